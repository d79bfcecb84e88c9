"""What training needs beside the runtime's ops: backward kernels, the loss, gradient sums, AdamW.

Sums over lanes run over 16 of them and then a fixed tree; sums over rows run in ascending order inside one task. So the
results do not depend on the threads.
"""

from __future__ import annotations

import math

from tinyllm.backends.cpu_kernels.jit import kernel
from tinyllm.backends.cpu_kernels.simd import (
    fma,
    iota_mask,
    lane_max,
    lane_sum,
    load_f32,
    load_first,
    load_i32,
    load_i64,
    maximum,
    splat,
    sqrt,
    sqrt_lanes,
    store_f32,
    store_first,
    zeros,
)
from tinyllm.backends.cpu_kernels.vmath import exp

__all__ = [
    "BLOCK",
    "adamw",
    "add_rows_at",
    "cross_entropy",
    "rms_norm_backward",
    "silu_mul_backward",
    "sum_gradients",
]

BLOCK = 4096  # numbers of the flat parameter vector in one task


@kernel
def rms_norm_backward(
    worker: int, begin: int, end: int, x: int, dy: int, weight: int, eps: float, rows: int, columns: int, dx: int,
    dweight: int,
) -> None:  # fmt: skip
    """dx += and dweight += the gradients of y = x / sqrt(mean(x**2) + eps) * weight, rows in ascending order.

    With r = 1 / sqrt(mean(x**2) + eps) and g = dy * weight: dx = r * (g - x * r**2 * mean(g * x)). One task.
    """
    for row in range(rows):
        source, above, target = x + 4 * row * columns, dy + 4 * row * columns, dx + 4 * row * columns
        squares, products = zeros(), zeros()
        for i in range(0, columns, 16):
            lanes = columns - i
            values = load_first(source + 4 * i, lanes)
            g = load_first(above + 4 * i, lanes) * load_first(weight + 4 * i, lanes)
            squares, products = fma(values, values, squares), fma(g, values, products)
        inverse = splat(1.0) / splat(sqrt(lane_sum(squares) / columns + eps))
        shrink = inverse * inverse * splat(lane_sum(products) / columns)
        for i in range(0, columns, 16):
            lanes = columns - i
            values, d = load_first(source + 4 * i, lanes), load_first(above + 4 * i, lanes)
            g = d * load_first(weight + 4 * i, lanes)
            change = (g - values * shrink) * inverse
            store_first(target + 4 * i, load_first(target + 4 * i, lanes) + change, lanes)
            total = fma(d, values * inverse, load_first(dweight + 4 * i, lanes))
            store_first(dweight + 4 * i, total, lanes)


@kernel
def silu_mul_backward(worker: int, begin: int, end: int, x: int, dout: int, columns: int, dx: int) -> None:
    """x = (gate, up) (T, 2I), out = silu(gate) * up: dx (T, 2I) from dout (T, I). A task is a row."""
    for row in range(begin, end):
        gate, above, target = x + 8 * row * columns, dout + 4 * row * columns, dx + 8 * row * columns
        up = gate + 4 * columns
        for i in range(0, columns, 16):
            lanes = columns - i
            g, u, d = load_first(gate + 4 * i, lanes), load_first(up + 4 * i, lanes), load_first(above + 4 * i, lanes)
            sigmoid = splat(1.0) / (exp(zeros() - g) + splat(1.0))
            slope = sigmoid * fma(g, splat(1.0) - sigmoid, splat(1.0))
            store_first(target + 4 * i, d * u * slope, lanes)
            store_first(target + 4 * (columns + i), d * (g * sigmoid), lanes)


@kernel
def cross_entropy(
    worker: int, begin: int, end: int, logits: int, targets: int, columns: int, scale: float, losses: int
) -> None:
    """losses (T,) = -log softmax(logits)[target], and logits (T, V) become scale times their gradients."""
    for row in range(begin, end):
        source, target = logits + 4 * row * columns, load_i32(targets + 4 * row)
        top = splat(-math.inf)
        for i in range(0, columns, 16):
            values = load_first(source + 4 * i, columns - i)
            if columns - i < 16:
                values = iota_mask(values, 0, columns - i)
            top = maximum(values, top)
        m, at_target = lane_max(top), load_f32(source + 4 * target)
        total = zeros()
        for i in range(0, columns, 16):
            values = load_first(source + 4 * i, columns - i) - splat(m)
            if columns - i < 16:
                values = iota_mask(values, 0, columns - i)
            values = exp(values)
            store_first(source + 4 * i, values, columns - i)
            total = total + values
        s = lane_sum(total)
        store_f32(losses + 4 * row, math.log(s) + (m - at_target))
        factor = splat(scale) / splat(s)
        for i in range(0, columns, 16):
            store_first(source + 4 * i, load_first(source + 4 * i, columns - i) * factor, columns - i)
        store_f32(source + 4 * target, load_f32(source + 4 * target) - scale)


@kernel
def add_rows_at(worker: int, begin: int, end: int, x: int, indices: int, rows: int, columns: int, out: int) -> None:
    """out[indices[t]] += x[t], t ascending: the embedding's gradient. One task."""
    for t in range(rows):
        source, target = x + 4 * t * columns, out + 4 * load_i32(indices + 4 * t) * columns
        for i in range(0, columns, 16):
            lanes = columns - i
            store_first(target + 4 * i, load_first(target + 4 * i, lanes) + load_first(source + 4 * i, lanes), lanes)


@kernel
def sum_gradients(
    worker: int, begin: int, end: int, gradients: int, shards: int, size: int, out: int, squares: int
) -> None:
    """out = the sum of the shards' gradients in ascending order; squares[task] = the sum of out**2 in a block.

    gradients: int64 addresses of `shards` vectors of `size` numbers.
    """
    for block in range(begin, end):
        first, last = block * BLOCK, min(size, block * BLOCK + BLOCK)
        total = zeros()
        for i in range(first, last, 16):
            lanes = last - i
            values = load_first(load_i64(gradients) + 4 * i, lanes)
            for shard in range(1, shards):
                values = values + load_first(load_i64(gradients + 8 * shard) + 4 * i, lanes)
            store_first(out + 4 * i, values, lanes)
            total = fma(values, values, total)
        store_f32(squares + 4 * block, lane_sum(total))


@kernel
def adamw(
    worker: int, begin: int, end: int, parameters: int, gradient: int, first_moment: int, second_moment: int,
    average: int, size: int, decayed: int, clip: float, lr: float, beta1: float, beta2: float, correction1: float,
    correction2: float, eps: float, weight_decay: float, average_rate: float,
) -> None:  # fmt: skip
    """One step of AdamW (arXiv:1711.05101) and of the parameters' moving average. A task is a block.

    The first `decayed` parameters, a multiple of 16, decay; correction1, correction2: 1 - beta**step; clip: factor of
    the gradient.
    """
    for block in range(begin, end):
        last = min(size, block * BLOCK + BLOCK)
        for i in range(block * BLOCK, last, 16):
            lanes, at = last - i, 4 * i
            g = load_first(gradient + at, lanes) * splat(clip)
            m, v = load_first(first_moment + at, lanes), load_first(second_moment + at, lanes)
            m = fma(g - m, splat(1.0 - beta1), m)
            v = fma(g * g - v, splat(1.0 - beta2), v)
            store_first(first_moment + at, m, lanes)
            store_first(second_moment + at, v, lanes)
            p = load_first(parameters + at, lanes)
            change = m / splat(correction1) / (sqrt_lanes(v / splat(correction2)) + splat(eps))
            if i < decayed:
                change = fma(p, splat(weight_decay), change)
            p = p - change * splat(lr)
            store_first(parameters + at, p, lanes)
            a = load_first(average + at, lanes)
            store_first(average + at, fma(p - a, splat(average_rate), a), lanes)
