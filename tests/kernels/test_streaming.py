"""StreamingLLM in paged_attention: sinks seen by a second query, freed blocks, the same bits however it is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray

from tests.kernels.kernel_cases import F64, Sequences, rounded, worst
from tinyllm.backends.base import NO_WINDOW, Backend, Batch
from tinyllm.backends.cpu import CpuBackend

NONE = (0, NO_WINDOW)  # sinks and window of a sequence that does not stream

MASKS = [  # sinks, window
    (0, 1), (0, 33), (1, 1), (1, 40), (4, 60), (4, 252), (4, 300), (16, 64), (17, 47), (64, 3), (255, 1), (256, 1),
    (256, 257), (256, 300), NONE,
]  # fmt: skip


@dataclass
class Streams:
    """Sequences in a cache, with the sinks and the window of each, and random queries for the sinks."""

    sequences: Sequences
    sink_queries: list[NDArray[np.float32]]
    masks: list[tuple[int, int]]
    cache: Any
    tables: NDArray[np.int32]
    block_size: int

    @staticmethod
    def random(
        rng: np.random.Generator, backend: Backend, lengths: list[int], masks: list[tuple[int, int]], *,
        heads: int = 3, kv_heads: int = 1, head_dim: int = 24, block_size: int = 16, dtype: str = "f32",
    ) -> Streams:  # fmt: skip
        sequences = Sequences.random(rng, lengths, heads, kv_heads, head_dim)
        sink_queries = [np.float32(2) * rng.standard_normal(q.shape, np.float32) for q in sequences.queries]
        cache, tables = sequences.fill(backend, block_size, dtype, rng)
        return Streams(sequences, sink_queries, masks, cache, tables, block_size)

    def lowest(self, s: int, p: int) -> int:
        """The first key that the query at p sees with q."""
        sinks, window = self.masks[s]
        return 0 if p < sinks + window else p - window + 1

    def freed(self, s: int, p: int) -> NDArray[np.int64]:
        """Blocks of sequence s that queries from p on do not see."""
        first = -(-self.masks[s][0] // self.block_size)
        return np.arange(first, max(first, self.lowest(s, p) // self.block_size))

    def attend(
        self, backend: Backend, spans: list[tuple[int, int, int]], *, freed_entry: int | None = None, **options: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Spans are (s, first, end). Entries of freed blocks become freed_entry, or a block full of NaN."""
        q, batch = self.sequences.batch(spans, self.tables)
        if freed_entry is None:
            owned = self.tables[self.tables < 2**31 - 1]
            freed_entry = int(np.setdiff1d(np.arange(len(owned) + 3), owned)[0])
        tables = batch.block_tables.copy()
        for row, (s, first, _) in zip(tables, spans, strict=True):
            row[self.freed(s, first)] = freed_entry
        sinks, windows = (np.array([self.masks[s][i] for s, _, _ in spans], np.int32) for i in (0, 1))
        sink_q = np.concatenate([self.sink_queries[s][first:end] for s, first, end in spans])
        batch = replace(batch, block_tables=tables, windows=windows, num_sinks=sinks, sink_positions=batch.positions)
        options = {"scale": 0.2, "sink_q": sink_q} | options
        return backend.paged_attention(q, self.cache.layers[0], batch, **options)

    def exact(self, s: int, dtype: str, scale: float, softcap: float) -> tuple[F64, F64]:
        """Attention of all positions of sequence s in float64, with dense scores: out (n, H, D), lse (n, H)."""
        x = self.sequences
        q, sink_q = x.queries[s].astype(np.float64), self.sink_queries[s].astype(np.float64)
        group = q.shape[1] // x.keys[s].shape[1]
        k, v = (np.repeat(rounded(a[s], dtype), group, axis=1).astype(np.float64) for a in (x.keys, x.values))
        sinks, window = self.masks[s]
        p, j = np.arange(len(q))[:, None], np.arange(len(q))[None]
        evicting = p >= sinks + window
        by_sink_q = evicting & (j < sinks)
        visible = (j <= p) & (by_sink_q | ~evicting | (j > p - window))
        scores = np.where(by_sink_q, np.einsum("qhd,khd->hqk", sink_q, k), np.einsum("qhd,khd->hqk", q, k)) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        probs = np.exp(scores - top)
        total = probs.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", probs / total, v), (top + np.log(total))[..., 0].T


SHAPES = [  # heads, kv heads, head dim, block size, dtype, softcap
    (3, 1, 24, 16, "f32", 0.0),
    (2, 2, 64, 32, "f16", 5.0),
    (6, 2, 40, 16, "bf16", 0.0),
    (40, 1, 16, 48, "f32", 2.0),
    (6, 2, 20, 32, "int8", 5.0),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size", "dtype", "softcap"), SHAPES)
def test_as_exact_as_the_reference(heads, kv_heads, head_dim, block_size, dtype, softcap, cpu, reference):
    """Queries around the first that evicts, around later split borders, and the last; all masks in one batch."""
    masks = MASKS if heads < 8 else MASKS[4:8]
    lengths = [max(700, sum(mask) + 20) if mask != NONE else 700 for mask in masks]
    spans = []
    for s, (n, mask) in enumerate(zip(lengths, masks, strict=True)):
        start = 500 if mask == NONE else sum(mask)
        spans += [(s, max(0, start - 3), start + 3), (s, 510, 514), (s, n - 1, n)]
    options = {"scale": head_dim**-0.5, "softcap": softcap}
    results = []
    for backend in (cpu, reference):
        streams = Streams.random(
            np.random.default_rng(7), backend, lengths, masks,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype,
        )  # fmt: skip
        results.append(streams.attend(backend, spans, **options))
    exact = [streams.exact(s, dtype, head_dim**-0.5, softcap) for s in range(len(masks))]
    for i in range(2):  # out, lse
        expected = np.concatenate([exact[s][i][first:end] for s, first, end in spans])
        error, baseline = (worst(result[i], expected) for result in results)
        assert baseline <= 2e-6 * np.abs(expected).max()
        assert error <= 3 * baseline + 2e-7 * np.abs(expected).max()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [(3, 1, 24, "f32"), (8, 2, 24, "bf16"), (6, 2, 32, "bf16"), (3, 1, 24, "int8")],
)
def test_same_bits_however_it_is_cut(mask, heads, kv_heads, head_dim, dtype, cpu, single, rng):
    n = 600
    streams = Streams.random(rng, cpu, [n], [mask], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    whole = streams.attend(cpu, [(0, 0, n)])
    assert all(np.isfinite(result).all() for result in whole)

    def check(backend, first, end):
        for result, expected in zip(streams.attend(backend, [(0, first, end)]), whole, strict=True):
            assert result.tobytes() == expected[first:end].tobytes()

    check(single, 0, n)
    start = min(sum(mask), n - 3)  # the first query that evicts
    borders = {start + d for d in (-2, -1, 0, 1, 2)} | {15, 16, 255, 256, 257, 511, 512, n - 1}
    for p in sorted(b for b in borders if 0 <= b < n):
        for backend in (cpu, single, CpuBackend(3)):  # split-parallel decode, and not
            check(backend, p, p + 1)
    for chunk in (7, 15, 16, 17):
        for first in range(0, n, chunk):
            check(cpu, first, min(first + chunk, n))
    for first, end in ((start - 1, start + 1), (start, start + 1), (start, n), (start - 1, n), (0, start)):
        check(cpu, max(first, 0), end)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sinks=st.integers(0, 256), window=st.integers(1, 400), first=st.integers(0, 698), count=st.integers(1, 60),
    block_size=st.sampled_from([16, 32, 80]),
)  # fmt: skip
def test_any_mask_and_chunk_as_a_query_at_a_time(sinks, window, first, count, block_size, cpu, single):
    rng, end = np.random.default_rng(3), min(700, first + count)
    streams = Streams.random(rng, cpu, [700], [(sinks, window)], block_size=block_size, head_dim=16)
    chunk = streams.attend(cpu, [(0, first, end)])
    for p in {first, (first + end) // 2, end - 1}:
        for backend in (cpu, single):
            for result, expected in zip(streams.attend(backend, [(0, p, p + 1)]), chunk, strict=True):
                assert result.tobytes() == expected[p - first : p - first + 1].tobytes()
    assert np.isfinite(chunk[0]).all()


def test_neighbours_change_nothing(cpu, single, reference):
    """Streaming sequences and others in one batch: the others as without any streaming."""
    masks = [NONE, (4, 60), (0, 33), NONE, (256, 44), (17, 500)]
    for backend in (cpu, single, reference):
        small = backend is reference
        streams = Streams.random(np.random.default_rng(5), backend, [600] * 6, masks, head_dim=8 if small else 24)
        decode = [(s, 599 - s, 600 - s) for s in range(6)]
        mixed = [(s, 290, 310 - 3 * s) for s in range(6)]
        for spans in (decode, decode[::-1], decode[:2], decode * 5, mixed, [*mixed, *decode]):
            spans = spans[:6] if small else spans
            outs, lses = streams.attend(backend, spans)
            at = 0
            for span in spans:
                out, lse = streams.attend(backend, [span])
                if masks[span[0]] == NONE:
                    q, batch = streams.sequences.batch([span], streams.tables)
                    plain = backend.paged_attention(q, streams.cache.layers[0], batch, scale=0.2)
                    assert out.tobytes() == plain[0].tobytes()
                    assert lse.tobytes() == plain[1].tobytes()
                assert outs[at : at + len(out)].tobytes() == out.tobytes()
                assert lses[at : at + len(out)].tobytes() == lse.tobytes()
                at += len(out)


@pytest.mark.parametrize("layer_window", [1, 59, 60, 61, 64, 100, 10_000])
def test_the_layers_own_window_wins_where_it_is_no_wider(layer_window, cpu, single, reference):
    """Then the layer has no sinks either, and needs no sink_q; else its own window does not matter."""
    for backend in (cpu, single, reference):
        streams = Streams.random(np.random.default_rng(9), backend, [330], [(4, 60)], heads=2)
        for span in [(0, 50, 80), (0, 329, 330)]:
            q, batch = streams.sequences.batch([span], streams.tables)
            if layer_window <= 60:
                expected = backend.paged_attention(q, streams.cache.layers[0], batch, scale=0.2, window=layer_window)
                found = streams.attend(backend, [span], window=layer_window, sink_q=None)
            else:
                expected = streams.attend(backend, [span])
                found = streams.attend(backend, [span], window=layer_window)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


def test_no_sinks_need_no_second_query(cpu, reference):
    for backend in (cpu, reference):
        streams = Streams.random(np.random.default_rng(2), backend, [100, 40], [(0, 33), NONE])
        spans = [(0, 99, 100), (1, 30, 40)]
        expected = streams.attend(backend, spans)
        found = streams.attend(backend, spans, sink_q=None)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
        sinks = replace(streams, masks=[(4, 33), NONE])
        with pytest.raises(AssertionError):
            sinks.attend(backend, spans, sink_q=None)


@pytest.mark.parametrize("dtype", ["f32", "int8"])
@pytest.mark.parametrize("mask", [(4, 60), (0, 60), (16, 200), (17, 1), (256, 32)])
def test_what_lies_between_is_not_read(mask, dtype, cpu, single, rng):
    """A freed block's entry may be anything: reading at it would end the process.

    Keys of a block that holds visible ones too are never multiplied.
    """
    sinks = mask[0]
    streams = Streams.random(rng, cpu, [700], [mask], dtype=dtype)
    for span in ([(0, 690, 700)], [(0, 699, 700)], [(0, 600, 700)]):
        first = span[0][1]
        for backend in (cpu, single):
            expected = streams.attend(backend, span)
            between = slice(sinks, streams.lowest(0, first))
            torn = Sequences(*([a[0].copy()] for a in vars(streams.sequences).values()))
            torn.keys[0][between], torn.values[0][between] = np.nan, np.inf
            cache, tables = torn.fill(cpu, 16, dtype, rng)
            result = replace(streams, cache=cache, tables=tables).attend(backend, span, freed_entry=-(2**31))
            assert np.isfinite(result[0]).all()
            assert all(a.tobytes() == b.tobytes() for a, b in zip(result, expected, strict=True))


def test_shared_sink_blocks(cpu, rng):
    """Two sequences whose first blocks are the same, as forks' are, with windows of their own."""
    streams = Streams.random(rng, cpu, [400, 500], [(20, 64), (4, 100)])
    x = streams.sequences
    x.keys[1][:32], x.values[1][:32] = x.keys[0][:32], x.values[0][:32]
    streams.cache, streams.tables = x.fill(cpu, 16, "f32", rng)
    spans = [(0, 380, 400), (1, 499, 500), (1, 470, 480), (0, 399, 400)]
    expected = streams.attend(cpu, spans)
    k = streams.cache.layers[0].k
    k[streams.tables[1, :2]] = np.nan
    streams.tables[1, :2] = streams.tables[0, :2]
    result = streams.attend(cpu, spans)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(result, expected, strict=True))


def test_strided_queries(cpu, rng):
    streams = Streams.random(rng, cpu, [120], [(4, 40)], heads=4, kv_heads=2)
    for first in (100, 119):
        spans = [(0, first, 120)]
        expected = streams.attend(cpu, spans)
        wide = np.full((120 - first, 7, 30), np.nan, np.float32)
        wide[:, 2:6, 3:27] = streams.sink_queries[0][first:]
        result = streams.attend(cpu, spans, sink_q=wide[:, 2:6, 3:27])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(result, expected, strict=True))


def test_sinks_are_merged_first(reference):
    """The order is part of the definition: partials built by hand, merged by the definition's arithmetic."""
    streams = Streams.random(np.random.default_rng(4), reference, [600], [(8, 500)], heads=1, head_dim=8)
    out, lse = streams.attend(reference, [(0, 590, 591)])
    x, f32 = streams.sequences, np.float32
    maximum, total, acc = f32(-np.inf), f32(0), np.zeros(8, np.float32)
    for q, first, end in (
        (streams.sink_queries[0][590, 0], 0, 8), (x.queries[0][590, 0], 91, 256), (x.queries[0][590, 0], 256, 512),
        (x.queries[0][590, 0], 512, 591),
    ):  # fmt: skip
        scores = f32(0.2) * np.sum(x.keys[0][first:end, 0] * q, axis=1)
        new = np.maximum(maximum, scores.max())
        probs, keep = np.exp(scores - new), np.exp(maximum - new)
        total, maximum = total * keep + probs.sum(), new
        acc = acc * keep + np.sum((probs[:, None] * x.values[0][first:end, 0]).T.copy(), axis=1)
    assert out[0, 0].tobytes() == (acc / total).tobytes()
    assert lse[0, 0] == maximum + np.log(total)


def test_sinks_are_merged_first_everywhere(cpu, single, reference):
    """Equal scores: sums of values, where 2**24 + 1 + 1 depends on the order, in float32."""
    for backend in (cpu, single, reference):
        streams = Streams.random(np.random.default_rng(4), backend, [600], [(8, 300)], heads=1, head_dim=16)
        x = streams.sequences
        x.queries[0][:], streams.sink_queries[0][:], x.values[0][:] = 0, 0, 0
        x.values[0][[3, 400, 550]] = np.array([2**24, 1, 1], np.float32)[:, None, None]
        streams.cache, streams.tables = x.fill(backend, 16, "f32", np.random.default_rng(4))
        for span in ((0, 560, 561), (0, 555, 565)):
            out, _ = streams.attend(backend, [span])
            assert (out == np.float32(2**24) / np.float32(308)).all()
        x.values[0][[3, 400, 550]] = np.array([1, 1, 2**24], np.float32)[:, None, None]
        streams.cache, streams.tables = x.fill(backend, 16, "f32", np.random.default_rng(4))
        for span in ((0, 560, 561), (0, 555, 565)):
            out, _ = streams.attend(backend, [span])
            assert (out == np.float32(2**24 + 2) / np.float32(308)).all()


def test_scratch_is_within_what_is_announced(cpu, rng):
    """Also where sequences stream: the sinks are one partial more."""
    backend = CpuBackend(2)
    streams = Streams.random(rng, backend, [700], [(4, 600)], heads=8, kv_heads=1)
    streams.attend(backend, [(0, 699, 700)])
    max_context = streams.tables.shape[1] * 16
    assert backend._scratch.nbytes <= backend.workspace_nbytes(1, 1, 8, 1, 24, max_context)


def test_constant_scratch_for_endless_sequences(rng):
    """Scratch follows the window, not the position."""
    backend = CpuBackend(2)
    streams = Streams.random(rng, backend, [300], [(4, 60)])
    streams.attend(backend, [(0, 299, 300)])
    before = backend._scratch.nbytes
    q, batch = streams.sequences.batch([(0, 299, 300)], streams.tables)
    far = 1_000_000
    tables = np.full((1, far // 16 + 1), -(2**31), np.int32)
    position = far - 1
    tables[0, 0] = streams.tables[0, 0]
    for block in range((position - 59) // 16, position // 16 + 1):
        tables[0, block] = streams.tables[0, block % 8 + 1]
    one = np.ones(1, np.int32)
    batch = Batch(one, one, one, batch.cu_seqlens_q, one * far, tables, one * 60, one * 4, one * 63)
    out, _ = backend.paged_attention(q, streams.cache.layers[0], batch, scale=0.2, sink_q=q)
    single = CpuBackend(1).paged_attention(q, streams.cache.layers[0], batch, scale=0.2, sink_q=q)
    assert np.isfinite(out).all()
    assert out.tobytes() == single[0].tobytes()
    assert backend._scratch.nbytes == before
