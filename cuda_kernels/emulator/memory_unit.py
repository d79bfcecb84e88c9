"""Loads, stores and atomics of a launch: addresses resolved and checked, then one gather or scatter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuda_kernels.emulator.floating import fused
from cuda_kernels.emulator.formats import bf16_to_f32, odd_f64_to_bf16
from cuda_kernels.emulator.memory import DeviceMemory
from cuda_kernels.emulator.ptx import GLOBAL_WINDOW, LOCAL_WINDOW, SHARED_WINDOW, SIZES, Array
from cuda_kernels.emulator.races import RaceShadow
from cuda_kernels.emulator.report import ProblemLog
from cuda_kernels.emulator.space import ALL_WRITTEN, MAPPED, POISON, UNITS, UNMAPPED, Space
from cuda_kernels.emulator.threads import Threads


@dataclass
class Traffic:
    """Global memory traffic of a launch."""

    read_nbytes: int = 0
    written_nbytes: int = 0
    read_sectors: int = 0
    written_sectors: int = 0


class MemoryUnit:
    """The three state spaces of a batch, and their checks."""

    def __init__(
        self,
        threads: Threads,
        log: ProblemLog,
        memory: DeviceMemory,
        shared_nbytes: int,
        local_nbytes: int,
        uninitialised: bool,
    ) -> None:
        self.threads, self.log, self.memory, self.uninitialised = threads, log, memory, uninitialised
        self.shared_races: RaceShadow | None = None
        self.global_races: RaceShadow | None = None
        self.pending: Array | None = None  # per byte of shared memory: cp.async copies on their way to it
        self.traffic = Traffic()
        self.spaces = {
            "global": memory.space,
            "shared": _window(threads.block_in_batch, threads.blocks, shared_nbytes),
            "local": _window(threads.lanes, threads.count, local_nbytes),
        }

    def begin_batch(self) -> None:
        """Forget the shared and local memory of the blocks before."""
        for space in ("shared", "local"):
            self.spaces[space].bytes[:] = POISON
            self.spaces[space].state_bytes[:] = MAPPED
        if self.shared_races is not None:
            self.shared_races.begin_batch()

    def addresses(self, base: Any, offset: int, mask: Array | None) -> tuple[Array, Array]:
        """(lanes [n], addresses [n] uint64) of the lanes in the mask."""
        threads = self.threads
        if offset and getattr(base, "dtype", None) == np.uint32:  # 32-bit addresses wrap at 32 bits
            base, offset = base + np.uint32(offset & 0xFFFFFFFF), 0
        if mask is None:
            lanes = threads.lanes
            address = np.asarray(base, "u8")
            if address.ndim == 0:
                address = np.full(threads.count, address)
        else:
            lanes = np.flatnonzero(mask)
            address = np.full(len(lanes), base, "u8") if np.ndim(base) == 0 else base[lanes].astype("u8", copy=False)
        return lanes, address + np.uint64(offset & (2**64 - 1)) if offset else address

    def resolve(
        self, instruction: int, space: str, lanes: Array, address: Array, width: int, action: str
    ) -> Iterator[tuple[str, Array | None, Array, Array]]:
        """(space, positions in `lanes` or None for all, lanes, byte offsets in the space) for each space touched.

        Lanes whose access is out of bounds or misaligned are reported and left out.
        """
        if space == "generic":
            in_local = address >= LOCAL_WINDOW
            in_shared = (address >= SHARED_WINDOW) & ~in_local
            if in_local.any() or in_shared.any():
                windows = ((in_shared, "shared", SHARED_WINDOW), (in_local, "local", LOCAL_WINDOW))
                for chosen, name, window in (*windows, (~in_shared & ~in_local, "global", 0)):
                    positions = np.flatnonzero(chosen)
                    if len(positions):
                        moved = address[positions] - np.uint64(window)
                        for found, part, own, offset in self.resolve(
                            instruction, name, lanes[positions], moved, width, action
                        ):
                            yield found, positions if part is None else positions[part], own, offset
                return
            space = "global"
        if space == "const":
            space = "global"
        here = self.spaces[space]
        relative = address - np.uint64(GLOBAL_WINDOW) if space == "global" else address
        bad = relative > np.uint64(max(0, here.nbytes - width))
        if here.nbytes < width:
            bad = np.ones(len(lanes), bool)
        if width > 1:
            misaligned = (relative & np.uint64(width - 1)) != 0
            if misaligned.any():
                message = f"misaligned {action} of {width} bytes in {space} memory"
                first = int(np.flatnonzero(misaligned)[0])
                message += f" at {self.place(space, int(relative[first]))}"
                self.log.add("misaligned", message, instruction, lanes[misaligned])
                bad = bad | misaligned
        outside = bad & ~misaligned if width > 1 else bad
        if outside.any():
            self.out_of_bounds(instruction, space, lanes, relative, outside, width, action)
        if bad.any():
            positions = np.flatnonzero(~bad)
            if not len(positions):
                return
            own = lanes[positions]
            offset = relative[positions].view("i8")
            yield space, positions, own, offset if here.base is None else offset + here.base[own]
            return
        offset = relative.view("i8") if relative.flags.c_contiguous else relative.astype("i8")
        yield space, None, lanes, offset if here.base is None else offset + here.base[lanes]

    def out_of_bounds(
        self, instruction: int, space: str, lanes: Array, relative: Array, bad: Array, width: int, action: str
    ) -> None:
        first = int(np.flatnonzero(bad)[0])
        message = f"{action} of {width} bytes outside of {space} memory, at {self.place(space, int(relative[first]))}"
        self.log.add("out-of-bounds", message, instruction, lanes[bad])

    def place(self, space: str, offset: int) -> str:
        """An address within a window, in words."""
        if space == "global":
            return self.memory.where(offset + GLOBAL_WINDOW & (2**64 - 1))
        size = self.spaces[space].nbytes
        signed = offset - (1 << 64) if offset >= 1 << 63 else offset
        return f"byte {signed} of {size}"

    def check_state(
        self, instruction: int, space: str, lanes: Array, offset: Array, width: int, action: str
    ) -> Array | None:
        """Check the states of the bytes that lanes touch. Returns the positions that may be used, None for all."""
        here = self.spaces[space]
        if space != "global" and not self.uninitialised:
            return None
        index = offset >> (width.bit_length() - 1)
        written = here.states[width].take(index) == ALL_WRITTEN[width]
        if written.all():
            return None
        doubtful = np.flatnonzero(~written)
        states = here.state_bytes[offset[doubtful][:, None] + np.arange(width)]  # [doubtful, width]
        unmapped = (states == UNMAPPED).any(axis=1)
        if unmapped.any():
            outside = np.zeros(len(lanes), bool)
            outside[doubtful[unmapped]] = True
            self.out_of_bounds(instruction, space, lanes, offset, outside, width, action)
        if action == "write":
            here.states[width][index[doubtful[~unmapped]]] = ALL_WRITTEN[width]
        elif self.uninitialised and not unmapped.all():
            never = doubtful[~unmapped]
            at = int(offset[never[0]])
            at = at if here.base is None else at - int(here.base[lanes[never[0]]])
            message = (
                f"{action} of {width} bytes of {space} memory that were not all written, at {self.place(space, at)}"
            )
            self.log.add("uninitialised-read", message, instruction, lanes[never])
        if not unmapped.any():
            return None
        usable = np.ones(len(lanes), bool)
        usable[doubtful[unmapped]] = False
        return np.flatnonzero(usable)

    def checked(
        self, instruction: int, space: str, lanes: Array, address: Array, width: int, action: str, atomic: bool = False
    ) -> Iterator[tuple[str, Array | None, Array, Array]]:
        """`resolve`, with the states checked and the access noted for the race checks."""
        for name, part, own, offset in self.resolve(instruction, space, lanes, address, width, action):
            usable = self.check_state(instruction, name, own, offset, width, action)
            if usable is not None:
                part = usable if part is None else part[usable]
                own, offset = own[usable], offset[usable]
                if not len(own):
                    continue
            write = action == "write" or atomic
            if name == "global":
                self.count(own, offset, width, write)
                if self.global_races is not None:
                    self.global_races.access(instruction, offset, width, own, write, atomic)
            elif name == "shared" and self.shared_races is not None:
                if self.pending is not None:
                    self.check_pending(instruction, offset, width, own, action)
                self.shared_races.access(instruction, offset, width, own, write, atomic)
            yield name, part, own, offset

    def check_pending(self, instruction: int, offset: Array, width: int, lanes: Array, action: str) -> None:
        assert self.pending is not None
        pending = (self.pending[offset[:, None] + np.arange(width)] > 0).any(axis=1)
        if pending.any():
            message = f"{action} of shared memory that a cp.async is on its way to and that was not waited for"
            self.log.add("unwaited-cp-async", message, instruction, lanes[pending])

    def count(self, lanes: Array, offset: Array, width: int, write: bool) -> None:
        """Count bytes, and distinct 32-byte sectors within each warp."""
        key = (lanes >> 5 << 48) | (offset >> 5)
        steps = key[1:] != key[:-1]
        if not (key[1:] >= key[:-1]).all():
            key = np.sort(key)
            steps = key[1:] != key[:-1]
        sectors = int(np.count_nonzero(steps)) + 1
        if write:
            self.traffic.written_nbytes += len(lanes) * width
            self.traffic.written_sectors += sectors
        else:
            self.traffic.read_nbytes += len(lanes) * width
            self.traffic.read_sectors += sectors

    def load(
        self, instruction: int, space: str, base: Any, offset: int, dtype: str, count: int, mask: Array | None
    ) -> list[Array]:
        """ld: `count` vectors over all lanes."""
        lanes, address = self.addresses(base, offset, mask)
        width = SIZES[dtype] * count
        unit, shift = UNITS[width], width.bit_length() - 1
        result: list[Array] | None = None
        for name, _, own, at in self.checked(instruction, space, lanes, address, width, "read"):
            values = self.spaces[name].views[unit].take(at >> shift).view(dtype).reshape(-1, count)
            if len(own) == self.threads.count:
                return [values[:, index] for index in range(count)]
            if result is None:
                result = [np.zeros(self.threads.count, dtype) for _ in range(count)]
            for index, vector in enumerate(result):
                vector[own] = values[:, index]
        return result or [np.zeros(self.threads.count, dtype) for _ in range(count)]

    def store(
        self,
        instruction: int,
        space: str,
        base: Any,
        offset: int,
        dtype: str,
        values: tuple[Any, ...],
        mask: Array | None,
    ) -> None:
        """st: one vector (or scalar) for each element."""
        lanes, address = self.addresses(base, offset, mask)
        width = SIZES[dtype] * len(values)
        unit, shift = UNITS[width], width.bit_length() - 1
        for name, _, own, at in self.checked(instruction, space, lanes, address, width, "write"):
            everybody = len(own) == self.threads.count
            packed = np.empty((len(own), len(values)), dtype)
            for index, value in enumerate(values):
                packed[:, index] = value if everybody or np.ndim(value) == 0 else value[own]
            self.spaces[name].views[unit][at >> shift] = packed.view(unit)[:, 0]

    def atomic(
        self,
        instruction: int,
        space: str,
        base: Any,
        offset: int,
        dtype: str,
        kind: str,
        operation: str,
        values: tuple[Array, ...],
        mask: Array | None,
        returns: bool,
    ) -> Array:
        """atom and red: lanes take their turns in order. Returns the values from before, over all lanes."""
        lanes, address = self.addresses(base, offset, mask)
        result = np.zeros(self.threads.count, dtype)
        width = SIZES[dtype]
        action = "write" if operation == "exch" else "read-modify-write"  # an exchange may begin a byte's life
        for name, _, own, at in self.checked(instruction, space, lanes, address, width, action, True):
            view = self.spaces[name].views[dtype]
            index = at >> (width.bit_length() - 1)
            operands = [value[own] for value in values]
            result[own] = _take_turns(view, index, kind, operation, operands)
            if name == "global" or self.uninitialised:
                self.spaces[name].states[width][index] = ALL_WRITTEN[width]
        return result


def _window(owner: Array, count: int, nbytes: int) -> Space:
    """A state space in which each of `count` owners has `nbytes`; owner: [lanes]."""
    size = max(16, count * nbytes)
    return Space(np.empty(size, "u1"), np.empty(size, "u1"), owner * nbytes, nbytes)


def _take_turns(view: Array, index: Array, kind: str, operation: str, operands: list[Array]) -> Array:
    """Apply an atomic operation to view[index], lanes of one element in order. Returns the old values."""
    before = np.empty(len(index), view.dtype)
    order = np.argsort(index, kind="stable")
    new = np.flatnonzero(np.diff(index[order], prepend=-1))  # where the lanes of an element begin
    rank = np.arange(len(index)) - np.repeat(new, np.diff(new, append=len(index)))
    by_rank = np.argsort(rank, kind="stable")
    for turn in np.split(order[by_rank], np.flatnonzero(np.diff(rank[by_rank])) + 1):  # no element twice in a turn
        old = view[index[turn]]
        before[turn] = old
        view[index[turn]] = _combine(kind, operation, old, [operand[turn] for operand in operands])
    return before


def _combine(kind: str, operation: str, old: Array, operands: list[Array]) -> Array:
    b = operands[0]
    if kind in ("bf16", "bf16x2"):
        halves = [bf16_to_f32(x.view("u2")) for x in (old, b)]
        if operation == "add":
            return odd_f64_to_bf16(fused(halves[0], 1.0, halves[1])).view(old.dtype)
        chosen = (np.fmin if operation == "min" else np.fmax)(*halves)
        return odd_f64_to_bf16(chosen.astype("f8")).view(old.dtype)
    if kind == "f16x2":
        x, y = old.view("f2"), b.view("f2")
        return {"add": np.add, "min": np.fmin, "max": np.fmax}[operation](x, y).view(old.dtype)
    if operation == "cas":
        return np.where(old == b, operands[1], old)
    if operation == "exch":
        return b
    one = old.dtype.type(1)
    if operation == "inc":
        return np.where(old >= b, old.dtype.type(0), old + one)
    if operation == "dec":
        return np.where((old == 0) | (old > b), b, old - one)
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    return functions[operation](old, b)
