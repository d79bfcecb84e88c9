"""Small launches of every kernel family that tell a right kernel from a wrong one, each within seconds.

A probe takes a runtime and a generator, and raises where something is wrong: EmulatorError by the emulator's checks,
AssertionError by the result, against float64 and bit for bit against another form. They are the helpers and tests of
the families' test modules, at sizes chosen so that tiles are ragged on every side. PROBES has those of each module of
device code, the quickest and most telling first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from cuda_kernels import elementwise as elementwise_kernels, kv_cache_kernels, paged_cache, rope as rope_kernels
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.paged_attention_f32 import paged_attention_f32
from tests.cuda import (
    test_embedding,
    test_flash_attention as flash,
    test_kv_cache as kv,
    test_linear as linear,
    test_naive_attention as naive,
    test_paged_attention_f32 as f32,
    test_paged_attention_mma as mma,
    test_rows as rows,
    test_sampling as sampling,
)
from tests.cuda.attention_cases import NO_BLOCK, Options, PagedSequences, Sequences, Span
from tests.cuda.linear_cases import Case

__all__ = ["FAMILIES", "PROBES", "Probe"]

Probe = Callable[[EmulatedRuntime, np.random.Generator], None]

# ---- paged attention


def _paged(
    rt: EmulatedRuntime,
    rng: np.random.Generator,
    dtype: str,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int = 16,
) -> PagedSequences:
    return PagedSequences.create(rt, Sequences.random(rng, dtype, [300, 70, 1], *heads, head_dim), rng, block_size)


# past one split, padding, all of a tile and some, one key, across the end of a split, one key of a tile
PLAIN = [
    Span(0, 280, 300),
    Span(None, 0, 2),
    Span(1, 50, 70),
    Span(2, 0, 1),
    Span(0, 255, 257),
    Span(1, 61, 65),
    Span(1, 32, 33),
]
WINDOWED = [Span(0, 290, 300), Span(1, 0, 20), Span(0, 299, 300)]
STREAMING = [
    Span(0, 286, 300, window=20, sinks=4),
    Span(1, 40, 56, window=30, sinks=17),
    Span(0, 298, 300, window=20, sinks=70),
    Span(0, 255, 259, window=1, sinks=1),
    Span(1, 60, 70, window=30, sinks=35),
    Span(1, 66, 70),
    Span(2, 0, 1, window=90, sinks=3),
    Span(None, 0, 2),
]


def _mma_all_forms(paged: PagedSequences, spans: list[Span], options: Options) -> None:
    """The prefill form, the decode form, and both in one call, where a sequence without queries comes first."""
    whole = mma.check(paged, spans, options, mma.prefill)
    longest = max(span.end - span.first for span in spans)
    scratch = paged.runtime.empty(1 << 20, np.uint8)
    mma.same_bits(whole, mma.check(paged, spans, options, mma.decode_up_to(longest + 1), scratch=scratch))
    scratch = paged.runtime.empty(1 << 20, np.uint8)  # never written, once more
    mma.same_bits(whole, paged.run([Span(1, 5, 5), *spans], options, mma.decode_up_to(3), scratch=scratch))


def mma_padded_head(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    """A head whose last k_step is half padding."""
    paged = _paged(rt, rng, "f16", (5, 1), 24)
    _mma_all_forms(paged, PLAIN, Options(scale=0.4))
    _mma_all_forms(paged, WINDOWED, Options(scale=0.4, window=65))


def mma_streaming(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    paged = _paged(rt, rng, "bf16", (2, 1), 16, 8)
    _mma_all_forms(paged, STREAMING, Options(scale=0.7, softcap=2.5))
    _mma_all_forms(paged, STREAMING, Options(scale=0.7, softcap=2.5, window=30))
    spans, options = [Span(1, 0, 3, window=90, sinks=20)], Options(scale=0.7, softcap=2.5)  # more sinks than keys
    tables = np.full((1, 3), NO_BLOCK, np.int32)
    tables[0, 0] = paged.tables[1][0]
    for attention in (mma.prefill, mma.decode_up_to(3)):
        mma.check(paged, spans, options, attention, block_tables=rt.from_host(tables))


def mma_bytes(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    """Three k_steps of an 8-bit cache: pairs and one left over; two KV heads."""
    paged = _paged(rt, rng, "int8", (4, 2), 48)
    _mma_all_forms(paged, PLAIN[1:], Options(scale=0.2, window=130))


def mma_wide_head(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    """Tiles of 32 keys, warps that share rows in both forms, and threads that load no scale."""
    paged = _paged(rt, rng, "int8", (2, 1), 144)
    _mma_all_forms(paged, PLAIN[1:4], Options(scale=0.1))


def f32_both(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    cache = f32.create(rt, rng, [300, 70, 1], (3, 1), 12)
    for spans, options in ((PLAIN, Options()), (WINDOWED, Options(window=33))):
        limit = max(s.end - s.first for s in spans)
        results = []
        for query_limit in (0, limit + 1):
            attention = partial(paged_attention_f32, query_limit=query_limit)
            f32.check(cache, [s for s in spans if s.sequence is not None], options, attention)
            results.append(cache.run(spans, options, attention))
        mixed = cache.run([Span(1, 5, 5), *spans], options, partial(paged_attention_f32, query_limit=3))
        f32.same_bits(*results)
        f32.same_bits(results[0], mixed)


def f32_lone_keys(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    """A key alone in its tile has the largest score, and sums of weights come near powers of two.

    Only there do an online step and a merge of partials, which rounds once more, differ in bits.
    """
    cache = f32.create(rt, rng, [65], (64, 1), 12)
    for position in (32, 64):
        factors = np.linspace(0.5, 3, 64, dtype=np.float32)[:, None]
        cache.sequences.queries[0][position] = factors * cache.sequences.keys[0].bits[position]
    spans = [Span(0, 32, 33), Span(0, 64, 65)]
    results = [cache.run(spans, Options(), partial(paged_attention_f32, query_limit=limit)) for limit in (0, 1)]
    f32.same_bits(*results)


def f32_streaming(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    cache = f32.create(rt, rng, [300, 70, 1], (2, 1), 8)
    for options in (Options(softcap=2.0), Options(softcap=2.0, window=30)):
        results = []
        for query_limit in (0, 16):
            attention = partial(paged_attention_f32, query_limit=query_limit)
            f32.check(cache, STREAMING[:-1], options, attention)
            results.append(cache.run(STREAMING, options, attention))
        f32.same_bits(*results)
    cache = f32.create(rt, rng, [300, 70, 1], (2, 1), 8, 8)
    spans, options = [Span(1, 0, 3, window=90, sinks=20)], Options(softcap=2.0)  # more sinks than keys
    tables = np.full((1, 3), NO_BLOCK, np.int32)
    tables[0, 0] = cache.tables[1][0]
    for query_limit in (0, 3):
        attention = partial(paged_attention_f32, query_limit=query_limit)
        cache.run(spans, options, attention, block_tables=rt.from_host(tables))


def f32_wide_head(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    """Tiles of 16 keys, and threads without a last chunk of a row."""
    cache = f32.create(rt, rng, [40, 17], (2, 1), 132)
    spans, options = [Span(0, 33, 40), Span(1, 16, 17)], Options(scale=0.1)
    results = []
    for query_limit in (0, 7):
        attention = partial(paged_attention_f32, query_limit=query_limit)
        f32.check(cache, spans, options, attention)
        results.append(cache.run(spans, options, attention))
    f32.same_bits(*results)


def f32_unseen(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    f32.test_keys_that_a_row_does_not_see_cannot_reach_it(rt, rng, np.nan, 9)


# ---- dense attention


def _flash_forward(dtype: str, head_dim: int, *shapes: tuple[int, int, int, int, int, bool]) -> Probe:
    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        for shape in shapes:
            flash.check_forward(rt, flash.case(rng, dtype, head_dim, shape))

    return probe


def _flash_backward(dtype: str, head_dim: int, *shapes: tuple[int, int, int, int, int, bool]) -> Probe:
    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        for shape in shapes:
            flash.check_backward(rt, flash.case(rng, dtype, head_dim, shape))

    return probe


def _flash_bits(dtype: str, head_dim: int) -> Probe:
    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        same_bits = flash.TestSameBits()
        same_bits.test_wherever_in_its_tile_a_query_is(dtype, head_dim, rt, rng)
        same_bits.test_keys_after_the_last_query_do_not_matter(dtype, head_dim, rt, rng)
        flash.test_keys_that_no_query_of_a_tile_sees_are_not_read(dtype, head_dim, rt, rng)

    return probe


SHAPES = (
    (1, 67, 131, 2, 1, True),
    (1, 65, 33, 1, 1, True),
    (2, 5, 35, 1, 1, False),
    (2, 13, 9, 1, 1, False),
)

# ---- linear layers


def _linear(form: str, columns: int, few: int = 3, many: int = 19) -> Probe:
    """Few and many tokens against exact products, and the same bits."""

    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        case = Case.random(rt, rng, form, 37, columns)
        x = rng.standard_normal((many, columns)).astype(np.float32)
        bias = rng.standard_normal(37).astype(np.float32)
        exact, bound = case.model(x)
        bound = bound + 2.0**-24 * np.abs(bias)
        result = case.run(x[:few], bias)
        assert (np.abs(result - (exact[:few] + bias)) <= bound[:few]).all()
        whole = case.run(x, bias)
        assert (np.abs(whole - (exact + bias)) <= bound).all()
        assert np.array_equal(whole[:few], result)
        assert np.array_equal(case.run(x[few : few + 1], bias), whole[few : few + 1])
        case.run(x[:few])

    return probe


def linear_magnitudes(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    linear.test_rows_of_any_magnitude_fit_float16(rt, rng)
    linear.test_nan_and_infinity_stay_in_their_token("f16", rt, rng)


def _linear_odd(form: str, shapes: list[tuple[int, int]]) -> Probe:
    return lambda rt, rng: linear.test_odd_shapes(form, shapes, rt, rng)


def _linear_rounds(form: str) -> Probe:
    return lambda rt, rng: linear.test_rows_longer_than_a_round_of_slices(form, rt, rng)


# ---- rows


def _norms(*sizes: int) -> Probe:
    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        for size in sizes:
            rows.test_rms_norm_is_within_the_bound_of_its_sum(rt, rng, size)
            rows.test_layer_norm_is_within_the_bound_of_its_sums(rt, rng, size)
            rows.test_add_rms_norm_has_the_bits_of_its_two_steps(rt, rng, size)

    return probe


def _rope(*shapes: tuple[int, int, int, int]) -> Probe:
    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        for shape in shapes:
            rows.test_rope_rotates_views_in_place_with_the_bits_of_separate_roundings(rt, rng, *shape)

    return probe


def rope_apart(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    """Queries and keys that do not lie side by side."""
    q, k = rows.values(rng, 3, 4, 16), rows.values(rng, 3, 2, 16)
    angles = rng.uniform(0, 100, (3, 8))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    device_q, device_k = rt.from_host(q), rt.from_host(k)
    rope_kernels.rope(rt, device_q, device_k, rt.from_host(cos), rt.from_host(sin))
    rows.assert_same_bits(device_q, rows.rotated(q, cos, sin))
    rows.assert_same_bits(device_k, rows.rotated(k, cos, sin))


def activations(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    rows.test_silu_mul_and_gelu_mul_are_within_their_stated_errors(rt, 1)
    rows.test_gelu_and_softcap_in_place(rt, rng, 1033)
    rows.test_activations_of_what_is_not_finite(rt)


def elementwise(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    for size in (33, 34, 576):
        rows.test_add_and_scale_round_once(rt, rng, size)
    x, y = rows.values(rng, 3, 576), rows.values(rng, 3, 576)
    device = rt.from_host(x)  # rows without a gap: what is past one's end is another's
    elementwise_kernels.add(rt, device, rt.from_host(y))
    elementwise_kernels.scale(rt, device, 0.3)
    rows.assert_same_bits(device, (x + y) * np.float32(0.3))


def gather(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    for size in (34, 576):
        rows.test_gather_rows_takes_rows_in_any_order_and_zeros_for_padding(rt, rng, size)


# ---- embedding and cache


def _embedding(*forms: str) -> Probe:
    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        for form in forms:
            test_embedding.test_rows_equal_the_decoded_ones_bit_for_bit(form, rt, rng)

    return probe


def embedding_odd(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    test_embedding.test_odd_numbers_of_columns("bf16", 33, rt, rng)
    test_embedding.test_odd_numbers_of_columns("f32", 4, rt, rng)


def _write_kv(*cases: tuple[str, int, int, int]) -> Probe:
    def probe(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
        for dtype, heads, head_dim, block_size in cases:
            kv.test_write_kv_stores_the_rounded_vectors_in_their_slots_and_nothing_else(
                rt, rng, dtype, heads, head_dim, block_size
            )

    return probe


def smallest_scale(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    """The least vector that is stored as more than zeros, and the next below."""
    least = np.float32(2.0**-100)
    x = np.array([least, np.nextafter(least, np.float32(0))])[:, None, None] * np.ones(16, np.float32)
    layer = paged_cache.allocate_layer(rt, 2, 1, 1, 16, "int8")
    device = rt.from_host(x)
    kv_cache_kernels.write_kv(rt, device, device, layer, rt.from_host(np.arange(2, dtype=np.int32)))
    codes, scales = kv.stored(x, "int8")
    np.testing.assert_array_equal(rt.download(layer.k).reshape(codes.shape), codes)
    np.testing.assert_array_equal(rt.download(layer.k_scale).reshape(-1), np.asarray(scales).reshape(-1))


def read_kv(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    for dtype in ("f16", "int8"):
        kv.test_what_is_read_is_as_close_as_the_format_allows(rt, rng, dtype)
    kv.test_storing_what_was_read_gives_the_same_bits(rt, "fp8", 80, 2)


def copy_blocks(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    for case in (("f32", 1, 2, 4), ("f16", 3, 4, 20), ("fp8", 2, 16, 32)):
        kv.test_copy_blocks_does_what_one_copy_after_another_does_in_every_layer(rt, rng, *case, together=True)


def conversions(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    kv.test_e4m3_of_every_code_and_boundary(rt)
    kv.test_halves_round_to_nearest_even_at_every_boundary(rt, "bf16")


# ---- sampling


def draws(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    for vocab in (1, 33, 1000):
        logits = rng.normal(0, 2.5, (len(sampling.FILTERS), vocab)).astype(np.float32)
        sampling.check(rt, logits, sampling.FILTERS)
    sampling.test_rows_that_have_no_choice(rt, 1.0)
    sampling.test_rows_that_have_no_choice(rt, 0.0)
    sampling.test_padding_reads_no_logits(rt)


def draws_among_ties(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    sampling.test_both_zeros_are_one_logit(rt)
    sampling.test_cuts_among_ties_keep_the_lowest_ids(rt, 4)
    sampling.test_filters_keep_exactly_their_set(rt, {"top_k": 3, "temperature": 5.0}, {1, 3, 2})
    sampling.test_filters_keep_exactly_their_set(rt, {"min_p": 1.0}, {1, 3})
    sampling.test_a_draw_depends_on_its_row_and_its_words_alone(rt, rng)
    sampling.test_rows_may_lie_apart_and_begin_anywhere(rt, rng)
    sampling.test_a_nan_is_found_wherever_it_is(rt)


def draws_of_many(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    sampling.test_many_small_probabilities_add_up(rt)
    sampling.test_the_number_of_threads_changes_nothing(rt, rng)


def noise(rt: EmulatedRuntime, rng: np.random.Generator) -> None:
    sampling.test_the_exponential_variate_is_accurate_down_to_the_smallest(rt, rng)


# ---- which for which

_MMA = (mma_padded_head, mma_streaming, mma_bytes, mma_wide_head)
_F32 = (f32_both, f32_streaming, f32_unseen, f32_lone_keys, f32_wide_head)
_FLASH_F32 = (_flash_forward("f32", 64, *SHAPES), _flash_bits("f32", 64))
_FLASH_MMA = (_flash_forward("f16", 64, *SHAPES), _flash_bits("bf16", 80))
_LINEAR_TENSOR = (
    _linear("Q5_1", 608),
    _linear("f16", 65, few=9),
    _linear("Q6_K", 512),
    _linear("Q5_K", 512),
    _linear("Q8_0", 96),
    linear_magnitudes,
    _linear_rounds("Q5_1"),
)
_LINEAR_F32 = (_linear("f32", 260), _linear_odd("f32", [(1, 4), (33, 256)]), _linear_rounds("f32"))
_ROWS = (_norms(34), elementwise, gather, _rope((2, 2, 21, 18)))
_SAMPLING = (draws, draws_among_ties, draws_of_many)

FAMILIES: dict[str, dict[str, tuple[Probe, ...]]] = {
    "attention": {
        "attention_tiles": _MMA,
        "attention_steps": _MMA,
        "attention_partials": _MMA,
        "paged_attention_mma": _MMA,
        "online_softmax": _MMA[:2],
    },
    "attention_f32": {"attention_f32_tiles": _F32, "paged_attention_f32": _F32},
    "naive_attention": {
        "naive_attention": tuple(
            partial(naive.test_it_matches_float64_and_moves_what_the_formula_says, shape=shape)
            for shape in ((2, 131, 8), (1, 65, 40))
        )
    },
    "flash_attention": {
        "flash_attention": _FLASH_F32,
        "flash_attention_mma": _FLASH_MMA,
        "flash_attention_tiles": (*_FLASH_MMA, *_FLASH_F32, _flash_forward("f32", 80, *SHAPES[1:])),
        "flash_attention_backward": (_flash_backward("f32", 64, *SHAPES), _flash_backward("bf16", 80, *SHAPES)),
        "flash_attention_backward_f32": (_flash_backward("f32", 64, *SHAPES), _flash_bits("f32", 64)),
        "flash_attention_backward_mma": (_flash_backward("bf16", 80, *SHAPES), _flash_bits("bf16", 80)),
    },
    "linear": {
        "linear_activations": (_linear("Q5_1", 608), linear_magnitudes, _linear_odd("f16", [(1, 1), (15, 33)])),
        "linear_decode": _LINEAR_TENSOR,
        "linear_prefill": _LINEAR_TENSOR,
        "linear_f32": _LINEAR_F32,
        "linear_fragments": _LINEAR_TENSOR[:5],
        "embedding": (embedding_odd, _embedding("Q4_K", "Q5_1", "Q6_K", "f16")),
    },
    "rows": {
        "norms": (_norms(34, 33, 127, 260, 5000),),
        "rope": (
            rope_apart,
            _rope((2, 2, 21, 18), (3, 1, 80, 32), (5, 0, 8, 8), (9, 3, 40, 40)),
        ),
        "elementwise": (elementwise,),
        "gather": (gather,),
        "quads": _ROWS,
        "special_functions": (activations,),
    },
    "kv_cache": {
        "kv_cache_kernels": (
            _write_kv(("f16", 2, 64, 16), ("int8", 5, 20, 4), ("fp8", 3, 80, 8), ("f32", 1, 256, 4)),
            read_kv,
            copy_blocks,
        ),
        "kv_formats": (
            _write_kv(("f16", 2, 64, 16), ("int8", 1, 16, 1), ("fp8", 3, 80, 8)),
            conversions,
            smallest_scale,
        ),
    },
    "sampling": {"sampling": _SAMPLING, "sampling_noise": (noise, draws)},
}
PROBES: dict[str, tuple[Probe, ...]] = {
    module: probes for family in FAMILIES.values() for module, probes in family.items()
}
