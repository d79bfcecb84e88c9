"""What the kernel tests share: random quantised tensors, paged caches with traps in them, and exact answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.poison import poison
from tinyllm.backends.base import Backend, Batch, KVCacheSpec
from weights import Tensor
from weights.quants import FORMATS

F64 = NDArray[np.float64]

# Where the float16 scales of a block lie: random bytes there would be infinities and NaN.
_SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, int]) -> Tensor:
    """Any bit pattern of quants, with finite scales of both signs."""
    form = FORMATS[dtype]
    if form.block_size == 1:
        values = rng.standard_normal(shape).astype(np.float32)
        if dtype == "F32":
            data: Any = values.view(np.uint8)
        elif dtype == "F16":
            data = values.astype(np.float16).view(np.uint8)
        else:
            data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        blocks = rng.integers(0, 256, (form.nbytes(shape[0] * shape[1]) // form.block_nbytes, form.block_nbytes))
        data = blocks.astype(np.uint8)
        for offset in _SCALES.get(dtype, (0,)):
            scales = rng.standard_normal(len(data)).astype(np.float16) * np.float16(0.01)
            data[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return Tensor("w", shape, dtype, np.ascontiguousarray(data).reshape(-1))


def oracle_values(tensor: Tensor) -> NDArray[np.float32]:
    """The tensor's values as the gguf package decodes them."""
    kind = gguf.GGMLQuantizationType[tensor.dtype]
    data = tensor.data.view(np.float32) if tensor.dtype == "F32" else tensor.data
    if tensor.dtype == "F16":
        data = tensor.data.view(np.float16)
    values: NDArray[np.float32] = gguf.quants.dequantize(data.reshape(tensor.shape[0], -1), kind)
    return values.reshape(tensor.shape)


def worst(actual: NDArray[np.float32], exact: F64) -> float:
    return float(np.abs(actual.astype(np.float64) - exact).max())


def rounded(x: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """What the cache keeps of x, whose vectors lie along its last axis."""
    if dtype == "f16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bf16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    if dtype == "int8":
        codes, scales = int8_vectors(x)
        return codes.astype(np.float32) * scales[..., None]
    return x


def int8_vectors(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes (..., D) and scales (...) of vectors: the scale is max |x| / 127, rounded up to sixteen bits."""
    amax = np.abs(x).max(-1)
    fraction, exponent = np.frexp(amax / np.float32(127))
    scale = np.ldexp(np.ceil(np.ldexp(fraction, 16)), exponent - 16).astype(np.float32)
    scale = np.where(amax < 2.0**-100, np.float32(0), np.where(np.isfinite(amax), scale, np.float32(np.nan)))
    codes = np.zeros(x.shape, np.int8)
    some = scale > 0
    codes[some] = np.rint(x[some] * (np.float32(1) / scale[some])[:, None])
    return codes, scale


@dataclass
class Sequences:
    """Keys, values and queries of some sequences, (length, heads, D) each, and where a cache keeps them.

    The cache is full of NaN but for what `fill` writes, tables are shuffled, and entries past a sequence's end are
    block ids that do not exist.
    """

    keys: list[NDArray[np.float32]]
    values: list[NDArray[np.float32]]
    queries: list[NDArray[np.float32]]

    @staticmethod
    def random(rng: np.random.Generator, lengths: list[int], heads: int, kv_heads: int, head_dim: int) -> Sequences:
        def normal(n: int, h: int, scale: float) -> NDArray[np.float32]:
            return (rng.standard_normal((n, h, head_dim)) * scale).astype(np.float32)

        return Sequences(
            [normal(n, kv_heads, 1.0) for n in lengths],
            [normal(n, kv_heads, 1.0) for n in lengths],
            [normal(n, heads, 2.0) for n in lengths],
        )

    def fill(self, backend: Backend, block_size: int, dtype: str, rng: np.random.Generator) -> tuple[Any, Any]:
        """Writes all of it into a new cache; returns the cache and the tables (S, MB)."""
        lengths = [len(k) for k in self.keys]
        kv_heads, head_dim = self.keys[0].shape[1:]
        needed = [-(-n // block_size) for n in lengths]
        spec = KVCacheSpec(
            num_layers=1,
            num_blocks=sum(needed) + 3,
            block_size=block_size,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        cache = backend.allocate_kv_cache(spec)
        layer = cache.layers[0]
        poison(layer)
        ids = rng.permutation(spec.num_blocks).astype(np.int32)
        tables = np.full((len(lengths), max(needed) + 2), 2**31 - 1, np.int32)
        for s, n in enumerate(needed):
            tables[s, :n], ids = ids[:n], ids[n:]
            positions = np.arange(lengths[s])
            slots = tables[s, positions // block_size] * block_size + positions % block_size
            backend.write_kv(self.keys[s], self.values[s], layer, slots.astype(np.int32))
        return cache, tables

    def batch(self, spans: list[tuple[int, int, int]], tables: NDArray[np.int32]) -> tuple[Any, Batch]:
        """q and the batch whose queries are positions first to end - 1 of sequence s, for spans (s, first, end)."""
        q = np.concatenate([self.queries[s][first:end] for s, first, end in spans])
        cu_seqlens = np.cumsum([0] + [end - first for _, first, end in spans])
        unused = np.zeros(len(q), np.int32)
        seq_lens = np.array([end for _, _, end in spans], np.int32)
        picked = tables[[s for s, _, _ in spans]]
        return q, Batch(unused, unused, unused, cu_seqlens.astype(np.int32), seq_lens, picked)

    def exact(self, s: int, dtype: str, scale: float, window: int | None, softcap: float) -> tuple[F64, F64]:
        """Attention of all positions of sequence s in float64: out (n, H, D), lse (n, H)."""
        q, k, v = (
            x.astype(np.float64)
            for x in (self.queries[s], rounded(self.keys[s], dtype), rounded(self.values[s], dtype))
        )
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        distance = np.arange(len(q))[:, None] - np.arange(len(q))[None]
        visible = (distance >= 0) & (distance < (window or len(q) + 1))
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        probs = np.exp(scores - top)
        total = probs.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", probs / total, v), (top + np.log(total))[..., 0].T
