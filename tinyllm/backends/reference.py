"""The definition of every op, in plain numpy: short rather than fast. Other backends are tested against it.

It keeps the same-bits promise too: no BLAS, and each output row is computed by itself from 1-D contiguous arrays,
so that neither the order of a sum nor numpy's choice of vector loop depends on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import NO_WINDOW, SPLIT_KEYS, Batch, F32Array, I32Array, KVCacheSpec
from tinyllm.backends.host import HostBackend
from tinyllm.backends.int8_vectors import dequantized, quantized
from tinyllm.errors import ConfigError
from weights import Tensor

__all__ = ["ReferenceBackend"]

f32 = np.float32


@dataclass(frozen=True)
class DenseWeight:
    """A matrix as float32 values."""

    values: F32Array  # (out, in)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)


@dataclass(frozen=True)
class KVLayer:
    """One layer's cache: keys and values, (NB, BS, KH, D) each, stored in the cache's dtype.

    int8 has scales (NB, BS, KH) besides; else they are None.
    """

    k: NDArray[np.generic]
    v: NDArray[np.generic]
    k_scales: F32Array | None = None
    v_scales: F32Array | None = None

    @property
    def arrays(self) -> list[NDArray[np.generic]]:
        return [array for array in (self.k, self.v, self.k_scales, self.v_scales) if array is not None]


@dataclass(frozen=True)
class PagedKVCache:
    spec: KVCacheSpec
    layers: tuple[KVLayer, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer.arrays)


_STORAGE: dict[str, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "int8": np.int8,
}


def _storage(spec: KVCacheSpec) -> np.dtype[np.generic]:
    if spec.dtype not in _STORAGE:
        raise ConfigError(f"kv_dtype {spec.dtype} is for GPUs; the device is reference")
    return np.dtype(_STORAGE[spec.dtype])


def _store(x: F32Array, array: NDArray[np.generic], scales: F32Array | None, at: Any) -> None:
    if scales is None:
        array[at] = _to_storage(x, array.dtype)
    else:
        array[at], scales[at] = quantized(x)


def _load(array: NDArray[np.generic], scales: F32Array | None, at: Any) -> F32Array:
    return _from_storage(array[at]) if scales is None else dequantized(array[at].astype(np.int8), scales[at])


def _to_storage(x: F32Array, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Rounds to nearest even; bfloat16 is kept as the upper 16 bits of a float32. Overflow of f16 gives inf."""
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return x.astype(dtype)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _from_storage(x: NDArray[np.generic]) -> F32Array:
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)


def _rows(f: Callable[[F32Array], F32Array], x: F32Array, out: F32Array | None) -> F32Array:
    """f on each row along the last axis, each as a fresh contiguous array."""
    flat = [f(np.ascontiguousarray(x[index])) for index in np.ndindex(x.shape[:-1])]
    result = np.array(flat, dtype=np.float32).reshape(*x.shape[:-1], -1) if flat else np.empty(x.shape, f32)
    if out is None:
        return result
    out[...] = result
    return out


def _gelu(x: F32Array) -> F32Array:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (arXiv:1606.08415, the approximation)."""
    inner = f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)
    return f32(0.5) * x * (f32(1) + np.tanh(inner))


def _mask_of(batch: Batch, s: int, window: int | None) -> tuple[int, int]:
    """The window and the sinks of sequence s in a layer of that window."""
    window = NO_WINDOW if window is None else window
    if batch.windows is None or batch.num_sinks is None or int(batch.windows[s]) >= window:
        return window, 0
    return int(batch.windows[s]), int(batch.num_sinks[s])


class ReferenceBackend(HostBackend):
    """Plain numpy."""

    name = "reference"

    def load_matrix(self, tensors: Sequence[Tensor], *, near_output: bool = False) -> DenseWeight:
        return DenseWeight(np.concatenate([t.dequantize() for t in tensors]))

    def matrix_nbytes(self, parts: Sequence[tuple[str, tuple[int, int]]]) -> int:
        return sum(4 * rows * columns for _, (rows, columns) in parts)

    def allocate_kv_cache(self, spec: KVCacheSpec) -> PagedKVCache:
        slots = (spec.num_blocks, spec.block_size, spec.num_kv_heads)
        dtype = _storage(spec)

        def layer() -> KVLayer:
            k, v = (np.zeros((*slots, spec.head_dim), dtype) for _ in range(2))
            return KVLayer(k, v, *(np.zeros(slots, np.float32) for _ in range(2 * (spec.dtype == "int8"))))

        return PagedKVCache(spec, tuple(layer() for _ in range(spec.num_layers)))

    def kv_cache_nbytes(self, spec: KVCacheSpec) -> int:
        vectors = 2 * spec.num_layers * spec.num_blocks * spec.block_size * spec.num_kv_heads
        return vectors * (spec.head_dim * _storage(spec).itemsize + 4 * (spec.dtype == "int8"))

    def workspace_nbytes(
        self, max_tokens: int, max_in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int,
        vocab_size: int = 0,
    ) -> int:  # fmt: skip
        return 0  # numpy's temporaries are not reserved

    def embedding(self, token_ids: I32Array, weight: DenseWeight, *, out: F32Array | None = None) -> F32Array:
        return np.take(weight.values, token_ids, axis=0, out=out, mode="raise")

    def linear(
        self, x: F32Array, weight: DenseWeight, bias: F32Array | None = None, *, out: F32Array | None = None
    ) -> F32Array:
        if out is None:
            out = np.empty((x.shape[0], weight.shape[0]), np.float32)
        for t in range(x.shape[0]):
            out[t] = np.sum(weight.values * x[t], axis=1)  # pairwise over k, for each output by itself
        if bias is not None:
            out += bias
        return out

    def rms_norm(self, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None) -> F32Array:
        def norm(row: F32Array) -> F32Array:
            return row / np.sqrt(np.mean(row * row) + f32(eps)) * weight

        return _rows(norm, x, out)

    def add_rms_norm(
        self, residual: F32Array, x: F32Array, weight: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        residual += x
        return self.rms_norm(residual, weight, eps, out=out)

    def layer_norm(
        self, x: F32Array, weight: F32Array, bias: F32Array, eps: float, *, out: F32Array | None = None
    ) -> F32Array:
        def norm(row: F32Array) -> F32Array:
            centred = row - np.mean(row)
            return centred / np.sqrt(np.mean(centred * centred) + f32(eps)) * weight + bias

        return _rows(norm, x, out)

    def rope(self, q: F32Array, k: F32Array, cos: F32Array, sin: F32Array) -> None:
        half = cos.shape[1]
        for x in (q, k):
            first, second = x[..., :half].copy(), x[..., half : 2 * half].copy()
            x[..., :half] = first * cos[:, None] - second * sin[:, None]
            x[..., half : 2 * half] = second * cos[:, None] + first * sin[:, None]

    def silu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        def silu_mul(row: F32Array) -> F32Array:
            gate, up = np.split(row, 2)
            with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right limit, -0
                return gate / (f32(1) + np.exp(-gate)) * up

        return _rows(silu_mul, x, out)

    def gelu_mul(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        def gelu_mul(row: F32Array) -> F32Array:
            gate, up = np.split(row, 2)
            return _gelu(gate.copy()) * up

        return _rows(gelu_mul, x, out)

    def gelu(self, x: F32Array, *, out: F32Array | None = None) -> F32Array:
        return _rows(_gelu, x, out)

    def softcap(self, x: F32Array, cap: float) -> None:
        _rows(lambda row: f32(cap) * np.tanh(row / f32(cap)), x, x)

    def write_kv(self, k: F32Array, v: F32Array, layer: KVLayer, slot_mapping: I32Array) -> None:
        blocks, offsets = np.divmod(slot_mapping, layer.k.shape[1])
        _store(k, layer.k, layer.k_scales, (blocks, offsets))
        _store(v, layer.v, layer.v_scales, (blocks, offsets))

    def copy_blocks(self, cache: PagedKVCache, pairs: I32Array) -> None:
        for src, dst in pairs:
            for layer in cache.layers:
                for array in layer.arrays:
                    array[dst] = array[src]

    def read_kv(self, layer: KVLayer, slots: I32Array) -> tuple[F32Array, F32Array]:
        blocks, offsets = np.divmod(slots, layer.k.shape[1])
        at = (blocks, offsets)
        return _load(layer.k, layer.k_scales, at), _load(layer.v, layer.v_scales, at)

    def paged_attention(
        self,
        q: F32Array,
        layer: KVLayer,
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float = 0.0,
        sink_q: F32Array | None = None,
        out: F32Array | None = None,
        lse: F32Array | None = None,
    ) -> tuple[F32Array, F32Array]:
        T, H, D = q.shape
        block_size, KH = layer.k.shape[1], layer.k.shape[2]
        out = np.empty((T, H, D), np.float32) if out is None else out
        lse = np.empty((T, H), np.float32) if lse is None else lse
        for s, seq_len in enumerate(batch.seq_lens):
            keep, sinks = _mask_of(batch, s, window)
            first_row, end_row = batch.cu_seqlens_q[s], batch.cu_seqlens_q[s + 1]
            for t in range(first_row, end_row):
                p = int(seq_len) - int(end_row - t)
                lowest = 0 if p < sinks + keep else p - keep + 1
                parts = [
                    (q, np.arange(max(start, lowest), min(start + SPLIT_KEYS, p + 1)))
                    for start in range(lowest // SPLIT_KEYS * SPLIT_KEYS, p + 1, SPLIT_KEYS)
                ]
                if sinks > 0 and p >= sinks + keep:
                    assert sink_q is not None
                    parts.insert(0, (sink_q, np.arange(sinks)))
                for h in range(H):
                    maximum, total, acc = f32(-np.inf), f32(0), np.zeros(D, np.float32)
                    for query, keys in parts:
                        at = (batch.block_tables[s, keys // block_size], keys % block_size, h // (H // KH))
                        k, v = _load(layer.k, layer.k_scales, at), _load(layer.v, layer.v_scales, at)  # (n, D)
                        scores = f32(scale) * np.sum(k * np.ascontiguousarray(query[t, h]), axis=1)
                        if softcap:
                            scores = f32(softcap) * np.tanh(scores / f32(softcap))
                        # merge this part into the running softmax (arXiv:1805.02867)
                        new_maximum = np.maximum(maximum, scores.max())
                        probs = np.exp(scores - new_maximum)
                        correction = np.exp(maximum - new_maximum)
                        total = total * correction + probs.sum()
                        acc = acc * correction + np.sum((probs[:, None] * v).T.copy(), axis=1)
                        maximum = new_maximum
                    out[t, h] = acc / total
                    lse[t, h] = maximum + np.log(total)
        return out, lse

    def flash_attention(
        self,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        *,
        scale: float,
        causal: bool = True,
        out: F32Array | None = None,
        lse: F32Array | None = None,
    ) -> tuple[F32Array, F32Array]:
        (N, Q, H, D), (K, KH) = q.shape, k.shape[1:3]
        out = np.empty((N, Q, H, D), np.float32) if out is None else out
        lse = np.empty((N, H, Q), np.float32) if lse is None else lse
        for n, i, h in np.ndindex(N, Q, H):
            seen = max(0, i + K - Q + 1) if causal else K
            keys, values = k[n, :seen, h // (H // KH)], v[n, :seen, h // (H // KH)]  # (seen, D)
            scores = f32(scale) * np.sum(keys * q[n, i, h], axis=1)
            maximum = scores.max(initial=f32(-np.inf))
            probs = np.exp(scores - maximum)
            total = probs.sum()
            out[n, i, h] = np.sum((probs[:, None] * values).T.copy(), axis=1) / total if seen else 0
            lse[n, h, i] = maximum + np.log(total) if seen else -np.inf
        return out, lse

    def flash_attention_backward(
        self,
        dout: F32Array,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        out: F32Array,
        lse: F32Array,
        *,
        scale: float,
        causal: bool = True,
        dq: F32Array | None = None,
        dk: F32Array | None = None,
        dv: F32Array | None = None,
    ) -> tuple[F32Array, F32Array, F32Array]:
        (N, Q, H, _), (K, KH) = q.shape, k.shape[1:3]
        dq, dk, dv = (np.empty(x.shape, f32) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
        dk[...] = dv[...] = 0
        for n, i, h in np.ndindex(N, Q, H):
            at = (n, slice(max(0, i + K - Q + 1) if causal else K), h // (H // KH))  # the keys that the row sees
            probs = np.exp(f32(scale) * np.sum(k[at] * q[n, i, h], axis=1) - lse[n, h, i])
            dprobs = np.sum(v[at] * dout[n, i, h], axis=1)
            delta = np.sum(dout[n, i, h] * out[n, i, h])  # sum(probs * dprobs)
            dscores = f32(scale) * probs * (dprobs - delta)
            dq[n, i, h] = np.sum((dscores[:, None] * k[at]).T.copy(), axis=1)
            dk[at] += dscores[:, None] * q[n, i, h]
            dv[at] += probs[:, None] * dout[n, i, h]
        return dq, dk, dv
