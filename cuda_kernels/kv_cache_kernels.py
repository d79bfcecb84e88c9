"""Keys and values into the slots of a paged cache layer, rounded to its dtype, and out of them again.

`write_kv` and `read_kv` work on vectors of D values, one per token and head, of keys and of values:

    grid (T, vectors of a token / vectors of a block); vector v < KH is the key of head v, v >= KH the value of v - KH
    a vector belongs to 1, 2, 4, ... 32 neighbouring lanes; a lane takes quads lane, lane + lanes, ... of four values

The scale of an int8 or fp8 vector is found by a butterfly over its lanes. `copy_blocks` moves whole blocks. Formats:
`kv_formats`, layout: `paged_cache`. All are bound by memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy.typing import NDArray

from cuda_kernels.kernel import Kernel
from cuda_kernels.kv_formats import load_stored, quad_words, scale_of, store_rounded
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.paged_cache import CACHE_DTYPES, SCALED_DTYPES, PagedLayer
from cuda_kernels.primitives import FULL_MASK, Pointer, Value, as_uint, load4, store4
from cuda_kernels.views import address_of, aligned16, ceil_div, check_array, strides_of

__all__ = ["copy_blocks", "independent_runs", "kernels", "read_kv", "write_kv"]

THREADS = 128
MAX_HEAD_DIM = 512
COPY_THREADS = 256

i32, i64, u32 = types.int32, types.int64, types.uint32
ZERO = np.float32(0)


def _lanes(head_dim: int) -> int:
    """Lanes of a vector: a power of two, with four values or more each."""
    return min(32, 1 << (head_dim // 4 - 1).bit_length())


def _build_write_kv(*, dtype: str, head_dim: int) -> Callable[..., None]:
    lanes, words = _lanes(head_dim), quad_words(dtype)
    quads = ceil_div(head_dim // 4, lanes)  # of a lane
    scaled = dtype in SCALED_DTYPES
    find_scale, store = scale_of(dtype), store_rounded(dtype)
    steps = lanes.bit_length() - 1

    def write_kv(
        k: Pointer, k_row: Value, k_head: Value, v: Pointer, v_row: Value, v_head: Value, slots: Pointer,
        k_cache: Pointer, v_cache: Pointer, k_scales: Pointer, v_scales: Pointer, kv_heads: Value, block_size: Value,
    ) -> None:  # fmt: skip
        thread = i32(cuda.threadIdx.x)
        vector = i32(cuda.blockIdx.y * (THREADS // lanes) + thread // lanes)
        lane = i32(thread % lanes)
        token = i64(cuda.blockIdx.x)
        slot = slots[token]
        if slot < 0:
            return
        source, cache, scales, head = k, k_cache, k_scales, vector
        at, head_stride = token * k_row, k_head
        if vector >= kv_heads:
            source, cache, scales, head = v, v_cache, v_scales, i32(vector - kv_heads)
            at, head_stride = token * v_row, v_head
        here = head < kv_heads
        at += i64(head) * head_stride
        block = i32(slot // block_size)
        row = (i64(block) * kv_heads + head) * block_size + i32(slot - block * block_size)
        inverse = ZERO
        if scaled:
            amax = i32(0)  # the bits of |x|, which order as the values do
            for j in range(quads):
                column = i32(4 * (lane + j * lanes))
                if here and column < head_dim:
                    for value in load4(source, at + column):
                        amax = max(amax, i32(as_uint(value) & u32(0x7FFFFFFF)))
            for step in range(steps):
                amax = max(amax, i32(cuda.shfl_xor_sync(FULL_MASK, amax, 1 << step)))
            scale, inverse = find_scale(u32(amax))
            if here and lane == 0:
                scales[row] = scale
        for j in range(quads):
            column = i32(4 * (lane + j * lanes))
            if here and column < head_dim:
                a, b, c, d = load4(source, at + column)
                store(cache, row * (head_dim // 4 * words) + i32(column // 4 * words), a, b, c, d, inverse)

    return write_kv


def _build_read_kv(*, dtype: str, head_dim: int) -> Callable[..., None]:
    lanes, words = _lanes(head_dim), quad_words(dtype)
    quads = ceil_div(head_dim // 4, lanes)
    scaled = dtype in SCALED_DTYPES
    load = load_stored(dtype)

    def read_kv(
        slots: Pointer, k_cache: Pointer, v_cache: Pointer, k_scales: Pointer, v_scales: Pointer, kv_heads: Value,
        block_size: Value, k_out: Pointer, v_out: Pointer,
    ) -> None:  # fmt: skip
        thread = i32(cuda.threadIdx.x)
        vector = i32(cuda.blockIdx.y * (THREADS // lanes) + thread // lanes)
        lane = i32(thread % lanes)
        token = i64(cuda.blockIdx.x)
        out, cache, scales, head = k_out, k_cache, k_scales, vector
        if vector >= kv_heads:
            out, cache, scales, head = v_out, v_cache, v_scales, i32(vector - kv_heads)
        if head >= kv_heads:
            return
        slot = slots[token]
        block = i32(slot // block_size)
        row = (i64(block) * kv_heads + head) * block_size + i32(slot - block * block_size)
        scale = ZERO
        if scaled and slot >= 0:
            scale = scales[row]
        for j in range(quads):
            column = i32(4 * (lane + j * lanes))
            if column < head_dim:
                a, b, c, d = ZERO, ZERO, ZERO, ZERO
                if slot >= 0:
                    a, b, c, d = load(cache, row * (head_dim // 4 * words) + i32(column // 4 * words), scale)
                store4(out, (token * kv_heads + head) * head_dim + column, a, b, c, d)

    return read_kv


_CACHE = ("u32*", "u32*", "f32*", "f32*", "i32", "i32")
_WRITE = ("f32*", "i64", "i64", "f32*", "i64", "i64", "i32*", *_CACHE)
_READ = ("i32*", *_CACHE, "f32*", "f32*")


@functools.cache
def _kernel(name: str, dtype: str, head_dim: int) -> Kernel:
    build, signature = (_build_write_kv, _WRITE) if name == "write_kv" else (_build_read_kv, _READ)
    return Kernel(f"{name}_{dtype}_d{head_dim}", build, (("dtype", dtype), ("head_dim", head_dim)), signature, THREADS)


def _launch(
    rt: Runtime, name: str, layer: PagedLayer, tokens: int, before: tuple[object, ...], after: tuple[object, ...]
) -> None:
    require(layer.head_dim <= MAX_HEAD_DIM, f"head size {layer.head_dim}: at most {MAX_HEAD_DIM}")
    k, v = layer.k.view(np.uint32), layer.v.view(np.uint32)
    scales = (layer.k_scale, layer.v_scale)
    if layer.k_scale is None:
        scales = (k.view(np.float32), v.view(np.float32))  # not read by kernels of these dtypes
    vectors = THREADS // _lanes(layer.head_dim)
    grid = (tokens, ceil_div(2 * layer.num_kv_heads, vectors), 1)
    cache = (k, v, *scales, layer.num_kv_heads, layer.block_size)
    rt.launch(_kernel(name, layer.dtype, layer.head_dim), grid, (*before, *cache, *after))


def write_kv(rt: Runtime, k: Array, v: Array, layer: PagedLayer, slot_mapping: Array) -> None:
    """Rounds keys and values into slots block * BS + offset; a slot below 0 takes none.

    Args:
        k, v: (T, KH, D) float32, any strides but a contiguous last axis, heads at multiples of 16 bytes.
        slot_mapping: (T,) int32, no slot twice.

    Raises:
        KernelArgumentError.
    """
    tokens = k.shape[0]
    for array, name in ((k, "k"), (v, "v")):
        check_array(array, name, np.float32, (tokens, layer.num_kv_heads, layer.head_dim))
        require(tokens == 0 or aligned16(array), f"the heads of {name} must start at multiples of 16 bytes")
    check_array(slot_mapping, "slot_mapping", np.int32, (tokens,))
    strides_of(slot_mapping, "slot_mapping")
    if tokens:
        (k_row, k_head, _), (v_row, v_head, _) = strides_of(k, "k"), strides_of(v, "v")
        _launch(rt, "write_kv", layer, tokens, (k, k_row, k_head, v, v_row, v_head, slot_mapping), ())


def read_kv(rt: Runtime, layer: PagedLayer, slots: Array, k_out: Array, v_out: Array) -> None:
    """What slots (T,) int32 hold, as float32 (T, KH, D), contiguous; write_kv of it gives the same stored bits.

    A slot below 0 reads as zeros. Raises KernelArgumentError.
    """
    check_array(slots, "slots", np.int32, (None,))
    strides_of(slots, "slots")
    tokens = slots.shape[0]
    for array, name in ((k_out, "k_out"), (v_out, "v_out")):
        check_array(array, name, np.float32, (tokens, layer.num_kv_heads, layer.head_dim))
        require(bool(array.flags.c_contiguous), f"{name} must be contiguous")
        require(tokens == 0 or aligned16(array), f"{name} must start at a multiple of 16 bytes")
    if tokens:
        _launch(rt, "read_kv", layer, tokens, (slots,), (k_out, v_out))


# ---- copies of blocks


def _build_copy_blocks(*, vector: bool) -> Callable[..., None]:
    width = 4 if vector else 1

    def copy_blocks(base: Pointer, array_stride: Value, block_words: Value, pairs: Pointer, first: Value) -> None:
        pair = i32(2 * (first + i32(cuda.blockIdx.y)))
        array = i64(cuda.blockIdx.z) * array_stride
        source = array + i64(pairs[pair]) * block_words
        target = array + i64(pairs[pair + 1]) * block_words
        word = i32(width * (cuda.blockIdx.x * COPY_THREADS + cuda.threadIdx.x))
        if word >= block_words:
            return
        if vector:
            a, b, c, d = load4(base, source + word)
            store4(base, target + word, a, b, c, d)
        else:
            base[target + word] = base[source + word]

    return copy_blocks


@functools.cache
def _copy_kernel(vector: bool) -> Kernel:
    name = f"copy_blocks{'' if vector else '_unaligned'}"
    signature = ("u32*", "i64", "i32", "i32*", "i32")
    return Kernel(name, _build_copy_blocks, (("vector", vector),), signature, COPY_THREADS)


def independent_runs(pairs: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Cuts (source, target) pairs (n, 2) into the longest stretches [begin, end) that may be copied all at once.

    A pair begins a new stretch where it reads what the stretch wrote, or writes what it read or wrote: stretches in
    order then do what one copy after another does.
    """
    runs, begin = [], 0
    read, written = set[int](), set[int]()
    for index, (source, target) in enumerate(pairs.tolist()):
        if source in written or target in read or target in written:
            runs.append((begin, index))
            begin, read, written = index, set(), set()
        read.add(source)
        written.add(target)
    return [*runs, (begin, len(pairs))] if len(pairs) else []


def _evenly_spaced(arrays: Sequence[Array]) -> list[tuple[Array, int, int]]:
    """Arrays of one shape as (first, words from one to the next, how many), all in one where memory allows it."""
    addresses = [address_of(array) for array in arrays]
    stride = addresses[1] - addresses[0]
    if stride % 4 == 0 and addresses == [addresses[0] + stride * index for index in range(len(arrays))]:
        return [(arrays[0], stride // 4, len(arrays))]
    return [(array, 0, 1) for array in arrays]


def copy_blocks(rt: Runtime, layers: Sequence[PagedLayer], pairs: NDArray[np.int32], device_pairs: Array) -> None:
    """Copies block pairs[i, 0] onto pairs[i, 1] in every layer, as if one after another.

    Layers that `allocate_layers` made together take one launch for each run of independent pairs, and one for its
    scales; others one for each array.

    Args:
        layers: alike in shape and dtype.
        pairs: (n, 2) int32, on the host.
        device_pairs: the same on the device, contiguous.

    Raises:
        KernelArgumentError.
    """
    require(pairs.ndim == 2 and pairs.shape[1] == 2, f"pairs of blocks have shape (n, 2), not {pairs.shape}")
    check_array(device_pairs, "device_pairs", np.int32, tuple(pairs.shape))
    if len(pairs) == 0 or not layers:
        return
    first = layers[0]
    require(all((x.dtype, x.k.shape) == (first.dtype, first.k.shape) for x in layers), "the layers differ")
    inside = 0 <= int(pairs.min()) and int(pairs.max()) < first.num_blocks
    require(inside, f"a block is outside the {first.num_blocks} of the cache")
    require(bool(device_pairs.flags.c_contiguous), "device_pairs must be contiguous")
    groups = _evenly_spaced([array for layer in layers for array in (layer.k, layer.v)])
    if first.k_scale is not None:
        groups += _evenly_spaced([array for layer in layers for array in layer.arrays[2:]])
    runs = independent_runs(pairs)
    for base, stride, count in groups:
        words = int(base.nbytes) // 4 // first.num_blocks
        vector = words % 4 == 0 and stride % 4 == 0 and address_of(base) % 16 == 0
        pieces = ceil_div(words // 4 if vector else words, COPY_THREADS)
        for begin, end in runs:
            rt.launch(
                _copy_kernel(vector),
                (pieces, end - begin, count),
                (base.view(np.uint32), stride, words, device_pairs, begin),
            )


def kernels() -> list[Kernel]:
    """The variants of common head sizes."""
    return [
        *(_kernel(name, dtype, 128) for name in ("write_kv", "read_kv") for dtype in CACHE_DTYPES),
        *(_kernel("write_kv", dtype, head_dim) for dtype in ("f16", "fp8") for head_dim in (64, 80, 96, 256)),
        *(_copy_kernel(vector) for vector in (True, False)),
    ]
