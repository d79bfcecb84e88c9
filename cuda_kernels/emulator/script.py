"""Stands in for numba.cuda while a script runs, so that its kernels are compiled to PTX and emulated.

What a script touches on the host side is replaced: `cuda.jit` and launches, device arrays and copies, streams, events,
the current device. What stands inside kernels is numba-cuda's own.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
from numba import cuda, types
from numba.cuda import args as transfer
from numba.extending import typeof_impl
from numba.np.numpy_support import as_dtype
from numpy.typing import DTypeLike

from cuda_kernels.compile import compile_to_ptx
from cuda_kernels.emulator.checks import Checks
from cuda_kernels.emulator.errors import LaunchError
from cuda_kernels.emulator.memory import DeviceMemory
from cuda_kernels.emulator.program import Program
from cuda_kernels.emulator.ptx import Array
from cuda_kernels.emulator.report import Problem, Report

Listener = Callable[[str, Sequence[Problem]], None]


@dataclass
class KernelTotals:
    """What the launches of one kernel came to. problems: over all launches, by place and kind."""

    launches: int = 0
    thread_instructions: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    problems: set[tuple[str, str | None, int | None, str]] = field(default_factory=set)

    def add(self, report: Report) -> list[Problem]:
        """Add a launch. Returns the problems that are new."""
        self.launches += 1
        self.thread_instructions += report.thread_instructions
        self.read_nbytes += report.global_read_nbytes
        self.written_nbytes += report.global_written_nbytes
        new = []
        for problem in report.problems:
            key = (problem.kind, problem.file, problem.line, problem.instruction)
            if key not in self.problems:
                self.problems.add(key)
                new.append(problem)
        return new


class EmulatedArray(np.ndarray):
    """A device array: numpy's, in the emulated memory, with numba's methods. Views of it keep the memory alive."""

    _memory: DeviceMemory | None = None
    _owner: object = None

    def __array_finalize__(self, source: Any) -> None:
        self._memory = getattr(source, "_memory", None)
        self._owner = getattr(source, "_owner", None)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        if self._memory is not None and self._memory.contains(self):
            target = self[index]
            if isinstance(target, np.ndarray) and self._memory.contains(target):
                self._memory.mark_written(target)
            else:
                self._memory.mark_written(self)

    def copy_to_host(self, ary: Array | None = None, stream: Any = 0) -> Array:
        """The contents as a host array."""
        if ary is None:
            return np.array(self, order="K", subok=False)
        ary[...] = self
        return ary

    def copy_to_device(self, ary: Any, stream: Any = 0) -> None:
        """Overwrite with a host or device array."""
        self[...] = ary


class _Owner:
    """Frees an allocation when the last array that uses it is gone."""

    def __init__(self, memory: DeviceMemory, allocation: Array) -> None:
        weakref.finalize(self, memory.free, allocation)


class EmulatedKernel:
    """What `cuda.jit` gives: a kernel to be launched, or called from another kernel as a device function."""

    def __init__(self, session: Session, function: Callable[..., Any], signatures: list[Any], options: Any) -> None:
        self.session, self.py_func, self.signatures = session, function, signatures
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.dispatcher = session.real_jit(function)  # for calls from other kernels
        self.launch_bounds = options.get("launch_bounds")
        self._programs: dict[tuple[Any, ...], Program] = {}

    def __getitem__(self, configuration: Any) -> Callable[..., None]:
        values = configuration if isinstance(configuration, tuple) else (configuration,)
        if not 2 <= len(values) <= 4:
            raise LaunchError(f"{self.__name__}[grid, block, stream, shared]: {len(values)} values given")
        grid, block, _, shared_nbytes = (*values, 0, 0)[:4]
        return lambda *args: self.session.launch(self, grid, block, shared_nbytes or 0, args)

    def __call__(self, *args: Any) -> None:
        raise LaunchError(f"{self.__name__} was called without a grid and a block: {self.__name__}[grid, block](...)")

    def forall(self, ntasks: int, tpb: int = 0, stream: Any = 0, sharedmem: int = 0) -> Callable[..., None]:
        """A launch of one thread for each task."""
        block = tpb or 128
        return self[max(1, -(-ntasks // block)), block, stream, sharedmem]

    def types_for(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The numba types to compile for: a signature that fits, or those of the arguments."""
        found = tuple(numba.typeof(_plain(arg)) for arg in args)
        if not self.signatures:
            return found
        for signature in self.signatures:
            if len(signature) == len(found) and all(map(_accepts, signature, found)):
                return tuple(signature)
        given = ", ".join(map(str, found))
        raise LaunchError(f"{self.__name__}: no signature fits the arguments ({given})")

    def program(self, argument_types: tuple[Any, ...]) -> Program:
        """The compiled kernel for argument types."""
        if argument_types not in self._programs:
            ptx = compile_to_ptx(
                self.py_func,
                argument_types,
                target=self.session.target,
                launch_bounds=_bounds(self.launch_bounds),
                fuse=True,
                line_info=True,
            )
            self._programs[argument_types] = Program(ptx)
        return self._programs[argument_types]


@typeof_impl.register(EmulatedKernel)
def _type_of_kernel(kernel: EmulatedKernel, context: Any) -> Any:
    return typeof_impl(kernel.dispatcher, context)


class Session:
    """One run of a script.

    Args:
        checks: for every launch; problems never raise.
        target: compute capability to compile for.
        on_problems: called with a kernel's name and the problems of a launch that were not seen before.
        memory_nbytes: of the emulated device.
    """

    def __init__(
        self, checks: Checks, target: tuple[int, int], on_problems: Listener, memory_nbytes: int = 8 << 30
    ) -> None:
        self.checks, self.target, self.on_problems = checks, target, on_problems
        self.memory = DeviceMemory(memory_nbytes)
        self.totals: dict[str, KernelTotals] = {}
        self.real_jit = cuda.jit

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace numba.cuda's host side for the time of a `with`."""
        stands_in = self._replacements()
        before = {name: getattr(cuda, name) for name in stands_in if hasattr(cuda, name)}
        for name, value in stands_in.items():
            setattr(cuda, name, value)
        try:
            yield
        finally:
            for name in stands_in:
                if name in before:
                    setattr(cuda, name, before[name])
                else:
                    delattr(cuda, name)

    def _replacements(self) -> dict[str, Any]:
        device = SimpleNamespace(
            id=0,
            name=b"emulated",
            compute_capability=self.target,
            MULTIPROCESSOR_COUNT=4,
            WARP_SIZE=32,
            MAX_THREADS_PER_BLOCK=1024,
            MAX_SHARED_MEMORY_PER_BLOCK=48 << 10,
            synchronize=_nothing,
            reset=_nothing,
        )
        context = SimpleNamespace(
            device=device,
            synchronize=_nothing,
            get_memory_info=lambda: (self.memory.nbytes - self.memory.allocated_nbytes, self.memory.nbytes),
        )
        return {
            "jit": self.jit,
            "to_device": self.to_device,
            "device_array": self.device_array,
            "device_array_like": self.device_array_like,
            "managed_array": self.device_array,
            "mapped_array": self.device_array,
            "pinned_array": _pinned_array,
            "as_cuda_array": lambda array, **_: array,
            "is_cuda_array": lambda array: isinstance(array, EmulatedArray),
            "synchronize": _nothing,
            "stream": _Stream,
            "default_stream": _Stream,
            "event": lambda timing=True: _Event(),
            "event_elapsed_time": lambda start, end: start.elapsed_time(end),
            "pinned": lambda *arrays: contextlib.nullcontext(),
            "defer_cleanup": contextlib.nullcontext,
            "is_available": lambda: True,
            "detect": lambda: True,
            "get_current_device": lambda: device,
            "current_context": lambda device_id=None: context,
            "select_device": lambda device_id: device,
            "close": _nothing,
            "profile_start": _nothing,
            "profile_stop": _nothing,
        }

    def jit(self, func_or_sig: Any = None, device: bool = False, **options: Any) -> Any:
        """`numba.cuda.jit`, with or without signatures."""
        if device:
            return self.real_jit(func_or_sig, device=True, **options)
        if callable(func_or_sig) and not isinstance(func_or_sig, (types.Type, numba.core.typing.Signature)):
            return EmulatedKernel(self, func_or_sig, [], options)
        signatures = func_or_sig if isinstance(func_or_sig, list) else [] if func_or_sig is None else [func_or_sig]
        normalised = [numba.core.sigutils.normalize_signature(signature)[0] for signature in signatures]
        return lambda function: EmulatedKernel(self, function, normalised, options)

    def device_array(
        self, shape: Any, dtype: DTypeLike = np.float64, strides: Any = None, order: str = "C", stream: Any = 0
    ) -> EmulatedArray:
        """`numba.cuda.device_array`: never written."""
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        allocation = self.memory.empty(shape[::-1] if order == "F" else shape, dtype)
        array = (allocation.T if order == "F" else allocation).view(EmulatedArray)
        array._memory, array._owner = self.memory, _Owner(self.memory, allocation)
        return array

    def device_array_like(self, ary: Any, stream: Any = 0) -> EmulatedArray:
        """`numba.cuda.device_array_like`."""
        order = "F" if ary.flags.f_contiguous and not ary.flags.c_contiguous else "C"
        return self.device_array(ary.shape, ary.dtype, order=order)

    def to_device(self, obj: Any, stream: Any = 0, copy: bool = True, to: Any = None) -> EmulatedArray:
        """`numba.cuda.to_device`."""
        source = np.asarray(obj)
        target: EmulatedArray = self.device_array_like(source) if to is None else to
        if copy:
            target[...] = source
        return target

    def launch(self, kernel: EmulatedKernel, grid: Any, block: Any, shared_nbytes: int, args: Sequence[Any]) -> None:
        """Compile a kernel for its arguments, and run it under the checks."""
        argument_types = kernel.types_for(args)
        never_written: list[int] = []
        words: list[Any] = []
        for arg, argument_type in zip(args, argument_types, strict=True):
            if isinstance(arg, transfer.Out):
                never_written.append(len(words))
            _flatten(arg, argument_type, words)
        checks = Checks(**(vars(self.checks) | {"uninitialised_arguments": tuple(never_written)}))
        report = kernel.program(argument_types).launch(
            grid, block, words, shared_nbytes=shared_nbytes, memory=self.memory, checks=checks, abi="numba"
        )
        new = self.totals.setdefault(kernel.__name__, KernelTotals()).add(report)
        if new:
            self.on_problems(kernel.__name__, new)


def _plain(arg: Any) -> Any:
    """An argument as something that numba.typeof knows."""
    if isinstance(arg, (transfer.In, transfer.Out, transfer.InOut)):
        arg = arg.value
    return np.asarray(arg) if isinstance(arg, EmulatedArray) else arg


def _accepts(wanted: Any, given: Any) -> bool:
    """Whether a signature's type takes an argument's."""
    if isinstance(wanted, types.Array) or isinstance(given, types.Array):
        same = isinstance(wanted, types.Array) and isinstance(given, types.Array)
        return bool(
            same and (wanted.dtype, wanted.ndim) == (given.dtype, given.ndim) and wanted.layout in (given.layout, "A")
        )
    return not isinstance(given, types.Float) or isinstance(wanted, (types.Float, types.Complex))


def _flatten(arg: Any, argument_type: Any, words: list[Any]) -> None:
    """Append an argument in the form that `Program.launch` takes: arrays, numpy scalars; tuples element by element."""
    if isinstance(arg, transfer.In):
        value = np.array(arg.value)
        value.flags.writeable = False
        words.append(value)
    elif isinstance(arg, (transfer.Out, transfer.InOut)):
        words.append(arg.value)
    elif isinstance(arg, np.ndarray):
        words.append(arg)
    elif isinstance(argument_type, types.BaseTuple):
        for element, element_type in zip(arg, argument_type.types, strict=True):
            _flatten(element, element_type, words)
    elif isinstance(argument_type, (types.Integer, types.Float, types.Boolean)):
        words.append(as_dtype(argument_type).type(arg))
    else:
        raise LaunchError(f"an argument of type {argument_type} is not supported")


def _bounds(bounds: Any) -> tuple[int, ...] | None:
    return None if bounds is None else tuple(bounds) if isinstance(bounds, (tuple, list)) else (bounds,)


def _pinned_array(shape: Any, dtype: DTypeLike = np.float64, strides: Any = None, order: Any = "C", **_: Any) -> Array:
    return np.empty(shape, dtype, order)


def _nothing(*_: Any, **__: Any) -> None:
    """For calls that have nothing to do where every launch has ended before the next begins."""


class _Stream:
    def synchronize(self) -> None: ...

    @contextlib.contextmanager
    def auto_synchronize(self) -> Iterator[_Stream]:
        yield self


class _Event:
    """Wall-clock times of the emulator, which tell nothing of a GPU."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = 0) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = 0) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.seconds - self.seconds)
