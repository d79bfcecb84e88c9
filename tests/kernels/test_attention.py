"""The paged cache and paged_attention of the cpu backend: exactness, traps, and the same bits however it is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.kernel_cases import Sequences, int8_vectors, rounded, worst
from tests.poison import poison
from tinyllm.backends.base import KVCacheSpec
from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels.attention_amx import suits_amx
from tinyllm.errors import ConfigError

SCALE_LIMIT = np.float32(33026 * 2.0**106)  # 127 times the next number of sixteen bits overflows
LENGTHS = [1, 15, 16, 17, 63, 65, 255, 256, 257, 1000]

CASES = [  # heads, kv heads, head dim, block size, dtype, window, softcap
    (9, 3, 64, 16, "f32", None, 0.0),
    (4, 4, 8, 32, "f32", None, 0.0),
    (8, 1, 128, 64, "f32", None, 0.0),
    (3, 1, 80, 16, "f32", 70, 0.0),
    (2, 2, 256, 32, "f16", 256, 0.0),
    (8, 1, 40, 16, "bf16", 1, 5.0),
    (6, 2, 24, 64, "f16", 300, 30.0),
    (40, 1, 16, 16, "bf16", None, 2.0),
    (6, 2, 64, 48, "f32", 100, 0.0),
    (9, 3, 64, 16, "int8", None, 0.0),
    (8, 1, 20, 48, "int8", 70, 30.0),
    (4, 4, 128, 64, "int8", 300, 0.0),
    (40, 1, 8, 32, "int8", None, 2.0),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size", "dtype", "window", "softcap"), CASES)
def test_as_exact_as_the_reference(heads, kv_heads, head_dim, block_size, dtype, window, softcap, cpu, reference, rng):
    """The last queries of sequences of many lengths in one batch."""
    sequences = Sequences.random(rng, LENGTHS, heads, kv_heads, head_dim)
    spans = [(s, max(0, n - 5 * (s % 3) - 1), n) for s, n in enumerate(LENGTHS)]
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    results = []
    for backend in (cpu, reference):
        cache, tables = sequences.fill(backend, block_size, dtype, rng)
        results.append(backend.paged_attention(*_attend(sequences, spans, tables, cache), **options))
    exact = [sequences.exact(s, dtype, head_dim**-0.5, window, softcap) for s, _, _ in spans]
    for i in range(2):  # out, lse
        expected = np.concatenate([exact[s][i][first:end] for s, first, end in spans])
        error, baseline = (worst(result[i], expected) for result in results)
        assert error <= 3 * baseline + 2e-7 * np.abs(expected).max()


def _attend(sequences, spans, tables, cache):
    q, batch = sequences.batch(spans, tables)
    return q, cache.layers[0], batch


BF16 = [  # heads, kv heads, head dim, block size, window, softcap: multiples of 32 are for AMX, where there is one
    (9, 3, 64, 16, None, 0.0),
    (8, 1, 128, 48, 70, 5.0),
    (24, 1, 32, 16, 300, 0.0),
    (2, 2, 96, 64, 1, 30.0),
    (3, 1, 48, 16, None, 0.0),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size", "window", "softcap"), BF16)
def test_bfloat16_errs_no_more_than_rounding_can(heads, kv_heads, head_dim, block_size, window, softcap, cpu, rng):
    """On AMX queries and probabilities are rounded to bfloat16 as well, by 2**-8 of themselves at most."""
    sequences = Sequences.random(rng, LENGTHS, heads, kv_heads, head_dim)
    cache, tables = sequences.fill(cpu, block_size, "bf16", rng)
    spans = [(s, max(0, n - 70), n) for s, n in enumerate(LENGTHS)]
    scale = head_dim**-0.5
    out, lse = cpu.paged_attention(
        *_attend(sequences, spans, tables, cache), scale=scale, window=window, softcap=softcap
    )  # fmt: skip
    if suits_amx(head_dim):
        sequences.queries[:] = [rounded(q, "bf16") for q in sequences.queries]
    wanted = [sequences.exact(s, "bf16", scale, window, softcap) for s, _, _ in spans]
    sequences.values[:] = [np.abs(v) for v in sequences.values]
    magnitudes = [sequences.exact(s, "bf16", scale, window, softcap)[0] for s, _, _ in spans]
    at, errors = 0, []
    for (_, first, end), (exact_out, exact_lse), magnitude in zip(spans, wanted, magnitudes, strict=True):
        rows = slice(at, at + end - first)
        errors.append(out[rows] - exact_out[first:end])
        # both a probability and the sum that it is divided by are that far off, in the worst case
        assert (np.abs(errors[-1]) <= 2.0**-7 * magnitude[first:end] + 1e-6).all()
        assert np.abs(lse[rows] - exact_lse[first:end]).max() <= 2.0**-8 + 1e-5
        at += end - first
    assert np.sqrt((np.concatenate(errors) ** 2).mean()) <= 2.0**-9 * np.sqrt((out**2).mean())  # in the mean less


@pytest.mark.parametrize("window", [None, 1, 33, 64, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (3, 1, 24, "f32"),
        (2, 2, 24, "f16"),
        (8, 2, 24, "bf16"),
        (3, 1, 64, "bf16"),
        (12, 1, 96, "bf16"),
        (3, 1, 24, "int8"),
    ],
)
def test_same_bits_however_it_is_cut(window, heads, kv_heads, head_dim, dtype, cpu, single, rng):
    lengths = [600, 37, 300]
    sequences = Sequences.random(rng, lengths, heads, kv_heads, head_dim)
    cache, tables = sequences.fill(cpu, 16, dtype, rng)
    options = {"scale": 0.2, "window": window}

    def attend(spans, backend=cpu):
        return backend.paged_attention(*_attend(sequences, spans, tables, cache), **options)

    whole = [attend([(s, 0, n)]) for s, n in enumerate(lengths)]

    def check(spans, result):
        for i in range(2):
            expected = np.concatenate([whole[s][i][first:end] for s, first, end in spans])
            assert np.array_equal(result[i], expected)

    for chunk in (1, 7, 16, 17, 255, 256):
        for s, n in enumerate(lengths):
            if chunk == 1 and n > 300:  # all border positions, and some more
                starts = sorted({*range(0, 600, 17), *range(250, 262), 15, 16, 63, 64, 65, 511, 512, 513, 599})
            else:
                starts = list(range(0, n, chunk))
            for first in starts:
                spans = [(s, first, min(first + chunk, n))]
                check(spans, attend(spans))
    mixed = [(0, 599, 600), (1, 0, 37), (2, 120, 300), (0, 100, 101), (1, 36, 37)]
    decode = [(0, 599, 600), (1, 36, 37), (2, 299, 300)]
    for spans in (mixed, decode, decode[:1], decode * 20):
        for backend in (cpu, single, CpuBackend(3)):
            check(spans, attend(spans, backend))


@pytest.mark.parametrize(("dtype", "head_dim"), [("f32", 40), ("int8", 40), ("bf16", 64)])
@pytest.mark.parametrize("block_size", [32, 48, 64, 256])
def test_same_bits_for_every_block_size(block_size, dtype, head_dim, cpu, rng):
    sequences = Sequences.random(rng, [600, 37], 6, 2, head_dim)
    spans = [(0, 0, 600), (1, 20, 37)]
    results = []
    for size in (16, block_size):
        cache, tables = sequences.fill(cpu, size, dtype, rng)
        results.append(cpu.paged_attention(*_attend(sequences, spans, tables, cache), scale=0.3, window=90))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", ["f32", "int8", "bf16"])
def test_blocks_before_the_window_are_not_read(dtype, cpu, rng):
    """A freed block's entry may be anything: reading at it would end the process."""
    sequences = Sequences.random(rng, [700], 3, 1, 32)
    cache, tables = sequences.fill(cpu, 16, dtype, rng)
    for spans in ([(0, 690, 700)], [(0, 699, 700)]):
        args = _attend(sequences, spans, tables, cache)
        expected = cpu.paged_attention(*args, scale=0.3, window=40)
        torn = tables.copy()
        torn[0, : (spans[0][1] - 39) // 16] = -(2**31)
        result = cpu.paged_attention(*_attend(sequences, spans, torn, cache), scale=0.3, window=40)
        assert np.array_equal(result[0], expected[0])
        assert np.isfinite(result[0]).all()


@pytest.mark.parametrize("dtype", ["f32", "int8", "bf16"])
def test_a_later_token_cannot_reach_an_earlier_one(dtype, cpu, rng):
    """NaN and infinity at position 20 leave positions 0 to 19 as they were, in one call."""
    sequences = Sequences.random(rng, [64], 4, 2, 32)
    cache, tables = sequences.fill(cpu, 16, dtype, rng)
    clean, _ = cpu.paged_attention(*_attend(sequences, [(0, 0, 64)], tables, cache), scale=0.3)
    sequences.keys[0][20, 0], sequences.values[0][20, 0] = np.nan, np.inf
    cache, tables = sequences.fill(cpu, 16, dtype, rng)
    result, _ = cpu.paged_attention(*_attend(sequences, [(0, 0, 64)], tables, cache), scale=0.3)
    assert np.array_equal(result[:20], clean[:20])
    assert np.isnan(result[20:, :2]).all()
    assert np.array_equal(result[:, 2:], clean[:, 2:])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_beside_the_window_cannot_reach_a_query(dtype, bad, cpu, rng):
    """Values that are no numbers at 5, 70 and 100 reach those queries that see them, whoever is computed beside."""
    sequences = Sequences.random(rng, [160], 3, 1, 64)
    cache, tables = sequences.fill(cpu, 16, dtype, rng)
    clean, _ = cpu.paged_attention(*_attend(sequences, [(0, 0, 160)], tables, cache), scale=0.1, window=40)
    places = [5, 70, 100]
    for place in places:
        sequences.values[0][place, 0, place % 64] = bad
    cache, tables = sequences.fill(cpu, 16, dtype, rng)
    seen = np.array([[place <= p < place + 40 for place in places] for p in range(160)])
    for spans in ([(0, 0, 160)], [(0, 60, 100), (0, 100, 117)], [(0, 109, 110)]):
        result, _ = cpu.paged_attention(*_attend(sequences, spans, tables, cache), scale=0.1, window=40)
        rows = np.concatenate([np.arange(first, end) for _, first, end in spans])
        expected = clean[rows].copy()
        for i, place in enumerate(places):
            expected[seen[rows, i], :, place % 64] = bad
        assert np.array_equal(result, expected, equal_nan=True)


def test_shared_blocks(cpu, rng):
    """Two sequences whose tables share their first blocks, as a fork's do."""
    sequences = Sequences.random(rng, [80], 3, 1, 16)
    cache, tables = sequences.fill(cpu, 16, "f32", rng)
    spans = [(0, 70, 80), (0, 30, 48), (0, 79, 80)]
    whole, _ = cpu.paged_attention(*_attend(sequences, [(0, 0, 80)], tables, cache), scale=0.3)
    result, _ = cpu.paged_attention(*_attend(sequences, spans, tables, cache), scale=0.3)
    assert np.array_equal(result, np.concatenate([whole[a:b] for _, a, b in spans]))


def test_strided_queries(cpu, rng):
    sequences = Sequences.random(rng, [50], 6, 2, 16)
    cache, tables = sequences.fill(cpu, 16, "f32", rng)
    for first in (0, 49):
        q, layer, batch = _attend(sequences, [(0, first, 50)], tables, cache)
        wide = np.full((len(q), 6 * 16 + 40), np.nan, np.float32)
        wide[:, 8 : 8 + 96] = q.reshape(len(q), 96)
        view = np.lib.stride_tricks.as_strided(wide[:, 8:], q.shape, (wide.strides[0], 64, 4))
        out = np.empty(q.shape, np.float32)
        result, lse = cpu.paged_attention(view, layer, batch, scale=0.3, out=out)
        assert result is out
        expected = cpu.paged_attention(q, layer, batch, scale=0.3)
        assert np.array_equal(out, expected[0])
        assert np.array_equal(lse, expected[1])


def test_large_scores(cpu, rng):
    """One key dominates; the others underflow to nothing."""
    sequences = Sequences.random(rng, [300], 1, 1, 16)
    sequences.queries[0] *= 100
    cache, tables = sequences.fill(cpu, 16, "f32", rng)
    out, lse = cpu.paged_attention(*_attend(sequences, [(0, 0, 300)], tables, cache), scale=1.0)
    expected = sequences.exact(0, "f32", 1.0, None, 0.0)
    np.testing.assert_allclose(out, expected[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


def test_the_largest_sums_of_integers(cpu):
    """All elements as large as they can be, of either sign: nothing overflows."""
    for head_dim, sign in ((512, 1), (512, -1), (16, 1)):
        ones = np.ones((130, 1, head_dim), np.float32)
        sequences = Sequences([ones * 127], [ones * 127 * sign], [ones * np.float32(126.9999) * sign])
        cache, tables = sequences.fill(cpu, 16, "int8", np.random.default_rng(1))
        for spans in ([(0, 0, 130)], [(0, 129, 130)]):
            out, lse = cpu.paged_attention(*_attend(sequences, spans, tables, cache), scale=1e-6)
            np.testing.assert_allclose(out, 127 * sign, rtol=1e-6)
            keys = np.arange(spans[0][1], 130) + 1
            score = 1e-6 * 127 * 126.9999 * head_dim * sign
            np.testing.assert_allclose(lse[:, 0], score + np.log(keys), rtol=1e-5)


# ---- the cache


def stored(layer):
    """k, v as (NB, BS, KH, D), and in int8 their scales (NB, BS, KH)."""
    k, v, scales = layer.k, layer.v, ()
    if layer.storage == "bf16x2":  # pairs of elements, pairs of keys
        k = k.swapaxes(-1, -2).reshape(*k.shape[:3], layer.head_dim, 16)
        v = v.swapaxes(-1, -2).reshape(*v.shape[:2], layer.block_size, layer.head_dim)
    if layer.storage == "int8":  # a tile's, a block's bytes in fours, and then its scales
        n, padded = 16 * layer.head_dim, -(-layer.head_dim // 16) * 16
        k, k_scales = k[..., :n] ^ np.int8(-128), k[..., n:].copy().view(np.float32)
        k = k.reshape(*k.shape[:3], -1, 16, 4).swapaxes(-1, -2).reshape(*k.shape[:3], -1, 16)
        n = layer.block_size * padded
        v, v_scales = v[..., :n], v[..., n:].copy().view(np.float32)
        v = v.reshape(*v.shape[:2], -1, padded, 4).swapaxes(-1, -2).reshape(*v.shape[:2], -1, padded)
        k_scales = k_scales.reshape(*k_scales.shape[:2], -1)
        scales = k_scales.transpose(0, 2, 1), v_scales.transpose(0, 2, 1)
    blocks, kv_heads, tiles, head_dim, lanes = k.shape
    k = k.transpose(0, 2, 4, 1, 3).reshape(blocks, tiles * lanes, kv_heads, head_dim)
    return k, v.transpose(0, 2, 1, 3)[..., :head_dim], *scales


def vectors(rng, shape):
    """Vectors of many magnitudes, some of them zero or not finite."""
    x = (rng.standard_normal(shape) * np.exp(rng.uniform(-75, 80, (*shape[:-1], 1)))).astype(np.float32)
    x[::2] = rng.standard_normal(x[::2].shape)
    x[1, 0], x[2, 1, -1], x[3, 2, 0], x[4], x[5, 0, 1] = 0, np.nan, np.inf, 1e-31, -0.0
    x[6, 1, 2], x[7, 0] = np.finfo(np.float32).max, np.finfo(np.float32).max
    return x


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_write_kv_stores_what_the_reference_stores(dtype, head_dim, cpu, single, reference, rng):
    spec = KVCacheSpec(num_layers=1, num_blocks=5, block_size=32, num_kv_heads=3, head_dim=head_dim, dtype=dtype)
    fused = (rng.standard_normal((100, 6 * head_dim + 5)) * 300).astype(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-8, 3e-5, 65504, 65520, 1e38, 1.00390625]
    fused[:12, 0] = special
    fused[:12, 3 * head_dim] = special
    shape, strides = (100, 3, head_dim), (fused.strides[0], 4 * head_dim, 4)
    k, v = (np.lib.stride_tricks.as_strided(fused[:, start:], shape, strides) for start in (0, 3 * head_dim))
    slots = rng.permutation(160)[:100].astype(np.int32)
    expected = reference.allocate_kv_cache(spec).layers[0]
    reference.write_kv(k, v, expected, slots)
    for backend in (cpu, single):
        layer = backend.allocate_kv_cache(spec).layers[0]
        backend.write_kv(k, v, layer, slots)
        for ours, theirs in zip(stored(layer), (expected.k, expected.v), strict=True):
            assert np.array_equal(ours, theirs, equal_nan=dtype != "bf16")


@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_int8_vectors_in_the_cache(head_dim, cpu, single, reference, rng):
    """Codes and scales are those of the definition; what was read is stored with the same bits; NaN stays NaN."""
    spec = KVCacheSpec(num_layers=1, num_blocks=5, block_size=32, num_kv_heads=3, head_dim=head_dim, dtype="int8")
    fused = vectors(rng, (100, 7, head_dim))
    k, v = fused[:, :3], fused[:, 3:6]
    slots = rng.permutation(160)[:100].astype(np.int32)
    parts = []
    for x in (k, v):
        largest = np.abs(x).max(-1) > 1e38  # their scale is rounded down
        codes, scales = int8_vectors(np.where(largest[..., None], x / 4, x))
        parts += [codes, np.where(largest, np.minimum(scales, SCALE_LIMIT / 4) * 4, scales)]
    for backend in (cpu, single, reference):
        layer = backend.allocate_kv_cache(spec).layers[0]
        poison(layer)
        backend.write_kv(k, v, layer, slots)
        is_cpu = backend is not reference
        arrays = stored(layer) if is_cpu else (layer.k, layer.v, layer.k_scales, layer.v_scales)
        for i, part in enumerate(parts):
            found = arrays[i // 2 + 2 * (i % 2)][slots // 32, slots % 32]
            np.testing.assert_array_equal(found, part)
            assert not np.isfinite(arrays[2 + i // 2]).all()  # those of slots that were not written
        found = backend.read_kv(layer, slots)
        for read, codes, scales, x in zip(found, parts[::2], parts[1::2], (k, v), strict=True):
            np.testing.assert_array_equal(read, codes * scales[..., None])
            assert np.isnan(read[~np.isfinite(x).all(-1)]).all()
            usable = scales > 0
            assert (np.abs(read - x)[usable] <= 0.5001 * scales[usable][:, None]).all()
        before = [array.tobytes() for array in vars(layer).values() if isinstance(array, np.ndarray)]
        backend.write_kv(*found, layer, slots)
        assert [array.tobytes() for array in vars(layer).values() if isinstance(array, np.ndarray)] == before
        again = backend.read_kv(layer, slots[::-7])
        assert all(a.tobytes() == b[::-7].tobytes() for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_read_kv_gives_what_was_written(dtype, head_dim, cpu, reference, rng):
    """The rounded values, from both backends alike; and writing them again changes no byte."""
    spec = KVCacheSpec(num_layers=1, num_blocks=5, block_size=32, num_kv_heads=3, head_dim=head_dim, dtype=dtype)
    k, v = (rng.standard_normal((2, 100, 3, head_dim)) * 300).astype(np.float32)
    k[:9, 0, 0] = v[:9, 2, 3] = [0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, 3e-5, 65504, 1e38]
    slots = rng.permutation(160)[:100].astype(np.int32)
    for backend in (cpu, reference):
        layer = backend.allocate_kv_cache(spec).layers[0]
        backend.write_kv(k, v, layer, slots)
        found = backend.read_kv(layer, slots)
        for read, written in zip(found, (k, v), strict=True):
            assert read.dtype == np.float32
            assert read.shape == (100, 3, head_dim)
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(read, rounded(written, dtype))
            assert np.array_equal(np.signbit(read), np.signbit(written))
        before = layer.k.tobytes(), layer.v.tobytes()
        backend.write_kv(*found, layer, slots)
        assert (layer.k.tobytes(), layer.v.tobytes()) == before
        again = backend.read_kv(layer, slots[::-7])
        assert all(a.tobytes() == b[::-7].tobytes() for a, b in zip(again, found, strict=True))
        assert backend.read_kv(layer, slots[:0])[0].shape == (0, 3, head_dim)


def test_copied_blocks_have_their_scales(cpu, reference, rng):
    spec = KVCacheSpec(num_layers=2, num_blocks=4, block_size=16, num_kv_heads=2, head_dim=24, dtype="int8")
    k, v = rng.standard_normal((2, 16, 2, 24)).astype(np.float32)
    slots = np.arange(16, dtype=np.int32)
    for backend in (cpu, reference):
        cache = backend.allocate_kv_cache(spec)
        for layer in cache.layers:
            backend.write_kv(k, v, layer, slots + 16)
        backend.copy_blocks(cache, np.array([[1, 3], [3, 0]], np.int32))
        for layer in cache.layers:
            wanted = backend.read_kv(layer, slots + 16)
            for block in (3, 0):
                found = backend.read_kv(layer, slots + 16 * block)
                assert all(a.tobytes() == b.tobytes() for a, b in zip(found, wanted, strict=True))


def test_copy_blocks_in_order(cpu, rng):
    spec = KVCacheSpec(num_layers=2, num_blocks=4, block_size=16, num_kv_heads=1, head_dim=8, dtype="f32")
    cache = cpu.allocate_kv_cache(spec)
    for layer in cache.layers:
        layer.k[...] = rng.standard_normal(layer.k.shape)
        layer.v[...] = rng.standard_normal(layer.v.shape)
    before = [(layer.k.copy(), layer.v.copy()) for layer in cache.layers]
    cpu.copy_blocks(cache, np.array([[0, 1], [1, 2]], np.int32))
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        for now, old in ((layer.k, k), (layer.v, v)):
            assert np.array_equal(now, old[[0, 0, 0, 3]])


def test_cache_sizes(cpu):
    spec = KVCacheSpec(num_layers=3, num_blocks=7, block_size=32, num_kv_heads=2, head_dim=20, dtype="f16")
    assert cpu.kv_cache_nbytes(spec) == cpu.allocate_kv_cache(spec).nbytes == 3 * 7 * 32 * 2 * (20 + 32) * 2
    int8 = replace(spec, dtype="int8")
    assert cpu.kv_cache_nbytes(int8) == cpu.allocate_kv_cache(int8).nbytes == 3 * 7 * 32 * 2 * (20 + 4 + 32 + 4)
    with pytest.raises(ConfigError, match="heads of size 516 in int8: the cpu backend takes at most 512"):
        cpu.kv_cache_nbytes(replace(int8, head_dim=516))
    bad = KVCacheSpec(num_layers=1, num_blocks=1, block_size=24, num_kv_heads=1, head_dim=8, dtype="f32")
    for method in (cpu.allocate_kv_cache, cpu.kv_cache_nbytes):
        with pytest.raises(ConfigError, match="multiple of 16"):
            method(bad)
