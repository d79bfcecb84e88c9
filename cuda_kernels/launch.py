"""Running compiled kernels: what a runtime is, and how arguments are checked before they reach one.

Two runtimes share everything above them: `gpu.GpuRuntime` holds CuPy arrays and launches machine code, and
`emulated.EmulatedRuntime` holds numpy arrays and interprets the same PTX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.kernel import Kernel

__all__ = ["Array", "Graph", "Runtime", "as_scalar", "check_arguments", "require"]

Array = Any  # a CuPy array, or a numpy array in an emulated device's memory

_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "i32": np.dtype(np.int32),
    "u32": np.dtype(np.uint32),
    "u16": np.dtype(np.uint16),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "i64": np.dtype(np.int64),
    "u64": np.dtype(np.uint64),
}
_POINTEES = {f"{kind}*": dtype for kind, dtype in _DTYPES.items()}
_LIMITS = {
    "i32": (-(1 << 31), (1 << 31) - 1),
    "u32": (0, (1 << 32) - 1),
    "i64": (-(1 << 63), (1 << 63) - 1),
    "u64": (0, (1 << 64) - 1),
}

MAX_GRID = (2**31 - 1, 65535, 65535)


class Graph(Protocol):
    """Launches recorded once, to be launched again together, with the same arguments."""

    def launch(self) -> None: ...


class Runtime(Protocol):
    """A device's memory and its queue of launches. Launches run in order; host code does not wait for them.

    Attributes:
        xp: the module of its arrays: cupy or numpy.
        num_multiprocessors: of the device.
        max_shared_nbytes: the most shared memory that a block may ask for.
    """

    name: str
    xp: Any
    num_multiprocessors: int
    max_shared_nbytes: int

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """A C-contiguous array, 256-byte aligned, contents undefined."""
        ...

    def from_host(self, array: NDArray[Any]) -> Array:
        """A copy on the device."""
        ...

    def upload(self, target: Array, source: NDArray[Any]) -> None:
        """Queues a copy of host memory into a contiguous device array of the same size; source may change after."""
        ...

    def download(self, array: Array) -> NDArray[Any]:
        """Waits for all launches, and copies an array to the host."""
        ...

    def fill(self, array: Array, nbyte: int) -> None:
        """Queues the filling of a contiguous array with one byte's value."""
        ...

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any], *, shared_nbytes: int = 0
    ) -> None:
        """Queues a kernel over a grid of blocks, with dynamic shared memory. Raises CudaKernelError."""
        ...

    def capture(self, launches: Callable[[], None]) -> Graph:
        """Records what `launches` launches, without running it."""
        ...

    def synchronize(self) -> None:
        """Waits for all launches."""
        ...

    def free_nbytes(self) -> int:
        """Bytes of memory that may still be taken."""
        ...


def require(condition: bool, message: str) -> None:
    """Raises KernelArgumentError with the message unless the condition holds."""
    if not condition:
        raise KernelArgumentError(message)


def check_arguments(kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    """Holds arguments against a kernel's signature. Raises KernelArgumentError.

    An array is passed as the address of its first element; its strides are the launcher's business. Scalars are
    checked for range, pointers for dtype.
    """
    if len(arguments) != len(kernel.signature):
        raise KernelArgumentError(f"{kernel.name} takes {len(kernel.signature)} arguments, not {len(arguments)}")
    for size, most in zip(grid, MAX_GRID, strict=True):
        if not 1 <= size <= most:
            raise KernelArgumentError(f"{kernel.name}: no grid of {grid} blocks")
    for index, (kind, value) in enumerate(zip(kernel.signature, arguments, strict=True)):
        pointee = _POINTEES.get(kind)
        if pointee is not None:
            if getattr(value, "dtype", None) != pointee:
                found = getattr(value, "dtype", type(value).__name__)
                raise KernelArgumentError(f"{kernel.name}: argument {index} must be {kind}, not {found}")
        elif kind == "f32":
            if not isinstance(value, (float, np.floating)):
                raise KernelArgumentError(f"{kernel.name}: argument {index} must be a float, not {value!r}")
        else:
            low, high = _LIMITS[kind]
            if not isinstance(value, (int, np.integer)) or not low <= value <= high:
                raise KernelArgumentError(f"{kernel.name}: argument {index} must be {kind}, not {value!r}")


def as_scalar(kind: str, value: Any) -> Any:
    """A number as the numpy scalar of a signature's type."""
    return _DTYPES[kind].type(value)
