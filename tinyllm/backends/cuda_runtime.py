"""Opens a GPU, real or emulated, with the kernels' cache in tinyllm's cache folder."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cuda_kernels.compile import Compiler
from cuda_kernels.errors import CudaKernelError
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Runtime
from tinyllm.cache import cache_root
from tinyllm.errors import DeviceError

__all__ = ["open_runtime"]


class _NamingCompiler(Compiler):
    """What keeps a kernel from being compiled is a DeviceError, whenever it comes up: one line for the user."""

    def ptx(self, kernel: Kernel) -> str:
        try:
            return super().ptx(kernel)
        except CudaKernelError as error:
            raise DeviceError(f"a GPU kernel cannot be compiled: {error}") from error

    def cubin(self, kernel: Kernel, architecture: str) -> bytes:
        try:
            return super().cubin(kernel, architecture)
        except CudaKernelError as error:
            raise DeviceError(f"a GPU kernel cannot be assembled: {error}") from error


def open_runtime(device: str, on_event: Callable[[str], None] | None = None) -> Runtime:
    """The runtime of "cuda" or "cuda-emulated".

    Args:
        on_event: told once, before the first kernel is compiled; by default that goes to stderr.

    Raises:
        CudaKernelError: there is no GPU, no driver, or CuPy is not installed.
    """
    compiler = _NamingCompiler(cache_root() / "cuda", on_compile=_told_once(on_event or _print))
    if device == "cuda":
        from cuda_kernels.gpu import GpuRuntime

        return GpuRuntime(compiler)
    from cuda_kernels.emulated import EmulatedRuntime

    return EmulatedRuntime(compiler)


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _told_once(report: Callable[[str], None]) -> Callable[[str], None]:
    told = False

    def on_compile(_: str) -> None:
        nonlocal told
        if not told:
            told = True
            report("compiling the GPU kernels, once; they are kept in the cache folder")

    return on_compile
