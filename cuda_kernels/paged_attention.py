"""Attention over the paged cache: the form for the cache's dtype, and the scratch memory that either form needs."""

from __future__ import annotations

from cuda_kernels.attention_inputs import NO_WINDOW, SPLIT_KEYS, AttentionInputs
from cuda_kernels.attention_partials import partial_layout
from cuda_kernels.launch import Runtime, require
from cuda_kernels.paged_attention_f32 import paged_attention_f32
from cuda_kernels.paged_attention_mma import paged_attention_mma

__all__ = [
    "HEAD_DIM_MULTIPLES",
    "NO_WINDOW",
    "SPLIT_KEYS",
    "AttentionInputs",
    "check_head_dim",
    "paged_attention",
    "paged_attention_scratch_nbytes",
]

HEAD_DIM_MULTIPLES = {"f32": 4, "f16": 8, "bf16": 8, "int8": 16, "fp8": 16}  # by cache dtype
MAX_HEAD_DIM = 256


def paged_attention(rt: Runtime, inputs: AttentionInputs) -> None:
    """Queues attention of a step's queries over the cache: writes inputs.out and inputs.lse.

    Where scratch memory does not hold the partials of the decode form, all sequences take the prefill form: with so
    many of them it has blocks enough, and the bits are the same.

    Raises KernelArgumentError where a shape is not served.
    """
    T, H, D = inputs.q.shape
    needed = paged_attention_scratch_nbytes(
        *(T, H, D, inputs.max_seq_len),
        num_seqs=inputs.num_seqs,
        num_kv_heads=inputs.layer.num_kv_heads,
        window=inputs.window,
        streams=inputs.streams,
    )
    query_limit = None if needed <= inputs.scratch.nbytes else 0
    if inputs.layer.dtype == "f32":
        paged_attention_f32(rt, inputs, query_limit=query_limit)
    else:
        paged_attention_mma(rt, inputs, query_limit=query_limit)


def check_head_dim(dtype: str, head_dim: int) -> None:
    """Raises KernelArgumentError where attention over a cache of that dtype has no kernel for heads of that size."""
    multiple = HEAD_DIM_MULTIPLES[dtype]
    fits = head_dim % multiple == 0 and 0 < head_dim <= MAX_HEAD_DIM
    require(fits, f"heads of size {head_dim} in {dtype}: a multiple of {multiple} up to {MAX_HEAD_DIM}")


def paged_attention_scratch_nbytes(
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    max_seq_len: int,
    *,
    num_seqs: int | None = None,
    num_kv_heads: int | None = None,
    window: int = NO_WINDOW,
    streams: bool = True,
) -> int:
    """Enough scratch memory for any step of up to num_tokens queries and max_seq_len keys a sequence.

    Args:
        num_seqs, num_kv_heads: at most so many sequences, exactly so many KV heads, where known: a tighter bound.
        window, streams: the layer's window, and whether sequences may have sinks.
    """
    num_rows = num_tokens
    if num_seqs is not None and num_kv_heads is not None:
        # a sequence in decode form brings up to 16 rows of (query, head of a group) pairs, or a single query
        num_rows = min(num_rows, num_seqs * max(1, 16 // (num_heads // num_kv_heads)))
    layout = partial_layout(
        num_seqs=num_rows,
        num_queries=1,
        num_heads=num_heads,
        head_dim=head_dim,
        max_seq_len=max_seq_len,
        # queries beside the first may touch keys before its window
        window=min(NO_WINDOW, window + 16),
        streams=streams,
    )
    return layout.nbytes
