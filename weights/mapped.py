"""Memory-mapped files, and the checkpoint made of them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weights.errors import WeightsError
from weights.tensor import Tensor

__all__ = ["MappedCheckpoint", "MappedFile", "read_prefix"]


def read_prefix(path: Path, nbytes: int) -> bytes:
    """The first bytes of a regular file, at most `nbytes`. Raises WeightsError."""
    try:
        if not path.is_file():  # a FIFO or a device would block or never end
            raise WeightsError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as f:
            return f.read(nbytes)
    except OSError as e:
        raise WeightsError(f"{path}: cannot be read: {e.strerror or e}") from e


class MappedFile:
    """A file mapped read-only. It must not shrink while it is in use: reading past its end kills the process.

    Attributes:
        buffer: the mapping itself, for parsing; slices of it are bytes.
        data: (size,) uint8, read-only, the same bytes. Views of it keep the mapping alive after close().
    """

    def __init__(self, path: Path) -> None:
        """Raises WeightsError where the file cannot be read or is empty."""
        if not read_prefix(path, 1):
            raise WeightsError(f"{path}: the file is empty")
        try:
            with path.open("rb") as f:
                self.buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise WeightsError(f"{path}: cannot be mapped: {e}") from e
        self.path = path
        self.size = len(self.buffer)
        self.data: NDArray[np.uint8] = np.frombuffer(self.buffer, np.uint8)

    def release(self, view: NDArray[np.uint8]) -> bool:
        """Drops the whole pages under a contiguous array from memory, if it is a view of `data`.

        Reading brings them back. Returns whether the array lies in this file.
        """
        start = _address(view) - _address(self.data)
        if start < 0 or start + view.nbytes > self.data.nbytes or view.nbytes == 0:
            return False
        page = mmap.PAGESIZE
        first, end = -(-start // page) * page, (start + view.nbytes) // page * page
        if first < end and hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED, first, end - first)
        return True

    def close(self) -> None:
        """Unmaps the file, or leaves that to the last array that still looks into it."""
        self.data = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # the caller's arrays still need the mapping
            self.buffer.close()


def _address(array: NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class MappedCheckpoint:
    """A Checkpoint over one or more mapped files. Close it, or use it in a `with` statement.

    Arrays taken from it stay valid after close(); `tensors` is empty then.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        files: Sequence[MappedFile],
    ) -> None:
        self.path = path
        self.kind = kind
        self.metadata = metadata
        self.tensors = tensors
        self._files = tuple(files)

    def release(self, tensor: Tensor) -> None:
        """Tells the operating system that the tensor's mapped pages will not be read again soon.

        The tensor may be renamed, or a slice of rows; nothing happens for one that is a copy.
        """
        if tensor.data.flags.c_contiguous:
            any(file.release(tensor.data) for file in self._files)

    def close(self) -> None:
        self.tensors = {}
        for file in self._files:
            file.close()
        self._files = ()

    def __enter__(self) -> MappedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
