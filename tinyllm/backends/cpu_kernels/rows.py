"""Norms, activations, rotary embedding. A task is a row (rope: a token); sums run over 16 lanes, then a fixed tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinyllm.backends.cpu_kernels.jit import Kernel, device, kernel
from tinyllm.backends.cpu_kernels.simd import (
    fma,
    lane_sum,
    load_first,
    splat,
    sqrt,
    store_first,
    zeros,
)
from tinyllm.backends.cpu_kernels.vmath import gelu, silu, tanh

__all__ = [
    "add", "add_rms_norm", "gelu_mul", "gelu_rows", "layer_norm", "rms_norm", "rope", "scale", "silu_mul", "softcap",
]  # fmt: skip


@kernel
def add(worker: int, begin: int, end: int, x: int, x_stride: int, y: int, y_stride: int, columns: int) -> None:
    """x += y"""
    for row in range(begin, end):
        target, source = x + row * x_stride, y + row * y_stride
        for i in range(0, columns, 16):
            lanes = columns - i
            store_first(target + 4 * i, load_first(target + 4 * i, lanes) + load_first(source + 4 * i, lanes), lanes)


@kernel
def scale(worker: int, begin: int, end: int, x: int, x_stride: int, columns: int, factor: float) -> None:
    """x *= factor"""
    for row in range(begin, end):
        target = x + row * x_stride
        for i in range(0, columns, 16):
            lanes = columns - i
            store_first(target + 4 * i, load_first(target + 4 * i, lanes) * splat(factor), lanes)


@device
def _rms_norm_row(x: int, weight: int, eps: float, columns: int, out: int) -> None:
    squares = zeros()
    for i in range(0, columns, 16):
        values = load_first(x + 4 * i, columns - i)
        squares = fma(values, values, squares)
    inverse = splat(1.0) / splat(sqrt(lane_sum(squares) / columns + eps))
    for i in range(0, columns, 16):
        lanes = columns - i
        store_first(out + 4 * i, load_first(x + 4 * i, lanes) * inverse * load_first(weight + 4 * i, lanes), lanes)


@kernel
def rms_norm(
    worker: int, begin: int, end: int, x: int, x_stride: int, inner: int, x_inner_stride: int, weight: int, eps: float,
    columns: int, out: int, out_stride: int, out_inner_stride: int,
) -> None:  # fmt: skip
    """Row r of x lies at x + (r // inner) * x_stride + (r % inner) * x_inner_stride; likewise of out."""
    for row in range(begin, end):
        i, j = row // inner, row % inner
        source = x + i * x_stride + j * x_inner_stride
        _rms_norm_row(source, weight, eps, columns, out + i * out_stride + j * out_inner_stride)


@kernel
def add_rms_norm(
    worker: int, begin: int, end: int, residual: int, residual_stride: int, x: int, x_stride: int, weight: int,
    eps: float, columns: int, out: int, out_stride: int,
) -> None:  # fmt: skip
    """residual += x, then out = rms_norm(residual)"""
    for row in range(begin, end):
        total, added = residual + row * residual_stride, x + row * x_stride
        for i in range(0, columns, 16):
            lanes = columns - i
            store_first(total + 4 * i, load_first(total + 4 * i, lanes) + load_first(added + 4 * i, lanes), lanes)
        _rms_norm_row(total, weight, eps, columns, out + row * out_stride)


@kernel
def layer_norm(
    worker: int, begin: int, end: int, x: int, x_stride: int, weight: int, bias: int, eps: float, columns: int,
    out: int, out_stride: int,
) -> None:  # fmt: skip
    for row in range(begin, end):
        source, target = x + row * x_stride, out + row * out_stride
        total = zeros()
        for i in range(0, columns, 16):
            total = total + load_first(source + 4 * i, columns - i)
        mean = splat(lane_sum(total) / columns)
        squares = zeros()
        for i in range(0, columns, 16):
            lanes = columns - i
            centred = load_first(source + 4 * i, lanes) - mean
            if lanes < 16:  # the lanes beyond the row hold -mean
                store_first(target + 4 * i, centred, lanes)
                centred = load_first(target + 4 * i, lanes)
            squares = fma(centred, centred, squares)
        inverse = splat(1.0) / splat(sqrt(lane_sum(squares) / columns + eps))
        for i in range(0, columns, 16):
            lanes = columns - i
            values = (load_first(source + 4 * i, lanes) - mean) * inverse
            scale, shift = load_first(weight + 4 * i, lanes), load_first(bias + 4 * i, lanes)
            store_first(target + 4 * i, fma(values, scale, shift), lanes)


def _gated(name: str, activation: Callable[..., Any]) -> Kernel:
    """out = activation(x[:columns]) * x[columns:]"""

    def gated(
        worker: int, begin: int, end: int, x: int, x_stride: int, columns: int, out: int, out_stride: int
    ) -> None:
        for row in range(begin, end):
            gate, target = x + row * x_stride, out + row * out_stride
            up = gate + 4 * columns
            for i in range(0, columns, 16):
                lanes = columns - i
                values = activation(load_first(gate + 4 * i, lanes)) * load_first(up + 4 * i, lanes)
                store_first(target + 4 * i, values, lanes)

    return Kernel(f"rows.{name}", gated)


silu_mul = _gated("silu_mul", silu)
gelu_mul = _gated("gelu_mul", gelu)


@kernel
def gelu_rows(
    worker: int, begin: int, end: int, x: int, x_stride: int, columns: int, out: int, out_stride: int
) -> None:
    for row in range(begin, end):
        source, target = x + row * x_stride, out + row * out_stride
        for i in range(0, columns, 16):
            lanes = columns - i
            store_first(target + 4 * i, gelu(load_first(source + 4 * i, lanes)), lanes)


@kernel
def softcap(worker: int, begin: int, end: int, x: int, x_stride: int, columns: int, cap: float) -> None:
    """x = cap * tanh(x / cap), in place"""
    for row in range(begin, end):
        source = x + row * x_stride
        for i in range(0, columns, 16):
            lanes = columns - i
            values = splat(cap) * tanh(load_first(source + 4 * i, lanes) / splat(cap))
            store_first(source + 4 * i, values, lanes)


@device
def _rotate(x: int, cos: int, sin: int, half: int) -> None:
    for i in range(0, half, 16):
        lanes = half - i
        c, s = load_first(cos + 4 * i, lanes), load_first(sin + 4 * i, lanes)
        first, second = load_first(x + 4 * i, lanes), load_first(x + 4 * (half + i), lanes)
        store_first(x + 4 * i, fma(first, c, zeros() - second * s), lanes)
        store_first(x + 4 * (half + i), fma(second, c, first * s), lanes)


@kernel
def rope(
    worker: int, begin: int, end: int, q: int, q_stride: int, q_head_stride: int, q_heads: int, k: int, k_stride: int,
    k_head_stride: int, k_heads: int, cos: int, sin: int, half: int,
) -> None:  # fmt: skip
    """Rotates all heads of a token in place; cos, sin: (T, half) contiguous."""
    for t in range(begin, end):
        c, s = cos + 4 * half * t, sin + 4 * half * t
        for h in range(q_heads):
            _rotate(q + t * q_stride + h * q_head_stride, c, s, half)
        for h in range(k_heads):
            _rotate(k + t * k_stride + h * k_head_stride, c, s, half)
