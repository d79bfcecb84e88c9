"""Tiles of the tensor-core attention: how keys and values lie in shared memory, and the two products on them.

A tile is `keys` keys at a fixed absolute position, of one KV head. Two stages take turns: cp.async fills one while the
other is used.

    stage: | K: keys rows | V: keys rows | k_scale, v_scale: keys float32 each (8-bit storage) |

A row is head_dim stored values in 16-byte chunks, rounded up to an odd number of chunks: eight rows at the same chunk,
which is what ldmatrix reads at once, then lie in eight different groups of four banks, for every head size. Rows that
no query of the tile sees are filled with zeros and their memory is never read.

Fragments of one warp (mma.m16n8k16; g = lane // 4, t = lane % 4; 16 query rows, the thread holds rows g and g + 8):

    S (16 x keys)      n-tile j: columns 8 j + 2 t + {0, 1}, rows g, g, g + 8, g + 8
    O (16 x head_dim)  group c of 16 columns, 8 values; 16-bit storage: n-tile e = 0, 1 has columns
                       16 c + 8 e + 2 t + {0, 1}; 8-bit storage: 16 c + 4 t + e + {0, 2}

8-bit values pass through the same ldmatrix as pairs of bytes (x0, x1, x2, x3) and widen in registers to the pairs
(x0, x2) and (x1, x3): the order of the head dimension inside a chunk is the same for Q and K, and for V it shows in O's
columns above. Keys widen to float16 and values to bfloat16, both exactly: int8 has 7 bits and a sign, e4m3 has 4 bits.

A key's scale multiplies its column of S. A value's scale multiplies its column of P before P is rounded, to bfloat16:
there the product p * v_scale keeps its 8 bits whatever the scale's size, while in float16 it would drown among the
subnormals below 2**-14, and no common factor can prevent that unless it looks at other keys' scales. Measured with
normal values, head size 128, 512 keys, relative root mean square errors of O: int8 quantisation itself 6.3e-3; P *
v_scale in bfloat16 1.6e-3, at every size of scale; in float16 2.1e-4 for values around 1, but 1.1e-2 around 1e-3 and
6.8e-2 around 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba.cuda import types

from cuda_kernels.primitives import (
    Pointer,
    Value,
    cp_async4,
    cp_async16,
    device_function,
    fma_bf16x2,
    fma_f16x2,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    load2,
    load4,
    mma_bf16,
    mma_f16,
    multiply_wide,
    pack_bf16,
    pack_f16,
    shift_right,
)

__all__ = ["STORAGES", "TileFunctions", "TileShape", "tile_functions"]

STORAGES = ("f16", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class TileShape:
    """What a thread block works on.

    Attributes:
        storage: dtype of the cache: f16, bf16, int8 or fp8.
        head_dim: a multiple of 8, of 16 for 8-bit storage, up to 256.
        row_warps: groups of 16 query rows, each with warps of its own.
        column_warps: warps that share 16 rows: of S they take groups of 16 keys in turn, of O groups of 16 columns.
    """

    storage: str
    head_dim: int
    row_warps: int
    column_warps: int

    @property
    def rows(self) -> int:
        return 16 * self.row_warps

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.column_warps

    @property
    def keys(self) -> int:
        """Part of a result's definition: it depends on nothing but the head size."""
        return 64 if self.head_dim <= 128 else 32

    @property
    def scaled(self) -> bool:
        return self.storage in ("int8", "fp8")

    @property
    def k_steps(self) -> int:
        """Products of depth 16 that a score takes."""
        return -(-self.head_dim // 16)

    @property
    def key_groups(self) -> int:
        """Groups of 16 keys of a tile."""
        return self.keys // 16

    @property
    def own_key_groups(self) -> int:
        """The most of them that one of the warps of a row takes; likewise of the k_steps groups of 16 columns."""
        return -(-self.key_groups // self.column_warps)

    @property
    def own_column_groups(self) -> int:
        return -(-self.k_steps // self.column_warps)

    @property
    def steps_at_once(self) -> int:
        """k_steps that one ldmatrix serves."""
        return 2 if self.scaled else 1

    @property
    def chunks(self) -> int:
        """16-byte chunks of a row in global memory."""
        return self.head_dim // (16 if self.scaled else 8)

    @property
    def padded_chunks(self) -> int:
        """Those of whole k_steps; the last may be zeros."""
        return self.k_steps * (1 if self.scaled else 2)

    @property
    def pitch(self) -> int:
        """Words from one row to the next in shared memory."""
        return (self.padded_chunks | 1) * 4

    @property
    def tile_words(self) -> int:
        return self.keys * self.pitch

    @property
    def stage_words(self) -> int:
        return 2 * self.tile_words + (2 * self.keys if self.scaled else 0)

    @property
    def register_steps(self) -> int:
        """k_steps whose query fragments stay in registers: all, unless warps share a row and with it the fragments."""
        return self.k_steps if self.column_warps == 1 else 0

    @property
    def shared_steps(self) -> int:
        return self.k_steps - self.register_steps

    @property
    def queries_at(self) -> int:
        """Where the query fragments lie, in words: 32 lanes x 4 for each k_step of 16 rows."""
        return 2 * self.stage_words

    @property
    def scores_at(self) -> int:
        """Where the warps of a row exchange their scores, in words."""
        return self.queries_at + self.row_warps * self.shared_steps * 128

    @property
    def state_at(self) -> int:
        """Where threads keep what they seldom need, in words: three pieces of 4 words for each, see attention_steps."""
        return self.scores_at + (self.rows * self.keys if self.column_warps > 1 else 0)

    @property
    def shared_nbytes(self) -> int:
        return (self.state_at + 12 * self.threads) * 4


class TileFunctions(NamedTuple):
    """Device functions for one TileShape; `sh` is dynamic shared memory as uint32, positions in it count words.

    load_tile(sh, at, k, v, k_scale, v_scale, tables, table_row, head, num_kv_heads, block_shift, first_key, low, high,
        thread): begins to copy the keys first_key ... of a tile to the stage at `at`; those outside low ... high
        become zeros.
    load_query(q, row_a, row_b, step, t, scale) -> the fragment of q * scale for one k_step, from the rows at the
        offsets row_a and row_b.
    multiply_keys(sh, at, group, step, lane, a, i, s, j): adds the products of TileShape.steps_at_once k_steps, from
        `step` on, to s[j:j + 8], the scores of group `group` of 16 keys; a[i:] holds their query fragments.
    multiply_values(sh, at, group, lane, p, o, j): adds P V to o[j:j + 8], group `group` of 16 columns.
    pack_probs(a, b) -> a pair of P's dtype.
    """

    load_tile: Callable[..., Any]
    load_query: Callable[..., Any]
    multiply_keys: Callable[..., Any]
    multiply_values: Callable[..., Any]
    pack_probs: Callable[..., Any]


_i32, _i64, _u32 = types.int32, types.int64, types.uint32


@device_function
def _widen_int8_f16(x: Value) -> Value:
    """Bytes 0 and 2 of x, int8, as a pair of float16: 1024 + (128 + x) is exact, and so is the difference."""
    biased = ((x ^ np.uint32(0x00800080)) & np.uint32(0x00FF00FF)) | np.uint32(0x64006400)
    return fma_f16x2(biased, np.uint32(0x3C003C00), np.uint32(0xE480E480))  # * 1 - 1152


@device_function
def _widen_int8_bf16(x: Value) -> Value:
    """Bytes 0 and 2 of x, int8, as a pair of bfloat16: (128 + low 7 bits) - (128 or 256, by the sign)."""
    magnitude = (x & np.uint32(0x007F007F)) | np.uint32(0x43004300)
    sign = (x & np.uint32(0x00800080)) | np.uint32(0xC300C300)  # -128 or -256
    return fma_bf16x2(magnitude, np.uint32(0x3F803F80), sign)


@device_function
def _widen_fp8_f16(x: Value) -> Value:
    """Bytes 0 and 2 of x, e4m3, as a pair of float16, times 2**-8; subnormals too."""
    return ((x & np.uint32(0x00800080)) << np.uint32(8)) | ((x & np.uint32(0x007F007F)) << np.uint32(7))


@device_function
def _widen_fp8_bf16(x: Value) -> Value:
    """Bytes 0 and 2 of x, e4m3, as a pair of bfloat16: the exponents differ by 2**120."""
    tiny = ((x & np.uint32(0x00800080)) << np.uint32(8)) | ((x & np.uint32(0x007F007F)) << np.uint32(4))
    return fma_bf16x2(tiny, np.uint32(0x7B807B80), np.uint32(0x80008000))  # * 2**120 - 0


def tile_functions(shape: TileShape) -> TileFunctions:
    """The device functions for a shape."""
    products = _byte_products if shape.scaled else _half_products
    load_query, multiply_keys, multiply_values, pack_probs = products(shape)
    return TileFunctions(_load_tile(shape), load_query, multiply_keys, multiply_values, pack_probs)


def _load_tile(shape: TileShape) -> Callable[..., Any]:
    keys, pitch, chunks, padded = shape.keys, shape.pitch, shape.chunks, shape.padded_chunks
    scaled, threads, tile_words = shape.scaled, shape.threads, shape.tile_words
    total = keys * padded
    row_words = chunks * 4

    @device_function
    def load_tile(
        sh: Any,
        at: Value,
        k: Pointer,
        v: Pointer,
        k_scale: Pointer,
        v_scale: Pointer,
        tables: Pointer,
        table_row: Value,
        head: Value,
        num_kv_heads: Value,
        block_shift: Value,
        first_key: Value,
        low: Value,
        high: Value,
        thread: Value,
    ) -> None:
        block_mask = _i32((_i32(1) << block_shift) - 1)
        block_words = _i32(_i32(num_kv_heads << block_shift) * row_words)
        for i in range(-(-total // threads)):
            piece = _i32(thread + i * threads)
            if (i + 1) * threads <= total or piece < total:
                if threads % padded == 0:  # the same chunk for all i
                    chunk = _i32(_u32(thread) % _u32(padded))
                    row = _i32(_i32(_u32(thread) // _u32(padded)) + i * (threads // padded))
                else:
                    chunk = _i32(_u32(piece) % _u32(padded))
                    row = _i32(_u32(piece) // _u32(padded))
                key = _i32(first_key + row)
                seen = min(max(key, low), high)  # a row that may be read, for all
                block = tables[table_row + _i32(shift_right(_u32(seen), _u32(block_shift)))]
                offset = _i32(_i32(_i32(head << block_shift) + (seen & block_mask)) * row_words + chunk * 4)
                nbytes = _i32(16) if seen == key else _i32(0)
                if padded != chunks and chunk >= chunks:
                    nbytes = _i32(0)
                    offset = _i32(offset - chunk * 4)
                source = _i64(multiply_wide(_u32(block), _u32(block_words))) + _i64(offset)
                to = _i32(at + row * pitch + chunk * 4)
                cp_async16(sh, to, k, source, nbytes)
                cp_async16(sh, _i32(to + tile_words), v, source, nbytes)
        if scaled and thread < 2 * keys:
            row = _i32(thread % keys)
            key = _i32(first_key + row)
            seen = min(max(key, low), high)
            block = tables[table_row + (seen >> block_shift)]
            offset = _i32(_i32(head << block_shift) + (seen & block_mask))
            source = _i64(block) * _i64(_i32(num_kv_heads << block_shift)) + _i64(offset)
            nbytes = _i32(4) if seen == key else _i32(0)
            to = _i32(at + 2 * tile_words + thread)
            if thread < keys:
                cp_async4(sh, to, k_scale, source, nbytes)
            else:
                cp_async4(sh, to, v_scale, source, nbytes)

    return load_tile


def _adder(mma: Callable[..., Any]) -> Callable[..., Any]:
    @device_function
    def add_product(a0: Value, a1: Value, a2: Value, a3: Value, b0: Value, b1: Value, acc: Any, i: Value) -> None:
        """acc[i] += A B on four values of a thread; i is a multiple of 4."""
        acc[i], acc[i + 1], acc[i + 2], acc[i + 3] = mma(
            a0, a1, a2, a3, b0, b1, acc[i], acc[i + 1], acc[i + 2], acc[i + 3]
        )

    return add_product


def _half_products(shape: TileShape) -> tuple[Callable[..., Any], ...]:
    """The products for f16 and bf16 storage."""
    pitch, key_steps, head_dim = shape.pitch, shape.keys // 16, shape.head_dim
    padded = shape.padded_chunks != shape.chunks
    pack = pack_f16 if shape.storage == "f16" else pack_bf16
    add_product = _adder(mma_f16 if shape.storage == "f16" else mma_bf16)

    @device_function
    def load_query(q: Pointer, row_a: Value, row_b: Value, step: Value, t: Value, scale: Value) -> Value:
        column = _i32(step * 16 + t * 2)
        x0, x1 = load2(q, row_a + column)
        y0, y1 = load2(q, row_b + column)
        second = _i32(column + 8)
        if padded and step * 16 + 16 > head_dim:
            second = column  # columns past the head meet keys of zeros: any number will do
        x8, x9 = load2(q, row_a + second)
        y8, y9 = load2(q, row_b + second)
        return (
            pack(x0 * scale, x1 * scale),
            pack(y0 * scale, y1 * scale),
            pack(x8 * scale, x9 * scale),
            pack(y8 * scale, y9 * scale),
        )

    @device_function
    def multiply_keys(
        sh: Any, at: Value, group: Value, step: Value, lane: Value, a: Any, i: Value, s: Any, j: Value
    ) -> None:
        row = _i32(((lane >> 4) << 3) + (lane & 7))
        here = _i32(at + row * pitch + ((lane >> 3) & 1) * 4)
        b0, b1, b2, b3 = ldmatrix_x4(sh, _i32(here + group * (16 * pitch) + step * 8))
        add_product(a[i], a[i + 1], a[i + 2], a[i + 3], b0, b1, s, j)
        add_product(a[i], a[i + 1], a[i + 2], a[i + 3], b2, b3, s, j + 4)

    @device_function
    def multiply_values(sh: Any, at: Value, group: Value, lane: Value, p: Any, o: Any, j: Value) -> None:
        here = _i32(at + (lane & 15) * pitch + (lane >> 4) * 4 + group * 8)
        for step in range(key_steps):
            i = step * 4
            b0, b1, b2, b3 = ldmatrix_x4_trans(sh, _i32(here + step * (16 * pitch)))
            add_product(p[i], p[i + 1], p[i + 2], p[i + 3], b0, b1, o, j)
            add_product(p[i], p[i + 1], p[i + 2], p[i + 3], b2, b3, o, j + 4)

    return load_query, multiply_keys, multiply_values, pack


def _byte_products(shape: TileShape) -> tuple[Callable[..., Any], ...]:
    """The products for int8 and fp8 storage."""
    pitch, key_pairs, k_steps = shape.pitch, shape.keys // 32, shape.k_steps
    int8 = shape.storage == "int8"
    widen_key = _widen_int8_f16 if int8 else _widen_fp8_f16
    widen_value = _widen_int8_bf16 if int8 else _widen_fp8_bf16
    add_key_product, add_value_product = _adder(mma_f16), _adder(mma_bf16)
    eight = np.uint32(8)

    @device_function
    def load_query(q: Pointer, row_a: Value, row_b: Value, step: Value, t: Value, scale: Value) -> Value:
        column = _i32(step * 16 + t * 4)
        x0, x1, x2, x3 = load4(q, row_a + column)
        y0, y1, y2, y3 = load4(q, row_b + column)
        return (
            pack_f16(x0 * scale, x2 * scale),
            pack_f16(y0 * scale, y2 * scale),
            pack_f16(x1 * scale, x3 * scale),
            pack_f16(y1 * scale, y3 * scale),
        )

    @device_function
    def multiply_keys(
        sh: Any, at: Value, group: Value, step: Value, lane: Value, a: Any, i: Value, s: Any, j: Value
    ) -> None:
        second = lane >> 4  # lanes 16 to 31 name the rows of the next k_step
        if step + 1 == k_steps:
            second = _i32(0)  # which does not exist
        row = _i32(group * 16 + (lane & 15))
        b0, b1, c0, c1 = ldmatrix_x4(sh, _i32(at + row * pitch + (step + second) * 4))
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        add_key_product(a0, a1, a2, a3, widen_key(b0), widen_key(b0 >> eight), s, j)
        add_key_product(a0, a1, a2, a3, widen_key(b1), widen_key(b1 >> eight), s, j + 4)
        if step + 1 < k_steps:
            a0, a1, a2, a3 = a[i + 4], a[i + 5], a[i + 6], a[i + 7]
            add_key_product(a0, a1, a2, a3, widen_key(c0), widen_key(c0 >> eight), s, j)
            add_key_product(a0, a1, a2, a3, widen_key(c1), widen_key(c1 >> eight), s, j + 4)

    @device_function
    def multiply_step(b0: Value, b1: Value, p: Any, i: Value, o: Any, j: Value) -> None:
        p0, p1, p2, p3 = p[i], p[i + 1], p[i + 2], p[i + 3]
        add_value_product(p0, p1, p2, p3, widen_value(b0), widen_value(b1), o, j)
        add_value_product(p0, p1, p2, p3, widen_value(b0 >> eight), widen_value(b1 >> eight), o, j + 4)

    @device_function
    def multiply_values(sh: Any, at: Value, group: Value, lane: Value, p: Any, o: Any, j: Value) -> None:
        here = _i32(at + lane * pitch + group * 4)
        for pair in range(key_pairs):
            b0, b1, c0, c1 = ldmatrix_x4_trans(sh, _i32(here + pair * (32 * pitch)))
            multiply_step(b0, b1, p, pair * 8, o, j)
            multiply_step(c0, c1, p, pair * 8 + 4, o, j)

    return load_query, multiply_keys, multiply_values, pack_bf16
