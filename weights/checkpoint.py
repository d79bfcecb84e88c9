"""What every model file looks like to the rest of the program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from weights.errors import WeightsError, quoted
from weights.gguf import MAGIC, open_gguf
from weights.huggingface import open_huggingface
from weights.mapped import read_prefix
from weights.tensor import Tensor

__all__ = ["Checkpoint", "open_checkpoint"]

# bare pickles, and the zip files that hold torch's
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class Checkpoint(Protocol):
    """An opened model: memory-mapped tensors by their names in the file, and what the file says of itself."""

    path: Path
    kind: str  # "gguf" or "huggingface"
    metadata: Mapping[str, Any]  # GGUF key-values, or the parsed config.json
    tensors: Mapping[str, Tensor]

    def release(self, tensor: Tensor) -> None:
        """Tells the operating system that the tensor's mapped pages will not be read again."""

    def close(self) -> None:
        """Unmaps the files; arrays taken from the tensors stay valid. May be called again."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a `.gguf` file, known by its first bytes, or a Hugging Face folder. Raises WeightsError."""
    try:
        return open_huggingface(path) if path.is_dir() else _open_file(path)
    except OSError as e:  # a folder that may not be searched
        raise WeightsError(f"{path}: cannot be read: {e}") from e


def _open_file(path: Path) -> Checkpoint:
    magic = read_prefix(path, 4)
    if magic == MAGIC:
        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise WeightsError(f"{path}: name the folder that holds it and its config.json instead")
    if magic.startswith(_PICKLES):
        raise WeightsError(f"{path}: looks like a pickle, which is never read; use GGUF or safetensors")
    if not magic:
        raise WeightsError(f"{path}: the file is empty")
    raise WeightsError(f"{path}: not a GGUF file (it begins with {quoted(magic)}, not {quoted(MAGIC)})")
