"""What a sequence knows and what stands in the KV cache for it, as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array

__all__ = ["Snapshot"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A sequence at rest: L layers, P positions held, KH key/value heads of dimension D.

    Attributes:
        fingerprint: names model, device and cache dtype by what they compute; another engine resumes bit for bit only
            if its own is the same.
        kv_dtype: one of tinyllm.config.KV_DTYPES; keys and values are float32 numbers that the cache holds exactly.
        token_ids: (T,) int32, all tokens; those from num_computed_tokens on have no keys and values yet.
        positions: (P,) int32, ascending, where keys and values are held: 0 to num_computed_tokens - 1, without those
            that no later token will see.
        keys, values: (L, P, KH, D)
        window, sinks: see SamplingParams; what the keys and values depend on besides the tokens.
        cache_salt: whose cached prefixes it shares.
    """

    fingerprint: str
    kv_dtype: str
    token_ids: NDArray[np.int32]
    num_computed_tokens: int
    positions: NDArray[np.int32]
    keys: F32Array
    values: F32Array
    window: int | None
    sinks: int
    cache_salt: str
