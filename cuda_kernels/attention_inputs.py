"""What attention over the paged cache takes: a ragged batch of queries, one layer's cache, where the results go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuda_kernels.launch import Array, require
from cuda_kernels.paged_cache import PagedLayer

__all__ = ["NO_WINDOW", "SPLIT_KEYS", "AttentionInputs"]

SPLIT_KEYS = 256  # keys of one partial result, at fixed absolute positions
NO_WINDOW = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """One step's attention. T queries of S sequences, H query heads, KH key and value heads, D head dimension.

    The queries of sequence s are its last n = cu_seqlens_q[s + 1] - cu_seqlens_q[s] positions, seq_lens[s] - n to
    seq_lens[s] - 1. The query at position p sees the keys max(0, p - window + 1) <= j <= p; query head h reads KV head
    h // (H // KH). A score is scale * q.k, then softcap * tanh(score / softcap).

    Streaming (StreamingLLM, arXiv:2309.17453): a sequence whose windows[s] = W is less than `window` has the window W
    and n = num_sinks[s] sinks. A query at p < n + W sees the keys 0 <= j <= p. From p = n + W on it sees
    p - W + 1 <= j <= p with q, and the sinks 0 <= j < n with sink_q. Nothing else is read.

    Attributes:
        q: (T, H, D) float32, any strides over rows and heads that keep rows 16-byte aligned.
        layer: keys and values.
        cu_seqlens_q: (S + 1,) int32, prefix sums of the queries of each sequence.
        seq_lens: (S,) int32, keys of each sequence, its own queries included; 0 for a padding sequence, whose rows
            come out as zeros with an lse of -inf.
        block_tables: (S, MB) int32, rows may be strided; entries that no query can see hold anything.
        windows, num_sinks: (S,) int32, or None where no sequence streams. At most SPLIT_KEYS sinks.
        sink_q: (T, H, D) float32, like q; may be None where no query uses it.
        scale, window, softcap: as above; NO_WINDOW and 0.0 for none.
        out: (T, H, D) float32, C-contiguous.
        lse: (T, H) float32, C-contiguous: the natural logarithm of the sum of exp(scores).
        max_query_len: at least the queries of any one sequence. This and the next shape grids, never a result's bits.
        max_seq_len: at least any of seq_lens.
        scratch: float32 or uint8, contiguous, see paged_attention_scratch_nbytes.

    Raises:
        KernelArgumentError: shapes, dtypes or layouts that do not fit.
    """

    q: Array
    layer: PagedLayer
    cu_seqlens_q: Array
    seq_lens: Array
    block_tables: Array
    windows: Array | None = None
    num_sinks: Array | None = None
    sink_q: Array | None = None
    scale: float
    window: int = NO_WINDOW
    softcap: float = 0.0
    out: Array
    lse: Array
    max_query_len: int
    max_seq_len: int
    scratch: Array

    def __post_init__(self) -> None:
        require(self.q.ndim == 3, f"q must be (T, H, D), not {self.q.shape}")
        T, H, D = self.q.shape
        S = self.seq_lens.shape[0]
        require(self.layer.head_dim == D, f"queries of head size {D}, a cache of {self.layer.head_dim}")
        require(H % self.layer.num_kv_heads == 0, f"{H} query heads cannot share {self.layer.num_kv_heads} KV heads")
        require(min(T, S) >= 1, "attention needs at least one query and one sequence")
        _check_queries("q", self.q, (T, H, D))
        if self.sink_q is not None:
            _check_queries("sink_q", self.sink_q, (T, H, D))
        for name, array, length in (
            ("cu_seqlens_q", self.cu_seqlens_q, S + 1),
            ("seq_lens", self.seq_lens, S),
            ("windows", self.windows, S),
            ("num_sinks", self.num_sinks, S),
        ):
            if array is not None:
                fits = array.shape == (length,) and array.dtype == np.int32 and bool(array.flags.c_contiguous)
                require(fits, f"{name} must be ({length},) int32, contiguous")
        tables = self.block_tables
        require(tables.ndim == 2 and tables.shape[0] == S, f"block_tables must be ({S}, MB), not {tables.shape}")
        require(tables.dtype == np.int32 and tables.strides[1] == 4, "block_tables must be int32 with contiguous rows")
        require((self.windows is None) == (self.num_sinks is None), "windows and num_sinks go together")
        for name, result, shape in (("out", self.out, (T, H, D)), ("lse", self.lse, (T, H))):
            fits = result.shape == shape and result.dtype == np.float32 and bool(result.flags.c_contiguous)
            require(fits, f"{name} must be {shape} float32, C-contiguous")
        require(1 <= self.window <= NO_WINDOW, f"the window must be 1 to {NO_WINDOW}, not {self.window}")
        require(self.softcap >= 0.0, f"softcap must not be negative: {self.softcap}")
        require(min(self.max_query_len, self.max_seq_len) >= 1, "max_query_len and max_seq_len must be positive")

    @property
    def num_seqs(self) -> int:
        return int(self.seq_lens.shape[0])

    @property
    def num_heads(self) -> int:
        return int(self.q.shape[1])

    @property
    def group_size(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.layer.num_kv_heads

    @property
    def streams(self) -> bool:
        """Whether some sequence may have sinks."""
        return self.windows is not None


def _check_queries(name: str, x: Array, shape: tuple[int, ...]) -> None:
    require(x.shape == shape and x.dtype == np.float32, f"{name} must be {shape} float32")
    aligned = all(stride % 16 == 0 for stride in x.strides[:2]) and shape[2] % 4 == 0
    require(x.strides[2] == 4 and aligned, f"{name} must have a contiguous last axis and rows aligned to 16 bytes")
