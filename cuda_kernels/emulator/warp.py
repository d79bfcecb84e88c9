"""What lanes of a warp do together: shuffles, votes, reductions, matches and ldmatrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.emulator.memory_unit import MemoryUnit
from cuda_kernels.emulator.ptx import Array
from cuda_kernels.emulator.report import ProblemLog
from cuda_kernels.emulator.threads import WARP, Threads

_ABSENT = np.uint32(0xFFFFDEAD)  # what a shuffle gives for a lane that did not take part


def lane_bits(lanes: Array) -> Array:
    """[lanes] bool -> [lanes] uint32: the set of lanes of each lane's warp."""
    words = np.packbits(lanes.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32).reshape(-1)
    return np.repeat(words, WARP)


class WarpUnit:
    """Warp-wide instructions; each takes the mask [lanes] of the lanes that execute it together."""

    def __init__(self, threads: Threads, log: ProblemLog, unit: MemoryUnit) -> None:
        self.threads, self.log, self.unit = threads, log, unit
        self.warp_start: Array = threads.lanes - threads.in_warp

    def shuffle(
        self, instruction: int, mode: str, value: Any, lane: Any, clamp: Any, mask: Array
    ) -> tuple[Array, Array]:
        """shfl.sync: (values, whether the source lane was in range). PTX ISA, "shfl.sync"."""
        count, own = self.threads.count, self.threads.in_warp
        value = np.broadcast_to(value, count)
        b = np.broadcast_to(lane, count).astype(np.int64) & 31
        c = np.broadcast_to(clamp, count).astype(np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        last, first = (own & segment) | (limit & ~segment), own & segment
        if mode == "idx":
            source = first | (b & ~segment)
            inside = source <= last
        elif mode == "up":
            source = own - b
            inside = source >= last
        else:
            source = own + b if mode == "down" else own ^ b
            inside = source <= last
        source = self.warp_start + np.where(inside, source, own)
        result = value[source]
        absent = mask & ~mask[source]
        if absent.any():
            self.log.add(
                "shuffle-from-absent-lane",
                "shfl.sync reads a lane that does not take part in it",
                instruction,
                np.flatnonzero(absent),
            )
            result = np.where(absent, _ABSENT, result)
        return result, inside

    def vote(self, mode: str, predicate: Any, mask: Array) -> Array:
        """vote.sync: ballot as uint32, all, any and uni as bool."""
        predicate = np.broadcast_to(predicate, self.threads.count)
        if mode == "ballot":
            return lane_bits(predicate & mask)
        some = np.repeat((predicate & mask).reshape(-1, WARP).any(axis=1), WARP)
        if mode == "any":
            return some
        every = np.repeat((predicate | ~mask).reshape(-1, WARP).all(axis=1), WARP)
        return every if mode == "all" else every | ~some

    def elect(self, mask: Array) -> tuple[Array, Array]:
        """elect.sync: (the lowest lane, whether this is it)."""
        leader = np.repeat(mask.reshape(-1, WARP).argmax(axis=1), WARP)
        return leader.astype(np.uint32), mask & (self.threads.in_warp == leader)

    def reduce(self, operation: str, value: Any, mask: Array) -> Array:
        """redux.sync."""
        value = np.broadcast_to(value, self.threads.count)
        function = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[operation]
        limits = np.iinfo(value.dtype)
        neutral = {"min": limits.max, "max": limits.min}.get(operation, 0)
        identity = ~value.dtype.type(0) if operation == "and" else value.dtype.type(neutral)
        rows = np.where(mask, value, identity).reshape(-1, WARP)
        return np.repeat(function.reduce(rows, axis=1, dtype=value.dtype), WARP)

    def block_reduce(self, operation: str, predicate: Any, mask: Array) -> Array:
        """bar.red: the count (popc), and, or of a predicate over the threads of each block."""
        per_block = self.threads.per_block
        predicate = np.broadcast_to(predicate, self.threads.count)
        if operation == "popc":
            counts = (predicate & mask).reshape(-1, per_block).sum(axis=1, dtype=np.uint32)
            return np.repeat(counts, per_block)
        if operation == "or":
            return np.repeat((predicate & mask).reshape(-1, per_block).any(axis=1), per_block)
        return np.repeat((predicate | ~mask).reshape(-1, per_block).all(axis=1), per_block)

    def match(self, mode: str, value: Any, mask: Array) -> tuple[Array, Array]:
        """match.sync: (the lanes with the same value, whether all have it)."""
        rows = np.broadcast_to(value, self.threads.count).reshape(-1, WARP)
        taking_part = mask.reshape(-1, WARP)
        equal = (rows[:, :, None] == rows[:, None, :]) & taking_part[:, None, :]
        bits = np.packbits(equal, axis=2, bitorder="little").view(np.uint32).reshape(-1)
        same = bits == lane_bits(mask)
        agree = np.repeat((same | ~mask).reshape(-1, WARP).all(axis=1), WARP)
        return (bits if mode == "any" else np.where(agree, bits, np.uint32(0))), agree

    def load_matrix(
        self, instruction: int, base: Any, offset: int, count: int, transposed: bool, mask: Array
    ) -> list[Array]:
        """ldmatrix: `count` 8x8 matrices of 16-bit elements; lanes 8k .. 8k + 7 give the rows of matrix k."""
        unit, threads = self.unit, self.threads
        lanes, address = unit.addresses(base, offset, mask)
        results = []
        for matrix in range(count):
            chosen = np.flatnonzero(threads.in_warp[lanes] // 8 == matrix)
            rows = np.zeros((threads.count // WARP, 8, 8), np.uint16)  # [warps, row, column]
            for space, _, own, at in unit.checked(instruction, "shared", lanes[chosen], address[chosen], 16, "read"):
                values = unit.spaces[space].views["c16"].take(at >> 4).view(np.uint16).reshape(-1, 8)
                rows[own // WARP, threads.in_warp[own] % 8] = values
            ordered = rows.transpose(0, 2, 1) if transposed else rows
            results.append(np.ascontiguousarray(ordered).view(np.uint32).reshape(-1))
        return results
