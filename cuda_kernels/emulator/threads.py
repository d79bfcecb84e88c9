"""Which threads a batch holds: lanes are numbered block by block, each block padded to whole warps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_kernels.emulator.ptx import Array

WARP = 32
Dim3 = tuple[int, int, int]


class Threads:
    """The lanes of one batch of blocks.

    count: lanes of a batch. per_block: lanes of a block, a multiple of 32. first_block: of the batch at hand.
    lanes, warps, in_warp: [count] the lane, its warp in the batch, its place in the warp.
    """

    def __init__(self, grid: Dim3, block: Dim3, batch_threads: int) -> None:
        self.grid, self.block = grid, block
        self.block_threads = block[0] * block[1] * block[2]
        self.total_blocks = grid[0] * grid[1] * grid[2]
        self.per_block = -(-self.block_threads // WARP) * WARP
        self.blocks = max(1, min(self.total_blocks, batch_threads // self.per_block))
        self.count = self.blocks * self.per_block
        self.first_block = 0
        self.lanes: Array = np.arange(self.count)
        self.warps: Array = self.lanes // WARP
        self.in_warp: Array = self.lanes % WARP
        self.block_in_batch: Array = self.lanes // self.per_block

    def alive(self) -> Array:
        """[count] bool: lanes of the batch that stand for a thread of the grid."""
        inside = self.lanes % self.per_block < self.block_threads
        return inside & (self.block_of_lane() < self.total_blocks)

    def block_of_lane(self) -> Array:
        """[count] the block of each lane within the grid."""
        return self.first_block + self.block_in_batch

    def name(self, lane: int) -> str:
        """A lane of the batch in CUDA's terms."""
        return self.name_of(self.first_block + lane // self.per_block, lane % self.per_block)

    def name_of(self, block: int, thread: int) -> str:
        """A thread of a block of the grid in CUDA's terms."""
        return f"block {_unravel(block, self.grid)} thread {_unravel(thread, self.block)}"


class SpecialRegisters(dict[str, Any]):
    """The special registers (PTX ISA, "Special Registers") of the batch at hand, made when they are asked for."""

    def __init__(self, threads: Threads, dynamic_shared: int, shared: int) -> None:
        super().__init__()
        self.threads, self.dynamic_shared, self.shared = threads, dynamic_shared, shared

    def __missing__(self, name: str) -> Any:
        value = self[name] = self._make(name)
        return value

    def _make(self, name: str) -> Any:
        threads = self.threads
        if name[:-2] in ("%tid", "%ctaid", "%ntid", "%nctaid"):
            axis = "xyz".index(name[-1])
            extent = threads.grid if "cta" in name else threads.block
            if name.startswith("%n"):
                return np.uint32(extent[axis])
            index = threads.block_of_lane() if "cta" in name else threads.lanes % threads.per_block
            return (index // math.prod(extent[:axis]) % extent[axis]).astype(np.uint32)
        if name.startswith("%lanemask_"):
            equal = np.uint32(1) << threads.in_warp.astype(np.uint32)
            below = equal - np.uint32(1)
            return {"eq": equal, "lt": below, "le": below | equal, "gt": ~(below | equal), "ge": ~below}[name[-2:]]
        makers: dict[str, Callable[[], Any]] = {
            "%laneid": lambda: threads.in_warp.astype(np.uint32),
            "%warpid": lambda: (threads.lanes % threads.per_block // WARP).astype(np.uint32),
            "%nwarpid": lambda: np.uint32(threads.per_block // WARP),
            "%smid": lambda: threads.block_of_lane().astype(np.uint32),
            "%nsmid": lambda: np.uint32(threads.total_blocks),
            "%dynamic_smem_size": lambda: np.uint32(self.dynamic_shared),
            "%total_smem_size": lambda: np.uint32(self.shared),
        }
        return makers[name]() if name in makers else np.uint32(0)


def _unravel(index: int, extent: Dim3) -> str:
    return f"({index % extent[0]}, {index // extent[0] % extent[1]}, {index // (extent[0] * extent[1])})"
