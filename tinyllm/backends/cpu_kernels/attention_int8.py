"""The two products of attention over keys and values in int8: sums of integers, which are exact in any order.

A score or an output of a tile is rounded to float32 as fma(256 S0 + S1, 256, S2) of the sums of queries' or
probabilities' digits (`attention_digits.py`), and then multiplied by the scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from tinyllm.backends.cpu_kernels.attention_digits import (
    DIGITS,
    FACTS,
    WORDS_NBYTES,
    larger,
    quantise_probs,
    quantise_query,
)
from tinyllm.backends.cpu_kernels.attention_tiles import ROW_TILE, by_rows, prefetch_lines, unrolled
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.integer_dot import emit_dot4
from tinyllm.backends.cpu_kernels.jit import called, device
from tinyllm.backends.cpu_kernels.online_softmax import TILE_KEYS
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I32,
    I64,
    LANES,
    V32,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_fma,
    emit_load,
    emit_loop,
    emit_opaque,
    emit_splat,
    instruction,
    load,
    load_i32,
    pointer,
    store,
    vec,
    zeros,
)

__all__ = ["Int8Tiles", "int8_tiles"]

_ROW = 4 * TILE_KEYS  # bytes from one row of scores to the next
_WIDE = host_cpu().has("avx512f")

i64 = types.int64


# ---- scores


def _total(b: Builder, sums: list[Value]) -> Value:
    """The digits' sums as one float32."""
    high, middle, low = sums
    upper = b.sitofp(b.add(b.shl(high, const_vec(V32, 8)), middle), VF)
    return emit_fma(b, upper, const_vec(VF, 256.0), b.sitofp(low, VF))


def _score_tile(rows: int, key_tiles: int) -> Callable[..., None]:
    """(q, facts, keys, more_keys, words, scores): scores[r] = q[r] . 16 or 32 keys; words: D / 4, rounded up."""

    @instruction(types.void, *(i64,) * 6)
    def score_tile(
        b: Builder, q: Value, facts: Value, keys: Value, more_keys: Value, words: Value, scores: Value
    ) -> None:
        tiles = [keys, more_keys][:key_tiles]
        digits = [(r, digit) for r in range(rows) for digit in range(DIGITS)]

        def one(word: Value, sums: list[Value]) -> list[Value]:
            at = b.mul(word, const(4 * LANES))
            codes = [emit_load(b, b.add(tile, at), V32) for tile in tiles]
            place = b.add(q, b.mul(word, const(WORDS_NBYTES)))
            result = []
            for (r, digit), several in zip(digits, _chunks(sums, key_tiles), strict=True):
                x = emit_splat(b, emit_load(b, place, I32, 4 * (ROW_TILE * digit + r), align=4), V32)
                result += [emit_dot4(b, s, code, x, 8) for s, code in zip(several, codes, strict=True)]
            return result

        sums = unrolled(b, words, [const_vec(V32, 0)] * (len(digits) * key_tiles), one)
        for index, tile in enumerate(tiles):
            key_scales = emit_load(b, b.add(tile, b.mul(words, const(4 * LANES))), VF, align=4)
            for r in range(rows):
                mine = sums[index + DIGITS * key_tiles * r :: key_tiles][:DIGITS]
                at = [4 * (ROW_TILE * (1 + digit) + r) for digit in range(DIGITS)]
                firsts = [emit_splat(b, emit_load(b, facts, I32, offset, align=4), V32) for offset in at]
                total = _total(b, [b.add(x, first) for x, first in zip(mine, firsts, strict=True)])
                scale = emit_splat(b, emit_load(b, facts, F32, 4 * r, align=4))
                score = b.fmul(b.fmul(total, scale), key_scales)
                b.store(score, pointer(b, scores, VF, _ROW * r + 4 * LANES * index), align=4)

    return score_tile


def _chunks(values: list[Value], n: int) -> list[list[Value]]:
    return [values[i : i + n] for i in range(0, len(values), n)]


# ---- values


@instruction(vec, vec, i64, i64)
def _keep(b: Builder, x: Value, first: Value, end: Value) -> Value:
    """Lanes first <= i < end keep x; the others become 0."""
    kind = ir.VectorType(I64, LANES)
    lanes = ir.Constant(kind, list(range(LANES)))
    above, below = (
        b.icmp_signed(">=", lanes, emit_splat(b, first, kind)),
        b.icmp_signed("<", lanes, emit_splat(b, end, kind)),
    )
    return b.select(b.and_(above, below), x, const_vec(VF, 0.0))


def _value_tile(rows: int, vectors: int) -> Callable[..., None]:
    """(probs, tile, first, end, v, v_block_stride, v_stride, table, block_size, acc, acc_stride)

    acc[r] += probs[r][j] * V[j] for the fours of keys with first <= j < end; 16 * vectors elements. probs: a tile's
    rows.
    """

    @instruction(types.void, *(i64,) * 11)
    def value_tile(
        b: Builder, probs: Value, tile: Value, first: Value, end: Value, v: Value, v_block_stride: Value,
        v_stride: Value, table: Value, block_size: Value, acc: Value, acc_stride: Value,
    ) -> None:  # fmt: skip
        digits = [(r, digit) for r in range(rows) for digit in range(DIGITS)]

        def one_block(block: Value, sums: list[Value]) -> list[Value]:
            start = b.mul(block, block_size)
            stop = b.add(start, block_size)
            low = b.select(b.icmp_signed("<", start, first), first, start)
            high = b.select(b.icmp_signed("<", end, stop), end, stop)
            four = b.lshr(b.sub(low, start), const(2))
            fours = b.sub(b.lshr(b.add(b.sub(high, start), const(3)), const(2)), four)
            number = b.sext(emit_load(b, b.add(table, b.mul(block, const(4))), I32), I64)
            row = b.add(v, b.add(b.mul(number, v_block_stride), b.mul(four, v_stride)))
            place = b.add(probs, b.add(b.sub(start, tile), b.shl(four, const(2))))

            def one(i: Value, sums: list[Value]) -> list[Value]:
                at = b.add(row, b.mul(i, v_stride))
                codes = [emit_load(b, at, V32, 4 * LANES * j) for j in range(vectors)]
                words = emit_opaque(b, b.add(place, b.shl(i, const(2))))
                result = []
                for (r, digit), several in zip(digits, _chunks(sums, vectors), strict=True):
                    p = emit_splat(b, emit_load(b, words, I32, _ROW * r + TILE_KEYS * digit, align=4), V32)
                    result += [emit_dot4(b, s, p, code, 8) for s, code in zip(several, codes, strict=True)]
                return result

            return unrolled(b, fours, sums, one)

        last = b.sdiv(b.sub(end, const(1)), block_size)
        blocks = b.sdiv(first, block_size), b.add(last, const(1))
        sums = emit_loop(b, *blocks, 1, [const_vec(V32, 0)] * (len(digits) * vectors), one_block)
        for r in range(rows):
            facts = b.add(probs, const(_ROW * r + FACTS))
            scale = emit_splat(b, emit_load(b, facts, F32, align=4))
            for j in range(vectors):
                mine = sums[j + DIGITS * vectors * r :: vectors][:DIGITS]
                place = pointer(b, b.add(acc, b.mul(const(r), acc_stride)), VF, 4 * LANES * j)
                b.store(emit_fma(b, _total(b, mine), scale, b.load(place, align=4)), place, align=4)

    return value_tile


def _vectors(rows: int) -> int:
    """Vectors of V's elements that so many rows multiply at once, three sums for each."""
    return {1: 4, 2: 4, 3: 2, 4: 2}.get(rows, 1) if _WIDE else 1


@dataclass(frozen=True)
class Int8Tiles:
    """Functions for kernels, for up to ROW_TILE rows.

    quantise_query(source, head_dim, tile, row): a query as row `row` of a query tile.
    scores(rows, key, end, q, k, k_block_stride, table, block_size, head_dim, scores) -> next key; see AttentionTiles.
    weigh(row, tile, first, end, v, v_block_stride, table, block_size, padded): a row of probs from its probabilities,
        those of keys first <= j < end; the others count nothing.
    values(rows, probs, tile, first, end, v, v_block_stride, table, block_size, acc, padded): see _value_tile.
    fetch(key, k, v, k_block_stride, v_block_stride, table, block_size, head_dim): asks memory for sixteen keys and
        their values.
    """

    quantise_query: Callable[..., None]
    scores: Callable[..., int]
    weigh: Callable[..., None]
    values: Callable[..., None]
    fetch: Callable[..., None]


@cache
def int8_tiles() -> Int8Tiles:
    kinds = (1, 2, 3, 4, ROW_TILE)
    single_scores = by_rows([_score_tile(rows, 1) for rows in kinds])
    pair_scores = by_rows([_score_tile(rows, 2 if _WIDE and rows <= 4 else 1) for rows in kinds])
    wide_values = by_rows([_value_tile(rows, _vectors(rows)) for rows in kinds])
    narrow_values = by_rows([_value_tile(rows, 1) for rows in kinds])
    one_width, few_width, most_width = 16 * _vectors(1), 16 * _vectors(4), 16 * _vectors(ROW_TILE)
    pairs = _WIDE

    @device
    def keys_at(key: int, k: int, k_block_stride: int, table: int, block_size: int, head_dim: int) -> int:
        block = k + load_i32(table + 4 * (key // block_size)) * k_block_stride
        return block + key % block_size * ((head_dim + 3) // 4 * 4 + 4)

    @called
    def scores(
        rows: int, key: int, end: int, q: int, k: int, k_block_stride: int, table: int, block_size: int,
        head_dim: int, out: int,
    ) -> int:  # fmt: skip
        words, facts = (head_dim + 3) // 4, q + (head_dim + 15) // 16 * 4 * WORDS_NBYTES
        keys = keys_at(key, k, k_block_stride, table, block_size, head_dim)
        if pairs and rows <= 4 and key + 16 < end and key % 32 == 0:
            more_keys = keys_at(key + 16, k, k_block_stride, table, block_size, head_dim)
            pair_scores(rows, q, facts, keys, more_keys, words, out)
            return key + 32
        single_scores(rows, q, facts, keys, keys, words, out)
        return key + 16

    @device
    def weigh(
        row: int, tile: int, first: int, end: int, v: int, v_block_stride: int, table: int, block_size: int,
        padded: int,
    ) -> None:  # fmt: skip
        top = zeros()
        for at in range(0, TILE_KEYS, 16):
            key = tile + at
            probs = zeros()
            if key + 16 > first and key < end:
                block = v + load_i32(table + 4 * (key // block_size)) * v_block_stride
                scales = load(block + block_size * padded + 4 * (key % block_size))
                probs = _keep(load(row + 4 * at) * scales, first - key, end - key)
                top = larger(top, probs)
            store(row + 4 * at, probs)
        quantise_probs(row, top)

    @called
    def values(
        rows: int, probs: int, tile: int, first: int, end: int, v: int, v_block_stride: int, table: int,
        block_size: int, acc: int, padded: int,
    ) -> None:  # fmt: skip
        width = one_width if rows <= 2 else few_width if rows <= 4 else most_width
        d = 0
        while d + width <= padded:
            wide_values(
                rows, probs, tile, first, end, v + 4 * d, v_block_stride, 4 * padded, table, block_size, acc + 4 * d,
                4 * padded,
            )  # fmt: skip
            d += width
        while d < padded:
            narrow_values(
                rows, probs, tile, first, end, v + 4 * d, v_block_stride, 4 * padded, table, block_size, acc + 4 * d,
                4 * padded,
            )  # fmt: skip
            d += 16

    @called
    def fetch(
        key: int, k: int, v: int, k_block_stride: int, v_block_stride: int, table: int, block_size: int, head_dim: int
    ) -> None:  # fmt: skip
        padded = (head_dim + 15) // 16 * 16
        keys = keys_at(key, k, k_block_stride, table, block_size, head_dim)
        prefetch_lines(keys, 16 * ((head_dim + 3) // 4 * 4 + 4))
        block = v + load_i32(table + 4 * (key // block_size)) * v_block_stride
        prefetch_lines(block + key % block_size * padded, 16 * padded)
        prefetch_lines(block + block_size * padded + key % block_size * 4, 64)

    return Int8Tiles(quantise_query, scores, weigh, values, fetch)
