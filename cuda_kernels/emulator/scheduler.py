"""Runs a batch: always the lanes at the lowest basic block, all together, until they are done or wait for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_kernels.emulator.ptx import Array, Instruction
from cuda_kernels.emulator.races import Clock
from cuda_kernels.emulator.report import ProblemLog
from cuda_kernels.emulator.threads import WARP, Threads
from cuda_kernels.emulator.translate import EXIT, Translation
from cuda_kernels.emulator.translate_warp import is_block_barrier
from cuda_kernels.emulator.warp import lane_bits

Step = Callable[[Array], Any]


class StuckError(Exception):
    """The batch cannot go on; the reason is in the problem log."""


class Scheduler:
    """Steps of one launch.

    lanes_run: [blocks of code] thread-steps taken by each basic block, for the counts of the report.
    """

    def __init__(
        self,
        threads: Threads,
        clock: Clock,
        log: ProblemLog,
        translation: Translation,
        namespace: dict[str, Any],
        max_basic_blocks: int,
        strict_exit: bool,
    ) -> None:
        self.threads, self.clock, self.log, self.translation = threads, clock, log, translation
        self.namespace, self.max_basic_blocks, self.strict_exit = namespace, max_basic_blocks, strict_exit
        self.collectives = [block.collective for block in translation.blocks]
        self.masked: list[Step] = []
        self.full: list[Step] = []
        for number, collective in enumerate(self.collectives):
            name = f"collective{number}" if collective is not None else f"block{number}"
            self.masked.append(namespace[name])
            self.full.append(namespace[name if collective is not None else f"{name}_all"])
        self.basic_blocks = 0
        self.lanes_run = [0] * len(self.collectives)

    def run(self, alive: Array) -> None:
        """Run the lanes `alive` [lanes] from the first block to their exits. Raises StuckError."""
        self.ready: dict[int, Array] = {0: alive}
        self.waiting: dict[int, Array] = {}
        self.exited: Array = ~alive
        everybody = bool(alive.all())
        while self.ready or self.waiting:
            if not self.ready:
                if not any(self.release(number, last_resort=False) for number in sorted(self.waiting)) and not any(
                    self.release(number, last_resort=True) for number in sorted(self.waiting)
                ):
                    self.deadlock()
                continue
            number = min(self.ready)
            mask = self.ready.pop(number)
            if self.collectives[number] is not None:
                self.waiting[number] = self.waiting[number] | mask if number in self.waiting else mask
                self.release(number, last_resort=False)
                continue
            full = everybody and bool(mask.all())
            self.took(number, self.threads.count if full else int(np.count_nonzero(mask)))
            ways = (self.full if full else self.masked)[number](mask)
            if type(ways) is int:
                self.go(ways, mask)
                continue
            for chosen, target in ways:
                lanes = mask & chosen
                if lanes.any():
                    self.go(target, lanes)

    def took(self, number: int, lanes: int) -> None:
        """Count a step."""
        self.basic_blocks += 1
        self.lanes_run[number] += lanes
        if self.basic_blocks > self.max_basic_blocks:
            message = f"no end after {self.max_basic_blocks} basic blocks: a loop without end, or threads that spin"
            self.log.add("endless-loop", message, self.translation.blocks[number].first, None)
            raise StuckError

    def go(self, number: int, lanes: Array) -> None:
        """Send lanes to a block."""
        if number == EXIT:
            self.exited = self.exited | lanes
        else:
            self.ready[number] = self.ready[number] | lanes if number in self.ready else lanes

    def release(self, number: int, last_resort: bool) -> bool:
        """Let lanes that wait at a block go on where all that they wait for have come. Whether any did."""
        collective = self.collectives[number]
        assert collective is not None
        if is_block_barrier(collective):
            return self.release_blocks(number, collective, last_resort)
        return self.release_warps(number, collective)

    def leave(self, number: int, lanes: Array) -> None:
        """Run a collective for lanes that wait at it, and let them go on."""
        left = self.waiting.pop(number) & ~lanes
        if left.any():
            self.waiting[number] = left
        self.took(number, int(np.count_nonzero(lanes)))
        self.masked[number](lanes)
        self.go(number + 1, lanes)

    # barriers of a block

    def barrier(self, number: int, lanes: Array) -> tuple[int, int | None]:
        """(barrier, number of threads or None for all) of a bar or barrier instruction."""
        collective = self.collectives[number]
        assert collective is not None
        operands = collective.operands[1:-1] if "red" in collective.parts else collective.operands
        values = [self.operand(text, lanes) for text in operands]
        return (values[0] if values else 0), (values[1] if len(values) > 1 else None)

    def operand(self, text: str, lanes: Array) -> int:
        """An operand that is the same in all lanes: a literal, or the register's value in the first of them."""
        emitter = self.translation.emitter
        if text in emitter.registers:
            vector = self.namespace[emitter.views[text, "u4"]]
            return int(vector[int(np.flatnonzero(lanes)[0])])
        return int(text, 0)

    def release_blocks(self, number: int, collective: Instruction, last_resort: bool) -> bool:
        lanes, threads = self.waiting[number], self.threads
        barrier, wanted = self.barrier(number, lanes)
        here = [number]
        if last_resort:  # threads of one block wait at different instructions of one barrier
            here = [
                other
                for other, mask in self.waiting.items()
                if (instruction := self.collectives[other]) is not None
                and is_block_barrier(instruction)
                and self.barrier(other, mask)[0] == barrier
            ]
        arrived = np.logical_or.reduce([self.waiting[other] for other in here]).reshape(threads.blocks, -1)
        exited = self.exited.reshape(threads.blocks, -1)
        complete = (arrived | exited).all(axis=1) if wanted is None else arrived.sum(axis=1) >= wanted
        complete &= arrived.any(axis=1)
        if not complete.any():
            return False
        inside = np.repeat(complete, threads.per_block)
        if last_resort:
            message = "threads of one block meet at different barrier instructions"
            self.log.add(
                "divergent-barrier",
                message,
                self.translation.blocks[number].first,
                np.flatnonzero(lanes & inside) if (lanes & inside).any() else np.flatnonzero(lanes),
            )
        if self.strict_exit and wanted is None:
            gone = self.exited & inside & threads.alive()
            if gone.any():
                message = "a barrier after threads of the block have returned"
                index = self.translation.blocks[number].first
                self.log.add("barrier-after-exit", message, index, np.flatnonzero(gone))
        self.clock.block_barrier(complete)
        for other in here:
            going = self.waiting[other] & inside
            if going.any():
                self.leave(other, going)
        return True

    # warp-wide instructions

    def member_mask(self, number: int) -> Array | np.uint32 | None:
        mask = self.translation.masks[number]
        if isinstance(mask, str):
            vector: Array = self.namespace[mask]
            return vector
        return None if mask is None else np.uint32(mask)

    def release_warps(self, number: int, collective: Instruction) -> bool:
        lanes, threads = self.waiting[number], self.threads
        members = self.member_mask(number)
        arrived = lane_bits(lanes)
        wanted = arrived if members is None else np.broadcast_to(members, threads.count) & ~lane_bits(self.exited)
        complete = lanes & ((wanted & ~arrived) == 0)
        warps = (complete | ~lanes).reshape(-1, WARP).all(axis=1) & lanes.reshape(-1, WARP).any(axis=1)
        index = self.translation.blocks[number].first
        if members is not None:
            own_bit = (np.broadcast_to(members, threads.count) >> threads.in_warp.astype(np.uint32)) & np.uint32(1)
            outside = lanes & (own_bit == 0)
            if outside.any():
                message = f"{collective.base}.sync by a lane that is not in its member mask"
                self.log.add("mask", message, index, np.flatnonzero(outside))
        if not warps.any():
            return False
        going = lanes & np.repeat(warps, WARP)
        if collective.base in ("mma", "ldmatrix"):
            partial = going & (lane_bits(going) != np.uint32(0xFFFFFFFF))
            if partial.any():
                message = f"{collective.base} needs all 32 lanes of a warp, and some have returned or do not exist"
                self.log.add("mask", message, index, np.flatnonzero(partial))
        if collective.base in ("bar", "barrier"):
            self.clock.warp_barrier(warps)
        self.leave(number, going)
        return True

    def deadlock(self) -> None:
        """Report what the lanes wait at, and give up."""
        for number, lanes in sorted(self.waiting.items()):
            others = len(self.waiting) > 1
            message = "threads wait here for others that never come"
            message += ", and others wait elsewhere" if others else ""
            self.log.add("deadlock", message, self.translation.blocks[number].first, np.flatnonzero(lanes))
        raise StuckError
