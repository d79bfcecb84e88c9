"""What the parts of the CPU backend stand on; `cpu.py` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from tinyllm.backends.cpu_kernels.jit import Kernel

__all__ = ["CpuOps"]


class CpuOps:
    """How ops reach kernels, scratch memory and addresses."""

    num_threads: int

    @property
    def _address_of(self) -> Callable[[NDArray[Any]], int]:
        """A function that gives the address of an array's first element."""
        raise NotImplementedError

    def _run(self, kernel: Kernel, tasks: int, work: int, *arguments: int | float) -> None:
        """Runs a kernel over its tasks; `work` is about the number of elements that it touches."""
        raise NotImplementedError

    def _reserve(self, nbytes: int) -> int:
        """The address of scratch memory of at least nbytes."""
        raise NotImplementedError
