"""The float32 form of paged attention: within the arithmetic's error of float64, the same bits however cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from cuda_kernels.attention_f32_tiles import tile_keys
from cuda_kernels.attention_inputs import NO_WINDOW, SPLIT_KEYS, AttentionInputs
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.launch import Runtime
from cuda_kernels.paged_attention_f32 import (
    attention_f32_kernel,
    kernels_for_report,
    paged_attention_f32,
    shared_nbytes_of,
)
from cuda_kernels.paged_cache import PagedLayer
from tests.cuda.attention_cases import F32, Answer, Options, PagedSequences, Sequences, Span, exact_attention

U = 2.0**-24  # float32's unit roundoff
Attention = Callable[[Runtime, AttentionInputs], None]

prefill: Attention = partial(paged_attention_f32, query_limit=0)


def bounds(answer: Answer, span: Span, options: Options, head_dim: int) -> tuple[F32, F32]:
    """What rounding can do to out (n, H, D) and lse (n, H), to first order in U.

    A score is a chain of D fused operations and a scaling by a rounded constant; tanh is good to 5 units in the last
    place, exp2 to 2, rcp to 1 and log2 to 2^-22. A weight is rescaled at the end of each tile and split, and each
    number is added to at most SPLIT_KEYS others, then to one more for each split.
    """
    size = answer.score_size
    splits = span.end // SPLIT_KEYS + 2
    rescalings = SPLIT_KEYS // tile_keys(head_dim) + splits
    score = (head_dim + 4) * size + 12 * options.softcap
    weight = score + 2 * size + 4  # the difference from the maximum, and exp2
    weight = weight + rescalings * (2 * size + 5)
    sums = np.minimum(answer.num_keys, SPLIT_KEYS)[:, None] + rescalings
    out = (2 * weight + sums + 4)[..., None] * U * answer.spread
    lse = (weight + sums + np.abs(answer.lse)) * U + 2.0**-22
    return out, lse


def check(cache: PagedSequences, spans: Sequence[Span], options: Options, attention: Attention) -> None:
    out, lse = cache.run(spans, options, attention)
    row = 0
    for span in spans:
        rows = slice(row, row + span.end - span.first)
        row = rows.stop
        answer = exact_attention(cache.sequences, span, options)
        out_bound, lse_bound = bounds(answer, span, options, cache.sequences.head_dim)
        np.testing.assert_array_less(np.abs(out[rows] - answer.out), out_bound)
        np.testing.assert_array_less(np.abs(lse[rows] - answer.lse), lse_bound)


def create(
    runtime: Runtime,
    rng: np.random.Generator,
    lengths: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int = 16,
) -> PagedSequences:
    sequences = Sequences.random(rng, "f32", lengths, *heads, head_dim)
    return PagedSequences.create(runtime, sequences, rng, block_size)


def chunks(sequence: int, length: int, size: int, **streaming: int) -> list[Span]:
    """A sequence in chunks; of very many the first and the last."""
    spans = [Span(sequence, at, min(at + size, length), **streaming) for at in range(0, length, size)]
    return spans if len(spans) <= 50 else spans[:20] + spans[-30:]


def same_bits(a: tuple[F32, F32], b: tuple[F32, F32]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32))


def same_rows(result: tuple[F32, F32], whole: tuple[F32, F32], spans: Sequence[Span]) -> None:
    """Holds the rows of these spans against those of the whole sequence."""
    rows = np.concatenate([np.arange(span.first, span.end) for span in spans])
    same_bits(result, (whole[0][rows], whole[1][rows]))


# ---- against float64


@pytest.mark.parametrize("attention", [prefill, paged_attention_f32], ids=["prefill", "by length"])
def test_odd_lengths_and_ragged_batches_match_float64(
    runtime: Runtime, rng: np.random.Generator, attention: Attention
) -> None:
    lengths = [1, 15, 16, 17, 31, 33, 65, 255, 256, 257, 521]
    cache = create(runtime, rng, lengths, (3, 1), 8)
    spans = [Span(s, max(0, n - 1 - 5 * s), n) for s, n in enumerate(lengths)]
    check(cache, spans, Options(), attention)


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 1), 80), ((2, 1), 256)])
def test_head_sizes_and_groups_match_float64(
    runtime: Runtime, rng: np.random.Generator, heads: tuple[int, int], head_dim: int
) -> None:
    cache = create(runtime, rng, [20, 37, 258], heads, head_dim)
    spans = [Span(0, 0, 20), Span(1, 19, 37), Span(2, 257, 258), Span(1, 0, 1)]
    check(cache, spans, Options(scale=head_dim**-0.5), paged_attention_f32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((1, 1), 4), ((24, 1), 12), ((8, 1), 24), ((6, 2), 40), ((4, 4), 64), ((3, 3), 96), ((4, 2), 128), ((2, 2), 252)],
)
def test_other_head_sizes_match_float64(
    runtime: Runtime, rng: np.random.Generator, heads: tuple[int, int], head_dim: int
) -> None:
    test_head_sizes_and_groups_match_float64(runtime, rng, heads, head_dim)


@pytest.mark.parametrize("window", [1, 31, 250])
def test_a_window_hides_older_keys_and_their_blocks_are_not_read(
    runtime: Runtime, rng: np.random.Generator, window: int
) -> None:
    cache = create(runtime, rng, [300, 530], (2, 1), 8)
    spans = [Span(0, 280, 300), Span(1, 529, 530), Span(0, 0, 40), Span(1, 515, 520)]
    check(cache, spans, Options(window=window), paged_attention_f32)
    check(cache, spans, Options(window=window), prefill)


def test_sinks_are_seen_with_their_own_query(runtime: Runtime, rng: np.random.Generator) -> None:
    cache = create(runtime, rng, [70, 300, 530, 40], (2, 1), 8)
    spans = [
        Span(0, 0, 70, window=20, sinks=4),  # from before its window is full to long after
        Span(1, 299, 300, window=30, sinks=40),
        Span(2, 529, 530, window=5, sinks=SPLIT_KEYS),
        Span(2, 500, 503, window=260, sinks=1),
        Span(3, 10, 40),  # does not stream
        Span(3, 39, 40, window=12, sinks=0),
    ]
    check(cache, spans, Options(), paged_attention_f32)
    check(cache, spans, Options(window=64), prefill)


def test_softcap_matches_float64(runtime: Runtime, rng: np.random.Generator) -> None:
    cache = create(runtime, rng, [45, 270], (2, 1), 8)
    spans = [Span(0, 25, 45), Span(1, 269, 270)]
    for cap in (0.3, 30.0):
        check(cache, spans, Options(softcap=cap, scale=1.0), paged_attention_f32)


# ---- the same bits


@pytest.mark.parametrize("size", [1, 7, 17, 255])
def test_bits_do_not_depend_on_the_chunking(runtime: Runtime, size: int) -> None:
    cache = create(runtime, np.random.default_rng(1), [265, 23], (2, 1), 8)
    whole = cache.run([Span(0, 0, 265)], Options(), prefill)
    spans = chunks(0, 265, size)
    out, lse = cache.run([Span(1, 3, 23), *spans], Options())
    same_rows((out[20:], lse[20:]), whole, spans)


@pytest.mark.parametrize(
    ("options", "streaming"),
    [
        (Options(window=37), {}),
        (Options(), {"window": 41, "sinks": 6}),
        (Options(softcap=20.0), {}),
    ],
    ids=["window", "sinks", "softcap"],
)
def test_bits_do_not_depend_on_the_chunking_with_masks(
    runtime: Runtime, rng: np.random.Generator, options: Options, streaming: dict[str, int]
) -> None:
    cache = create(runtime, rng, [265], (1, 1), 8)
    whole = cache.run([Span(0, 0, 265, **streaming)], options, prefill)
    for size in (1, 17):
        spans = chunks(0, 265, size, **streaming)
        same_rows(cache.run(spans, options), whole, spans)


@pytest.mark.parametrize("head_dim", [80, 256])
def test_decode_and_prefill_have_the_same_bits(runtime: Runtime, rng: np.random.Generator, head_dim: int) -> None:
    cache = create(runtime, rng, [262], (2, 1), head_dim)
    out, lse = cache.run([Span(0, 240, 262)], Options(), prefill)
    positions = [240, 255, 256, 261]
    one_by_one = cache.run([Span(0, p, p + 1) for p in positions], Options())
    rows = [p - 240 for p in positions]
    same_bits(one_by_one, (out[rows], lse[rows]))


def test_bits_do_not_depend_on_the_block_size(runtime: Runtime) -> None:
    results = []
    for block_size in (1, 8, 16, 32, 256):
        cache = create(runtime, np.random.default_rng(3), [270, 30], (2, 1), 8, block_size)
        results.append(cache.run([Span(0, 255, 270), Span(1, 0, 30), Span(0, 269, 270)], Options()))
    for result in results[1:]:
        same_bits(result, results[0])


def test_bits_do_not_depend_on_how_heads_share_keys(runtime: Runtime, rng: np.random.Generator) -> None:
    grouped = Sequences.random(rng, "f32", [50], 6, 2, 8)
    alone = replace(
        grouped,
        keys=[replace(x, bits=np.repeat(x.bits, 3, axis=1)) for x in grouped.keys],
        values=[replace(x, bits=np.repeat(x.bits, 3, axis=1)) for x in grouped.values],
    )
    spans = [Span(0, 0, 50), Span(0, 49, 50)]
    a, b = (PagedSequences.create(runtime, x, rng).run(spans, Options()) for x in (grouped, alone))
    same_bits(a, b)


def test_bits_do_not_depend_on_the_bounds_that_shape_grids(runtime: Runtime, rng: np.random.Generator) -> None:
    cache = create(runtime, rng, [270, 30], (2, 1), 8)
    spans = [Span(0, 269, 270), Span(1, 11, 30)]
    scratch = runtime.empty(1 << 20, np.uint8)
    results = [
        cache.run(spans, Options(), max_seq_len=seq_len, max_query_len=query_len, scratch=scratch)
        for seq_len, query_len in ((270, 19), (2000, 19), (512, 130))
    ]
    for result in results[1:]:
        same_bits(result, results[0])


def test_sequences_that_share_blocks_have_the_same_bits(runtime: Runtime, rng: np.random.Generator) -> None:
    sequences = Sequences.random(rng, "f32", [60, 80], 2, 1, 8)
    sequences.queries[1][:60] = sequences.queries[0]
    cache = PagedSequences.create(runtime, sequences, rng, shared=(0, 1, 48))
    out, lse = cache.run([Span(0, 0, 48), Span(1, 0, 48)], Options())
    same_bits((out[:48], lse[:48]), (out[48:], lse[48:]))
    check(cache, [Span(0, 0, 60), Span(1, 50, 80)], Options(), paged_attention_f32)


# ---- what must not be seen


@pytest.mark.parametrize(("poison", "window"), [(np.nan, NO_WINDOW), (np.nan, 9), (np.inf, NO_WINDOW)])
def test_keys_that_a_row_does_not_see_cannot_reach_it(
    runtime: Runtime, rng: np.random.Generator, poison: float, window: int
) -> None:
    cache = create(runtime, rng, [50], (2, 1), 8)
    options = Options(window=window)
    clean = cache.run([Span(0, 0, 50)], options, prefill)
    for rows in (cache.sequences.keys[0].bits, cache.sequences.values[0].bits):
        rows[30] = poison
    spoiled = PagedSequences.create(runtime, cache.sequences, rng).run([Span(0, 0, 50)], options, prefill)
    unaffected = [p for p in range(50) if p < 30 or p >= 30 + window]
    same_bits((spoiled[0][unaffected], spoiled[1][unaffected]), (clean[0][unaffected], clean[1][unaffected]))
    assert not np.isfinite(spoiled[0][30]).any()


@pytest.mark.parametrize("attention", [prefill, paged_attention_f32], ids=["prefill", "by length"])
def test_padding_comes_out_as_zeros(runtime: Runtime, rng: np.random.Generator, attention: Attention) -> None:
    cache = create(runtime, rng, [40], (2, 1), 8)
    spans = [Span(None, 0, 1), Span(0, 39, 40), Span(None, 0, 3), Span(None, 0, 1)]
    out, lse = cache.run(spans, Options(), attention)
    padding = [0, 2, 3, 4, 5]
    assert (out[padding] == 0).all() and (lse[padding] == -np.inf).all()
    alone = cache.run([Span(0, 39, 40)], Options(), attention)
    same_bits((out[1:2], lse[1:2]), alone)


def test_queries_may_be_a_view_into_wider_rows(runtime: Runtime, rng: np.random.Generator) -> None:
    cache = create(runtime, rng, [40], (2, 1), 8)
    spans, options = [Span(0, 0, 40), Span(0, 39, 40)], Options()
    expected = cache.run(spans, options)
    q = runtime.download(cache.inputs(spans, options).q)
    wide = np.full((41, 4, 12), np.nan, np.float32)
    wide[:, 1:3, 4:12] = q
    same_bits(cache.run(spans, options, q=runtime.from_host(wide)[:, 1:3, 4:12]), expected)


# ---- limits


def test_what_it_cannot_serve_is_refused(runtime: Runtime, rng: np.random.Generator) -> None:
    cache = create(runtime, rng, [20], (2, 1), 8)
    inputs = cache.inputs([Span(0, 19, 20)], Options())
    with pytest.raises(KernelArgumentError, match="bytes of scratch"):
        paged_attention_f32(runtime, replace(inputs, scratch=runtime.empty(16, np.uint8)))
    halves = runtime.from_host(np.zeros(inputs.layer.k.shape, np.uint16))
    with pytest.raises(KernelArgumentError, match="cannot read a f16 cache"):
        paged_attention_f32(runtime, replace(inputs, layer=PagedLayer("f16", halves, halves)))
    wide = create(runtime, rng, [1], (1, 1), 260).inputs([Span(0, 0, 1)], Options())
    with pytest.raises(KernelArgumentError, match="head size 260"):
        paged_attention_f32(runtime, wide)


@pytest.mark.parametrize("head_dim", [4, 8, 64, 96, 100, 128, 132, 252, 256])
def test_tiles_fit_the_shared_memory_of_every_part(runtime: Runtime, head_dim: int) -> None:
    for decode in (False, True):
        kernel = attention_f32_kernel(head_dim, decode=decode, softcap=False, streams=False)
        assert shared_nbytes_of(kernel) <= runtime.max_shared_nbytes


def test_reported_kernels_have_names_of_their_own() -> None:
    names = [kernel.name for kernel in kernels_for_report()]
    assert len(set(names)) == len(names) >= 10
