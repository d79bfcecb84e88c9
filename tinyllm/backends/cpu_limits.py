"""How fast this machine's memory can be read by the CPU backend's threads: the limit of decoding, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.jit import Kernel, kernel
from tinyllm.backends.cpu_kernels.memory import aligned_zeros
from tinyllm.backends.cpu_kernels.simd import (
    VF,
    Builder,
    Value,
    const_vec,
    emit_load,
    emit_loop,
    instruction,
    lane_sum,
    store_f32,
    vec,
)

__all__ = ["ReadMeter", "buffer_nbytes", "run_seconds"]

MAX_BUFFER_NBYTES = 1 << 30
_SLICE_NBYTES = 1 << 20  # of one task: long enough for the prefetcher to run straight on
_LOADS = 8  # sums side by side, so that no addition waits for the one before
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@instruction(vec, types.int64, types.int64)
def _sum_lanes(b: Builder, begin: Value, end: Value) -> Value:
    """Adds up the vectors at [begin, end), a multiple of 512 bytes."""

    def add(address: Value, sums: list[Value]) -> list[Value]:
        return [b.fadd(s, emit_load(b, address, VF, 64 * i, align=64)) for i, s in enumerate(sums)]

    total, *others = emit_loop(b, begin, end, 64 * _LOADS, [const_vec(VF, 0.0)] * _LOADS, add)
    for one in others:
        total = b.fadd(total, one)
    return total


@kernel
def read_memory(worker: int, begin: int, end: int, buffer: int, slice_nbytes: int, out: int) -> None:
    """A task reads one slice of the buffer; its sum goes to out[task], so that no read can be left out."""
    for task in range(begin, end):
        first = buffer + task * slice_nbytes
        store_f32(out + 4 * task, lane_sum(_sum_lanes(first, first + slice_nbytes)))


class ReadMeter:
    """Reads a buffer from end to end with all threads of a backend.

    nbytes: of the buffer, rounded up to whole slices; by default far more than the caches hold.
    """

    def __init__(self, backend: CpuBackend, nbytes: int | None = None) -> None:
        slices = -(-(nbytes or buffer_nbytes()) // _SLICE_NBYTES)
        self._backend = backend
        self._buffer: NDArray[np.uint8] = aligned_zeros(slices * _SLICE_NBYTES)
        self._buffer.view(np.float32).fill(1.0)  # pages never written are all the same page of zeros
        self._sums = np.zeros(slices, np.float32)
        self.measure(1)  # compiles, and starts the threads

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def measure(self, passes: int) -> float:
        """Bytes per second in the best of some passes: what others did to the memory meanwhile is not its limit."""
        arguments = (self._buffer.ctypes.data, _SLICE_NBYTES, self._sums.ctypes.data)
        seconds = min(run_seconds(self._backend, read_memory, len(self._sums), *arguments) for _ in range(passes))
        assert (self._sums == _SLICE_NBYTES // 4).all()
        return self.nbytes / seconds


def run_seconds(backend: CpuBackend, task_kernel: Kernel, tasks: int, *arguments: int | float) -> float:
    """The time of one run of a kernel over its tasks, on all threads."""
    run: Callable[..., None] = backend._run
    begin = time.perf_counter()
    run(task_kernel, tasks, 1 << 30, *arguments)
    return time.perf_counter() - begin


def buffer_nbytes() -> int:
    """Four times the last cache, but no more than 1 GiB; that where the system does not say how large the cache is."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        with suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return min(4 * max(sizes) or MAX_BUFFER_NBYTES, MAX_BUFFER_NBYTES)
