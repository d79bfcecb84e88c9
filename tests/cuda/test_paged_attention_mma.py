"""Tensor-core paged attention on the emulated GPU: exact within its arithmetic's bound, same bits however it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from cuda_kernels.attention_inputs import NO_WINDOW
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.launch import Runtime
from cuda_kernels.paged_attention_mma import paged_attention_mma
from tests.cuda.attention_cases import (
    F32,
    F64,
    UNIT_ROUNDOFF,
    Answer,
    Options,
    PagedSequences,
    Sequences,
    Span,
    exact_attention,
    rounded_to,
)

LOG2_E = np.log2(np.e)

prefill = partial(paged_attention_mma, query_limit=0)


def decode_up_to(limit: int) -> Callable[[Runtime, Any], None]:
    """Everything in decode form; limit: the most queries of a sequence."""
    return partial(paged_attention_mma, query_limit=limit)


def rounded_queries(dtype: str, options: Options) -> Callable[[F32], F64]:
    """The queries as the kernel sees them: q times a factor in float32, rounded to 16 bits."""
    factor = 2 * LOG2_E * options.scale / options.softcap if options.softcap else LOG2_E * options.scale
    kind = "bf16" if dtype == "bf16" else "f16"
    return lambda q: rounded_to(q * np.float32(factor), kind) / np.float64(factor)


def bounds(answer: Answer, dtype: str, options: Options, head_dim: int) -> tuple[F64, F64]:
    """The largest errors of out and lse that rounding P to 16 bits and float32 arithmetic can make.

    A score errs by its products' sums (one rounding for each 16 of the head dimension, and a few more for scales and
    the subtraction of the maximum) and the hardware's exponential; a weight by as much, relatively, twice, for it is
    divided by the sum of all. P is rounded to 16 bits; below 2**-14, float16 errs by 2**-25 whatever the weight.
    """
    score = 2.0**-22 * (head_dim / 16 + 4) * (answer.score_size + 1) + options.softcap * 2.0**-20  # (n, H)
    sums = (answer.num_keys[:, None] + 8) * 2.0**-23
    weight = 2 * np.expm1(score) + UNIT_ROUNDOFF["f16" if dtype == "f16" else "bf16"] + sums
    out = weight[..., None] * answer.spread
    if dtype == "f16":
        out += 2.0**-25 * answer.value_sum
    return out, np.expm1(score) + sums + 2.0**-22 * (abs(answer.lse) + 4)


def check(
    paged: PagedSequences,
    spans: Sequence[Span],
    options: Options,
    attention: Callable[[Runtime, Any], None] = paged_attention_mma,
    **changes: Any,
) -> tuple[F32, F32]:
    """Runs a batch and holds every row against float64; padding rows must be zeros with an lse of -inf."""
    out, lse = paged.run(spans, options, attention, **changes)
    row, data = 0, paged.sequences
    for span in spans:
        got_out, got_lse = out[row : row + span.end - span.first], lse[row : row + span.end - span.first]
        row += span.end - span.first
        if span.sequence is None:
            assert not got_out.any() and np.isneginf(got_lse).all()
            continue
        answer = exact_attention(data, span, options, rounded_queries(data.dtype, options))
        out_bound, lse_bound = bounds(answer, data.dtype, options, data.head_dim)
        assert (abs(got_out - answer.out) <= out_bound).all(), (
            f"{span}: {(abs(got_out - answer.out) / out_bound).max()}"
        )
        assert (abs(got_lse - answer.lse) <= lse_bound).all(), (
            f"{span}: {(abs(got_lse - answer.lse) / lse_bound).max()}"
        )
    return out, lse


def same_bits(a: tuple[F32, F32], b: tuple[F32, F32]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32))


def cut(sequence: int, length: int, chunk: int, first: int = 0) -> list[Span]:
    """A prompt in chunks: each is a sequence of the batch, over the same blocks."""
    return [Span(sequence, at, min(at + chunk, length)) for at in range(first, length, chunk)]


@pytest.fixture
def half_case(runtime: EmulatedRuntime, rng: np.random.Generator) -> PagedSequences:
    """float16, head size 16, three query heads on each of two KV heads."""
    return PagedSequences.create(runtime, Sequences.random(rng, "f16", [300, 70, 1], 6, 2, 16), rng)


# ---- against float64


SLOW = pytest.mark.slow  # each dtype, head size and variant is another pair of kernels to compile


@pytest.mark.parametrize("dtype", ["f16", "int8", pytest.param("bf16", marks=SLOW), pytest.param("fp8", marks=SLOW)])
def test_chunks_and_single_queries_of_every_cache_dtype(
    runtime: EmulatedRuntime, rng: np.random.Generator, dtype: str
) -> None:
    paged = PagedSequences.create(runtime, Sequences.random(rng, dtype, [281, 67], 6, 2, 16), rng)
    check(paged, [Span(0, 240, 281), Span(1, 66, 67), Span(1, 0, 37)], Options(scale=0.4))


SIZES = (8, 24, 32, 40, 48, 64, 80, 96, 128, 256)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", SIZES)
@pytest.mark.parametrize("dtype", ["f16", "bf16", "int8", "fp8"])
def test_every_head_size(runtime: EmulatedRuntime, rng: np.random.Generator, dtype: str, head_dim: int) -> None:
    if dtype in ("int8", "fp8") and head_dim % 16:
        pytest.skip("8-bit caches hold rows of whole 16-byte pieces")
    paged = PagedSequences.create(runtime, Sequences.random(rng, dtype, [277, 67], 6, 2, head_dim), rng)
    options = Options(scale=head_dim**-0.5)
    spans = [Span(0, 253, 277), Span(1, 66, 67), Span(1, 60, 64)]
    same_bits(check(paged, spans, options, prefill), check(paged, spans, options, decode_up_to(24)))


@pytest.mark.slow
def test_a_head_size_of_64_in_both_forms(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    paged = PagedSequences.create(runtime, Sequences.random(rng, "f16", [330, 67], 4, 2, 64), rng)
    spans = [Span(0, 270, 330), Span(1, 66, 67)]
    same_bits(check(paged, spans, Options(), prefill), check(paged, spans, Options(), decode_up_to(60)))


def test_odd_lengths_side_by_side(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    lengths = [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 701]
    paged = PagedSequences.create(runtime, Sequences.random(rng, "f16", lengths, 2, 1, 16), rng)
    spans = [Span(s, max(0, n - 1 - s % 4), n) for s, n in enumerate(lengths)]
    check(paged, spans, Options(scale=0.5), prefill)
    check(paged, spans, Options(scale=0.5), decode_up_to(4))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (8, 1), (20, 1)])
def test_group_sizes(runtime: EmulatedRuntime, rng: np.random.Generator, heads: int, kv_heads: int) -> None:
    paged = PagedSequences.create(runtime, Sequences.random(rng, "f16", [83, 130], heads, kv_heads, 16), rng)
    spans = [Span(0, 0, 45), Span(1, 129, 130), Span(0, 70, 83)]
    check(paged, spans, Options(scale=0.5))
    check(paged, spans, Options(scale=0.5), decode_up_to(45))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 150, 256, 257])
def test_sliding_windows(half_case: PagedSequences, window: int) -> None:
    spans = [Span(0, 240, 300), Span(1, 0, 70), Span(0, 299, 300), Span(2, 0, 1)]
    check(half_case, spans, Options(scale=0.5, window=window))
    check(half_case, spans[2:], Options(scale=0.5, window=window))


def test_the_first_and_last_key_around_the_borders_of_tiles(half_case: PagedSequences) -> None:
    """A tile is masked unless all rows see all of it: off by one, and a row sees a key too many."""
    firsts = (61, 62, 63, 64, 126, 254, 255)
    check(half_case, [Span(0, first, first + 6) for first in firsts], Options(scale=0.5), prefill)
    ends = (127, 128, 129, 130, 193, 257)
    check(half_case, [Span(0, end - 6, end) for end in ends], Options(scale=0.5, window=64), prefill)


def test_large_scores_and_large_values(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    """One key outweighs all: an error in the maximum's bookkeeping would overflow or vanish."""
    data = Sequences.random(rng, "f16", [300], 2, 1, 16)
    data.queries[0] *= 60
    paged = PagedSequences.create(runtime, data, rng)
    check(paged, [Span(0, 200, 300), Span(0, 299, 300)], Options(scale=1.0))
    data.queries[0] *= -1
    check(paged, [Span(0, 200, 300), Span(0, 299, 300)], Options(scale=1.0))


@pytest.fixture
def bf16_case(runtime: EmulatedRuntime, rng: np.random.Generator) -> PagedSequences:
    return PagedSequences.create(runtime, Sequences.random(rng, "bf16", [290, 90], 4, 2, 16), rng)


def test_softcap_and_sinks(bf16_case: PagedSequences) -> None:
    options = Options(scale=0.7, softcap=2.5)
    spans = [
        Span(0, 230, 290, window=100, sinks=4),  # all rows slide
        Span(1, 20, 90, window=30, sinks=17),  # some do
        Span(1, 89, 90, window=90, sinks=3),  # not yet
        Span(0, 289, 290, window=1, sinks=1),
        Span(0, 289, 290, window=20, sinks=70),
        Span(1, 80, 90),  # does not stream
        Span(None, 0, 2),
    ]
    same_bits(check(bf16_case, spans, options, prefill), check(bf16_case, spans, options, decode_up_to(70)))
    check(bf16_case, spans, options)


def test_a_window_of_the_layer_beside_streaming(bf16_case: PagedSequences) -> None:
    """Where a sequence's own window is not less than the layer's, the layer's holds, with no sinks."""
    options = Options(scale=0.7, softcap=2.5, window=50)
    spans = [Span(0, 280, 290, window=60, sinks=4), Span(0, 280, 290, window=40, sinks=4), Span(1, 40, 90)]
    check(bf16_case, spans, options)


def test_padding_beside_real_sequences(half_case: PagedSequences) -> None:
    options = Options(scale=0.5)
    check(half_case, [Span(None, 0, 1), Span(0, 299, 300), Span(None, 0, 1)], options)
    check(half_case, [Span(None, 0, 3), Span(0, 260, 300), Span(None, 0, 40)], options)


@pytest.mark.parametrize("block_size", [4, 8, 32, 128])
def test_block_sizes_change_no_bit(runtime: EmulatedRuntime, rng: np.random.Generator, block_size: int) -> None:
    data = Sequences.random(rng, "int8", [150, 67], 6, 2, 16)
    spans, options = [Span(0, 100, 150), Span(1, 66, 67)], Options(scale=0.5)
    expected = check(PagedSequences.create(runtime, data, rng), spans, options)
    same_bits(expected, check(PagedSequences.create(runtime, data, rng, block_size), spans, options))


def test_shared_blocks(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    data = Sequences.random(rng, "f16", [100, 120], 6, 2, 16)
    paged = PagedSequences.create(runtime, data, rng, shared=(0, 1, 64))
    assert (paged.tables[0][:4] == paged.tables[1][:4]).all()
    check(paged, [Span(0, 99, 100), Span(1, 50, 120)], Options(scale=0.5))


def test_views_of_wider_arrays(half_case: PagedSequences) -> None:
    """Queries inside the rows of a fused projection; tables inside wider rows."""
    rt, spans, options = half_case.runtime, [Span(0, 250, 300), Span(1, 69, 70)], Options(scale=0.5)
    inputs = half_case.inputs(spans, options)
    host = rt.download(inputs.q)
    fused = np.full((host.shape[0], 10, 20), np.nan, np.float32)
    fused[:, 2:8, 4:] = host
    tables = rt.download(inputs.block_tables)
    wide = rt.from_host(np.pad(tables, ((0, 0), (3, 5)), constant_values=2**31 - 1))
    view = replace(inputs, q=rt.from_host(fused)[:, 2:8, 4:], block_tables=wide[:, 3 : 3 + tables.shape[1]])
    expected = check(half_case, spans, options)
    paged_attention_mma(rt, view)
    same_bits(expected, (rt.download(view.out), rt.download(view.lse)))


# ---- same bits


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 255])
def test_chunks_of_any_size_give_the_bits_of_the_whole_prompt(half_case: PagedSequences, chunk: int) -> None:
    options = Options(scale=0.5)
    first = 200 if chunk < 16 else 0
    whole = half_case.run(cut(0, 300, 300), options, prefill)
    parts = half_case.run(cut(0, 300, chunk, first), options)
    same_bits((whole[0][first:], whole[1][first:]), parts)


@pytest.mark.parametrize("dtype", ["int8", pytest.param("bf16", marks=SLOW), pytest.param("fp8", marks=SLOW)])
def test_prefill_and_decode_give_the_same_bits(runtime: EmulatedRuntime, rng: np.random.Generator, dtype: str) -> None:
    paged = PagedSequences.create(runtime, Sequences.random(rng, dtype, [281, 67], 6, 2, 16), rng)
    spans, options = [Span(0, 250, 281), Span(1, 40, 67)], Options(scale=0.5)
    same_bits(paged.run(spans, options, prefill), paged.run(spans, options, decode_up_to(31)))


def test_neighbours_and_grids_change_no_bit(half_case: PagedSequences) -> None:
    options = Options(scale=0.5)
    alone = half_case.run([Span(0, 270, 300)], options)
    for before in ([Span(1, 69, 70)], [Span(1, 0, 70), Span(2, 0, 1), Span(None, 0, 5)]):
        out, lse = half_case.run([*before, Span(0, 270, 300)], options, max_query_len=90, max_seq_len=1300)
        same_bits(alone, (out[-30:], lse[-30:]))


def test_a_window_as_wide_as_the_sequence_is_none(half_case: PagedSequences) -> None:
    spans = [Span(0, 250, 300), Span(1, 69, 70)]
    same_bits(
        half_case.run(spans, Options(scale=0.5)), half_case.run(spans, Options(scale=0.5, window=300), max_seq_len=300)
    )


# ---- what is refused


def test_wrong_arguments_are_named(half_case: PagedSequences) -> None:
    spans = [Span(1, 69, 70)]
    inputs = half_case.inputs(spans, Options())
    rt = half_case.runtime
    with pytest.raises(KernelArgumentError, match="scratch"):
        paged_attention_mma(rt, replace(inputs, scratch=rt.empty(64, np.uint8)))
    with pytest.raises(KernelArgumentError, match="head size 8, a cache of 16"):
        replace(inputs, q=inputs.q[..., ::2])
    with pytest.raises(KernelArgumentError, match="rows aligned to 16 bytes"):
        replace(inputs, q=rt.from_host(np.zeros((1, 6, 17), np.float32))[..., :16])
    with pytest.raises(KernelArgumentError, match="seq_lens"):
        replace(inputs, cu_seqlens_q=inputs.cu_seqlens_q, seq_lens=rt.from_host(np.zeros(1, np.int64)))
    with pytest.raises(KernelArgumentError, match="window"):
        replace(inputs, window=NO_WINDOW + 1)
    with pytest.raises(KernelArgumentError, match="out must be"):
        replace(inputs, out=inputs.lse)
