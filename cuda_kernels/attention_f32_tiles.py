"""Tiles of the float32 attention: how they lie in shared memory and threads, and what is done with one.

A thread block of 128 has Q (rows, head_dim), K and V (keys, head_dim) and P (rows, keys) in shared memory. Threads are
numbered (tx, ty) = (0..7, 0..15):

               keys
             +-------------+            S: rows ty + 16 i, keys tx + 8 j; each score one fma chain over d
    rows  Q  |  S = Q K^T  |            O: rows ty + 16 i, columns 4 (tx + 8 j) + 0..3; each one fma chain over the
             | P = 2^(S-m) |               visible keys of a split
             +-------------+            a row's scores, maximum and sum stay within 8 lanes of one warp

A key that a row does not see is skipped, not weighted by zero: infinities and NaN there cannot reach the row, and what
other rows share the tile does not show in its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.online_softmax import NEG_INF
from cuda_kernels.primitives import FULL_MASK, Pointer, Value, cp_async16, device_function, exp2, fma, fmax, load4

__all__ = ["DECODE_ROWS", "THREADS", "TileFunctions", "TileShape", "tile_functions", "tile_keys"]

THREADS = 128
DECODE_ROWS = 16
_ZERO = np.float32(0)
_i32, _i64 = types.int32, types.int64


def tile_keys(head_dim: int) -> int:
    """Keys of a tile: part of a result's definition, it depends on the head size alone."""
    return 32 if head_dim <= 128 else 16


@dataclass(frozen=True)
class TileShape:
    """Sizes of a thread block's tile, and where its parts lie in shared memory, in float32."""

    head_dim: int
    decode: bool

    @property
    def rows(self) -> int:
        if self.decode:
            return DECODE_ROWS
        return 64 if self.head_dim <= 128 else 32  # what two O in registers allow

    @property
    def keys(self) -> int:
        return tile_keys(self.head_dim)

    @property
    def pitch(self) -> int:
        """From a row of Q or K to the next: an odd number of 16-byte pieces keeps 8 rows in different banks."""
        return self.head_dim + 4 if self.head_dim % 8 == 0 else self.head_dim

    @property
    def p_pitch(self) -> int:
        """From a row of P to the next: the 4 rows that a warp reads or writes at once lie in different banks."""
        return self.keys + 8

    @property
    def k_at(self) -> int:
        return self.rows * self.pitch

    @property
    def v_at(self) -> int:
        return self.k_at + self.keys * self.pitch

    @property
    def p_at(self) -> int:
        return self.v_at + self.keys * self.head_dim

    @property
    def shared_nbytes(self) -> int:
        return 4 * (self.p_at + self.rows * self.p_pitch)

    @property
    def chunks(self) -> int:
        """Pieces of 16 bytes in a row."""
        return self.head_dim // 4

    @property
    def own_rows(self) -> int:
        """Rows of a thread: ty + 16 i."""
        return self.rows // 16

    @property
    def own_keys(self) -> int:
        """Keys of a thread's scores: tx + 8 j."""
        return self.keys // 8

    @property
    def own_loads(self) -> int:
        """Keys that a thread helps to load: ty + 16 i."""
        return self.keys // 16

    @property
    def own_chunks(self) -> int:
        """Pieces of a row that a thread loads, and of O that it has: tx + 8 j, where there are so many."""
        return -(-self.chunks // 8)


class TileFunctions(NamedTuple):
    """Device functions on a tile of some shape. Arguments that they share:

    sh: the shared memory; thread: (tx, ty); tx, ty: its parts; heads: (KV heads, this block's); s (own_rows, own_keys),
    o (own_rows, own_chunks, 4), m, l, low, high (own_rows): local arrays; first_key: the tile's absolute position.
    """

    copy_row: Callable[..., Any]
    find_blocks: Callable[..., Any]
    copy_keys: Callable[..., Any]
    multiply_keys: Callable[..., Any]
    update_softmax: Callable[..., Any]
    add_values: Callable[..., Any]


@device_function
def _row_sum(x: Value) -> Value:
    """The sum over the 8 lanes of a row, in a fixed order."""
    for lanes in (4, 2, 1):
        x = x + cuda.shfl_xor_sync(FULL_MASK, x, lanes)
    return x


@device_function
def _row_max(x: Value) -> Value:
    for lanes in (4, 2, 1):
        x = fmax(x, cuda.shfl_xor_sync(FULL_MASK, x, lanes))
    return x


def tile_functions(tile: TileShape) -> TileFunctions:
    """The device functions for a shape."""
    return TileFunctions(*_loads(tile), *_products(tile))


def _loads(tile: TileShape) -> tuple[Callable[..., Any], ...]:
    head_dim, chunks, own_loads, own_chunks = tile.head_dim, tile.chunks, tile.own_loads, tile.own_chunks
    whole_chunks = chunks // 8  # of own_chunks, those that every thread has

    @device_function
    def copy_row(sh: Any, to: Value, tx: Value, source: Pointer, at: Value, nbytes: Value) -> None:
        """Begins to copy a row, together with the 7 other threads of this ty; zeros where nbytes is 0."""
        for j in range(own_chunks):
            if j < whole_chunks or tx < chunks - 8 * j:
                column = _i32(4 * tx + 32 * j)
                cp_async16(sh, _i32(to + column), source, at + column, nbytes)

    @device_function
    def find_blocks(blocks: Any, tables: Pointer, table_at: Value, key: Value, at_low: Value, at_high: Value,
                    block_shift: Value) -> None:  # fmt: skip
        """Block ids of the keys key + 16 i; -1 outside at_low..at_high, where the table is not read."""
        for i in range(own_loads):
            here = _i32(key + 16 * i)
            blocks[i] = _i32(-1)
            if here >= at_low and here <= at_high:
                blocks[i] = tables[table_at + (here >> block_shift)]

    @device_function
    def copy_keys(sh: Any, to: Value, to_pitch: Value, thread: Any, source: Pointer, blocks: Any, first_key: Value,
                  heads: Any, block_shift: Value) -> None:  # fmt: skip
        """Begins to copy a tile of keys or values, (keys, head_dim); those without a block are zeros."""
        tx, ty = thread
        num_kv_heads, kv_head = heads
        block_mask = _i32((_i32(1) << block_shift) - 1)
        for i in range(own_loads):
            row = _i32(ty + 16 * i)
            at, nbytes = _i64(0), _i32(0)
            if blocks[i] >= 0:
                block_row = _i64(_i64(blocks[i]) * num_kv_heads + kv_head) << block_shift
                at = (block_row + (_i32(first_key + row) & block_mask)) * head_dim
                nbytes = _i32(16)
            copy_row(sh, _i32(to + row * to_pitch), tx, source, at, nbytes)

    return copy_row, find_blocks, copy_keys


def _products(tile: TileShape) -> tuple[Callable[..., Any], ...]:
    head_dim, keys, pitch, p_pitch = tile.head_dim, tile.keys, tile.pitch, tile.p_pitch
    k_at, v_at, p_at = tile.k_at, tile.v_at, tile.p_at
    chunks, own_rows, own_keys, own_chunks = tile.chunks, tile.own_rows, tile.own_keys, tile.own_chunks

    @device_function
    def multiply_keys(sh: Any, thread: Any, s: Any) -> None:
        """S = Q K^T"""
        tx, ty = thread
        for i in range(own_rows):
            for j in range(own_keys):
                s[i, j] = _ZERO
        q_from, k_from = _i32(ty * pitch), _i32(k_at + tx * pitch)
        q_end = _i32(q_from + head_dim)
        while q_from < q_end:
            for i in range(own_rows):
                q0, q1, q2, q3 = load4(sh, q_from + 16 * i * pitch)
                for j in range(own_keys):
                    k0, k1, k2, k3 = load4(sh, k_from + 8 * j * pitch)
                    s[i, j] = fma(q3, k3, fma(q2, k2, fma(q1, k1, fma(q0, k0, s[i, j]))))
            q_from, k_from = _i32(q_from + 4), _i32(k_from + 4)

    @device_function
    def update_softmax(sh: Any, thread: Any, s: Any, m: Any, l: Any, o: Any) -> None:  # noqa: E741 - the papers' name
        """Raises m to the tile's maximum, rescales l and O, adds to l, and puts P where the row's lanes find it."""
        tx, ty = thread
        for i in range(own_rows):
            top = s[i, 0]
            for j in range(1, own_keys):
                top = fmax(top, s[i, j])
            top = fmax(_row_max(top), m[i])
            base = top if top != NEG_INF else _ZERO  # where nothing was seen yet, -inf - -inf would be NaN
            total = _ZERO
            for j in range(own_keys):
                p = exp2(s[i, j] - base)
                total = total + p
                sh[_i32(p_at + ty * p_pitch + tx) + (16 * i * p_pitch + 8 * j)] = p
            decay = exp2(m[i] - base)
            m[i] = top
            l[i] = fma(l[i], decay, _row_sum(total))
            for j in range(own_chunks):
                for e in range(4):
                    o[i, j, e] = o[i, j, e] * decay

    @device_function
    def add_values(sh: Any, thread: Any, o: Any, first_key: Value, low: Any, high: Any) -> None:
        """O += P V, key by key; low and high are None where every row sees every key."""
        tx, ty = thread
        p = cuda.local.array((own_rows, 4), types.float32)
        p_from, v_from = _i32(p_at + ty * p_pitch), _i32(v_at + 4 * tx)
        p_end = _i32(p_from + keys)
        # a thread without a last chunk repeats one that it has
        last_from = _i32(v_at + min(_i32(4 * tx + 32 * (own_chunks - 1)), _i32(head_dim - 4)))
        while p_from < p_end:
            for i in range(own_rows):
                p[i, 0], p[i, 1], p[i, 2], p[i, 3] = load4(sh, p_from + 16 * i * p_pitch)
            for e in range(4):
                key = _i32(first_key + e)
                for j in range(own_chunks):
                    if j < chunks // 8:
                        v0, v1, v2, v3 = load4(sh, v_from + (e * head_dim + 32 * j))
                    else:
                        v0, v1, v2, v3 = load4(sh, last_from + e * head_dim)
                    for i in range(own_rows):
                        if low is None or (key >= low[i] and key <= high[i]):
                            o[i, j, 0] = fma(p[i, e], v0, o[i, j, 0])
                            o[i, j, 1] = fma(p[i, e], v1, o[i, j, 1])
                            o[i, j, 2] = fma(p[i, e], v2, o[i, j, 2])
                            o[i, j, 3] = fma(p[i, e], v3, o[i, j, 3])
            p_from, first_key = _i32(p_from + 4), _i32(first_key + 4)
            v_from, last_from = _i32(v_from + 4 * head_dim), _i32(last_from + 4 * head_dim)

    return multiply_keys, update_softmax, add_values
