"""Attention over the paged cache: the form for the cache's dtype, and the scratch memory that either form needs."""

from __future__ import annotations

from cuda_kernels.attention_inputs import NO_WINDOW, SPLIT_KEYS, AttentionInputs
from cuda_kernels.attention_partials import partial_layout
from cuda_kernels.launch import Runtime
from cuda_kernels.paged_attention_f32 import paged_attention_f32
from cuda_kernels.paged_attention_mma import paged_attention_mma

__all__ = ["NO_WINDOW", "SPLIT_KEYS", "AttentionInputs", "paged_attention", "paged_attention_scratch_nbytes"]


def paged_attention(rt: Runtime, inputs: AttentionInputs) -> None:
    """Queues attention of a step's queries over the cache: writes inputs.out and inputs.lse.

    Raises KernelArgumentError where a shape is not served, or scratch is too small.
    """
    if inputs.layer.dtype == "f32":
        paged_attention_f32(rt, inputs)
    else:
        paged_attention_mma(rt, inputs)


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
