"""cp.async: the bytes are read at the instruction and arrive at the wait; until then nobody may touch their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuda_kernels.emulator.memory_unit import MemoryUnit
from cuda_kernels.emulator.ptx import Array
from cuda_kernels.emulator.report import ProblemLog
from cuda_kernels.emulator.threads import Threads


@dataclass
class _Copy:
    """Copies of one instruction on their way. lanes, offset, group: [n]; data: [n, nbytes] uint8."""

    instruction: int
    lanes: Array
    offset: Array
    data: Array
    group: Array

    def part(self, chosen: Array) -> _Copy:
        return _Copy(self.instruction, self.lanes[chosen], self.offset[chosen], self.data[chosen], self.group[chosen])


class AsyncCopies:
    """The cp.async traffic of a batch (PTX ISA, "Asynchronous copy": groups are per thread)."""

    def __init__(self, threads: Threads, log: ProblemLog, unit: MemoryUnit, check: bool) -> None:
        self.threads, self.log, self.unit, self.check = threads, log, unit, check
        self.groups: Array = np.zeros(threads.count, np.int64)  # committed groups of each lane
        self.on_the_way: list[_Copy] = []

    def begin_batch(self) -> None:
        self.groups[:] = 0
        self.on_the_way = []
        self.unit.pending = None

    def copy(
        self,
        instruction: int,
        to: Any,
        to_offset: int,
        source: Any,
        source_offset: int,
        nbytes: int,
        source_size: Any,
        mask: Array | None,
    ) -> None:
        """Start copies of `nbytes`, of which source_size [lanes] are read and the rest is zero-filled."""
        unit = self.unit
        lanes, destination = unit.addresses(to, to_offset, mask)
        _, address = unit.addresses(source, source_offset, mask)
        size = np.full(len(lanes), nbytes)
        if source_size is not None:
            size = np.minimum(np.broadcast_to(source_size, self.threads.count)[lanes].astype(np.int64), nbytes)
        data = self.read(instruction, lanes, address, nbytes, size)
        for _, part, own, offset in unit.checked(instruction, "shared", lanes, destination, nbytes, "write"):
            arriving = data if part is None else data[part]
            if self.check:
                if unit.pending is None:
                    unit.pending = np.zeros(len(unit.spaces["shared"].bytes), np.int16)
                np.add.at(unit.pending, offset[:, None] + np.arange(nbytes), 1)
            self.on_the_way.append(_Copy(instruction, own, offset, arriving, self.groups[own].copy()))

    def read(self, instruction: int, lanes: Array, address: Array, nbytes: int, size: Array) -> Array:
        """The bytes [n, nbytes] that copies of `size` [n] bytes each bring. Bytes past the size are not touched."""
        data = np.zeros((len(lanes), nbytes), np.uint8)
        unit = self.unit
        for length in np.unique(size):
            if length == 0:
                continue
            chosen = np.flatnonzero(size == length)
            # A partial source size is rare: its bytes are read one by one.
            pieces = [(0, nbytes)] if length == nbytes else [(start, 1) for start in range(int(length))]
            for start, width in pieces:
                here = address[chosen] + np.uint64(start)
                for space, part, _, offset in unit.checked(instruction, "generic", lanes[chosen], here, width, "read"):
                    rows = chosen if part is None else chosen[part]
                    columns = np.arange(width)
                    values = unit.spaces[space].bytes[offset[:, None] + columns]
                    data[rows[:, None], start + columns] = values
        return data

    def commit(self, mask: Array | None) -> None:
        """cp.async.commit_group."""
        if mask is None:
            self.groups += 1
        else:
            self.groups[mask] += 1

    def wait(self, instruction: int, allowed: int, mask: Array | None, everything: bool) -> None:
        """cp.async.wait_group (all but the last `allowed` groups) and wait_all: the bytes arrive."""
        waiting = np.ones(self.threads.count, bool) if mask is None else mask
        left = []
        unit = self.unit
        for copy in self.on_the_way:
            arrives = waiting[copy.lanes] & ((copy.group < self.groups[copy.lanes] - allowed) | everything)
            if arrives.any():
                done = copy.part(arrives)
                places = done.offset[:, None] + np.arange(done.data.shape[1])
                unit.spaces["shared"].bytes[places] = done.data
                if unit.pending is not None:
                    np.subtract.at(unit.pending, places, 1)
                if unit.shared_races is not None:
                    unit.shared_races.access(
                        copy.instruction, done.offset, done.data.shape[1], done.lanes, write=True, atomic=False
                    )
            if not arrives.all():
                left.append(copy.part(~arrives))
        self.on_the_way = left

    def end_batch(self) -> None:
        """Report the copies that nobody waited for."""
        for copy in self.on_the_way:
            message = "a cp.async that was never waited for"
            self.log.add("unwaited-cp-async", message, copy.instruction, copy.lanes)
