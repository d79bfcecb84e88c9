"""One vector for a text: the mean of its tokens' final hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["mean_embeddings"]


def mean_embeddings(rows: Sequence[NDArray[np.float32]], *, normalize: bool) -> NDArray[np.float32]:
    """The means (N, M) of N arrays of hidden states (T, M), summed in float64; of length 1 if `normalize`."""
    means = np.stack([states.mean(axis=0, dtype=np.float64) for states in rows])
    if normalize:
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return means.astype(np.float32)
