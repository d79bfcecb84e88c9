"""What a draw on the device is told: eight 32-bit words each, filled on the host and uploaded together.

word  0 - 1   key of the noise, 64 bits, low word first
      2       log2(e) / temperature, float32; 0: greedy
      3       top_k; 0: all
      4       top_p in units of 2 ** -32; 0: all
      5       log2(min_p), float32; -inf: all
      6       1; 0: no draw (padding)
      7       which row of the logits to draw from
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.errors import KernelArgumentError

__all__ = ["FORBIDDEN", "GREEDY_BELOW", "MAX_TEMPERATURE", "NOT_A_NUMBER", "ROW_WORDS", "SamplingRow", "pack_rows"]

ROW_WORDS = 8
GREEDY_BELOW = 1e-5  # a lower temperature would overflow where it should only sharpen
MAX_TEMPERATURE = 2.0**100  # the reciprocal is a normal float32

NOT_A_NUMBER = -1  # what a draw gives instead of a token where a logit is NaN
FORBIDDEN = -2  # and where no logit is above -inf

_ROW = struct.Struct("<QfIIfII")
_PADDING = bytes(4 * ROW_WORDS)


@dataclass(frozen=True)
class SamplingRow:
    """One draw.

    Attributes:
        logits_row: the row of the logits to draw from; several draws may share one.
        key: 64 bits that the noise of each token is a function of.
        temperature: divides the logits; below GREEDY_BELOW the most likely token is taken, ties by the lowest id.
        top_k: keep the k most likely tokens, ties by the lowest id; 0 keeps all.
        top_p: of these, the fewest of the most likely whose probabilities reach top_p, in (0, 1].
        min_p: of these, those at least min_p times as likely as the most likely, in [0, 1].

    Raises:
        KernelArgumentError: a value outside its range.
    """

    logits_row: int
    key: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, valid in (
            ("logits_row", 0 <= self.logits_row < 1 << 31),
            ("key", 0 <= self.key < 1 << 64),
            ("temperature", 0 <= self.temperature <= MAX_TEMPERATURE),
            ("top_k", 0 <= self.top_k < 1 << 32),
            ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p <= 1),
        ):
            if not valid:
                raise KernelArgumentError(f"sampling: {name} cannot be {getattr(self, name)}")

    def pack(self) -> bytes:
        """The words, little-endian."""
        scale = 0.0 if self.temperature < GREEDY_BELOW else math.log2(math.e) / self.temperature
        top_p = 0 if self.top_p == 1 else min(max(round(self.top_p * 2**32), 1), 2**32 - 1)
        min_p = math.log2(self.min_p) if self.min_p > 0 else -math.inf
        return _ROW.pack(self.key, scale, self.top_k, top_p, min_p, 1, self.logits_row)


def pack_rows(rows: Sequence[SamplingRow], size: int | None = None) -> NDArray[np.uint32]:
    """The words (N, ROW_WORDS) of N draws; with `size`, padding follows the rows given. Raises KernelArgumentError."""
    size = len(rows) if size is None else size
    if len(rows) > size:
        raise KernelArgumentError(f"sampling: {len(rows)} rows do not fit into {size}")
    packed = b"".join([*(row.pack() for row in rows), *[_PADDING] * (size - len(rows))])
    return np.frombuffer(packed, "<u4").astype(np.uint32).reshape(size, ROW_WORDS)
