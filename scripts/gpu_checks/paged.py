"""Checks and timings of attention over the paged cache, against float64, PyTorch, flash-attn and FlashInfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.roofline import TileWork
from gpu_checks.suite import Check, Context, Outcome, Prepared, Timing, bf16_bits, bf16_values, differing, larger

__all__ = ["checks", "timings"]

DTYPES = ("f32", "f16", "bf16", "int8", "fp8")
ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "int8": 2.0**-11, "fp8": 2.0**-11}
ITEMSIZE = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1, "fp8": 1}
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Sequences of (keys, queries), over KH heads of a group's G query heads each."""

    seqs: tuple[tuple[int, int], ...]
    KH: int = 2
    G: int = 2
    D: int = 64
    block_size: int = 16
    window: int | None = None
    softcap: float = 0.0


@dataclass
class Cached:
    """A cache on the device, what it holds in float64, and the tables: shuffled, with blocks of NaN to spare."""

    layer: Any
    keys: list[F64]  # per sequence, (keys, KH, D)
    values: list[F64]
    tables: NDArray[np.int32]  # (S, MB)


def _e4m3(codes: NDArray[np.uint8]) -> F64:
    """8-bit floats, no NaN among them."""
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.int64) - 7))
    return np.where(codes >= 128, -magnitude, magnitude)


def _random_rows(context: Context, dtype: str, shape: tuple[int, ...]) -> tuple[NDArray[Any], Any, F64]:
    """(stored, scales or None, exact values) of random keys or values (n, KH, D)."""
    if dtype in ("int8", "fp8"):
        scales = context.rng.uniform(0.5, 2, shape[:-1]).astype(np.float32)
        if dtype == "int8":
            stored: NDArray[Any] = context.rng.integers(-127, 128, shape).astype(np.int8)
            scales /= np.float32(64)
            exact = stored.astype(np.float64)
        else:
            stored = context.rng.integers(0, 0x48, shape).astype(np.uint8)  # up to 4 in magnitude
            stored |= (context.rng.integers(0, 2, shape) << 7).astype(np.uint8)
            exact = _e4m3(stored)
        return stored, scales, exact * scales[..., None]
    values = context.normal(*shape)
    if dtype == "bf16":
        bits = bf16_bits(values)
        return bits, None, bf16_values(bits).astype(np.float64)
    if dtype == "f16":
        half = values.astype(np.float16)
        return half.view(np.uint16), None, half.astype(np.float64)
    return values, None, values.astype(np.float64)


def _fill_cache(context: Context, dtype: str, case: Case) -> Cached:
    from cuda_kernels.paged_cache import CACHE_DTYPES, PagedLayer

    size = case.block_size
    counts = [-(-keys // size) for keys, _ in case.seqs]
    num_blocks, width = sum(counts) + 3, max(counts) + 2
    ids = context.rng.permutation(num_blocks).astype(np.int32)
    tables = np.full((len(counts), width), 2**30, np.int32)  # what no query can see is no block at all
    shape = (num_blocks, case.KH, size, case.D)
    pair, scale_pair, exact = [], [], []
    poison = {"f32": np.nan, "f16": 0x7E00, "bf16": 0x7FC0, "int8": -128, "fp8": 0x7F}[dtype]
    for _ in range(2):
        pair.append(np.full(shape, poison, CACHE_DTYPES[dtype]))
        scale_pair.append(np.full(shape[:3], np.nan, np.float32))
        exact.append([_random_rows(context, dtype, (keys, case.KH, case.D)) for keys, _ in case.seqs])
    used = 0
    for s, (keys, _) in enumerate(case.seqs):
        tables[s, : counts[s]] = ids[used : used + counts[s]]
        used += counts[s]
        positions = np.arange(keys)
        blocks, slots = tables[s, positions // size], positions % size
        for array, scales, rows in zip(pair, scale_pair, exact, strict=True):
            array[blocks, :, slots] = rows[s][0]
            if rows[s][1] is not None:
                scales[blocks, :, slots] = rows[s][1]
    k, v = (context.put(x) for x in pair)
    scaled = dtype in ("int8", "fp8")
    k_scale, v_scale = (context.put(x) if scaled else None for x in scale_pair)
    layer = PagedLayer(dtype, k, v, k_scale, v_scale)
    return Cached(layer, [r[2] for r in exact[0]], [r[2] for r in exact[1]], tables)


def _attend(
    context: Context,
    case: Case,
    cached: Cached,
    q: NDArray[np.float32],
    seqs: Sequence[tuple[int, int]],
    extra: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Runs one step in which sequence s has keys and queries as given; q (T, H, D). Returns (out, lse)."""
    from cuda_kernels.attention_inputs import NO_WINDOW, AttentionInputs
    from cuda_kernels.paged_attention import paged_attention, paged_attention_scratch_nbytes

    T, H, D = q.shape
    lens = np.array([keys for keys, _ in seqs], np.int32)
    starts = np.concatenate([[0], np.cumsum([n for _, n in seqs])]).astype(np.int32)
    out, lse = context.poisoned(T, H, D), context.poisoned(T, H)
    most_keys = int(lens.max()) + extra
    scratch_nbytes = paged_attention_scratch_nbytes(T, H, D, most_keys, num_seqs=len(seqs), num_kv_heads=case.KH)
    inputs = AttentionInputs(
        q=context.put(q),
        layer=cached.layer,
        cu_seqlens_q=context.put(starts),
        seq_lens=context.put(lens),
        block_tables=context.put(cached.tables[: len(seqs)]),
        scale=D**-0.5,
        window=NO_WINDOW if case.window is None else case.window,
        softcap=case.softcap,
        out=out,
        lse=lse,
        max_query_len=max(n for _, n in seqs),
        max_seq_len=most_keys,
        scratch=context.rt.empty(scratch_nbytes, np.uint8),
    )
    paged_attention(context.rt, inputs)
    return context.rt.download(out), context.rt.download(lse)


def _exact(case: Case, cached: Cached, q: NDArray[np.float32], s: int, first: int) -> tuple[F64, F64, float]:
    """(out (n, H, D), lse (n, H), the largest sum of |q||k| scaled) of sequence s, its n queries from `first` on."""
    keys, values = (np.repeat(x[s], case.G, axis=1) for x in (cached.keys, cached.values))  # (keys, H, D)
    q64 = q.astype(np.float64)
    scale = case.D**-0.5
    scores = scale * np.einsum("nhd,khd->nhk", q64, keys)
    magnitude = float((scale * np.einsum("nhd,khd->nhk", np.abs(q64), np.abs(keys))).max())
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    p, j = first + np.arange(len(q))[:, None], np.arange(len(keys))[None, :]
    hidden = j > p if case.window is None else (j > p) | (j <= p - case.window)
    scores = np.where(hidden[:, None, :], -np.inf, scores)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("nhk,khd->nhd", weights / total, values), (most + np.log(total))[..., 0], magnitude


def _check(dtype: str, cases: Callable[[Context], Sequence[Case]]) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        error, roundoff = 0.0, ROUNDOFF[dtype]
        for case in cases(context):
            cached = _fill_cache(context, dtype, case)
            T, H = sum(n for _, n in case.seqs), case.KH * case.G
            q = context.normal(T, H, case.D)
            out, lse = _attend(context, case, cached, q, case.seqs)
            start = 0
            for s, (keys, n) in enumerate(case.seqs):
                rows = slice(start, start + n)
                right, right_lse, magnitude = _exact(case, cached, q[rows], s, keys - n)
                of_score = magnitude * (2 * roundoff + (case.D + 8) * 2.0**-24) + 2.0**-21
                bound = (2 * of_score + 4 * roundoff + keys * 2.0**-24 + 2.0**-20) * np.abs(cached.values[s]).max()
                lse_bound = of_score + 2 * roundoff + keys * 2.0**-24 + 2.0**-19
                error = larger(error, float(np.abs(out[rows] - right).max()) / bound)
                lse_error = np.abs(lse[rows] - right_lse) / (lse_bound + 2.0**-23 * np.abs(right_lse))
                error = larger(error, float(lse_error.max()))
                start += n
        return Outcome(error, 1.0)

    return run


def _prefill_cases(context: Context) -> Sequence[Case]:
    if context.small:
        return (Case(((19, 19), (5, 2)), KH=1),)
    return (
        Case(((1, 1), (17, 17), (300, 41), (700, 130)), G=3),
        Case(((257, 257), (64, 63)), KH=1, G=8, D=128),
        Case(((600, 600),), KH=2, G=4, D=128, window=100),
        Case(((130, 130), (33, 1)), G=1, D=96, block_size=32),
        Case(((130, 130),), G=1, D=80, softcap=20.0, block_size=8),
        Case(((290, 290),), KH=1, G=2, D=256),
    )


def _decode_cases(context: Context) -> Sequence[Case]:
    if context.small:
        return (Case(((20, 1), (3, 1)), KH=1),)
    return (
        Case(((1, 1), (255, 1), (256, 1), (257, 1), (1000, 1))),
        Case(((4000, 1), (7, 1)), KH=2, G=8, D=128),
        Case(((700, 1),), G=3, window=300),
        Case(((513, 1),), KH=1, G=1, D=256),
        Case(((300, 1),), KH=4, G=1, D=80, block_size=32),
    )


def _check_same_bits(dtype: str, D: int) -> Callable[[Context], Outcome]:
    """Prefill whole, in chunks, and token by token (decode): the same rows."""

    def run(context: Context) -> Outcome:
        length, chunks = (21, (1, 8)) if context.small else (600, (1, 7, 64, 255))
        case = Case(((length, length), (length, length)), D=D)
        cached = _fill_cache(context, dtype, case)
        q = context.normal(2 * length, case.KH * case.G, D)
        out, lse = _attend(context, case, cached, q, case.seqs)
        whole, whole_lse = out[:length], lse[:length]
        differences = 0.0
        starts = (0, 1, length - 1) if context.small else (0, 15, 16, 255, 256, 257, 511, 512, length - 1)
        for chunk in chunks:
            for first in starts if chunk == 1 else range(0, length, chunk):
                end = min(first + chunk, length)
                part, part_lse = _attend(context, case, cached, q[first:end], [(end, end - first)], extra=chunk)
                differences += differing(part, whole[first:end]).error + differing(part_lse, whole_lse[first:end]).error
        return Outcome(differences, 0.0)

    return run


def _check_padding(context: Context) -> Outcome:
    """Sequences of no keys come out as zeros, and change nothing for the others."""
    case = Case(((20, 1), (33, 1)), KH=1)
    cached = _fill_cache(context, "bf16", case)
    q = context.normal(4, 2, case.D)
    cached.tables = np.concatenate([cached.tables, np.full((2, cached.tables.shape[1]), 2**30, np.int32)])
    out, lse = _attend(context, case, cached, q, [*case.seqs, (0, 1), (0, 1)])
    alone, _ = _attend(context, case, cached, q[:2], case.seqs)
    padding = np.count_nonzero(out[2:]) + np.count_nonzero(~np.isneginf(lse[2:]))
    return Outcome(padding + differing(out[:2], alone).error, 0.0)


def checks() -> list[Check]:
    return [
        *(Check("paged_attention", f"prefill {dtype}", _check(dtype, _prefill_cases)) for dtype in DTYPES),
        *(Check("paged_attention", f"decode {dtype}", _check(dtype, _decode_cases)) for dtype in DTYPES),
        *(
            Check("paged_attention", f"{dtype} D={D}: prefill = chunks = decode, same bits", _check_same_bits(dtype, D))
            for dtype in DTYPES
            for D in (64, 128)
        ),
        Check("paged_attention", "padding sequences", _check_padding),
    ]


# ---- timings


@dataclass(frozen=True)
class Load:
    """S sequences of L keys, the last n of them queries."""

    dtype: str
    S: int
    L: int
    n: int
    H: int = 32
    KH: int = 8
    D: int = 128

    @property
    def work(self) -> TileWork:
        pairs = self.S * sum(range(self.L - self.n + 1, self.L + 1))
        queries = 8 * self.S * self.n * self.H * self.D  # q and out, float32
        cache = 2 * self.S * self.L * self.KH * self.D * ITEMSIZE[self.dtype]
        cache += 8 * self.S * self.L * self.KH if self.dtype in ("int8", "fp8") else 0
        return TileWork(4.0 * self.H * self.D * pairs, queries + cache, tensor=self.dtype != "f32")

    def rivals(self, rotations: int) -> dict[str, Callable[[], Sequence[Callable[[], Any]]]]:
        """Of the 16-bit types. PyTorch's keys are contiguous, not paged, and it has no causal mask at an offset."""
        if self.dtype not in ("f16", "bf16"):
            return {}
        made: dict[str, Callable[[], Callable[[], Any]]] = {
            "flash-attn": self._flash_attn,
            "FlashInfer": self._flashinfer,
        }
        if self.n in (1, self.L):
            made = {"torch SDPA": self._sdpa, **made}
        return {name: partial(_repeated, make, rotations) for name, make in made.items()}

    def _kind(self) -> Any:
        import torch

        return torch.float16 if self.dtype == "f16" else torch.bfloat16

    def _sdpa(self) -> Callable[[], Any]:
        import torch

        def tensor(heads: int, length: int) -> Any:
            return torch.randn(self.S, heads, length, self.D, device="cuda", dtype=self._kind())

        q, k, v = tensor(self.H, self.n), tensor(self.KH, self.L), tensor(self.KH, self.L)
        attention = torch.nn.functional.scaled_dot_product_attention
        causal = self.n == self.L
        return lambda: attention(q, k, v, is_causal=causal, enable_gqa=True)

    def _flash_attn(self) -> Callable[[], Any]:
        import torch
        from flash_attn import flash_attn_with_kvcache

        size = 256
        blocks = self.S * -(-self.L // size)
        k, v = (torch.randn(blocks, size, self.KH, self.D, device="cuda", dtype=self._kind()) for _ in range(2))
        q = torch.randn(self.S, self.n, self.H, self.D, device="cuda", dtype=self._kind())
        table = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(self.S, -1)
        lens = torch.full((self.S,), self.L, device="cuda", dtype=torch.int32)
        return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, block_table=table, causal=True)

    def _flashinfer(self) -> Callable[[], Any]:
        import flashinfer
        import torch

        size = 16
        pages = -(-self.L // size)
        cache = torch.randn(self.S * pages, 2, size, self.KH, self.D, device="cuda", dtype=self._kind())
        q = torch.randn(self.S * self.n, self.H, self.D, device="cuda", dtype=self._kind())
        workspace = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)

        def integers(values: Any) -> Any:
            return torch.as_tensor(values, device="cuda", dtype=torch.int32)

        indptr = integers(np.arange(self.S + 1) * pages)
        indices = torch.randperm(self.S * pages, device="cuda", dtype=torch.int32)
        last = integers(np.full(self.S, self.L - (pages - 1) * size))
        if self.n == 1:
            decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
            decode.plan(indptr, indices, last, self.H, self.KH, self.D, size, data_type=self._kind())
            return lambda: decode.run(q, cache)
        prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        starts = integers(np.arange(self.S + 1) * self.n)
        prefill.plan(
            starts, indptr, indices, last, self.H, self.KH, self.D, size, causal=True, q_data_type=self._kind()
        )
        return lambda: prefill.run(q, cache)


def _repeated(make: Callable[[], Callable[[], Any]], count: int) -> list[Callable[[], Any]]:
    """So many launches, each on inputs of its own."""
    return [make() for _ in range(count)]


def _time(load: Load) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        from cuda_kernels.attention_inputs import AttentionInputs
        from cuda_kernels.paged_attention import paged_attention, paged_attention_scratch_nbytes
        from cuda_kernels.paged_cache import CACHE_DTYPES, PagedLayer

        rt, size = context.rt, 16
        T, pages = load.S * load.n, -(-load.L // size)
        shape = (load.S * pages, load.KH, size, load.D)
        row = _random_rows(context, load.dtype, (4096, load.D))
        values = np.resize(row[0], shape).astype(CACHE_DTYPES[load.dtype], copy=False)
        factors = np.resize(row[1], shape[:3]) if row[1] is not None else None
        rotations = context.rotations(2 * values.nbytes)
        scratch_nbytes = paged_attention_scratch_nbytes(
            T, load.H, load.D, load.L, num_seqs=load.S, num_kv_heads=load.KH, streams=False
        )

        def layer() -> PagedLayer:
            k_scale, v_scale = (None if factors is None else context.put(factors) for _ in range(2))
            return PagedLayer(load.dtype, context.put(values), context.put(values), k_scale, v_scale)

        first = AttentionInputs(
            q=context.put(context.normal(T, load.H, load.D)),
            layer=layer(),
            cu_seqlens_q=context.put(np.arange(load.S + 1, dtype=np.int32) * np.int32(load.n)),
            seq_lens=context.put(np.full(load.S, load.L, np.int32)),
            block_tables=context.put(context.rng.permutation(shape[0]).astype(np.int32).reshape(load.S, pages)),
            scale=load.D**-0.5,
            out=rt.empty((T, load.H, load.D), np.float32),
            lse=rt.empty((T, load.H), np.float32),
            max_query_len=load.n,
            max_seq_len=load.L,
            scratch=rt.empty(scratch_nbytes, np.uint8),
        )
        inputs = [first, *(replace(first, layer=layer()) for _ in range(rotations - 1))]
        return Prepared([partial(paged_attention, rt, one) for one in inputs], load.work, load.rivals(rotations))

    return prepare


def timings() -> list[Timing]:
    loads = [
        (Load("bf16", 1, 4096, 4096), True),
        (Load("f16", 1, 4096, 4096), False),
        (Load("bf16", 4, 1024, 1024), False),
        (Load("bf16", 1, 8192, 512), False),
        (Load("int8", 1, 4096, 4096), False),
        (Load("f32", 1, 2048, 2048), False),
        (Load("bf16", 1, 8192, 1), False),
        (Load("bf16", 16, 8192, 1), True),
        (Load("bf16", 64, 1024, 1), False),
        (Load("f16", 16, 8192, 1), False),
        (Load("int8", 16, 8192, 1), False),
        (Load("fp8", 16, 8192, 1), True),
        (Load("f32", 16, 4096, 1), False),
    ]
    return [
        Timing(
            "paged_attention",
            f"{'decode' if load.n == 1 else 'prefill'} {load.dtype} S={load.S} L={load.L} n={load.n} "
            f"H={load.H} KH={load.KH} D={load.D}",
            _time(load),
            quick,
        )
        for load, quick in loads
    ]
