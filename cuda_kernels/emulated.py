"""The emulated GPU: kernels' PTX interpreted over numpy arrays, under all checks of `emulator`."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuda_kernels.compile import Compiler
from cuda_kernels.emulator import Checks, DeviceMemory, Program, Report
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Graph, check_arguments

__all__ = ["EmulatedRuntime", "KernelTotals"]

DEFAULT_MEMORY = 8 << 30  # reserved addresses; memory is taken where it is touched


@dataclass
class KernelTotals:
    """What the launches of one kernel came to."""

    launches: int = 0
    thread_instructions: int = 0
    global_read_nbytes: int = 0
    global_written_nbytes: int = 0

    def add(self, report: Report) -> None:
        self.launches += 1
        self.thread_instructions += report.thread_instructions
        self.global_read_nbytes += report.global_read_nbytes
        self.global_written_nbytes += report.global_written_nbytes


@dataclass
class _RecordedLaunches:
    """A graph on the emulated device: the launches themselves, run again one by one."""

    runtime: EmulatedRuntime
    calls: list[tuple[Kernel, tuple[int, int, int], tuple[Any, ...], int]] = field(default_factory=list)

    def launch(self) -> None:
        for kernel, grid, arguments, shared_nbytes in self.calls:
            self.runtime.launch(kernel, grid, arguments, shared_nbytes=shared_nbytes)


class EmulatedRuntime:
    """A device without a GPU; see launch.Runtime. A problem that the checks find raises EmulatorError.

    Args:
        memory_nbytes: size of the device's memory.
        checks: what to check; all of it by default, races in global memory too.

    Attributes:
        totals: by kernel name, what ran so far.
    """

    name = "emulated"
    xp: Any = np
    num_multiprocessors = 4
    max_shared_nbytes = 99 * 1024  # the least of the architectures that the kernels are made for

    def __init__(
        self, compiler: Compiler, *, memory_nbytes: int = DEFAULT_MEMORY, checks: Checks | None = None
    ) -> None:
        self.compiler = compiler
        self.memory = DeviceMemory(memory_nbytes)
        self.checks = Checks(global_races=True) if checks is None else checks
        self.totals: dict[str, KernelTotals] = {}
        self._programs: dict[Kernel, Program] = {}
        self._recording: _RecordedLaunches | None = None

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Freed, and its memory unmapped, when the array and all views of it are gone."""
        array = self.memory.empty(shape, dtype)
        if array.nbytes == 0:
            return array
        address = array.__array_interface__["data"][0]
        root = np.frombuffer(memoryview((ctypes.c_uint8 * array.nbytes).from_address(address)), np.uint8)
        weakref.finalize(
            root, self.memory.free, array
        ).atexit = False  # views refer to the root, which the arena does not
        return root.view(array.dtype).reshape(array.shape)

    def from_host(self, array: NDArray[Any]) -> Array:
        result = self.empty(array.shape, array.dtype)
        self.upload(result, array)
        return result

    def upload(self, target: Array, source: NDArray[Any]) -> None:
        assert self._recording is None, "a copy from the host inside a recorded step"
        target[...] = source
        self.memory.mark_written(target)

    def download(self, array: Array) -> NDArray[Any]:
        assert self._recording is None, "a copy to the host inside a recorded step"
        return np.array(array)

    def fill(self, array: Array, nbyte: int) -> None:
        array.reshape(-1).view(np.uint8)[...] = nbyte
        self.memory.mark_written(array)

    def program(self, kernel: Kernel) -> Program:
        """A kernel's PTX, translated."""
        program = self._programs.get(kernel)
        if program is None:
            program = self._programs[kernel] = Program(self.compiler.ptx(kernel))
        return program

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any], *, shared_nbytes: int = 0
    ) -> None:
        check_arguments(kernel, grid, arguments)
        if self._recording is not None:
            self._recording.calls.append((kernel, grid, tuple(arguments), shared_nbytes))
            return
        report = self.program(kernel).launch(
            grid, kernel.threads, arguments, shared_nbytes=shared_nbytes, memory=self.memory, checks=self.checks
        )
        self.totals.setdefault(kernel.name, KernelTotals()).add(report)

    def capture(self, launches: Callable[[], None]) -> Graph:
        graph = _RecordedLaunches(self)
        self._recording = graph
        try:
            launches()
        finally:
            self._recording = None
        return graph

    def synchronize(self) -> None: ...

    def free_nbytes(self) -> int:
        return self.memory.nbytes - self.memory.allocated_nbytes
