"""Decode steps as programs: lists of jobs, recorded once and run by one call from then on.

A program is what a CUDA graph is on a GPU: the kernels of a step with all their arguments. Steps that decode one token
for each sequence differ in their number and in the longest of them alone; the latter is rounded up, and the arrays of
a batch of one shape always lie at the same addresses. So Python runs a step's ops twice (once at once, since kernels
may have to be compiled, once to record them), and never again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import Batch, I32Array
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.threads import JOB, ThreadPool

__all__ = ["Program", "ProgramSteps", "StagedBatches"]

MAX_SHAPES = 64  # that are remembered
MIN_COLUMNS = 16
VECTORS = ("token_ids", "positions", "slot_mapping", "cu_seqlens_q", "seq_lens")  # of a batch, as long as its sequences

Shape = tuple[int, int]  # sequences, columns of the block table


class Program:
    """Jobs in the making, then at one address."""

    def __init__(self) -> None:
        self._jobs: list[tuple[int, int, int, int]] = []  # kernel, offset of its arguments, tasks, chunk
        self._arguments = bytearray()
        self._table: NDArray[np.int64] | None = None

    def add(self, kernel: Kernel, tasks: int, chunk: int, arguments: tuple[int | float, ...]) -> None:
        """Appends a job; chunk: tasks claimed at once, 0 for a job of the calling thread alone."""
        assert self._table is None, "a program that has run takes no more jobs"
        offset = len(self._arguments)
        self._arguments += bytes(8 * len(arguments))
        kernel.pack_into(self._arguments, offset, *arguments)
        self._jobs.append((kernel.address, offset, tasks, chunk))

    def run(self, threads: ThreadPool) -> None:
        if self._table is None:
            self._values = np.frombuffer(bytes(self._arguments), np.int64)
            self._table = np.array(self._jobs, np.int64).reshape(-1, JOB)
            self._table[:, 1] += self._values.ctypes.data
            self._address = int(self._table.ctypes.data)
            self._parallel = bool(self._table[:, 3].any())
        if self._jobs:
            threads.run(self._address, len(self._jobs), parallel=self._parallel)


def _recurs(batch: Batch) -> bool:
    """One token for each sequence, and none that streams: its sinks come and go."""
    return batch.decodes and batch.windows is None


class StagedBatches:
    """Buffers that decoding batches of one shape are copied into."""

    def __init__(self) -> None:
        self._buffers: dict[Shape, dict[str, I32Array]] = {}  # by the names of a batch's arrays

    def stage(self, batch: Batch) -> Batch:
        """A decoding batch in its shape's buffers, valid until the next of that shape; any other as it is.

        The block table gets a power of two of columns: those past its own hold anything.
        """
        if not _recurs(batch):
            return batch
        sequences, columns = batch.block_tables.shape
        shape = sequences, max(MIN_COLUMNS, 1 << (columns - 1).bit_length())
        buffers = self._buffers.get(shape)
        if buffers is None:
            if len(self._buffers) >= MAX_SHAPES:
                del self._buffers[next(iter(self._buffers))]
            vectors = {name: np.zeros_like(getattr(batch, name)) for name in VECTORS}
            buffers = self._buffers[shape] = {**vectors, "block_tables": np.zeros(shape, np.int32)}
        for name in VECTORS:
            buffers[name][:] = getattr(batch, name)
        buffers["block_tables"][:, :columns] = batch.block_tables
        return replace(batch, **buffers, staged_extent=batch.extent)


class ProgramSteps:
    """A StepRunner that runs programs.

    Args:
        record: runs ops to note what they would do, doing nothing of it.
        run: runs what was recorded.
        generation: changes when memory moves that recorded jobs point at.
    """

    def __init__(
        self, record: Callable[[Callable[[], None]], Program], run: Callable[[Program], None],
        generation: Callable[[], int],
    ) -> None:  # fmt: skip
        self._record = record
        self._run = run
        self._generation = generation
        self._recorded_at = generation()
        self._seen: dict[Shape, tuple[I32Array, Program | None]] = {}  # with the table that tells its buffers

    def run(self, batch: Batch, step: Callable[[], None]) -> None:
        if not _recurs(batch):
            step()
            return
        if self._generation() != self._recorded_at:
            self._seen.clear()
            self._recorded_at = self._generation()
        table = batch.block_tables
        known, program = self._seen.get(table.shape, (None, None))
        if known is not table:
            step()
            self._remember(table, None)
            return
        if program is None:
            program = self._record(step)
            self._remember(table, program)
        self._run(program)

    def _remember(self, table: I32Array, program: Program | None) -> None:
        shape = table.shape[0], table.shape[1]
        if shape not in self._seen and len(self._seen) >= MAX_SHAPES:
            del self._seen[next(iter(self._seen))]
        self._seen[shape] = table, program
