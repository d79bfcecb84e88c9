"""The paged cache, and the kernel that writes keys and values into it; `attention.py` draws the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array, I32Array, KVCacheSpec
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.half import emit_half_of_float
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.memory import sparse_zeros
from tinyllm.backends.cpu_kernels.simd import (
    F16,
    I16,
    I32,
    Builder,
    Value,
    instruction,
    load_f32,
    load_i32,
    pointer,
    store_f32,
)
from tinyllm.errors import ConfigError

__all__ = ["KVLayer", "PagedKVCache", "allocate", "cache_nbytes", "read", "write_kernel"]

_STORAGE: dict[str, np.dtype[np.generic]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}


@dataclass(frozen=True)
class KVLayer:
    """One layer: k (NB, KH, BS / 16, D, 16) and v (NB, KH, BS, D'), D' = D rounded up to a multiple of 16."""

    dtype: str
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


def _shapes(spec: KVCacheSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if spec.block_size % 16:
        raise ConfigError(f"block_size must be a multiple of 16 on the cpu backend, not {spec.block_size}")
    k = (spec.num_blocks, spec.num_kv_heads, spec.block_size // 16, spec.head_dim, 16)
    v = (spec.num_blocks, spec.num_kv_heads, spec.block_size, -(-spec.head_dim // 16) * 16)
    return k, v


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
        layers.append(KVLayer(spec.dtype, spec.block_size, spec.head_dim, k, v, *addresses))
    return PagedKVCache(spec, tuple(layers))


# ---- reading and writing


def _widened(stored: NDArray[np.generic], dtype: str) -> F32Array:
    if dtype == "bf16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def read(layer: KVLayer, slots: I32Array) -> tuple[F32Array, F32Array]:
    """The keys and values in slots (T,), (T, KH, D) each."""
    blocks, offsets = np.divmod(slots, layer.block_size)
    k = layer.k[blocks, :, offsets // 16, :, offsets % 16]
    v = layer.v[blocks, :, offsets, : layer.head_dim]
    return _widened(k, layer.dtype), _widened(v, layer.dtype)


@instruction(types.void, types.int64, types.float32)
def _store_f16(b: Builder, address: Value, value: Value) -> None:
    """Rounded to nearest even; beyond 65504 (and half a step) infinity."""
    b.store(emit_half_of_float(b, value), pointer(b, address, F16), align=2)


@instruction(types.void, types.int64, types.float32)
def _store_bf16(b: Builder, address: Value, value: Value) -> None:
    """The upper half of the float32, rounded to nearest even; NaN becomes 0x7fc0."""
    bits = b.bitcast(value, I32)
    one, odd = ir.Constant(I32, 1), ir.Constant(I32, 0x7FFF)
    rounded = b.add(bits, b.add(odd, b.and_(b.lshr(bits, ir.Constant(I32, 16)), one)))
    chosen = b.select(b.fcmp_unordered("uno", value, value), ir.Constant(I32, 0x7FC00000), rounded)
    b.store(b.trunc(b.lshr(chosen, ir.Constant(I32, 16)), I16), pointer(b, address, I16), align=2)


@cache
def write_kernel(dtype: str) -> Kernel:
    """A task is a token: its keys and values go to the slot that slot_mapping names."""
    item = 4 if dtype == "f32" else 2
    store_value = {"f32": store_f32, "f16": _store_f16, "bf16": _store_bf16}[dtype]

    def write_kv(
        worker: int, begin: int, end: int, k: int, k_stride: int, k_head_stride: int, v: int, v_stride: int,
        v_head_stride: int, kv_heads: int, head_dim: int, padded: int, keys: int, values: int, block_size: int,
        slot_mapping: int,
    ) -> None:  # fmt: skip
        for t in range(begin, end):
            slot = load_i32(slot_mapping + 4 * t)
            block, offset = slot // block_size, slot % block_size
            for h in range(kv_heads):
                source = k + t * k_stride + h * k_head_stride
                at = (block * kv_heads + h) * block_size
                target = keys + item * ((at + offset // 16 * 16) * head_dim + offset % 16)
                for d in range(head_dim):
                    store_value(target + item * 16 * d, load_f32(source + 4 * d))
                source = v + t * v_stride + h * v_head_stride
                target = values + item * (at + offset) * padded
                for d in range(head_dim):
                    store_value(target + item * d, load_f32(source + 4 * d))

    return Kernel(f"kv_cache.write_kv-{dtype}", write_kv)
