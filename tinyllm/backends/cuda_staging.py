"""How a batch gets to the device: padded to few sizes, and in one copy, so that a CUDA graph fits many steps.

A graph holds launches with their grids and addresses. Steps that decode one token for each sequence differ in the
number of sequences and the longest of them alone; both are rounded up here, and the arrays of a rounded size always
lie at the same addresses.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.launch import Array, Runtime
from tinyllm.backends.base import NO_WINDOW, SPLIT_KEYS, Batch, BatchExtent, I32Array

__all__ = ["GraphKey", "Staging", "graph_key", "pad_batch", "round_up_sequences"]

ALIGNMENT = 256  # bytes; of each array in the buffer
GraphKey = tuple[int, int, BatchExtent, bool]  # sequences, columns of the block table, extent, whether some stream


def round_up_sequences(count: int) -> int:
    """1, 2, 4, 8, then multiples of 8 up to 64, then of 32."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


def _round_up_length(length: int) -> int:
    """SPLIT_KEYS times a power of two."""
    return SPLIT_KEYS << max(0, (-(-length // SPLIT_KEYS) - 1).bit_length())


def pad_batch(batch: Batch, block_size: int, max_tokens: int) -> Batch:
    """A batch that decodes, padded to one of few sizes of at most max_tokens; any other batch as it is.

    See Backend.padded.
    """
    if not batch.decodes:
        return batch
    S, columns = batch.block_tables.shape
    sequences = max(S, min(round_up_sequences(S), max_tokens))
    max_columns = max(columns, -(-_round_up_length(batch.extent.max_seq_len) // block_size))
    more = sequences - S

    def longer(array: I32Array, fill: int) -> I32Array:
        return np.concatenate([array, np.full(more, fill, np.int32)])

    def maybe_longer(array: I32Array | None, fill: int) -> I32Array | None:
        return None if array is None else longer(array, fill)

    tables = np.zeros((sequences, max_columns), np.int32)
    tables[:S, :columns] = batch.block_tables
    return replace(
        batch,
        token_ids=longer(batch.token_ids, 0),
        positions=longer(batch.positions, 0),
        slot_mapping=longer(batch.slot_mapping, -1),
        cu_seqlens_q=np.arange(sequences + 1, dtype=np.int32),
        seq_lens=longer(batch.seq_lens, 0),
        block_tables=tables,
        windows=maybe_longer(batch.windows, NO_WINDOW),
        num_sinks=maybe_longer(batch.num_sinks, 0),
        sink_positions=maybe_longer(batch.sink_positions, 0),
    )


def graph_key(batch: Batch) -> GraphKey | None:
    """What a staged batch's launches depend on, or None where it is not one that recurs."""
    if not batch.decodes:
        return None
    S, columns = batch.block_tables.shape
    return S, columns, batch.extent, batch.windows is not None


class Staging:
    """One device buffer that holds the arrays of the current batch.

    Attributes:
        generation: changes when the buffer moves, after which no address of it is valid.
    """

    def __init__(self, runtime: Runtime, nbytes: int = 1 << 20) -> None:
        self.generation = 0
        self._runtime = runtime
        self._buffer: Array = runtime.empty(nbytes, np.uint8)

    def stage(self, batch: Batch) -> Batch:
        """The batch with its arrays on the device, all in one copy. What was staged before is overwritten."""
        arrays: dict[str, NDArray[np.int32]] = {
            name: np.ascontiguousarray(array, np.int32)
            for name in ("token_ids", "positions", "slot_mapping", "cu_seqlens_q", "seq_lens", "block_tables",
                         "windows", "num_sinks")
            if (array := getattr(batch, name)) is not None
        }  # fmt: skip
        offsets, end = {}, 0
        for name, array in arrays.items():
            offsets[name] = end
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        host = np.zeros(end, np.uint8)
        for name, array in arrays.items():
            host[offsets[name] : offsets[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
        if self._buffer.nbytes < end:
            self._buffer = self._runtime.empty(2 * end, np.uint8)
            self.generation += 1
        self._runtime.upload(self._buffer[:end], host)
        staged = {
            name: self._buffer[offsets[name] : offsets[name] + array.nbytes].view(np.int32).reshape(array.shape)
            for name, array in arrays.items()
        }
        extent = replace(batch.extent, max_seq_len=_round_up_length(batch.extent.max_seq_len))
        return replace(batch, **staged, sink_positions=None, staged_extent=extent)
