"""The CPU backend's draws of tokens: packed into one array, then one run of a kernel."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array
from tinyllm.backends.cpu_kernels.sampling import DRAW_NBYTES, draw, scratch_nbytes
from tinyllm.backends.cpu_ops import CpuOps
from tinyllm.sampling import GREEDY_BELOW

__all__ = ["CpuSampling"]

_DRAW = struct.Struct("=qQdqdd")
assert _DRAW.size == DRAW_NBYTES


class CpuSampling(CpuOps):
    """`sample` of `Backend`."""

    max_sampled_vocab = (1 << 31) - 1
    _draws: NDArray[np.int64] | None = None  # room for the tokens of _max_draws, then for what is told of each
    _draws_address = 0
    _max_draws = 0

    def _sampling_scratch(self, columns: int) -> int:
        """Bytes of scratch of draws from rows of so many logits."""
        return self.num_threads * scratch_nbytes(columns)

    def sample(self, logits: F32Array, draws: Sequence[tuple[int, int, float, int, float, float]]) -> list[int]:
        (rows, columns), count = logits.shape, len(draws)
        assert logits.dtype == np.float32 and logits.strides[1] == 4
        memory = self._draws
        if memory is None or count > self._max_draws:
            self._max_draws = 2 * count
            memory = self._draws = np.empty(self._max_draws * (8 + DRAW_NBYTES) // 8, np.int64)
            self._draws_address = int(memory.ctypes.data)
        first = 8 * self._max_draws
        for i, (row, key, temperature, *filters) in enumerate(draws):
            assert 0 <= row < rows
            temperature = 0.0 if temperature < GREEDY_BELOW else temperature
            _DRAW.pack_into(memory.data, first + DRAW_NBYTES * i, row, key, temperature, *filters)
        self._run(
            draw, count, count * columns, self._address_of(logits), logits.strides[0], columns,
            self._draws_address + first, self._draws_address, self._reserve(self._sampling_scratch(columns)),
            scratch_nbytes(columns),
        )  # fmt: skip
        tokens: list[int] = memory[:count].tolist()
        return tokens
