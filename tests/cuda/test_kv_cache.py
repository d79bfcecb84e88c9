"""The paged cache on the emulated GPU: what is stored, bit for bit, what is read, and which blocks are copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from numba import cuda
from numpy.typing import NDArray

from cuda_kernels import kv_cache_kernels
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.kernel import Kernel
from cuda_kernels.kv_cache_kernels import copy_blocks, independent_runs, read_kv, write_kv
from cuda_kernels.kv_formats import decode_e4m3, encode_e4m3
from cuda_kernels.paged_cache import CACHE_DTYPES, PagedLayer, allocate_layer, allocate_layers, layer_nbytes
from cuda_kernels.primitives import as_float, as_uint

F32 = NDArray[np.float32]
E4M3 = ml_dtypes.float8_e4m3fn
on_the_emulator = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- the stored formats in numpy


def stored(x: F32, dtype: str) -> tuple[NDArray[Any], F32 | None]:
    """x (..., D) as the cache holds it, and its scales (...) where it has them."""
    if dtype == "f32":
        return x, None
    if dtype in ("f16", "bf16"):
        target, nan = (np.float16, 0x7E00) if dtype == "f16" else (ml_dtypes.bfloat16, 0x7FC0)
        with np.errstate(over="ignore", invalid="ignore"):
            codes = x.astype(target).view(np.uint16)
        return np.where(np.isnan(x), np.uint16(nan), codes), None
    largest = np.float32(127 if dtype == "int8" else 448)
    amax = np.abs(x).max(-1)
    scale = (((amax / largest).view(np.uint32) + np.uint32(255)) & ~np.uint32(255)).view(np.float32)
    most = np.float32(np.finfo(np.float32).max / largest).view(np.uint32) & ~np.uint32(255)
    scale = np.minimum(scale, most.view(np.float32))
    scale[amax < 2.0**-100] = 0
    scale[~np.isfinite(amax)] = np.nan
    usable = np.isfinite(scale) & (scale > 0)
    inverse = np.divide(np.float32(1), scale, where=usable, out=np.zeros_like(scale))
    scaled = np.where(usable[..., None], x, np.float32(0)) * inverse[..., None]
    return (np.rint(scaled).astype(np.int8) if dtype == "int8" else scaled.astype(E4M3).view(np.uint8)), scale


def vectors(rng: np.random.Generator, *shape: int) -> F32:
    """Keys of many magnitudes, some zero, some not finite."""
    one_each = (*shape[:-1], 1)
    exponents = np.where(rng.random(one_each) < 0.5, rng.uniform(-10, 10, one_each), rng.uniform(-75, 85, one_each))
    x = (rng.standard_normal(shape) * np.exp(exponents)).astype(np.float32)
    flat = x.reshape(-1, shape[-1])
    if len(flat) > 7:
        flat[1], flat[2, -1], flat[3, 0], flat[4], flat[5, 1] = 0, np.nan, np.inf, 1e-31, -0.0
        flat[6, 2] = np.finfo(np.float32).max
    return x


def cache_bits(layer: PagedLayer) -> list[NDArray[np.uint8]]:
    return [np.array(array).reshape(-1).view(np.uint8) for array in layer.arrays]


def slot_index(slots: NDArray[np.int32], block_size: int) -> Any:
    """Index of (T, KH) vectors in an array (NB, KH, BS, ...)."""
    return slots // block_size, slice(None), slots % block_size


# ---- writing and reading


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("KH", "D", "BS"), [(1, 16, 1), (2, 64, 16), (3, 80, 8), (1, 256, 4), (5, 20, 4), (2, 4, 32)])
def test_write_kv_stores_the_rounded_vectors_in_their_slots_and_nothing_else(
    runtime: EmulatedRuntime, rng: np.random.Generator, dtype: str, KH: int, D: int, BS: int
) -> None:
    T = 11
    NB = T // BS + 3
    layer = allocate_layer(runtime, NB, BS, KH, D, dtype)
    for array in layer.arrays:
        runtime.fill(array, 0xA5)
    expected = [np.array(array) for array in layer.arrays]
    slots = rng.permutation(NB * BS)[:T].astype(np.int32)
    slots[[2, 7]] = -1
    fused = vectors(rng, T, 4 * KH, D)  # the heads of queries, keys and values, one after the other
    device = runtime.from_host(fused)
    write_kv(runtime, device[:, 2 * KH : 3 * KH], device[:, 3 * KH :], layer, runtime.from_host(slots))
    kept = slots >= 0
    for index, x in enumerate((fused[kept, 2 * KH : 3 * KH], fused[kept, 3 * KH :])):
        codes, scales = stored(x, dtype)
        expected[index][slot_index(slots[kept], BS)] = codes
        if scales is not None:
            expected[2 + index][slot_index(slots[kept], BS)] = scales
    for got, want in zip(cache_bits(layer), expected, strict=True):
        np.testing.assert_array_equal(got, want.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("D", "seed"), [(8, 0), (64, 1), (80, 2)])
def test_storing_what_was_read_gives_the_same_bits(runtime: EmulatedRuntime, dtype: str, D: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    T, KH, BS = 13, 2, 8
    layer, again = (allocate_layer(runtime, 3, BS, KH, D, dtype) for _ in range(2))
    slots = runtime.from_host(rng.permutation(3 * BS)[:T].astype(np.int32))
    k, v = (runtime.from_host(vectors(rng, T, KH, D)) for _ in range(2))
    write_kv(runtime, k, v, layer, slots)
    k_out, v_out = (runtime.empty((T, KH, D), np.float32) for _ in range(2))
    read_kv(runtime, layer, slots, k_out, v_out)
    write_kv(runtime, k_out, v_out, again, slots)
    for got, want in zip(cache_bits(again), cache_bits(layer), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_what_is_read_is_as_close_as_the_format_allows(
    runtime: EmulatedRuntime, rng: np.random.Generator, dtype: str
) -> None:
    T, KH, D = 9, 2, 64
    layer = allocate_layer(runtime, 2, 16, KH, D, dtype)
    x = (rng.standard_normal((2, T, KH, D)) * 3).astype(np.float32)
    slots = np.arange(T, dtype=np.int32)
    slots[4] = -1
    k_out, v_out = (runtime.empty((T, KH, D), np.float32) for _ in range(2))
    write_kv(runtime, runtime.from_host(x[0]), runtime.from_host(x[1]), layer, runtime.from_host(slots))
    read_kv(runtime, layer, runtime.from_host(slots), k_out, v_out)
    x[:, 4] = 0
    amax = np.abs(x).max(-1, keepdims=True)
    rounding_of_scale = 1 + 2.0**-15 + 2.0**-22
    bound = {
        "f32": 0 * np.abs(x),
        "f16": np.abs(x) * 2.0**-11,
        "bf16": np.abs(x) * 2.0**-8,
        "int8": amax / 127 / 2 * rounding_of_scale + 0 * x,
        "fp8": np.maximum(np.abs(x) * 2.0**-4, amax / 448 * 2.0**-10) * rounding_of_scale,
    }[dtype]
    for got, want, most in zip((k_out, v_out), x, bound, strict=True):
        assert (np.abs(np.array(got, np.float64) - want) <= most).all()


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_a_token_is_stored_the_same_alone_and_among_others(
    runtime: EmulatedRuntime, rng: np.random.Generator, dtype: str
) -> None:
    T, KH, D, BS = 7, 3, 24, 8
    x = vectors(rng, 2, T, KH, D)
    layers = [allocate_layer(runtime, 1, BS, KH, D, dtype) for _ in range(2)]
    k, v = runtime.from_host(x[0]), runtime.from_host(x[1])
    slots = runtime.from_host(np.arange(T, dtype=np.int32))
    write_kv(runtime, k, v, layers[0], slots)
    for t in range(T):
        write_kv(runtime, k[t : t + 1], v[t : t + 1], layers[1], slots[t : t + 1])
    for got, want in zip(cache_bits(layers[1]), cache_bits(layers[0]), strict=True):
        np.testing.assert_array_equal(got, want)


# ---- conversions, over all codes, all boundaries between them, and random bits


def boundaries(codes: F32) -> F32:
    """Every finite value of a format, the middle between neighbours, and the float32 on both sides of each."""
    finite = np.unique(codes[np.isfinite(codes)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    points = np.concatenate([finite, middles])
    return np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])


def padded_to(x: F32, multiple: int) -> F32:
    return np.concatenate([x, np.zeros(-len(x) % multiple, np.float32)])


def written(rt: EmulatedRuntime, x: F32, dtype: str) -> NDArray[Any]:
    """The codes of x (n,), n a multiple of 64, through write_kv."""
    T = len(x) // 64
    layer = allocate_layer(rt, T, 1, 1, 64, dtype)
    device = rt.from_host(x.reshape(T, 1, 64))
    write_kv(rt, device, device, layer, rt.from_host(np.arange(T, dtype=np.int32)))
    codes = rt.download(layer.k).reshape(-1)
    np.testing.assert_array_equal(codes, rt.download(layer.v).reshape(-1))
    return codes


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_halves_round_to_nearest_even_at_every_boundary(runtime: EmulatedRuntime, dtype: str) -> None:
    codes = np.arange(0, 0x10000, 7, dtype=np.uint32).astype(np.uint16)
    of_codes = codes.view(np.float16 if dtype == "f16" else ml_dtypes.bfloat16).astype(np.float32)
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000], np.uint32).view(np.float32)
    x = padded_to(
        np.concatenate([boundaries(of_codes), nans, [np.float32(np.inf), np.finfo(np.float32).max], of_codes]).astype(
            np.float32
        ),
        64,
    )
    np.testing.assert_array_equal(written(runtime, x, dtype), stored(x, dtype)[0])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@on_the_emulator
@given(data=st.binary(min_size=256, max_size=256))
def test_halves_of_random_bits(runtime: EmulatedRuntime, dtype: str, data: bytes) -> None:
    x = np.frombuffer(data, np.float32)
    np.testing.assert_array_equal(written(runtime, x, dtype), stored(x, dtype)[0])


def _build_e4m3(*, decode: bool) -> Callable[..., None]:
    def convert(source: Any, out: Any, count: Any) -> None:
        index = cuda.blockIdx.x * 128 + cuda.threadIdx.x
        if index < count:
            if decode:
                out[index] = as_uint(decode_e4m3(source[index]))
            else:
                out[index] = encode_e4m3(as_float(source[index]))

    return convert


def converted(rt: EmulatedRuntime, words: NDArray[np.uint32], *, decode: bool) -> NDArray[np.uint32]:
    name = f"e4m3_{'decode' if decode else 'encode'}"
    kernel = Kernel(name, _build_e4m3, (("decode", decode),), ("u32*", "u32*", "i32"), 128)
    out = rt.empty(len(words), np.uint32)
    rt.launch(kernel, (-(-len(words) // 128), 1, 1), (rt.from_host(words), out, len(words)))
    return rt.download(out)


def e4m3_saturating(x: F32) -> NDArray[np.uint8]:
    """ml_dtypes' conversion gives NaN above 464; here all finite values and infinities saturate."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(x), np.uint8(0x7F), np.clip(x, -448, 448).astype(E4M3).view(np.uint8))


def test_e4m3_of_every_code_and_boundary(runtime: EmulatedRuntime) -> None:
    values = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint32)
    decoded = converted(runtime, codes, decode=True)
    np.testing.assert_array_equal(decoded, values[codes].view(np.uint32))
    special = np.array([np.nan, np.inf, -np.inf, 464, -465, 1e30, 1e-45, -1e-45], np.float32)
    x = np.concatenate([boundaries(values), special])
    np.testing.assert_array_equal(converted(runtime, x.view(np.uint32), decode=False), e4m3_saturating(x))


@on_the_emulator
@given(data=st.binary(min_size=512, max_size=512), narrow=st.booleans())
def test_e4m3_of_random_bits(runtime: EmulatedRuntime, data: bytes, narrow: bool) -> None:
    words = np.frombuffer(data, np.uint32)
    if narrow:  # exponents that e4m3 has
        words = (words & np.uint32(0x87FFFFFF)) | np.uint32(0x38000000)
    x = words.view(np.float32)
    np.testing.assert_array_equal(converted(runtime, words, decode=False), e4m3_saturating(x))


# ---- copies


def copied_in_order(array: NDArray[Any], pairs: NDArray[np.int32]) -> NDArray[Any]:
    result = array.copy()
    for source, target in pairs:
        result[target] = result[source]
    return result


CHAINS = (
    [(0, 1)],
    [(0, 1), (0, 2), (3, 4)],
    [(0, 1), (1, 2), (2, 3)],  # each reads what the one before wrote
    [(1, 2), (0, 1), (3, 0)],  # each writes what the one before read
    [(0, 1), (2, 1), (1, 1), (1, 5)],
    [(0, 6), (1, 0), (6, 1)],  # a swap
)


@pytest.mark.parametrize(
    ("dtype", "KH", "BS", "D"), [("f32", 1, 2, 4), ("f16", 3, 4, 20), ("int8", 1, 1, 16), ("fp8", 2, 16, 32)]
)
@pytest.mark.parametrize("together", [True, False])
def test_copy_blocks_does_what_one_copy_after_another_does_in_every_layer(
    runtime: EmulatedRuntime, rng: np.random.Generator, dtype: str, KH: int, BS: int, D: int, together: bool
) -> None:
    layers = allocate_layers(runtime, 3, 7, BS, KH, D, dtype)
    if not together:
        spaced = allocate_layers(runtime, 5, 7, BS, KH, D, dtype)
        layers = (spaced[0], spaced[1], spaced[4])
    for chain in CHAINS:
        pairs = np.array(chain, np.int32)
        for array in (array for layer in layers for array in layer.arrays):
            runtime.upload(array.reshape(-1).view(np.uint8), rng.integers(0, 256, array.nbytes).astype(np.uint8))
        expected = [copied_in_order(np.array(array), pairs) for layer in layers for array in layer.arrays]
        copy_blocks(runtime, layers, pairs, runtime.from_host(pairs))
        got = [bits for layer in layers for bits in cache_bits(layer)]
        for bits, want in zip(got, expected, strict=True):
            np.testing.assert_array_equal(bits, want.reshape(-1).view(np.uint8))


def test_layers_made_together_are_copied_in_one_launch(runtime: EmulatedRuntime) -> None:
    layers = allocate_layers(runtime, 4, 3, 4, 1, 16, "f16")
    pairs = np.array([(0, 1), (0, 2)], np.int32)
    before = runtime.totals["copy_blocks"].launches if "copy_blocks" in runtime.totals else 0
    copy_blocks(runtime, layers, pairs, runtime.from_host(pairs))
    assert runtime.totals["copy_blocks"].launches == before + 1
    copy_blocks(runtime, layers, pairs[:0], runtime.from_host(pairs[:0]))
    assert runtime.totals["copy_blocks"].launches == before + 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_runs_are_independent_complete_and_no_shorter_than_need_be(chain: list[tuple[int, int]]) -> None:
    pairs = np.array(chain, np.int32).reshape(-1, 2)
    runs = independent_runs(pairs)
    assert [index for begin, end in runs for index in range(begin, end)] == list(range(len(pairs)))
    blocks = np.arange(6)
    for begin, end in runs:
        sources, targets = pairs[begin:end].T
        assert len(set(targets.tolist())) == end - begin
        before = blocks.copy()
        blocks[targets] = before[sources]
        conflicts = [s in targets and s != t for s, t in pairs[begin:end]]
        assert not any(conflicts)
    np.testing.assert_array_equal(blocks, copied_in_order(np.arange(6), pairs))


# ---- sizes and arguments


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_layer_nbytes_is_exact(runtime: EmulatedRuntime, dtype: str) -> None:
    layers = allocate_layers(runtime, 2, 5, 4, 3, 12, dtype)
    assert all(layer.nbytes == layer_nbytes(5, 4, 3, 12, dtype) for layer in layers)
    first = layers[0]
    assert (first.num_blocks, first.block_size, first.num_kv_heads, first.head_dim) == (5, 4, 3, 12)
    assert not any(np.array(array).any() for array in first.arrays)


def test_layers_and_launchers_refuse_what_does_not_fit(runtime: EmulatedRuntime) -> None:
    layer = allocate_layer(runtime, 4, 4, 2, 16, "f16")
    k, slots = runtime.empty((3, 2, 16), np.float32), runtime.empty(3, np.int32)
    shifted = runtime.empty((3, 2, 20), np.float32)[..., 1:17]
    pairs = np.array([(0, 4)], np.int32)
    calls: dict[str, Callable[[], object]] = {
        "no cache dtype 'f64'": lambda: layer_nbytes(1, 4, 1, 8, "f64"),
        "block size 12": lambda: layer_nbytes(1, 12, 1, 8, "f32"),
        "block size 512": lambda: layer_nbytes(1, 512, 1, 8, "f32"),
        "head size 6": lambda: layer_nbytes(1, 16, 1, 6, "f32"),
        "no multiple of 16 bytes": lambda: layer_nbytes(1, 1, 1, 8, "int8"),
        "cannot hold uint16": lambda: PagedLayer("f32", layer.k, layer.v),
        "scales do not fit": lambda: PagedLayer("f16", layer.k, layer.v, k, k),
        "v has shape": lambda: write_kv(runtime, k, k[:, :1], layer, slots),
        "heads of k must start": lambda: write_kv(runtime, shifted, k, layer, slots),
        "slot_mapping has shape": lambda: write_kv(runtime, k, k, layer, slots[:2]),
        "k_out must be contiguous": lambda: read_kv(runtime, layer, slots[:2], k[::2], k[::2]),
        "outside the 4": lambda: copy_blocks(runtime, [layer], pairs, runtime.from_host(pairs)),
    }
    for message, call in calls.items():
        with pytest.raises(KernelArgumentError, match=message):
            call()


def test_every_kernel_is_listed_once() -> None:
    kernels = kv_cache_kernels.kernels()
    assert len({kernel.name for kernel in kernels}) == len(kernels)
