"""One launch: arguments packed, registers made, batches run, the report drawn up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cuda_kernels.emulator import floating, formats, integer
from cuda_kernels.emulator.async_copy import AsyncCopies
from cuda_kernels.emulator.checks import Checks
from cuda_kernels.emulator.errors import EmulatorError, LaunchError
from cuda_kernels.emulator.memory import DeviceMemory, room_for
from cuda_kernels.emulator.memory_unit import MemoryUnit, Traffic
from cuda_kernels.emulator.ptx import SIZES, Array, Variable
from cuda_kernels.emulator.races import Clock, RaceShadow
from cuda_kernels.emulator.report import ProblemLog, Report
from cuda_kernels.emulator.scheduler import Scheduler, StuckError
from cuda_kernels.emulator.space import POISON
from cuda_kernels.emulator.tensor_core import multiply_matrix
from cuda_kernels.emulator.threads import Dim3, SpecialRegisters, Threads
from cuda_kernels.emulator.warp import WarpUnit

if TYPE_CHECKING:
    from cuda_kernels.emulator.program import Program

MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024
_BATCH_LOCAL_NBYTES = 64 << 20  # local memory of a batch: kernels with much of it run fewer threads at a time
_FUNCTIONS = {
    name: function
    for module in (floating, formats, integer)
    for name, function in vars(module).items()
    if not name.startswith("_") and callable(function)
}


def run_launch(
    program: Program,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    args: Sequence[Any],
    shared_nbytes: int,
    memory: DeviceMemory | None,
    checks: Checks,
    abi: str,
) -> Report:
    """`Program.launch`."""
    grid_size, block_size = _extent("grid", grid, MAX_GRID), _extent("block", block, MAX_BLOCK)
    threads_of_block = math.prod(block_size)
    if threads_of_block > min(MAX_THREADS, program.max_threads or MAX_THREADS):
        raise LaunchError(f"a block of {threads_of_block} threads; {program.entry} takes {program.max_threads or 1024}")
    if abi not in ("pointers", "numba"):
        raise LaunchError(f"abi must be 'pointers' or 'numba', not {abi!r}")
    shared = -(-(program.static_shared_nbytes + shared_nbytes) // 16) * 16
    if shared_nbytes < 0 or shared > 227 << 10:
        raise LaunchError(f"{shared} bytes of shared memory for a block; at most {227 << 10} exist")
    arrays = {position: arg for position, arg in enumerate(args) if isinstance(arg, np.ndarray)}
    for position, array in arrays.items():
        if array.dtype.hasobject:
            raise LaunchError(f"argument {position} is an array of Python objects")
    outside = [position for position, array in arrays.items() if memory is None or not memory.contains(array)]
    never_written = [position in checks.uninitialised_arguments for position in outside]
    if memory is None:
        memory = DeviceMemory(room_for([arrays[position].nbytes for position in outside] + [program.global_nbytes]))
    with ExitStack() as stack:
        copies = stack.enter_context(memory.copies([arrays[position] for position in outside], never_written))
        arrays |= dict(zip(outside, copies, strict=True))
        global_base = _place_globals(program, memory, stack)
        parameters = _pack(program, [arrays.get(position, arg) for position, arg in enumerate(args)], memory, abi)
        with np.errstate(all="ignore"):
            launch = _Launch(program, grid_size, block_size, shared, shared_nbytes, memory, checks)
            report = launch.run(parameters, global_base)
    if report.problems and checks.raise_on_problem:
        raise EmulatorError(f"{program.entry}: {report}", report)
    return report


class _Launch:
    def __init__(
        self,
        program: Program,
        grid: Dim3,
        block: Dim3,
        shared: int,
        dynamic_shared: int,
        memory: DeviceMemory,
        checks: Checks,
    ) -> None:
        self.program, self.checks = program, checks
        self.shared, self.dynamic_shared = shared, dynamic_shared
        translation = program.translation
        local = -(-program.local_nbytes // 16) * 16
        batch_threads = min(checks.batch_threads, _BATCH_LOCAL_NBYTES // max(1, local))
        self.threads = Threads(grid, block, batch_threads)
        granule = translation.emitter.global_granule
        global_shadow = memory.race_shadow(granule, grid[0] * grid[1] * grid[2]) if checks.global_races else None
        self.clock = Clock(self.threads, global_shadow.next_block if global_shadow else 1)
        self.log = ProblemLog(translation.instructions, self.threads.name)
        self.unit = unit = MemoryUnit(self.threads, self.log, memory, shared, local, checks.uninitialised)
        if checks.races and shared:
            unit.shared_races = RaceShadow(self.threads.blocks * shared, translation.emitter.shared_granule)
            unit.shared_races.begin(self.clock, self.log, "shared", lambda offset: f"byte {offset % shared}")
        if global_shadow is not None:
            unit.global_races = global_shadow
            global_shadow.begin(self.clock, self.log, "global", lambda offset: unit.place("global", offset))
        self.copies = AsyncCopies(self.threads, self.log, self.unit, checks.races)

    def run(self, parameters: list[bytes], global_base: np.uint64) -> Report:
        namespace = self.namespace(parameters, global_base)
        exec(self.program.translation.code, namespace)
        checks = self.checks
        scheduler = Scheduler(
            self.threads,
            self.clock,
            self.log,
            self.program.translation,
            namespace,
            checks.max_basic_blocks,
            checks.strict_exit,
        )
        try:
            for first in range(0, self.threads.total_blocks, self.threads.blocks):
                self.threads.first_block = first
                namespace["special"] = SpecialRegisters(self.threads, self.dynamic_shared, self.shared)
                self.clock.begin_batch()
                self.unit.begin_batch()
                self.copies.begin_batch()
                scheduler.run(self.threads.alive())
                self.copies.end_batch()
        except StuckError:
            pass
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
            raise EmulatorError(
                f"{self.program.entry}: the PTX is inconsistent: {error}", self.report(scheduler)
            ) from error
        return self.report(scheduler)

    def namespace(self, parameters: list[bytes], global_base: np.uint64) -> dict[str, Any]:
        """What the generated code names: registers, constants, and the functions of the units."""
        warp = WarpUnit(self.threads, self.log, self.unit)
        count, log = self.threads.count, self.log
        emitter = self.program.translation.emitter
        names: dict[str, Any] = {"np": np, "global_base": global_base, **_FUNCTIONS, **emitter.constants}
        names |= {
            "load": self.unit.load,
            "store": self.unit.store,
            "atomic": self.unit.atomic,
            "async_copy": self.copies.copy,
            "async_commit": self.copies.commit,
            "async_wait": self.copies.wait,
            "shuffle": warp.shuffle,
            "vote": warp.vote,
            "elect": warp.elect,
            "reduce": warp.reduce,
            "block_reduce": warp.block_reduce,
            "match": warp.match,
            "load_matrix": warp.load_matrix,
            "multiply_matrix": partial(multiply_matrix, count),
            "clamp": np.clip,
            "spread": lambda value: np.ascontiguousarray(np.broadcast_to(value, count)),
            "parameter": lambda index, offset, dtype: np.frombuffer(parameters[index], dtype, 1, offset)[0],
            "trap": lambda index, mask: log.add(
                "trap", "the kernel gives up", index, self.threads.lanes if mask is None else np.flatnonzero(mask)
            ),
        }
        used = {register: emitter.registers[register] for register, _ in emitter.views}
        storage = np.full(count * sum(SIZES[own] for own in used.values()), POISON, np.uint8)
        vectors: dict[str, Array] = {}
        end = 0
        for register, own in sorted(used.items(), key=lambda item: -SIZES[item[1]]):  # wide ones first, for alignment
            start, end = end, end + count * SIZES[own]
            vectors[register] = storage[start:end].view(f"u{SIZES[own]}") if own != "?" else np.zeros(count, bool)
        for (register, dtype), name in emitter.views.items():
            vector = vectors[register]
            narrower = SIZES[used[register]] // SIZES[dtype]
            names[name] = vector if dtype == "?" else vector.view(dtype)[::narrower]
        return names

    def report(self, scheduler: Scheduler) -> Report:
        opcodes: Counter[str] = Counter()
        for block, lanes in zip(self.program.translation.blocks, scheduler.lanes_run, strict=True):
            for opcode, times in block.opcodes.items():
                opcodes[opcode] += times * lanes
        traffic: Traffic = self.unit.traffic
        return Report(
            self.log.problems(),
            sum(opcodes.values()),
            scheduler.basic_blocks,
            traffic.read_nbytes,
            traffic.written_nbytes,
            traffic.read_sectors,
            traffic.written_sectors,
            {opcode: times for opcode, times in opcodes.items() if times},
        )


def _extent(name: str, value: int | tuple[int, ...], limits: Dim3) -> Dim3:
    extent = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(extent) <= 3 or not all(isinstance(axis, (int, np.integer)) for axis in extent):
        raise LaunchError(f"the {name} must be one to three integers, not {value!r}")
    x, y, z = (*(int(axis) for axis in extent), 1, 1)[:3]
    if not all(1 <= axis <= limit for axis, limit in zip((x, y, z), limits, strict=True)):
        raise LaunchError(f"a {name} of {(x, y, z)}; each axis must be from 1 to {limits}")
    return x, y, z


def _place_globals(program: Program, memory: DeviceMemory, stack: ExitStack) -> np.uint64:
    """Allocate the module's .global and .const variables for the launch. Returns their address."""
    if not program.global_variables:
        return np.uint64(0)
    block = memory.empty(program.global_nbytes, np.uint8)
    stack.callback(memory.free, block)
    base = memory.address(block)
    for offset, variable in program.global_variables:
        contents = program.initial_bytes(variable, base)
        block[offset : offset + variable.nbytes] = np.frombuffer(contents, np.uint8)
    memory.mark_written(block)
    return np.uint64(base)


def _pack(program: Program, args: list[Any], memory: DeviceMemory, abi: str) -> list[bytes]:
    """The bytes of every parameter."""
    words: list[Any] = []
    for arg in args:
        if not isinstance(arg, np.ndarray):
            words.append(arg)
        elif abi == "pointers":
            words.append(memory.address(arg))
        else:  # numba's array structure: meminfo, parent, items, item size, data, shape, strides
            words += [0, 0, arg.size, arg.itemsize, memory.address(arg), *arg.shape, *arg.strides]
    if len(words) != len(program.parameters):
        raise LaunchError(
            f"{program.entry} takes {len(program.parameters)} parameters, and {len(args)} arguments gave {len(words)}"
        )
    return [_parameter(program, parameter, word) for parameter, word in zip(program.parameters, words, strict=True)]


def _parameter(program: Program, parameter: Variable, value: Any) -> bytes:
    """One parameter's bytes: floats and integers do not stand for one another."""
    if isinstance(value, bytes) and len(value) == parameter.nbytes:
        return value
    if isinstance(value, (bool, np.bool_)):
        value = int(value)
    real = isinstance(value, (float, np.floating))
    whole = isinstance(value, (int, np.integer))
    typed = parameter.type[0]  # b: either; f: a float; s, u: an integer
    size = parameter.nbytes
    if not (real or whole) or (typed == "f" and not real) or (typed in "su" and not whole) or size not in (1, 2, 4, 8):
        kind = type(value).__name__
        raise LaunchError(f"{program.entry}: a {kind} does not fit the parameter {parameter.name} (.{parameter.type})")
    if real:
        if size == 1:
            raise LaunchError(f"{program.entry}: a float does not fit the parameter {parameter.name}")
        return np.array(value, f"f{size}").tobytes()
    number = int(value)
    if not -(1 << 8 * size - 1) <= number < 1 << 8 * size:
        raise LaunchError(f"{program.entry}: {number} does not fit the parameter {parameter.name} (.{parameter.type})")
    return (number & (1 << 8 * size) - 1).to_bytes(size, "little")
