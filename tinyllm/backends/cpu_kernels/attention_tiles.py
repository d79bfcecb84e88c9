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
from tinyllm.backends.cpu_kernels.jit import called, device
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
    emit_prefetch,
    emit_splat,
    instruction,
    load_i32,
    pointer,
)

__all__ = [
    "ITEM_NBYTES", "ROW_TILE", "AttentionTiles", "StagedTiles", "attention_tiles", "by_rows", "prefetch_lines",
    "staged_tiles", "unrolled",
]  # fmt: skip

_WIDE = host_cpu().has("avx512f")  # 32 registers of sixteen lanes
ROW_TILE = 8 if _WIDE else 4  # the most rows that share loads of K and V
_TILE_ROWS = (1, 2, 3, 4, ROW_TILE)
_PAIRS = _WIDE  # whether scores of two tiles of keys are summed side by side
ITEM_NBYTES = {"f32": 4, "f16": 2, "bf16": 2}
_UNROLL = 4
CACHE_LINE = 64  # bytes

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


def unrolled(b: Builder, n: Value, accs: list[Value], one: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
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

        accs = unrolled(b, head_dim, [const_vec(VF, 0.0)] * (rows * key_tiles), one)
        for index, acc in enumerate(accs):
            offset = 4 * TILE_KEYS * (index // key_tiles) + 64 * (index % key_tiles)
            b.store(acc, pointer(b, scores, VF, offset), align=4)

    return score_tile


def _sum_keys(
    b: Builder, dtype: str, shape: tuple[int, int], n: Value, row: Value, v_stride: Value, probs: Value,
    accs: list[Value],
) -> list[Value]:  # fmt: skip
    """accs + probs[r][j] * V[j] for j in range(n); shape: rows, vectors; row: V's first; probs: of the first key."""
    rows, vectors = shape

    def one_key(j: Value, accs: list[Value]) -> list[Value]:
        at = b.add(row, b.mul(j, v_stride))
        lanes = [emit_load_values(b, at, dtype, 16 * i * ITEM_NBYTES[dtype]) for i in range(vectors)]
        return _multiply(b, accs, lanes, b.add(probs, b.mul(j, const(4))), rows, 4 * TILE_KEYS)

    return unrolled(b, n, accs, one_key)


def _places(b: Builder, rows: int, vectors: int, acc: Value, acc_stride: Value) -> list[Value]:
    return [
        pointer(b, b.add(acc, b.mul(const(r), acc_stride)), VF, 64 * i) for r in range(rows) for i in range(vectors)
    ]


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
        places = _places(b, rows, vectors, acc, acc_stride)

        def one_block(block: Value, accs: list[Value]) -> list[Value]:
            start = b.mul(block, block_size)
            stop = b.add(start, block_size)
            low = b.select(b.icmp_signed("<", start, first), first, start)
            high = b.select(b.icmp_signed("<", end, stop), end, stop)
            number = b.sext(emit_load(b, b.add(table, b.mul(block, const(4))), I32), I64)
            row = b.add(v, b.add(b.mul(number, v_block_stride), b.mul(b.sub(low, start), v_stride)))
            low_probs = b.add(probs, b.mul(low, const(4)))
            return _sum_keys(b, dtype, (rows, vectors), b.sub(high, low), row, v_stride, low_probs, accs)

        last = b.sdiv(b.sub(end, const(1)), block_size)
        blocks = b.sdiv(first, block_size), b.add(last, const(1))
        accs = emit_loop(b, *blocks, 1, [b.load(place, align=4) for place in places], one_block)
        for one, place in zip(accs, places, strict=True):
            b.store(one, place, align=4)

    return value_tile


def _staged_value_tile(rows: int, vectors: int) -> Callable[..., None]:
    """(probs, first, end, v, v_stride, acc, acc_stride): the same of float32 rows that lie one after another."""

    @instruction(types.void, *(i64,) * 7)
    def value_tile(
        b: Builder, probs: Value, first: Value, end: Value, v: Value, v_stride: Value, acc: Value, acc_stride: Value
    ) -> None:
        places = _places(b, rows, vectors, acc, acc_stride)
        accs = [b.load(place, align=4) for place in places]
        row, first_probs = b.add(v, b.mul(first, v_stride)), b.add(probs, b.mul(first, const(4)))
        accs = _sum_keys(b, "f32", (rows, vectors), b.sub(end, first), row, v_stride, first_probs, accs)
        for one, place in zip(accs, places, strict=True):
            b.store(one, place, align=4)

    return value_tile


def _copy_tile(vectors: int, dtype: str) -> Callable[..., None]:
    """(source, target, n): n times 16 * vectors values as float32."""

    @instruction(types.void, *(i64,) * 3)
    def copy_tile(b: Builder, source: Value, target: Value, n: Value) -> None:
        def one(i: Value, _state: list[Value]) -> list[Value]:
            at = b.add(source, b.mul(i, const(16 * vectors * ITEM_NBYTES[dtype])))
            to = b.add(target, b.mul(i, const(64 * vectors)))
            for j in range(vectors):
                values = emit_load_values(b, at, dtype, 16 * j * ITEM_NBYTES[dtype])
                b.store(values, pointer(b, to, VF, 64 * j), align=4)
            return []

        emit_loop(b, const(0), n, 1, [], one)

    return copy_tile


@instruction(types.void, i64, i64)
def prefetch_lines(b: Builder, address: Value, nbytes: Value) -> None:
    """Asks for nbytes from an address on."""

    def one(at: Value, _state: list[Value]) -> list[Value]:
        emit_prefetch(b, b.add(address, at))
        return []

    emit_loop(b, const(0), nbytes, CACHE_LINE, [], one)


def by_rows(tiles: list[Callable[..., None]]) -> Callable[..., None]:
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
    fetch(key, k, v, k_block_stride, v_block_stride, table, block_size, head_dim): asks memory for sixteen keys and
        their values.
    stage(first, end, k, v, k_block_stride, v_block_stride, table, block_size, head_dim, keys, values): copies keys
        first <= j < end of a tile, and the others of their sixteens, to keys (4, D, 16), and the values to (64, D'),
        both in float32 and each at its place in the tile.
    """

    scores: Callable[..., int]
    values: Callable[..., None]
    fetch: Callable[..., None]
    stage: Callable[..., None]


@dataclass(frozen=True)
class StagedTiles:
    """The same over a tile that was staged: many rows read it again and again.

    scores(rows, key, end, q, keys, head_dim, scores) -> next key.
    values(rows, probs, first, end, values, acc, padded): `values` is where key 0's would be.
    """

    scores: Callable[..., int]
    values: Callable[..., None]


@cache
def attention_tiles(dtype: str) -> AttentionTiles:
    item = ITEM_NBYTES[dtype]
    single_scores = by_rows([_score_tile(rows, 1, dtype) for rows in _TILE_ROWS])
    pair_scores = by_rows([_score_tile(rows, 2, dtype) for rows in _TILE_ROWS]) if _PAIRS else single_scores
    wide_values = by_rows([_value_tile(rows, _vectors(rows), dtype) for rows in _TILE_ROWS])
    narrow_values = by_rows([_value_tile(rows, 1, dtype) for rows in _TILE_ROWS])
    few_rows_width, most_rows_width = 16 * _vectors(4), 16 * _vectors(ROW_TILE)
    one_row_width = 16 * _vectors(1)
    pairs = _PAIRS
    copy_one = _copy_tile(1, dtype)

    @device
    def keys_at(key: int, k: int, k_block_stride: int, table: int, block_size: int, head_dim: int) -> int:
        block = k + load_i32(table + 4 * (key // block_size)) * k_block_stride
        return block + key % block_size * head_dim * item

    @called
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

    @called
    def values(
        rows: int, probs: int, first: int, end: int, v: int, v_block_stride: int, table: int, block_size: int,
        acc: int, padded: int,
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

    @called
    def fetch(
        key: int, k: int, v: int, k_block_stride: int, v_block_stride: int, table: int, block_size: int, head_dim: int
    ) -> None:  # fmt: skip
        row_nbytes = (head_dim + 15) // 16 * 16 * item
        prefetch_lines(keys_at(key, k, k_block_stride, table, block_size, head_dim), 16 * head_dim * item)
        block = v + load_i32(table + 4 * (key // block_size)) * v_block_stride
        prefetch_lines(block + key % block_size * row_nbytes, 16 * row_nbytes)

    @called
    def stage(
        first: int, end: int, k: int, v: int, k_block_stride: int, v_block_stride: int, table: int, block_size: int,
        head_dim: int, keys: int, staged_values: int,
    ) -> None:  # fmt: skip
        padded = (head_dim + 15) // 16 * 16
        for key in range(first // 16 * 16, end, 16):
            source = keys_at(key, k, k_block_stride, table, block_size, head_dim)
            copy_one(source, keys + key % TILE_KEYS * head_dim * 4, head_dim)
            offset = key % block_size
            block = v + load_i32(table + 4 * (key // block_size)) * v_block_stride
            low, high = max(first, key), min(end, key + 16)
            row = block + (offset + low - key) * padded * item
            copy_one(row, staged_values + low % TILE_KEYS * padded * 4, (high - low) * (padded // 16))

    return AttentionTiles(scores, values, fetch, stage)


@cache
def staged_tiles() -> StagedTiles:
    one_width, most_width = 16 * _vectors(1), 16 * _vectors(ROW_TILE)
    single_scores = _score_tile(ROW_TILE, 1, "f32")
    pair_scores = _score_tile(ROW_TILE, 2, "f32") if _PAIRS else single_scores
    one_wide, one_narrow = _staged_value_tile(1, _vectors(1)), _staged_value_tile(1, 1)
    most_wide, most_narrow = _staged_value_tile(ROW_TILE, _vectors(ROW_TILE)), _staged_value_tile(ROW_TILE, 1)
    pairs = _PAIRS

    @called
    def scores(rows: int, key: int, end: int, q: int, keys: int, head_dim: int, out: int) -> int:
        at = keys + key % TILE_KEYS * head_dim * 4
        if pairs and key + 16 < end and key % 32 == 0:
            pair_scores(q, at, at + 64 * head_dim, head_dim, out)
            return key + 32
        single_scores(q, at, at, head_dim, out)
        return key + 16

    @called
    def values(rows: int, probs: int, first: int, end: int, v: int, acc: int, padded: int) -> None:
        d = 0
        if rows == 1:
            while d + one_width <= padded:
                one_wide(probs, first, end, v + 4 * d, 4 * padded, acc + 4 * d, 4 * padded)
                d += one_width
            while d < padded:
                one_narrow(probs, first, end, v + 4 * d, 4 * padded, acc + 4 * d, 4 * padded)
                d += 16
        else:
            while d + most_width <= padded:
                most_wide(probs, first, end, v + 4 * d, 4 * padded, acc + 4 * d, 4 * padded)
                d += most_width
            while d < padded:
                most_narrow(probs, first, end, v + 4 * d, 4 * padded, acc + 4 * d, 4 * padded)
                d += 16

    return StagedTiles(scores, values)
