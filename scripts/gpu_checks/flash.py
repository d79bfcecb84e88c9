"""Checks and timings of dense FlashAttention, forward and backward, against float64 and PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.roofline import TileWork
from gpu_checks.suite import Check, Context, Outcome, Prepared, Timing, bf16_bits, bf16_values, differing, larger

__all__ = ["checks", "timings"]

ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
F64 = NDArray[np.float64]

# (N, Q, K, H, KH, D, causal)
SMALL = ((1, 5, 9, 2, 1, 64, True),)
SHAPES = (
    (2, 1, 1, 2, 2, 64, False),
    (2, 65, 127, 4, 2, 64, True),
    (1, 127, 65, 4, 4, 80, True),
    (1, 257, 257, 4, 1, 128, True),
    (2, 64, 129, 2, 1, 96, False),
)


def stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """As the kernels take a dtype's values."""
    if dtype == "f32":
        return values
    return bf16_bits(values) if dtype == "bf16" else values.astype(np.float16).view(np.uint16)


def values_of(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "f32":
        return array
    return bf16_values(array) if dtype == "bf16" else array.view(np.float16).astype(np.float32)


def _attention(q: F64, k: F64, v: F64, scale: float, causal: bool) -> tuple[F64, F64, F64]:
    """(out (N, Q, H, D), lse (N, H, Q), probabilities (N, H, Q, K)); k and v have one head for each of q."""
    scores = scale * np.einsum("nqhd,nkhd->nhqk", q, k)
    if causal:
        Q, K = scores.shape[-2:]
        scores[..., np.arange(K)[None, :] > np.arange(Q)[:, None] + K - Q] = -np.inf
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(most), most, 0.0))
    total = weights.sum(-1, keepdims=True)
    probabilities = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    with np.errstate(divide="ignore"):
        lse = (most + np.log(total))[..., 0]
    return np.einsum("nhqk,nkhd->nqhd", probabilities, v), lse, probabilities


def _inputs(context: Context, dtype: str, shape: tuple[int, ...]) -> tuple[list[NDArray[Any]], list[F64]]:
    N, Q, K, H, KH, D = shape
    host = [stored(context.normal(*s), dtype) for s in ((N, Q, H, D), (N, K, KH, D), (N, K, KH, D), (N, Q, H, D))]
    return host, [values_of(x, dtype).astype(np.float64) for x in host]


def _score_error(exact: Sequence[F64], scale: float, dtype: str) -> float:
    """The largest error of a score whose query is rounded to the dtype once more, and of its float32 sum."""
    q, k = np.abs(exact[0]), np.abs(exact[1])
    most = scale * float(np.sqrt((q * q).sum(-1)).max() * np.sqrt((k * k).sum(-1)).max())
    return most * (ROUNDOFF[dtype] + 8 * ROUNDOFF["f32"] * math.sqrt(q.shape[-1]))


def _check_forward(dtype: str) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        from cuda_kernels.flash_attention import flash_attention

        error = 0.0
        for *shape, causal in SMALL if context.small else SHAPES:
            N, Q, _, H, KH, D = shape
            host, exact = _inputs(context, dtype, tuple(shape))
            scale = D**-0.5
            wide = [np.repeat(x, H // KH, axis=2) for x in exact[1:3]]
            out, lse, _ = _attention(exact[0], *wide, scale, causal)
            q, k, v = (context.put(x) for x in host[:3])
            out_array = context.rt.empty((N, Q, H, D), host[0].dtype)
            lse_array = context.poisoned(N, H, Q)
            flash_attention(context.rt, q, k, v, out_array, lse_array, dtype=dtype, scale=scale, causal=causal)
            found = values_of(context.rt.download(out_array), dtype).astype(np.float64)
            bound = (2 * _score_error(exact, scale, dtype) + 3 * ROUNDOFF[dtype] + 2.0**-20) * np.abs(exact[2]).max()
            error = larger(error, float(np.abs(found - out).max()) / bound)
            found_lse = context.rt.download(lse_array)
            finite = np.isfinite(lse)
            if not np.array_equal(np.isneginf(found_lse), ~finite):
                error = larger(error, math.inf)
            error = larger(error, float(np.abs(found_lse - lse)[finite].max(initial=0.0)) / (bound + 2.0**-20))
        return Outcome(error, 1.0)

    return run


def _run_backward(context: Context, dtype: str, host: Sequence[NDArray[Any]], scale: float, causal: bool) -> list[Any]:
    from cuda_kernels.flash_attention import flash_attention
    from cuda_kernels.flash_attention_backward import flash_attention_backward, flash_attention_backward_scratch_nbytes

    N, Q, H, D = host[0].shape
    q, k, v, dout = (context.put(x) for x in host)
    out, lse = context.rt.empty((N, Q, H, D), host[0].dtype), context.rt.empty((N, H, Q), np.float32)
    flash_attention(context.rt, q, k, v, out, lse, dtype=dtype, scale=scale, causal=causal)
    gradients = [context.poisoned(*x.shape) for x in host[:3]]
    scratch = context.rt.empty(flash_attention_backward_scratch_nbytes(N, Q, H) // 4, np.float32)
    flash_attention_backward(
        context.rt, q, k, v, out, lse, dout, *gradients, dtype=dtype, scale=scale, causal=causal, scratch=scratch
    )
    return [context.rt.download(x) for x in gradients]


def _check_backward(dtype: str) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        error = 0.0
        for *shape, causal in SMALL if context.small else SHAPES:
            *_, H, KH, D = shape
            host, (q, k, v, dout) = _inputs(context, dtype, tuple(shape))
            scale, group = D**-0.5, H // KH
            wide_k, wide_v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
            out, _, p = _attention(q, wide_k, wide_v, scale, causal)
            dp = np.einsum("nqhd,nkhd->nhqk", dout, wide_v)
            ds = p * (dp - (dout * out).sum(-1).transpose(0, 2, 1)[..., None]) * scale

            def per_kv_head(x: F64, heads: int = KH, group: int = group) -> F64:
                return x.reshape(*x.shape[:2], heads, group, x.shape[-1]).sum(3)

            exact = [
                np.einsum("nhqk,nkhd->nqhd", ds, wide_k),
                per_kv_head(np.einsum("nhqk,nqhd->nkhd", ds, q)),
                per_kv_head(np.einsum("nhqk,nqhd->nkhd", p, dout)),
            ]
            found = _run_backward(context, dtype, host, scale, causal)
            # Each factor of a product is rounded a few times; sums of random signs grow as their norm.
            relative = 2 * _score_error((q, k), scale, dtype) + 8 * ROUNDOFF[dtype] + 2.0**-18
            # Of one key the probability is 1 and dS is 0: its error is that of the terms that cancel in it.
            terms = scale * float(np.abs(dp).max())
            sizes = [terms * np.abs(k).max(), terms * np.abs(q).max(), np.abs(dout).max()]
            for one, right, size in zip(found, exact, sizes, strict=True):
                error = larger(error, float(np.abs(one - right).max()) / (relative * max(np.abs(right).max(), size)))
        return Outcome(error, 1.0)

    return run


def _check_same_bits(context: Context) -> Outcome:
    """Backward has no atomics: two runs, and a sequence alone or in a batch, give the same gradients."""
    shape = (2, 9, 9, 2, 1, 64) if context.small else (3, 190, 190, 4, 2, 64)
    host, _ = _inputs(context, "f32" if context.small else "bf16", shape)
    dtype = "f32" if context.small else "bf16"
    together = _run_backward(context, dtype, host, 0.125, True)
    again = _run_backward(context, dtype, host, 0.125, True)
    alone = _run_backward(context, dtype, [x[1:2] for x in host], 0.125, True)
    differences = sum(differing(a, b).error for a, b in zip(together, again, strict=True))
    differences += sum(differing(a[1:2], b).error for a, b in zip(together, alone, strict=True))
    return Outcome(differences, 0.0)


def checks() -> list[Check]:
    dtypes = ("f32", "f16", "bf16")
    return [
        *(Check("flash_attention", f"forward {dtype}", _check_forward(dtype)) for dtype in dtypes),
        *(Check("flash_attention", f"backward {dtype}", _check_backward(dtype)) for dtype in dtypes),
        Check("flash_attention", "backward: same bits again and alone", _check_same_bits),
    ]


# ---- timings


def _torch_tensors(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[Any]:
    import torch

    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    return [torch.randn(shape, device="cuda", dtype=torch.float32).to(kind) for shape in shapes]


def _time(backward: bool, dtype: str, N: int, L: int, H: int, D: int) -> Callable[[Context], Prepared]:
    scale = D**-0.5
    pairs = N * H * L * (L + 1) // 2
    flop = pairs * D * (10 if backward else 4)  # 5 or 2 products of 2 operations an element
    nbytes = N * L * H * D * {"f32": 4, "f16": 2, "bf16": 2}[dtype] * (5 if backward else 4)
    nbytes += N * L * H * D * 12 if backward else 0

    def sdpa() -> Sequence[Callable[[], Any]]:
        import torch

        tensors = _torch_tensors([(N, H, L, D)] * 4, dtype)
        q, k, v, dout = (x.requires_grad_(backward) for x in tensors)
        attention = torch.nn.functional.scaled_dot_product_attention
        if not backward:
            return [lambda: attention(q, k, v, is_causal=True)]
        out = attention(q, k, v, is_causal=True)
        return [lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)]

    def flash_attn() -> Sequence[Callable[[], Any]]:
        import torch
        from flash_attn import flash_attn_func

        tensors = _torch_tensors([(N, L, H, D)] * 4, dtype)
        q, k, v, dout = (x.requires_grad_(backward) for x in tensors)
        if not backward:
            return [lambda: flash_attn_func(q, k, v, causal=True)]
        out = flash_attn_func(q, k, v, causal=True)
        return [lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)]

    rivals: dict[str, Callable[[], Sequence[Callable[[], Any]]]] = {"torch SDPA": sdpa}
    if dtype != "f32":
        rivals["flash-attn"] = flash_attn

    def prepare(context: Context) -> Prepared:
        from cuda_kernels.flash_attention import flash_attention
        from cuda_kernels.flash_attention_backward import (
            flash_attention_backward,
            flash_attention_backward_scratch_nbytes,
        )

        rt = context.rt
        q, k, v, dout = (context.put(stored(context.normal(N, L, H, D), dtype)) for _ in range(4))
        out, lse = rt.empty((N, L, H, D), q.dtype), rt.empty((N, H, L), np.float32)

        def forward() -> None:
            flash_attention(rt, q, k, v, out, lse, dtype=dtype, scale=scale, causal=True)

        forward()
        work = TileWork(flop, nbytes, tensor=dtype != "f32")
        if not backward:
            return Prepared([forward], work, rivals)
        gradients = [rt.empty((N, L, H, D), np.float32) for _ in range(3)]
        scratch = rt.empty(flash_attention_backward_scratch_nbytes(N, L, H) // 4, np.float32)

        def launch() -> None:
            flash_attention_backward(
                rt, q, k, v, out, lse, dout, *gradients, dtype=dtype, scale=scale, causal=True, scratch=scratch
            )

        return Prepared([launch], work, rivals)

    return prepare


def timings() -> list[Timing]:
    named = [
        (False, "bf16", 4, 2048, 16, 128, True),
        (False, "f16", 4, 2048, 16, 64, False),
        (True, "bf16", 4, 2048, 16, 128, True),
        (True, "f16", 4, 2048, 16, 64, False),
        (False, "f32", 1, 2048, 16, 64, False),
        (True, "f32", 1, 1024, 16, 64, False),
    ]
    return [
        Timing(
            "flash_attention",
            f"{'backward' if backward else 'forward'} {dtype} N={N} L={L} H={H} D={D} causal",
            _time(backward, dtype, N, L, H, D),
            quick,
        )
        for backward, dtype, N, L, H, D, quick in named
    ]
