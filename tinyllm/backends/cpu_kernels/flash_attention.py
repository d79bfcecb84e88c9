"""Dense FlashAttention, forward and backward, in tiles of 64 queries by 64 keys (arXiv:2205.14135, arXiv:2307.08691).

q (N, Q, H, D), k and v (N, K, KH, D), out like q, lse (N, H, Q): the natural logarithm of a row's sum of
exp(scale * q.k). Query head h reads key head h // (H / KH). A causal mask is aligned at the end: query i sees the
keys j <= i + shift, shift = K - Q.

    Q = 3, K = 5:  x x x . .        Q = 5, K = 3:  . . .   rows that see nothing: out 0, lse -inf
                   x x x x .                       . . .
                   x x x x x                       x . .
                                                   x x .
                                                   x x x

The scores of a tile need its keys transposed, so that sixteen lanes hold sixteen keys. `transpose_tiles` writes them
once per call, linear in length, and zeros beyond the last key:

    keys    (N, K, KH, D)  ->  tiles (N, KH, K / 64, D, 64)

The forward pass walks over a tile of queries' keys with an online softmax. The backward pass keeps nothing but out and
lse; with P = exp(scale * S - lse) and delta = rowsum(dout * out) it recomputes, tile by tile,

    dP = dout V^T,  dS = scale * P * (dP - delta);  dV = P^T dout,  dK = dS^T Q  (flash_attention_dkv: a tile of keys)
                                                    dQ = dS K                    (flash_attention_dq: a tile of queries)

A task owns what it writes, and adds tiles in ascending order: no result depends on the threads. Masked probabilities
are exact zeros, so a row's bits depend on what it sees alone, as long as what it does not see is finite.

Arrays (N, rows, heads, D) reach the kernels as a table of four int64 each: address, and the bytes from one batch, row
and head to the next.

Limits: D a multiple of 16; the last axis contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.jit import device, kernel
from tinyllm.backends.cpu_kernels.online_softmax import TILE_KEYS, softmax_row, start_row
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_fma,
    emit_load,
    emit_loop,
    emit_splat,
    fma,
    instruction,
    iota_mask,
    lane_sum,
    load,
    load_f32,
    load_i64,
    pointer,
    splat,
    store,
    store_f32,
    zeros,
)
from tinyllm.backends.cpu_kernels.vmath import exp

__all__ = [
    "TILE",
    "flash_attention",
    "flash_attention_delta",
    "flash_attention_dkv",
    "flash_attention_dq",
    "scratch_nbytes",
    "transpose_tiles",
    "transposed_nbytes",
]

TILE = TILE_KEYS  # keys of a tile, and its queries
_PITCH = 4 * TILE + 64  # bytes of a row of scores; one cache line more than it holds
_WIDE = host_cpu().has("avx512f")
_ROWS, _VECTORS = (8, 2) if _WIDE else (4, 1)  # what one product keeps in registers

i64 = types.int64


def scratch_nbytes(head_dim: int) -> int:
    """Bytes that a worker needs: two tiles of scores, two accumulators, and the softmax's states."""
    return 2 * TILE * _PITCH + 2 * TILE * (4 * head_dim + 64) + 128 * TILE


def transposed_nbytes(head_dim: int) -> int:
    """Bytes of one transposed tile."""
    return head_dim * _PITCH


@cache
def _product(rows: int, vectors: int, add: bool) -> Callable[..., None]:
    """(a, a_row, a_k, b, b_k, n, c, c_row): c[r] (+)= sum over k < n, in order, of a[r, k] * b[k].

    b[k] and c[r] are 16 * vectors contiguous numbers, a's elements lie a_row and a_k bytes apart.
    """

    @instruction(types.void, *(i64,) * 8)
    def product(
        b: Builder, a: Value, a_row: Value, a_k: Value, values: Value, value_k: Value, n: Value, c: Value, c_row: Value
    ) -> None:
        a_rows = [b.add(a, b.mul(const(r), a_row)) for r in range(rows)]
        c_rows = [b.add(c, b.mul(const(r), c_row)) for r in range(rows)]
        accs = [
            emit_load(b, at, VF, 64 * v, align=4) if add else const_vec(VF, 0.0)
            for at in c_rows
            for v in range(vectors)
        ]

        def multiply(k: Value, accs: list[Value], unroll: int) -> list[Value]:
            for u in range(unroll):
                step = b.add(k, const(u))
                at, offset = b.add(values, b.mul(step, value_k)), b.mul(step, a_k)
                lanes = [emit_load(b, at, VF, 64 * v, align=4) for v in range(vectors)]
                scalars = [emit_splat(b, emit_load(b, row, F32, offset, align=4)) for row in a_rows]
                accs = [
                    emit_fma(b, lanes[v], scalars[r], accs[r * vectors + v])
                    for r in range(rows)
                    for v in range(vectors)
                ]
            return accs

        whole = b.and_(n, const(-4))
        accs = emit_loop(b, const(0), whole, 4, accs, lambda k, accs: multiply(k, accs, 4))
        accs = emit_loop(b, whole, n, 1, accs, lambda k, accs: multiply(k, accs, 1))
        for i, acc in enumerate(accs):
            b.store(acc, pointer(b, c_rows[i // vectors], VF, 64 * (i % vectors)), align=4)

    return product


def _matrix_product(add: bool) -> Callable[..., None]:
    """(a, a_row, a_k, b, b_k, n, c, c_row, rows, columns): the same for any rows, and columns a multiple of 16.

    Where a row's sum is computed, among others or alone, its order over k is the same.
    """
    tile, narrow = _product(_ROWS, _VECTORS, add), _product(_ROWS, 1, add)
    row, narrow_row = _product(1, _VECTORS, add), _product(1, 1, add)
    width = 16 * _VECTORS

    @device
    def matrix_product(
        a: int, a_row: int, a_k: int, b: int, b_k: int, n: int, c: int, c_row: int, rows: int, columns: int
    ) -> None:
        whole_rows, whole_columns = rows - rows % _ROWS, columns - columns % width
        for r in range(0, whole_rows, _ROWS):
            for j in range(0, whole_columns, width):
                tile(a + r * a_row, a_row, a_k, b + 4 * j, b_k, n, c + r * c_row + 4 * j, c_row)
            for j in range(whole_columns, columns, 16):
                narrow(a + r * a_row, a_row, a_k, b + 4 * j, b_k, n, c + r * c_row + 4 * j, c_row)
        for r in range(whole_rows, rows):
            for j in range(0, whole_columns, width):
                row(a + r * a_row, a_row, a_k, b + 4 * j, b_k, n, c + r * c_row + 4 * j, c_row)
            for j in range(whole_columns, columns, 16):
                narrow_row(a + r * a_row, a_row, a_k, b + 4 * j, b_k, n, c + r * c_row + 4 * j, c_row)

    return matrix_product


_multiply = _matrix_product(False)
_multiply_add = _matrix_product(True)


@device
def _row_of(arrays: int, index: int, n: int, row: int, head: int) -> int:
    """The address of a row of one array of a table."""
    at = arrays + 32 * index
    return load_i64(at) + n * load_i64(at + 8) + row * load_i64(at + 16) + head * load_i64(at + 24)


@device
def _row_stride(arrays: int, index: int) -> int:
    return load_i64(arrays + 32 * index + 16)


@device
def _clear(at: int, nbytes: int) -> None:
    for i in range(0, nbytes, 64):
        store(at + i, zeros())


@kernel
def transpose_tiles(
    worker: int, begin: int, end: int, arrays: int, index: int, length: int, heads: int, head_dim: int, out: int
) -> None:
    """x (N, length, heads, D) -> out (N, heads, tiles, D, 64). A task is one tile."""
    tiles, row_stride = (length + TILE - 1) // TILE, _row_stride(arrays, index)
    for task in range(begin, end):
        n, h, tile = task // (heads * tiles), task // tiles % heads, task % tiles
        source = _row_of(arrays, index, n, tile * TILE, h)
        target = out + task * head_dim * _PITCH
        rows = min(TILE, length - tile * TILE)
        for d in range(head_dim):
            for j in range(rows):
                store_f32(target + d * _PITCH + 4 * j, load_f32(source + j * row_stride + 4 * d))
            for j in range(rows, TILE):
                store_f32(target + d * _PITCH + 4 * j, 0.0)


@kernel
def flash_attention(
    worker: int, begin: int, end: int, arrays: int, keys: int, lse: int, queries: int, length: int, heads: int,
    group: int, head_dim: int, shift: int, scale: float, scratch: int, scratch_stride: int,
) -> None:  # fmt: skip
    """A task is a tile of queries of one head. arrays: q, v, out; keys: transposed tiles."""
    q_row, v_row = _row_stride(arrays, 0), _row_stride(arrays, 1)
    q_tiles, k_tiles, kv_heads = (queries + TILE - 1) // TILE, (length + TILE - 1) // TILE, heads // group
    tile_nbytes, acc_pitch = head_dim * _PITCH, 4 * head_dim + 64
    scores = scratch + worker * scratch_stride
    acc = scores + 2 * TILE * _PITCH
    states = acc + 2 * TILE * acc_pitch
    for task in range(begin, end):
        n, h, first = task // (heads * q_tiles), task // q_tiles % heads, task % q_tiles * TILE
        rows = min(TILE, queries - first)
        source = _row_of(arrays, 0, n, first, h)
        tiles = keys + (n * kv_heads + h // group) * k_tiles * tile_nbytes
        values = _row_of(arrays, 1, n, 0, h // group)
        _clear(acc, rows * acc_pitch)
        for r in range(rows):
            start_row(states + 128 * r)
        stop = min(length, first + rows + shift)  # keys that the last row sees
        for key in range(0, stop, TILE):
            n_keys = min(TILE, stop - key)
            tile = tiles + key // TILE * tile_nbytes
            _multiply(source, q_row, 4, tile, _PITCH, head_dim, scores, _PITCH, rows, (n_keys + 15) // 16 * 16)
            for r in range(rows):
                visible = min(n_keys, first + r + shift + 1 - key)
                if visible > 0:
                    row_acc = acc + r * acc_pitch
                    softmax_row(scores + r * _PITCH, 0, 0, visible, scale, 0.0, states + 128 * r, row_acc, head_dim)
                else:
                    _clear(scores + r * _PITCH, _PITCH)
            _multiply_add(scores, _PITCH, 4, values + key * v_row, v_row, n_keys, acc, acc_pitch, rows, head_dim)
        for r in range(rows):
            state, target = states + 128 * r, _row_of(arrays, 2, n, first + r, h)
            m, total = load_f32(state), lane_sum(load(state + 64))
            sees = m != -math.inf
            for d in range(0, head_dim, 16):
                store(target + 4 * d, load(acc + r * acc_pitch + 4 * d) / splat(total) if sees else zeros())
            row_lse = lse + 4 * ((n * heads + h) * queries + first + r)
            store_f32(row_lse, m + math.log(total) if sees else -math.inf)


@kernel
def flash_attention_delta(
    worker: int, begin: int, end: int, arrays: int, queries: int, heads: int, head_dim: int, delta: int
) -> None:
    """delta (N, H, Q) = rowsum(out * dout). A task is one row. arrays: out, dout."""
    for task in range(begin, end):
        n, h, i = task // (heads * queries), task // queries % heads, task % queries
        x, y = _row_of(arrays, 0, n, i, h), _row_of(arrays, 1, n, i, h)
        total = zeros()
        for d in range(0, head_dim, 16):
            total = fma(load(x + 4 * d), load(y + 4 * d), total)
        store_f32(delta + 4 * task, lane_sum(total))


@device
def _recompute(
    q: int, q_row: int, dout: int, dout_row: int, lse: int, delta: int, key_tile: int, value_tile: int, rows: int,
    n_keys: int, visible: int, head_dim: int, scale: float, probs: int, dscores: int,
) -> None:  # fmt: skip
    """P and dS of a tile, zero where masked; row r sees its first `visible` + r keys."""
    columns = (n_keys + 15) // 16 * 16
    _multiply(q, q_row, 4, key_tile, _PITCH, head_dim, probs, _PITCH, rows, columns)
    _multiply(dout, dout_row, 4, value_tile, _PITCH, head_dim, dscores, _PITCH, rows, columns)
    for r in range(rows):
        row_probs, row_dscores, seen = probs + r * _PITCH, dscores + r * _PITCH, min(n_keys, visible + r)
        row_lse, row_delta = splat(load_f32(lse + 4 * r)), splat(load_f32(delta + 4 * r))
        for j in range(0, columns, 16):
            if j < seen:
                exponents = load(row_probs + 4 * j) * splat(scale) - row_lse
                if j + 16 > seen:
                    exponents = iota_mask(exponents, 0, seen - j)
                p = exp(exponents)
                store(row_probs + 4 * j, p)
                store(row_dscores + 4 * j, p * (load(row_dscores + 4 * j) - row_delta) * splat(scale))
            else:
                store(row_probs + 4 * j, zeros())
                store(row_dscores + 4 * j, zeros())


@kernel
def flash_attention_dq(
    worker: int, begin: int, end: int, arrays: int, keys: int, values: int, lse: int, delta: int, queries: int,
    length: int, heads: int, group: int, head_dim: int, shift: int, scale: float, scratch: int, scratch_stride: int,
) -> None:  # fmt: skip
    """A task is a tile of queries of one head. arrays: q, dout, k, dq; keys, values: transposed tiles."""
    q_row, dout_row, k_row = _row_stride(arrays, 0), _row_stride(arrays, 1), _row_stride(arrays, 2)
    q_tiles, k_tiles, kv_heads = (queries + TILE - 1) // TILE, (length + TILE - 1) // TILE, heads // group
    tile_nbytes, acc_pitch = head_dim * _PITCH, 4 * head_dim + 64
    probs = scratch + worker * scratch_stride
    dscores = probs + TILE * _PITCH
    acc = dscores + TILE * _PITCH
    for task in range(begin, end):
        n, h, first = task // (heads * q_tiles), task // q_tiles % heads, task % q_tiles * TILE
        rows = min(TILE, queries - first)
        at = 4 * ((n * heads + h) * queries + first)
        tiles = (n * kv_heads + h // group) * k_tiles * tile_nbytes
        k_rows = _row_of(arrays, 2, n, 0, h // group)
        _clear(acc, rows * acc_pitch)
        stop = min(length, first + rows + shift)
        for key in range(0, stop, TILE):
            n_keys = min(TILE, stop - key)
            tile = tiles + key // TILE * tile_nbytes
            _recompute(
                _row_of(arrays, 0, n, first, h), q_row, _row_of(arrays, 1, n, first, h), dout_row, lse + at, delta + at,
                keys + tile, values + tile, rows, n_keys, first + shift + 1 - key, head_dim, scale, probs, dscores,
            )  # fmt: skip
            _multiply_add(dscores, _PITCH, 4, k_rows + key * k_row, k_row, n_keys, acc, acc_pitch, rows, head_dim)
        for r in range(rows):
            target = _row_of(arrays, 3, n, first + r, h)
            for d in range(0, head_dim, 16):
                store(target + 4 * d, load(acc + r * acc_pitch + 4 * d))


@kernel
def flash_attention_dkv(
    worker: int, begin: int, end: int, arrays: int, keys: int, values: int, lse: int, delta: int, queries: int,
    length: int, heads: int, group: int, head_dim: int, shift: int, scale: float, scratch: int, scratch_stride: int,
) -> None:  # fmt: skip
    """A task is a tile of keys of one key head; it sums over the queries of the heads that share it.

    arrays: q, dout, dk, dv; keys, values: transposed tiles.
    """
    q_row, dout_row = _row_stride(arrays, 0), _row_stride(arrays, 1)
    k_tiles, kv_heads = (length + TILE - 1) // TILE, heads // group
    tile_nbytes, acc_pitch = head_dim * _PITCH, 4 * head_dim + 64
    probs = scratch + worker * scratch_stride
    dscores = probs + TILE * _PITCH
    k_acc = dscores + TILE * _PITCH
    v_acc = k_acc + TILE * acc_pitch
    for task in range(begin, end):
        n, kv_head, key = task // (kv_heads * k_tiles), task // k_tiles % kv_heads, task % k_tiles * TILE
        n_keys = min(TILE, length - key)
        tile = task * tile_nbytes
        _clear(k_acc, n_keys * acc_pitch)
        _clear(v_acc, n_keys * acc_pitch)
        start = max(0, key - shift) // TILE * TILE  # the tile of the first query that sees the first key
        for h in range(kv_head * group, kv_head * group + group):
            for first in range(start, queries, TILE):
                rows = min(TILE, queries - first)
                at = 4 * ((n * heads + h) * queries + first)
                q_rows, dout_rows = _row_of(arrays, 0, n, first, h), _row_of(arrays, 1, n, first, h)
                _recompute(
                    q_rows, q_row, dout_rows, dout_row, lse + at, delta + at, keys + tile, values + tile, rows, n_keys,
                    first + shift + 1 - key, head_dim, scale, probs, dscores,
                )  # fmt: skip
                _multiply_add(probs, 4, _PITCH, dout_rows, dout_row, rows, v_acc, acc_pitch, n_keys, head_dim)
                _multiply_add(dscores, 4, _PITCH, q_rows, q_row, rows, k_acc, acc_pitch, n_keys, head_dim)
        for j in range(n_keys):
            k_target = _row_of(arrays, 2, n, key + j, kv_head)
            v_target = _row_of(arrays, 3, n, key + j, kv_head)
            for d in range(0, head_dim, 16):
                store(k_target + 4 * d, load(k_acc + j * acc_pitch + 4 * d))
                store(v_target + 4 * d, load(v_acc + j * acc_pitch + 4 * d))
