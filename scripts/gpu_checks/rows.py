"""Checks and timings of norms, rotations, activations, gathers and the cache's writes: all bound by memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.roofline import TileWork
from gpu_checks.suite import Check, Context, Outcome, Prepared, Timing, differing, larger, worst

__all__ = ["checks", "timings"]

EPS = 1e-5
U32 = 2.0**-24  # unit roundoff of float32
KV_DTYPES = ("f32", "f16", "bf16", "int8", "fp8")


# ---- oracles, float64


def _rms_norm(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def _layer_norm(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight + bias


def _gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def _silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


# ---- checks


def _widths(context: Context) -> Sequence[tuple[int, int]]:
    return ((1, 1), (3, 33), (2, 576)) if context.small else ((1, 1), (3, 33), (17, 576), (5, 1000), (130, 4096))


def _check_rms_norm(context: Context) -> Outcome:
    from cuda_kernels.norms import add_rms_norm, rms_norm

    error, bits = 0.0, 0.0
    for T, M in _widths(context):
        x, y, weight = context.normal(T, M), context.normal(T, M), context.normal(M)
        out, out_after_add = context.poisoned(T, M), context.poisoned(T, M)
        residual, sum_ = context.put(x), context.put(x + y)
        rms_norm(context.rt, sum_, context.put(weight), EPS, out)
        add_rms_norm(context.rt, residual, context.put(y), context.put(weight), EPS, out_after_add)
        found = context.rt.download(out)
        exact = _rms_norm(x + y, weight)
        error = larger(error, worst(found, exact, np.abs(exact) + 1e-30))
        bits += differing(found, context.rt.download(out_after_add)).error
        bits += differing(x + y, context.rt.download(residual)).error
    return Outcome(error if bits == 0 else np.inf, 16 * U32)


def _check_layer_norm(context: Context) -> Outcome:
    from cuda_kernels.norms import layer_norm

    error = 0.0
    for T, M in _widths(context):
        x, weight, bias, out = context.normal(T, M), context.normal(M), context.normal(M), context.poisoned(T, M)
        layer_norm(context.rt, context.put(x), context.put(weight), context.put(bias), EPS, out)
        scale = (np.abs(x).max() / np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + EPS)) * np.abs(weight)
        error = larger(error, worst(context.rt.download(out), _layer_norm(x, weight, bias), scale + np.abs(bias)))
    return Outcome(error, 32 * U32)


def _check_rope(context: Context) -> Outcome:
    from cuda_kernels.rope import rope

    error = 0.0
    for T, H, KH, D, R in ((1, 1, 1, 8, 8), (5, 6, 2, 64, 64), (3, 4, 1, 80, 32)):
        q, k = context.normal(T, H, D), context.normal(T, KH, D)
        angles = context.normal(T, R // 2).astype(np.float64)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        arrays = context.put(q), context.put(k)
        rope(context.rt, *arrays, context.put(cos), context.put(sin))
        for x, array in zip((q, k), arrays, strict=True):
            exact = x.astype(np.float64)
            first, second = exact[..., : R // 2].copy(), exact[..., R // 2 : R].copy()
            exact[..., : R // 2] = first * cos[:, None] - second * sin[:, None]
            exact[..., R // 2 : R] = second * cos[:, None] + first * sin[:, None]
            error = larger(error, worst(context.rt.download(array), exact, np.abs(x).max()))
    return Outcome(error, 4 * U32)


def _check_activations(context: Context) -> Outcome:
    from cuda_kernels.activations import gelu, gelu_mul, silu_mul, softcap

    error = 0.0
    for T, columns in ((1, 1), (3, 33), (2, 576)):
        x = context.normal(T, 2 * columns, deviation=4)
        gate, up = np.split(x.astype(np.float64), 2, axis=1)
        for launch, exact in ((silu_mul, _silu(gate) * up), (gelu_mul, _gelu(gate) * up)):
            out = context.poisoned(T, columns)
            launch(context.rt, context.put(x), out)
            error = larger(error, worst(context.rt.download(out), exact, np.abs(gate * up) + 1e-30))
        out = context.poisoned(T, 2 * columns)
        gelu(context.rt, context.put(x), out)
        error = larger(error, worst(context.rt.download(out), _gelu(x.astype(np.float64)), np.abs(x)))
        capped = context.put(x)
        softcap(context.rt, capped, 3.0)
        error = larger(error, worst(context.rt.download(capped), 3 * np.tanh(x.astype(np.float64) / 3), 3.0))
    return Outcome(error, 16 * U32)


def _check_gather(context: Context) -> Outcome:
    from cuda_kernels.gather import gather_rows

    x, rows = context.normal(37, 132), context.rng.integers(0, 37, 9).astype(np.int32)
    out = context.poisoned(9, 132)
    gather_rows(context.rt, context.put(x), context.put(rows), out)
    return differing(context.rt.download(out), x[rows])


def _cache(context: Context, dtype: str, shape: tuple[int, int, int, int]) -> Any:
    from cuda_kernels.paged_cache import allocate_layer

    blocks, heads, size, dim = shape
    layer = allocate_layer(context.rt, blocks, size, heads, dim, dtype)
    for array in layer.arrays:
        context.rt.fill(array, 0)
    return layer


def _check_cache(dtype: str) -> Callable[[Context], Outcome]:
    """write_kv rounds to the dtype, and what read_kv gives is written back as the same bits."""

    def run(context: Context) -> Outcome:
        from cuda_kernels.kv_cache_kernels import read_kv, write_kv

        T, heads, dim, size, blocks = 13, 3, 64, 8, 5
        layer = _cache(context, dtype, (blocks, heads, size, dim))
        k, v = context.normal(T, heads, dim), context.normal(T, heads, dim)
        slots = context.rng.permutation(blocks * size)[:T].astype(np.int32)
        write_kv(context.rt, context.put(k), context.put(v), layer, context.put(slots))
        k_out, v_out = context.poisoned(T, heads, dim), context.poisoned(T, heads, dim)
        read_kv(context.rt, layer, context.put(slots), k_out, v_out)
        before = [context.rt.download(array) for array in layer.arrays]
        write_kv(context.rt, k_out, v_out, layer, context.put(slots))
        again = sum(
            differing(old, context.rt.download(array)).error for old, array in zip(before, layer.arrays, strict=True)
        )
        step = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.5 / 127, "fp8": 2.0**-4}[dtype]
        error = 0.0
        for x, out in ((k, k_out), (v, v_out)):
            of_row = np.abs(x).max(-1, keepdims=True)
            scale = of_row if dtype in ("int8", "fp8") else np.abs(x)
            error = larger(error, worst(context.rt.download(out), x.astype(np.float64), scale))
        return Outcome(error if again == 0 else np.inf, step * (1 + 1e-5))

    return run


def _check_copy_blocks(context: Context) -> Outcome:
    from cuda_kernels.kv_cache_kernels import copy_blocks

    layers = [_cache(context, "f16", (6, 2, 8, 64)) for _ in range(3)]
    stored = []
    for layer in layers:
        for array in layer.arrays:
            bits = context.rng.integers(0, 1 << 15, array.shape).astype(np.uint16)
            context.rt.upload(array, bits)
            stored.append(bits)
    pairs = np.array([[0, 3], [3, 4], [1, 5]], np.int32)
    for source, target in pairs:
        for bits in stored:
            bits[target] = bits[source]
    copy_blocks(context.rt, layers, pairs, context.put(pairs))
    found = [context.rt.download(array) for layer in layers for array in layer.arrays]
    return Outcome(sum(differing(a, b).error for a, b in zip(found, stored, strict=True)), 0.0)


def checks() -> list[Check]:
    named: list[tuple[str, str, Callable[[Context], Outcome]]] = [
        ("norms", "rms_norm, add_rms_norm", _check_rms_norm),
        ("norms", "layer_norm", _check_layer_norm),
        ("rope", "rope", _check_rope),
        ("activations", "silu_mul, gelu_mul, gelu, softcap", _check_activations),
        ("gather", "gather_rows", _check_gather),
        *(("kv_cache", f"write_kv, read_kv {dtype}", _check_cache(dtype)) for dtype in KV_DTYPES),
        ("kv_cache", "copy_blocks in order", _check_copy_blocks),
    ]
    return [Check(family, name, run) for family, name, run in named]


# ---- timings


def _memory(nbytes: int) -> TileWork:
    return TileWork(0.0, nbytes, tensor=False)


def _time_add_rms_norm(T: int, M: int) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        from cuda_kernels.norms import add_rms_norm

        nbytes = 16 * T * M
        weight, sets = context.put(context.normal(M)), []
        for _ in range(context.rotations(nbytes)):
            x, residual = context.put(context.normal(T, M)), context.zeros(T, M)
            sets.append((x, residual, context.rt.empty((T, M), np.float32)))

        def torch_rms_norm() -> Sequence[Callable[[], Any]]:
            import torch

            weight = torch.ones(M, device="cuda")
            arrays = [tuple(torch.randn(T, M, device="cuda") for _ in range(2)) for _ in sets]
            return [lambda x=x, y=y: torch.nn.functional.rms_norm(y.add_(x), (M,), weight, EPS) for x, y in arrays]

        launches = [lambda x=x, r=r, out=out: add_rms_norm(context.rt, r, x, weight, EPS, out) for x, r, out in sets]
        return Prepared(launches, _memory(nbytes), {"torch add_, rms_norm": torch_rms_norm})

    return prepare


def _time_silu_mul(T: int, columns: int) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        from cuda_kernels.activations import silu_mul

        nbytes = 12 * T * columns
        sets = [
            (context.put(context.normal(T, 2 * columns)), context.rt.empty((T, columns), np.float32))
            for _ in range(context.rotations(nbytes))
        ]

        def torch_silu_mul() -> Sequence[Callable[[], Any]]:
            import torch

            arrays = [torch.randn(T, 2 * columns, device="cuda") for _ in sets]
            return [lambda x=x: torch.nn.functional.silu(x[:, :columns]) * x[:, columns:] for x in arrays]

        launches = [lambda x=x, out=out: silu_mul(context.rt, x, out) for x, out in sets]
        return Prepared(launches, _memory(nbytes), {"torch silu, mul": torch_silu_mul})

    return prepare


def _time_rope(T: int, H: int, KH: int, D: int) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        from cuda_kernels.rope import rope

        nbytes = 8 * T * (H + KH) * D + 4 * T * D
        cos, sin = context.put(context.normal(T, D // 2)), context.put(context.normal(T, D // 2))
        sets = [
            (context.put(context.normal(T, H, D)), context.put(context.normal(T, KH, D)))
            for _ in range(context.rotations(nbytes))
        ]
        return Prepared([lambda q=q, k=k: rope(context.rt, q, k, cos, sin) for q, k in sets], _memory(nbytes))

    return prepare


def _time_write_kv(T: int, KH: int, D: int, dtype: str) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        from cuda_kernels.kv_cache_kernels import write_kv

        stored = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1, "fp8": 1}[dtype]
        nbytes = 2 * T * KH * D * (4 + stored)
        blocks = max(64, 2 * T // 16)
        layer = _cache(context, dtype, (blocks, KH, 16, D))
        slots = context.put(context.rng.permutation(blocks * 16)[:T].astype(np.int32))
        sets = [
            (context.put(context.normal(T, KH, D)), context.put(context.normal(T, KH, D)))
            for _ in range(context.rotations(nbytes))
        ]
        return Prepared([lambda k=k, v=v: write_kv(context.rt, k, v, layer, slots) for k, v in sets], _memory(nbytes))

    return prepare


def timings() -> list[Timing]:
    return [
        Timing("norms", "add_rms_norm T=1 M=4096", _time_add_rms_norm(1, 4096)),
        Timing("norms", "add_rms_norm T=2048 M=4096", _time_add_rms_norm(2048, 4096), quick=True),
        Timing("activations", "silu_mul T=2048 I=14336", _time_silu_mul(2048, 14336), quick=True),
        Timing("rope", "rope T=2048 H=32 KH=8 D=128", _time_rope(2048, 32, 8, 128)),
        Timing("kv_cache", "write_kv bf16 T=2048 KH=8 D=128", _time_write_kv(2048, 8, 128, "bf16")),
        Timing("kv_cache", "write_kv int8 T=2048 KH=8 D=128", _time_write_kv(2048, 8, 128, "int8")),
    ]
