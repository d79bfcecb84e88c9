"""What every model file looks like to the rest of the program.

STUB: the contract; open_checkpoint is to be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from weights.tensor import Tensor

__all__ = ["Checkpoint", "open_checkpoint"]


class Checkpoint(Protocol):
    """An opened model: memory-mapped tensors by their names in the file, and what the file says of itself."""

    path: Path
    kind: str  # "gguf" or "huggingface"
    metadata: Mapping[str, Any]  # GGUF key-values, or the parsed config.json
    tensors: Mapping[str, Tensor]

    def release(self, tensor: Tensor) -> None:
        """Tells the operating system that the tensor's mapped pages will not be read again."""

    def close(self) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a `.gguf` file or a Hugging Face folder. Raises WeightsError."""
    raise NotImplementedError
