"""A real GPU: CuPy arrays, and machine code launched through cupy.RawModule on a stream of its own."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuda_kernels.compile import Compiler
from cuda_kernels.errors import KernelCompileError, NoDeviceError, ToolMissingError
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Graph, as_scalar, check_arguments

__all__ = ["GpuRuntime", "driver_device_count"]

DEFAULT_SHARED = 48 * 1024  # what a block gets without asking for more


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ToolMissingError(f"CuPy is not installed ({error}): pip install 'tinyllm[cuda]'") from error
    return cupy


def driver_device_count() -> int:
    """How many GPUs the driver shows, 0 without a driver. Asks the driver itself, which takes no CuPy."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0


class GpuRuntime:
    """One GPU; see launch.Runtime.

    Args:
        device: its number, as the driver counts.

    Raises:
        NoDeviceError: no driver, or no such GPU.
        ToolMissingError: CuPy is not installed.
    """

    name = "gpu"

    def __init__(self, compiler: Compiler, *, device: int = 0) -> None:
        cupy = self.xp = _cupy()
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as error:
            raise NoDeviceError(f"no NVIDIA GPU can be used: {' '.join(str(error).split())}") from error
        if device >= count:
            raise NoDeviceError(f"there is no GPU number {device}: {count} found")
        self.compiler = compiler
        self.device = cupy.cuda.Device(device)
        self.device.use()
        attributes = self.device.attributes
        self.num_multiprocessors = int(attributes["MultiProcessorCount"])
        self.max_shared_nbytes = int(attributes["MaxSharedMemoryPerBlockOptin"])
        self.architecture = f"sm_{self.device.compute_capability}"
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._functions: dict[Kernel, Any] = {}

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        with self.stream:
            return self.xp.empty(shape, dtype)

    def from_host(self, array: NDArray[Any]) -> Array:
        result = self.empty(array.shape, array.dtype)
        self.upload(result, array)
        return result

    def upload(self, target: Array, source: NDArray[Any]) -> None:
        source = np.ascontiguousarray(source, target.dtype)
        assert source.shape == target.shape and target.flags.c_contiguous
        if source.nbytes:
            # memory that is not pinned is staged by the driver before the call returns
            target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self.stream)

    def download(self, array: Array) -> NDArray[Any]:
        result: NDArray[Any] = self.xp.asnumpy(array, stream=self.stream)
        self.stream.synchronize()
        return result

    def fill(self, array: Array, nbyte: int) -> None:
        assert array.flags.c_contiguous
        array.data.memset_async(nbyte, array.nbytes, self.stream)

    def _function(self, kernel: Kernel) -> Any:
        function = self._functions.get(kernel)
        if function is None:
            code = self.compiler.cubin(kernel, self.architecture)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "kernel.cubin")
                path.write_bytes(code)
                try:
                    function = self.xp.RawModule(path=str(path)).get_function(kernel.name)
                    function.max_dynamic_shared_size_bytes  # noqa: B018 - loads it while the file is there
                except Exception as error:
                    raise KernelCompileError(f"{kernel.name}: the driver refused its code: {error}") from error
            self._functions[kernel] = function
        return function

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any], *, shared_nbytes: int = 0
    ) -> None:
        check_arguments(kernel, grid, arguments)
        function = self._function(kernel)
        if shared_nbytes > DEFAULT_SHARED and function.max_dynamic_shared_size_bytes < shared_nbytes:
            function.max_dynamic_shared_size_bytes = shared_nbytes
        values = tuple(
            value.data.ptr if kind[-1] == "*" else as_scalar(kind, value)  # CuPy passes an int as 64 bits
            for kind, value in zip(kernel.signature, arguments, strict=True)
        )
        function(grid, (kernel.threads, 1, 1), values, shared_mem=shared_nbytes, stream=self.stream)

    def capture(self, launches: Callable[[], None]) -> Graph:
        self.stream.begin_capture()
        try:
            launches()
        finally:
            graph = self.stream.end_capture()
        return _CapturedGraph(graph, self.stream)

    def synchronize(self) -> None:
        self.stream.synchronize()

    def free_nbytes(self) -> int:
        return int(self.device.mem_info[0]) + int(self.xp.get_default_memory_pool().free_bytes())


class _CapturedGraph:
    """A CUDA graph and the stream it is launched on."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph = graph
        self._stream = stream

    def launch(self) -> None:
        self._graph.launch(self._stream)
