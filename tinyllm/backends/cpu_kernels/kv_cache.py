"""The paged cache, and the kernel that writes keys and values into it; `attention.py` draws the layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array, I32Array, KVCacheSpec
from tinyllm.backends.cpu_kernels.attention_amx import suits_amx
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.half import emit_bf16_of_float, emit_half_of_float
from tinyllm.backends.cpu_kernels.int8_vectors import inverse_of, scale_of, store_int8
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.memory import sparse_zeros
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I16,
    I32,
    LANES,
    V32,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_call,
    emit_load,
    emit_splat,
    instruction,
    load_f32,
    load_i32,
    pointer,
    store_f32,
)
from tinyllm.backends.int8_vectors import dequantized
from tinyllm.errors import ConfigError

__all__ = ["TOKENS", "KVLayer", "PagedKVCache", "allocate", "cache_nbytes", "read", "write_kernel"]

_STORAGE: dict[str, np.dtype[np.generic]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}


_ITEM_NBYTES = {name: dtype.itemsize for name, dtype in _STORAGE.items()}
TOKENS = 16  # that mostly lie in one tile of keys: two threads in one would contend for its cache lines
_MOST_IN_INT8 = 512  # the elements of a head whose products' sums are int32


@dataclass(frozen=True)
class KVLayer:
    """One layer: k (NB, KH, BS / 16, D, 16) and v (NB, KH, BS, D'), D' = D rounded up to a multiple of 16.

    storage is the dtype, but "bf16x2" where a matrix unit reads bfloat16 in pairs (`attention_amx.py`):
    k (NB, KH, BS / 16, D / 2, 16, 2) and v (NB, KH, BS / 2, D, 2).

    In int8, where scales follow a tile's and a block's numbers: k (NB, KH, BS / 16, 16 D + 64), D rounded up to a
    multiple of 4, and v (NB, KH, BS D' + 4 BS), in bytes.
    """

    storage: str
    block_size: int
    head_dim: int
    k: NDArray[np.generic]
    v: NDArray[np.generic]
    k_address: int
    v_address: int


@dataclass(frozen=True)
class PagedKVCache:
    spec: KVCacheSpec
    layers: tuple[KVLayer, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)


def _padded(head_dim: int, multiple: int = 16) -> int:
    return -(-head_dim // multiple) * multiple


def _storage(spec: KVCacheSpec) -> str:
    return "bf16x2" if spec.dtype == "bf16" and suits_amx(spec.head_dim) else spec.dtype


def _shapes(spec: KVCacheSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if spec.dtype not in _STORAGE:
        raise ConfigError(f"kv_dtype {spec.dtype} is for GPUs; the device is cpu")
    if spec.block_size % 16:
        raise ConfigError(f"block_size must be a multiple of 16 on the cpu backend, not {spec.block_size}")
    heads, tiles, padded = (spec.num_blocks, spec.num_kv_heads), spec.block_size // 16, _padded(spec.head_dim)
    if _storage(spec) == "bf16x2":
        return (*heads, tiles, spec.head_dim // 2, 16, 2), (*heads, spec.block_size // 2, spec.head_dim, 2)
    if spec.dtype == "int8":
        if spec.head_dim > _MOST_IN_INT8:
            raise ConfigError(f"heads of size {spec.head_dim} in int8: the cpu backend takes at most {_MOST_IN_INT8}")
        return (*heads, tiles, 16 * (_padded(spec.head_dim, 4) + 4)), (*heads, spec.block_size * (padded + 4))
    return (*heads, tiles, spec.head_dim, 16), (*heads, spec.block_size, padded)


def cache_nbytes(spec: KVCacheSpec) -> int:
    """Bytes that `allocate` reserves. Raises ConfigError."""
    values = sum(math.prod(shape) for shape in _shapes(spec))
    return spec.num_layers * values * _STORAGE[spec.dtype].itemsize


def _zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    return sparse_zeros(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def allocate(spec: KVCacheSpec) -> PagedKVCache:
    """Raises ConfigError."""
    dtype = _STORAGE[spec.dtype]
    layers = []
    for _ in range(spec.num_layers):
        k, v = (_zeros(shape, dtype) for shape in _shapes(spec))
        addresses = int(k.ctypes.data), int(v.ctypes.data)
        layers.append(KVLayer(_storage(spec), spec.block_size, spec.head_dim, k, v, *addresses))
    return PagedKVCache(spec, tuple(layers))


# ---- reading and writing


def _widened(stored: NDArray[np.generic], storage: str) -> F32Array:
    if storage in ("bf16", "bf16x2"):
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def _read_int8(layer: KVLayer, blocks: I32Array, offsets: I32Array) -> tuple[F32Array, F32Array]:
    (num_blocks, kv_heads, tiles, _), D = layer.k.shape, layer.head_dim
    k_nbytes, v_nbytes = 16 * _padded(D, 4), layer.block_size * _padded(D)
    k = layer.k[..., :k_nbytes].view(np.int8).reshape(num_blocks, kv_heads, tiles, -1, 16, 4)
    v = layer.v[..., :v_nbytes].view(np.int8).reshape(num_blocks, kv_heads, layer.block_size // 4, -1, 4)
    k_scales, v_scales = layer.k[..., k_nbytes:].view(np.float32), layer.v[..., v_nbytes:].view(np.float32)
    keys = k[blocks, :, offsets // 16, :, offsets % 16].reshape(len(blocks), kv_heads, -1)[..., :D]
    values = v[blocks, :, offsets // 4, :D, offsets % 4]
    return (
        dequantized(keys ^ np.int8(-128), k_scales[blocks, :, offsets // 16, offsets % 16]),
        dequantized(values, v_scales[blocks, :, offsets]),
    )


def read(layer: KVLayer, slots: I32Array) -> tuple[F32Array, F32Array]:
    """The keys and values in slots (T,), (T, KH, D) each."""
    blocks, offsets = np.divmod(slots, layer.block_size)
    if layer.storage == "int8":
        return _read_int8(layer, blocks, offsets)
    if layer.storage == "bf16x2":
        k = layer.k[blocks, :, offsets // 16, :, offsets % 16].reshape(len(slots), layer.k.shape[1], layer.head_dim)
        v = layer.v[blocks, :, offsets // 2, :, offsets % 2]
    else:
        k = layer.k[blocks, :, offsets // 16, :, offsets % 16]
        v = layer.v[blocks, :, offsets, : layer.head_dim]
    return _widened(k, layer.storage), _widened(v, layer.storage)


def _rounding(storage: str) -> Callable[[Builder, Value], Value]:
    """From float32, one or a vector of them, to what is stored."""
    if storage == "f32":
        return lambda b, x: x
    return emit_half_of_float if storage == "f16" else emit_bf16_of_float


def _writers(storage: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """put(source, target, stride): sixteen elements, to places `stride` bytes apart; put_one: one."""
    rounded = _rounding(storage)

    @instruction(types.void, *(types.int64,) * 3)
    def put(b: Builder, source: Value, target: Value, stride: Value) -> None:
        values = rounded(b, emit_load(b, source, VF, align=4))
        kind = values.type.element
        for lane in range(LANES):
            value = b.extract_element(values, ir.Constant(I32, lane))
            b.store(value, pointer(b, target, kind, b.mul(stride, const(lane))), align=_ITEM_NBYTES[storage])

    @instruction(types.void, *(types.int64,) * 2)
    def put_one(b: Builder, source: Value, target: Value) -> None:
        value = rounded(b, emit_load(b, source, F32, align=4))
        b.store(value, pointer(b, target, value.type), align=_ITEM_NBYTES[storage])

    return put, put_one


def _row_writer(storage: str) -> Callable[[int, int], None]:
    """(source, target): sixteen elements, to consecutive places."""
    rounded = _rounding(storage)

    @instruction(types.void, *(types.int64,) * 2)
    def put_row(b: Builder, source: Value, target: Value) -> None:
        values = rounded(b, emit_load(b, source, VF, align=4))
        b.store(values, pointer(b, target, values.type), align=_ITEM_NBYTES[storage])

    return put_row


@cache
def write_kernel(storage: str) -> Kernel:
    """A task is TOKENS tokens: their keys and values go to the slots that slot_mapping names."""
    if storage == "int8":
        return _write_int8()
    if storage == "bf16x2":
        return _write_pairs()
    item = _ITEM_NBYTES[storage]
    (put, put_one), put_row = _writers(storage), _row_writer(storage)

    def write_kv(
        worker: int, begin: int, end: int, tokens: int, k: int, k_stride: int, k_head_stride: int, v: int,
        v_stride: int, v_head_stride: int, kv_heads: int, head_dim: int, padded: int, keys: int, values: int,
        block_size: int, slot_mapping: int,
    ) -> None:  # fmt: skip
        whole = head_dim // 16 * 16
        for t in range(TOKENS * begin, min(TOKENS * end, tokens)):
            slot = load_i32(slot_mapping + 4 * t)
            block, offset = slot // block_size, slot % block_size
            for h in range(kv_heads):
                source = k + t * k_stride + h * k_head_stride
                at = (block * kv_heads + h) * block_size
                target = keys + item * ((at + offset // 16 * 16) * head_dim + offset % 16)
                for d in range(0, whole, 16):
                    put(source + 4 * d, target + item * 16 * d, item * 16)
                for d in range(whole, head_dim):
                    put_one(source + 4 * d, target + item * 16 * d)
                source = v + t * v_stride + h * v_head_stride
                target = values + item * (at + offset) * padded
                for d in range(0, whole, 16):
                    put_row(source + 4 * d, target + item * d)
                for d in range(whole, head_dim):
                    put_one(source + 4 * d, target + item * d)

    return Kernel(f"kv_cache.write_kv-{storage}", write_kv)


@instruction(types.void, *(types.int64,) * 2)
def _put_key_pairs(b: Builder, source: Value, target: Value) -> None:
    """Sixteen elements of a key, in pairs, to a tile of keys."""
    values = emit_bf16_of_float(b, emit_load(b, source, VF, align=4))
    pairs = b.bitcast(values, ir.VectorType(I32, LANES // 2))
    for i in range(LANES // 2):
        b.store(b.extract_element(pairs, ir.Constant(I32, i)), pointer(b, target, I32, 64 * i), align=4)


@instruction(types.void, *(types.int64,) * 3)
def _put_every_other(b: Builder, source: Value, target: Value, odd: Value) -> None:
    """Sixteen elements of a value to where they lie beside another key's, which another thread may be writing."""
    kind = ir.VectorType(I16, 2 * LANES)
    shift = emit_splat(b, b.trunc(b.mul(odd, const(16)), I32), V32)
    values = b.zext(emit_bf16_of_float(b, emit_load(b, source, VF, align=4)), V32)
    kept = b.bitcast(b.shl(const_vec(V32, 0xFFFF), shift), kind)
    mask = b.icmp_signed("!=", kept, ir.Constant(kind, [0] * (2 * LANES)))
    arguments = b.bitcast(b.shl(values, shift), kind), pointer(b, target, kind), ir.Constant(I32, 2), mask
    emit_call(b, "llvm.masked.store.v32i16.p0", ir.VoidType(), *arguments)


def _write_pairs() -> Kernel:
    def write_kv(
        worker: int, begin: int, end: int, tokens: int, k: int, k_stride: int, k_head_stride: int, v: int,
        v_stride: int, v_head_stride: int, kv_heads: int, head_dim: int, padded: int, keys: int, values: int,
        block_size: int, slot_mapping: int,
    ) -> None:  # fmt: skip
        for t in range(TOKENS * begin, min(TOKENS * end, tokens)):
            slot = load_i32(slot_mapping + 4 * t)
            block, offset = slot // block_size, slot % block_size
            for h in range(kv_heads):
                source = k + t * k_stride + h * k_head_stride
                at = (block * kv_heads + h) * block_size * 2 * head_dim
                target = keys + at + offset // 16 * 32 * head_dim + offset % 16 * 4
                for d in range(0, head_dim, 16):
                    _put_key_pairs(source + 4 * d, target + 32 * d)
                source = v + t * v_stride + h * v_head_stride
                target = values + at + offset // 2 * 4 * head_dim
                for d in range(0, head_dim, 16):
                    _put_every_other(source + 4 * d, target + 4 * d, offset % 2)

    return Kernel("kv_cache.write_kv-bf16x2", write_kv)


def _write_int8() -> Kernel:
    def write_kv(
        worker: int, begin: int, end: int, tokens: int, k: int, k_stride: int, k_head_stride: int, v: int,
        v_stride: int, v_head_stride: int, kv_heads: int, head_dim: int, padded: int, keys: int, values: int,
        block_size: int, slot_mapping: int,
    ) -> None:  # fmt: skip
        words = (head_dim + 3) // 4 * 4
        for t in range(TOKENS * begin, min(TOKENS * end, tokens)):
            slot = load_i32(slot_mapping + 4 * t)
            block, offset = slot // block_size, slot % block_size
            for h in range(kv_heads):
                head = (block * kv_heads + h) * block_size
                source = k + t * k_stride + h * k_head_stride
                scale = scale_of(source, head_dim)
                inverse = inverse_of(scale)
                target = keys + (head + offset // 16 * 16) * (words + 4)
                store_f32(target + 16 * words + 4 * (offset % 16), scale)
                target += offset % 16 * 4
                for d in range(head_dim):
                    store_int8(target + d // 4 * 64 + d % 4, load_f32(source + 4 * d), inverse, 128)
                source = v + t * v_stride + h * v_head_stride
                scale = scale_of(source, head_dim)
                inverse = inverse_of(scale)
                target = values + head * (padded + 4)
                store_f32(target + block_size * padded + 4 * offset, scale)
                target += offset // 4 * 4 * padded + offset % 4
                for d in range(head_dim):
                    store_int8(target + 4 * d, load_f32(source + 4 * d), inverse, 0)

    return Kernel("kv_cache.write_kv-int8", write_kv)
