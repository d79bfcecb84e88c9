"""The forms of one GGUF model that peers read: the file, a Hugging Face folder of it, and what they make themselves.

Made once, and kept in the cache folder: each appears in its place whole or not at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peers.huggingface import write_huggingface

__all__ = ["Forms"]


class Forms:
    """Where each form is, once it was asked for.

    Args:
        gguf: the model.
        folder: for what is made of it; of this model alone.
    """

    def __init__(self, gguf: Path, folder: Path) -> None:
        self.gguf = gguf
        self.folder = folder

    def path(self, form: str, prepare: Callable[[Path, Path], None]) -> Path:
        """Where a form is; it is made now where it is not there.

        Args:
            form: "gguf", "huggingface", or any other name; "NAME of FORM" is made of another form than the GGUF file.
            prepare: makes a form of any other name, given the source and where to put it.

        Raises UnavailableError, OSError, WeightsError, and what `prepare` raises.
        """
        if form == "gguf":
            return self.gguf
        name, _, source = form.partition(" of ")
        target = self.folder / name
        if not target.exists():
            make = write_huggingface if name == "huggingface" else prepare
            origin = self.path(source or "gguf", prepare)
            with self._replacing(target) as temporary:
                make(origin, temporary)
        return target

    @contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".making-") as scratch:
            temporary = Path(scratch) / target.name
            yield temporary
            os.replace(temporary, target)
