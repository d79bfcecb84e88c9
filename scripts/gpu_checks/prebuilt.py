"""Machine code made ahead, for a GPU machine without numba's compilers or ptxas: `gpu_check.py --build FOLDER`.

The kernels to make are found by going through all checks and timings on a runtime that launches nothing and takes
note of what it was asked to launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuda_kernels.compile import Compiler, kernel_digest
from cuda_kernels.errors import CudaKernelError
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Graph, check_arguments

__all__ = ["PrebuiltCompiler", "RecordingRuntime", "build"]


class RecordingRuntime:
    """Takes note of kernels; see launch.Runtime. Its device has the shape of an H100."""

    name = "recording"
    xp = np
    num_multiprocessors = 132
    max_shared_nbytes = 227 * 1024

    def __init__(self) -> None:
        self.kernels: dict[Kernel, None] = {}

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def from_host(self, array: NDArray[Any]) -> Array:
        return array

    def upload(self, target: Array, source: NDArray[Any]) -> None: ...

    def download(self, array: Array) -> NDArray[Any]:
        return np.array(array)

    def fill(self, array: Array, nbyte: int) -> None: ...

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any], *, shared_nbytes: int = 0
    ) -> None:
        check_arguments(kernel, grid, arguments)
        self.kernels[kernel] = None

    def capture(self, launches: Callable[[], None]) -> Graph:
        launches()
        return _Nothing()

    def synchronize(self) -> None: ...

    def free_nbytes(self) -> int:
        return 64 << 30


class _Nothing:
    def launch(self) -> None: ...


def build(
    kernels: Sequence[Kernel], folder: Path, architecture: str, cache: Path, jobs: int, say: Callable[[str], None]
) -> int:
    """Compiles what a folder lacks, in so many processes; returns how many kernels failed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    kernels = [kernel for kernel in kernels if not _path(folder, kernel, architecture).exists()]
    failed = 0
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(_compile, kernels, repeat(architecture), repeat(cache))
        for index, (kernel, code) in enumerate(zip(kernels, results, strict=True)):
            say(f"{index + 1}/{len(kernels)} {kernel.name}" + (f": {code}" if isinstance(code, str) else ""))
            if isinstance(code, str):
                failed += 1
            else:
                _path(folder, kernel, architecture).write_bytes(code)
    return failed


def _compile(kernel: Kernel, architecture: str, cache: Path) -> bytes | str:
    """Machine code, or what went wrong."""
    warnings.simplefilter("ignore")
    try:
        return Compiler(cache).cubin(kernel, architecture)
    except CudaKernelError as error:
        return str(error)


def _path(folder: Path, kernel: Kernel, architecture: str) -> Path:
    return folder / f"{kernel_digest(kernel, compilers=False)}.{architecture}.cubin"


class PrebuiltCompiler(Compiler):
    """Takes machine code from a folder that `build` filled, and compiles only what is not there.

    Args:
        prebuilt: that folder.
        folder: where what it compiles is kept.
    """

    def __init__(self, prebuilt: Path, folder: Path | None) -> None:
        super().__init__(folder)
        self._prebuilt = prebuilt

    def cubin(self, kernel: Kernel, architecture: str) -> bytes:
        try:
            return _path(self._prebuilt, kernel, architecture).read_bytes()
        except OSError:
            return super().cubin(kernel, architecture)
