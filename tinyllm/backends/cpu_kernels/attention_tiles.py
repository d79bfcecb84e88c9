"""The two products of attention for a tile of rows: scores with sixteen or thirty-two keys, and sums over values.

Rows share each load of K and V; how many rows there are, and how many vectors side by side, changes no row's
arithmetic: a score is summed over d ascending, an output over keys ascending, one fused multiply-add each.

A tile's queries lie transposed, (D, ROW_TILE), and its scores in rows of TILE_KEYS, so that all rows are at constant
distances from one address: strides in registers would take more of them than there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.jit import device
from tinyllm.backends.cpu_kernels.online_softmax import TILE_KEYS
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I32,
    I64,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_fma,
    emit_load,
    emit_load_values,
    emit_loop,
    emit_splat,
    instruction,
    load_i32,
    pointer,
)

__all__ = ["ITEM_NBYTES", "ROW_TILE", "AttentionTiles", "attention_tiles"]

_WIDE = host_cpu().has("avx512f")  # 32 registers of sixteen lanes
ROW_TILE = 8 if _WIDE else 4  # the most rows that share loads of K and V
_TILE_ROWS = (1, 2, 3, 4, ROW_TILE)
_PAIRS = _WIDE  # whether scores of two tiles of keys are summed side by side
ITEM_NBYTES = {"f32": 4, "f16": 2, "bf16": 2}
_UNROLL = 4

i64 = types.int64


def _vectors(rows: int) -> int:
    """Vectors of V's elements that so many rows multiply at once."""
    if _WIDE:
        return 4 if rows <= 4 else 2
    return 2 if rows <= 2 else 1


def _multiply(b: Builder, accs: list[Value], lanes: list[Value], factors: Value, rows: int, stride: int) -> list[Value]:
    """accs[r][v] + (the float32 at factors + r * stride bytes) * lanes[v]"""
    broadcast = [emit_splat(b, emit_load(b, factors, F32, stride * r, align=4)) for r in range(rows)]
    places = [(factor, lane) for factor in broadcast for lane in lanes]
    return [emit_fma(b, lane, factor, acc) for (factor, lane), acc in zip(places, accs, strict=True)]


def _unrolled(b: Builder, n: Value, accs: list[Value], one: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
    """accs after one(i, accs) for i in range(n)."""

    def several(i: Value, accs: list[Value]) -> list[Value]:
        for u in range(_UNROLL):
            accs = one(b.add(i, const(u)), accs)
        return accs

    whole = b.and_(n, const(-_UNROLL))
    accs = emit_loop(b, const(0), whole, _UNROLL, accs, several)
    return emit_loop(b, whole, n, 1, accs, one)


def _score_tile(rows: int, key_tiles: int, dtype: str) -> Callable[..., None]:
    """(q, keys, more_keys, head_dim, scores): scores[r] = q[:, r] . 16 or 32 keys.

    q (D, ROW_TILE); keys, more_keys: (D, 16) each, the latter for key_tiles = 2.
    """

    @instruction(types.void, *(i64,) * 5)
    def score_tile(b: Builder, q: Value, keys: Value, more_keys: Value, head_dim: Value, scores: Value) -> None:
        tiles = [keys, more_keys][:key_tiles]

        def one(d: Value, accs: list[Value]) -> list[Value]:
            at = b.mul(d, const(16 * ITEM_NBYTES[dtype]))
            lanes = [emit_load_values(b, b.add(tile, at), dtype) for tile in tiles]
            return _multiply(b, accs, lanes, b.add(q, b.mul(d, const(4 * ROW_TILE))), rows, 4)

        accs = _unrolled(b, head_dim, [const_vec(VF, 0.0)] * (rows * key_tiles), one)
        for index, acc in enumerate(accs):
            offset = 4 * TILE_KEYS * (index // key_tiles) + 64 * (index % key_tiles)
            b.store(acc, pointer(b, scores, VF, offset), align=4)

    return score_tile


def _value_tile(rows: int, vectors: int, dtype: str) -> Callable[..., None]:
    """(probs, first, end, v, v_block_stride, v_stride, table, block_size, acc, acc_stride)

    acc[r] += probs[r][j] * V[j] for keys first <= j < end, ascending; 16 * vectors elements. probs is where key 0's
    would be, v the first block's row of key 0.
    """

    @instruction(types.void, *(i64,) * 10)
    def value_tile(
        b: Builder, probs: Value, first: Value, end: Value, v: Value, v_block_stride: Value, v_stride: Value,
        table: Value, block_size: Value, acc: Value, acc_stride: Value,
    ) -> None:  # fmt: skip
        places = [
            pointer(b, b.add(acc, b.mul(const(r), acc_stride)), VF, 64 * i) for r in range(rows) for i in range(vectors)
        ]

        def one_block(block: Value, accs: list[Value]) -> list[Value]:
            start = b.mul(block, block_size)
            stop = b.add(start, block_size)
            low = b.select(b.icmp_signed("<", start, first), first, start)
            high = b.select(b.icmp_signed("<", end, stop), end, stop)
            number = b.sext(emit_load(b, b.add(table, b.mul(block, const(4))), I32), I64)
            row = b.add(v, b.add(b.mul(number, v_block_stride), b.mul(b.sub(low, start), v_stride)))
            factors = b.add(probs, b.mul(low, const(4)))

            def one_key(j: Value, accs: list[Value]) -> list[Value]:
                at = b.add(row, b.mul(j, v_stride))
                lanes = [emit_load_values(b, at, dtype, 16 * i * ITEM_NBYTES[dtype]) for i in range(vectors)]
                return _multiply(b, accs, lanes, b.add(factors, b.mul(j, const(4))), rows, 4 * TILE_KEYS)

            return _unrolled(b, b.sub(high, low), accs, one_key)

        last = b.sdiv(b.sub(end, const(1)), block_size)
        blocks = b.sdiv(first, block_size), b.add(last, const(1))
        accs = emit_loop(b, *blocks, 1, [b.load(place, align=4) for place in places], one_block)
        for one, place in zip(accs, places, strict=True):
            b.store(one, place, align=4)

    return value_tile


def _by_rows(tiles: list[Callable[..., None]]) -> Callable[..., None]:
    """(rows, *arguments): the first of _TILE_ROWS' tiles that has as many; results have room for its rows."""
    one, two, three, four, most = tiles

    @device
    def run(rows: int, *arguments: int) -> None:
        if rows == 1:
            one(*arguments)
        elif rows == 2:
            two(*arguments)
        elif rows == 3:
            three(*arguments)
        elif rows == 4:
            four(*arguments)
        else:
            most(*arguments)

    return run


@dataclass(frozen=True)
class AttentionTiles:
    """Functions for kernels, for up to ROW_TILE rows.

    scores(rows, key, end, q, k, k_block_stride, table, block_size, head_dim, scores) -> next key: the scores of
        sixteen keys from `key` on, a multiple of 16, or of thirty-two where that is even in the row of scores and the
        second sixteen begin before `end`.
    values(rows, probs, first, end, v, v_block_stride, table, block_size, acc, padded): see _value_tile.
    """

    scores: Callable[..., int]
    values: Callable[..., None]


@cache
def attention_tiles(dtype: str) -> AttentionTiles:
    item = ITEM_NBYTES[dtype]
    single_scores = _by_rows([_score_tile(rows, 1, dtype) for rows in _TILE_ROWS])
    pair_scores = _by_rows([_score_tile(rows, 2, dtype) for rows in _TILE_ROWS]) if _PAIRS else single_scores
    wide_values = _by_rows([_value_tile(rows, _vectors(rows), dtype) for rows in _TILE_ROWS])
    narrow_values = _by_rows([_value_tile(rows, 1, dtype) for rows in _TILE_ROWS])
    few_rows_width, most_rows_width = 16 * _vectors(4), 16 * _vectors(ROW_TILE)
    one_row_width = 16 * _vectors(1)
    pairs = _PAIRS

    @device
    def keys_at(key: int, k: int, k_block_stride: int, table: int, block_size: int, head_dim: int) -> int:
        block = k + load_i32(table + 4 * (key // block_size)) * k_block_stride
        return block + key % block_size * head_dim * item

    @device
    def scores(
        rows: int, key: int, end: int, q: int, k: int, k_block_stride: int, table: int, block_size: int,
        head_dim: int, out: int,
    ) -> int:  # fmt: skip
        keys = keys_at(key, k, k_block_stride, table, block_size, head_dim)
        if pairs and key + 16 < end and key % 32 == 0:
            more_keys = keys_at(key + 16, k, k_block_stride, table, block_size, head_dim)
            pair_scores(rows, q, keys, more_keys, head_dim, out)
            return key + 32
        single_scores(rows, q, keys, keys, head_dim, out)
        return key + 16

    @device
    def values(
        rows: int, probs: int, first: int, end: int, v: int, v_block_stride: int, table: int,
        block_size: int, acc: int, padded: int,
    ) -> None:  # fmt: skip
        width = one_row_width if rows <= 2 else few_rows_width if rows <= 4 else most_rows_width
        d = 0
        while d + width <= padded:
            wide_values(
                rows, probs, first, end, v + d * item, v_block_stride, padded * item, table, block_size,
                acc + 4 * d, 4 * padded,
            )  # fmt: skip
            d += width
        while d < padded:
            narrow_values(
                rows, probs, first, end, v + d * item, v_block_stride, padded * item, table, block_size,
                acc + 4 * d, 4 * padded,
            )  # fmt: skip
            d += 16

    return AttentionTiles(scores, values)
