"""What the tests of paged attention share: random sequences in a cache full of traps, and answers in float64.

The cache's spare blocks, and the slots past the end of a sequence's last block, hold NaN. Tables are shuffled, and
entries that no query can see are block ids that do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.attention_inputs import NO_WINDOW, AttentionInputs
from cuda_kernels.launch import Runtime
from cuda_kernels.paged_attention import paged_attention, paged_attention_scratch_nbytes
from cuda_kernels.paged_cache import CACHE_DTYPES, SCALED_DTYPES, PagedLayer

F32, F64 = NDArray[np.float32], NDArray[np.float64]

UNIT_ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of rounding to nearest."""

_POISON = {"f32": np.nan, "f16": 0x7E00, "bf16": 0x7FC0, "int8": -128, "fp8": 0x7F}
NO_BLOCK = 2**31 - 1


# ---- stored values


def to_bf16(x: F32) -> NDArray[np.uint16]:
    """Round to nearest even, of finite numbers."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_e4m3(bits: NDArray[np.uint8]) -> F64:
    """OCP e4m3: sign, 4 exponent bits of bias 7, 3 bits of fraction."""
    exponent, fraction = (bits >> 3 & 15).astype(np.int64), (bits & 7) / 8.0
    magnitude = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    return np.where(bits & 0x80, -magnitude, magnitude)


def rounded_to(x: F64 | F32, dtype: str) -> F64:
    """x (taken as float32) rounded to a 16-bit dtype, or f32, as float64."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "f16":
        return x.astype(np.float16).astype(np.float64)
    if dtype == "bf16":
        return from_bf16(to_bf16(x)).astype(np.float64)
    return x.astype(np.float64)


@dataclass(frozen=True)
class Stored:
    """Rows (n, KH, D) as a cache keeps them, their scales (n, KH) if any, and what they stand for."""

    bits: NDArray[Any]
    scale: F32 | None
    exact: F64

    @staticmethod
    def random(rng: np.random.Generator, dtype: str, shape: tuple[int, int, int]) -> Stored:
        normal = rng.standard_normal(shape).astype(np.float32)
        if dtype == "f32":
            return Stored(normal, None, normal.astype(np.float64))
        if dtype == "f16":
            return Stored(normal.astype(np.float16).view(np.uint16), None, rounded_to(normal, "f16"))
        if dtype == "bf16":
            return Stored(to_bf16(normal), None, rounded_to(normal, "bf16"))
        # every stored bit pattern that stands for a number, and scales over three powers of ten
        scale = (10.0 ** rng.uniform(-4.5, -1.5, shape[:2])).astype(np.float32)
        if dtype == "int8":
            bits: NDArray[Any] = rng.integers(-127, 128, shape).astype(np.int8)
            value = bits.astype(np.float64)
        else:
            bits = rng.integers(0, 127, shape).astype(np.uint8) | (rng.integers(0, 2, shape) << 7).astype(np.uint8)
            value = from_e4m3(bits)
        return Stored(bits, scale, value * scale[..., None].astype(np.float64))


# ---- sequences and their cache


@dataclass(frozen=True)
class Span:
    """The queries at positions first to end - 1 of a sequence, with seq_len = end; sequence None is padding."""

    sequence: int | None
    first: int
    end: int
    window: int = NO_WINDOW  # of a sequence that streams
    sinks: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one layer's attention."""

    scale: float = 0.125
    window: int = NO_WINDOW
    softcap: float = 0.0


@dataclass
class Sequences:
    """Keys, values and queries of some sequences, one row for each position."""

    dtype: str
    keys: list[Stored]
    values: list[Stored]
    queries: list[F32]  # (n, H, D)
    sink_queries: list[F32] = field(default_factory=list)

    @staticmethod
    def random(
        rng: np.random.Generator, dtype: str, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int
    ) -> Sequences:
        def stored() -> list[Stored]:
            return [Stored.random(rng, dtype, (n, kv_heads, head_dim)) for n in lengths]

        def queries() -> list[F32]:
            return [rng.standard_normal((n, heads, head_dim)).astype(np.float32) for n in lengths]

        return Sequences(dtype, stored(), stored(), queries(), queries())

    def share_prefix(self, source: int, target: int, length: int) -> None:
        """Makes the first keys and values of two sequences the same."""
        for rows in (self.keys, self.values):
            a, b = rows[source], rows[target]
            b.bits[:length], b.exact[:length] = a.bits[:length], a.exact[:length]
            if a.scale is not None and b.scale is not None:
                b.scale[:length] = a.scale[:length]

    @property
    def num_kv_heads(self) -> int:
        return int(self.keys[0].bits.shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.keys[0].bits.shape[2])


@dataclass
class PagedSequences:
    """Sequences in a device's cache."""

    runtime: Runtime
    sequences: Sequences
    layer: PagedLayer
    tables: list[NDArray[np.int32]]

    @staticmethod
    def create(
        runtime: Runtime,
        sequences: Sequences,
        rng: np.random.Generator,
        block_size: int = 16,
        shared: tuple[int, int, int] | None = None,
    ) -> PagedSequences:
        """Fills a new cache. shared = (source, target, length): the target uses the source's first blocks."""
        lengths = [len(rows.bits) for rows in sequences.keys]
        needed = [-(-n // block_size) for n in lengths]
        num_blocks = sum(needed) + 3
        ids = rng.permutation(num_blocks).astype(np.int32)
        tables = []
        for count in needed:
            tables.append(ids[:count].copy())
            ids = ids[count:]
        if shared is not None:
            source, target, length = shared
            sequences.share_prefix(source, target, length)
            tables[target][: length // block_size] = tables[source][: length // block_size]

        def fill(rows: list[Stored]) -> tuple[Any, Any]:
            kv_heads, head_dim = rows[0].bits.shape[1:]
            cache = np.full((num_blocks, kv_heads, block_size, head_dim), _POISON[sequences.dtype])
            cache = cache.astype(CACHE_DTYPES[sequences.dtype])
            scales = np.full((num_blocks, kv_heads, block_size), np.nan, np.float32)
            for table, stored in zip(tables, rows, strict=True):
                at = np.arange(len(stored.bits))
                cache[table[at // block_size], :, at % block_size] = stored.bits
                if stored.scale is not None:
                    scales[table[at // block_size], :, at % block_size] = stored.scale
            scaled = sequences.dtype in SCALED_DTYPES
            return runtime.from_host(cache), runtime.from_host(scales) if scaled else None

        (k, k_scale), (v, v_scale) = fill(sequences.keys), fill(sequences.values)
        layer = PagedLayer(sequences.dtype, k, v, k_scale, v_scale)
        return PagedSequences(runtime, sequences, layer, tables)

    def inputs(self, spans: Sequence[Span], options: Options, **changes: Any) -> AttentionInputs:
        """The batch of these spans. Results are full of NaN bits until they are written."""
        rt, data = self.runtime, self.sequences
        heads, head_dim = data.queries[0].shape[1:]

        def rows(of: list[F32]) -> Any:
            parts = [
                np.full((span.end - span.first, heads, head_dim), np.nan, np.float32)
                if span.sequence is None
                else of[span.sequence][span.first : span.end]
                for span in spans
            ]
            return rt.from_host(np.concatenate(parts))

        counts = [span.end - span.first for span in spans]
        seq_lens = [0 if span.sequence is None else span.end for span in spans]
        block_size = self.layer.block_size
        tables = np.full((len(spans), max(map(len, self.tables)) + 1), NO_BLOCK, np.int32)
        for row, span, seq_len in zip(tables, spans, seq_lens, strict=True):
            if span.sequence is not None:
                count = -(-seq_len // block_size)
                row[:count] = self.tables[span.sequence][:count]
                row[: self._unseen_blocks(span, options)] = NO_BLOCK
                sink_blocks = -(-span.sinks // block_size) if span.window < options.window else 0
                row[:sink_blocks] = self.tables[span.sequence][:sink_blocks]
        streams = any(span.window != NO_WINDOW for span in spans)
        # for any form: as if every sequence brought as many queries as the longest
        scratch_nbytes = paged_attention_scratch_nbytes(len(spans) * max(counts), heads, head_dim, max(*seq_lens, 1))

        def column(values: Sequence[int]) -> Any:
            return rt.from_host(np.array(values, np.int32))

        q = rows(data.queries)
        inputs = AttentionInputs(
            q=q,
            layer=self.layer,
            cu_seqlens_q=column([0, *np.cumsum(counts)]),
            seq_lens=column(seq_lens),
            block_tables=rt.from_host(tables),
            windows=column([span.window for span in spans]) if streams else None,
            num_sinks=column([span.sinks for span in spans]) if streams else None,
            sink_q=rows(data.sink_queries) if streams else None,
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            out=rt.from_host(np.full(q.shape, np.nan, np.float32)),
            lse=rt.from_host(np.full(q.shape[:2], np.nan, np.float32)),
            max_query_len=max(counts),
            max_seq_len=max(*seq_lens, 1),
            scratch=rt.empty(scratch_nbytes, np.uint8),
        )
        return replace(inputs, **changes)

    def _unseen_blocks(self, span: Span, options: Options) -> int:
        """Blocks before every query's window."""
        lowest, _ = visible(span.first, span, options)
        return lowest // self.layer.block_size

    def run(
        self,
        spans: Sequence[Span],
        options: Options,
        attention: Callable[[Runtime, AttentionInputs], None] = paged_attention,
        **changes: Any,
    ) -> tuple[F32, F32]:
        """out (T, H, D) and lse (T, H) of a batch."""
        inputs = self.inputs(spans, options, **changes)
        attention(self.runtime, inputs)
        return self.runtime.download(inputs.out), self.runtime.download(inputs.lse)


# ---- the answer


def visible(position: int, span: Span, options: Options) -> tuple[int, int]:
    """(first key of the window, sinks that are apart from it) of a query."""
    window, sinks = options.window, 0
    if span.window < window:
        window, sinks = span.window, span.sinks
    if position < sinks + window:
        return 0, 0
    return position - window + 1, sinks


@dataclass(frozen=True)
class Answer:
    """Exact results for queries as given, and what bounds need.

    Attributes:
        out, lse: (n, H, D), (n, H)
        spread: (n, H, D), sum of w |v| over the keys with weights w that sum to one
        value_sum: (n, H, D), sum of |v|
        score_size: (n, H), the largest scale * sum |q| |k|
        num_keys: (n,)
    """

    out: F64
    lse: F64
    spread: F64
    value_sum: F64
    score_size: F64
    num_keys: NDArray[np.int64]


def exact_attention(
    sequences: Sequences,
    span: Span,
    options: Options,
    query_of: Callable[[F32], F64] = lambda q: q.astype(np.float64),
) -> Answer:
    """The definition in float64, one query at a time; query_of may round the queries as a kernel does."""
    assert span.sequence is not None
    k, v = sequences.keys[span.sequence].exact, sequences.values[span.sequence].exact
    q, sink_q = query_of(sequences.queries[span.sequence]), query_of(sequences.sink_queries[span.sequence])
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    rows = []
    for position in range(span.first, span.end):
        lowest, sinks = visible(position, span, options)
        parts = [(q, np.arange(lowest, position + 1))]
        if sinks:
            parts.insert(0, (sink_q, np.arange(sinks)))
        keys = np.concatenate([at for _, at in parts])
        raw = np.concatenate([np.einsum("hd,khd->kh", query[position], k[at]) for query, at in parts]) * options.scale
        size = np.concatenate([np.einsum("hd,khd->kh", abs(query[position]), abs(k[at])) for query, at in parts])
        scores = options.softcap * np.tanh(raw / options.softcap) if options.softcap else raw
        top = scores.max(0)
        weights = np.exp(scores - top)
        total = weights.sum(0)
        weights /= total
        rows.append(
            (
                np.einsum("kh,khd->hd", weights, v[keys]),
                top + np.log(total),
                np.einsum("kh,khd->hd", weights, abs(v[keys])),
                abs(v[keys]).sum(0),
                size.max(0) * options.scale,
                len(keys),
            )
        )
    return Answer(*(np.array(column) for column in zip(*rows, strict=True)))
