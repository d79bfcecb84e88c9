"""Rearranges weights into the layout that `linear_forms` describes, on the host, a run of rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.linear_forms import F32_ROWS, TILE_COLUMNS, TILE_ROWS, Form, tiles_of

__all__ = ["pack_f32", "pack_headers", "pack_weights"]

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]


def pack_f32(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows, K) float32, rows a multiple of 32 -> (groups, K / 4, 32, 4)"""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(rows // F32_ROWS, F32_ROWS, columns // 4, 4).transpose(0, 2, 1, 3))


def pack_weights(form: Form, source: NDArray[Any], columns: int) -> U32:
    """The `weights` of some rows, a multiple of 16.

    Args:
        source: (rows, K) float32 for f16 and bf16, else (rows, row bytes) uint8, the file's blocks.
        columns: K.

    Returns:
        (row tiles, column tiles, words / 4, 32 lanes, 4) uint32
    """
    rows = source.shape[0]
    row_tiles, column_tiles, _ = tiles_of(rows, columns)
    if form.bits == 16:
        halves = _to_f16(source) if form.name == "f16" else _to_bf16(source)
        tiles = _tiles(_pad_columns(halves, TILE_COLUMNS))
        packed = tiles.transpose(0, 3, 4, 2, 6, 5, 1, 7)  # tile, column tile, kt | g, t | half, row + 8 | e
        return _words(packed).reshape(row_tiles, column_tiles, 4, 32, 4)
    tiles = _tiles(_pad_columns(_quants(form, source), TILE_COLUMNS))
    if form.bits == 8:
        tiles = tiles.reshape(*tiles.shape[:4], 2, 2, *tiles.shape[5:])  # kt -> run, k-tile of the run
        packed = tiles.transpose(0, 3, 4, 2, 7, 5, 6, 8, 1)  # tile, column tile, run | g, t | kt, half | e, row + 8
        return _words(packed).reshape(row_tiles, column_tiles, 2, 32, 4)
    low = tiles & np.uint8(15)
    pairs = low[:, 0] | low[:, 1] << np.uint8(4)  # (row tile, g, column tile, kt, half, t, e)
    packed = pairs.transpose(0, 2, 1, 5, 3, 6, 4)  # tile, column tile | g, t | kt | e, half
    return _words(packed).reshape(row_tiles, column_tiles, 1, 32, 4)


def pack_headers(form: Form, source: U8, columns: int) -> U32:
    """The `headers` of some rows, a multiple of 16, of file blocks: (row tiles, slices, header words) uint32."""
    rows = source.shape[0]
    row_tiles, _, slices = tiles_of(rows, columns)
    blocks = source.reshape(rows, -1, form.block_nbytes)
    parts = [_scales(form, blocks, slices)]
    if form.high_words:
        high = _pad_columns(_quants(form, source), 4 * TILE_COLUMNS) >> np.uint8(4)
        parts.append(_high_bits(form, high))
    if form.scaling == "block" and form.minima:
        minima = _pad_columns(blocks[:, :, 2:4].copy().view(np.uint16)[:, :, 0], 8)
        parts.append(minima.reshape(row_tiles, 2, 8, slices, 4, 2).transpose(0, 3, 2, 4, 1, 5))
    if form.bits == 6:
        d = blocks[:, :, 208:210].copy().view(np.uint16)[:, :, 0]
        parts.append(d.reshape(row_tiles, 2, 8, slices).transpose(0, 3, 2, 1))
    flat = [np.ascontiguousarray(part).reshape(row_tiles, slices, -1).view(np.uint32) for part in parts]
    return np.concatenate(flat, axis=2)


def _words(packed: NDArray[Any]) -> U32:
    """The bytes of an array, in its order, as words."""
    return np.ascontiguousarray(packed).reshape(-1).view(np.uint32)


def _pad_columns(values: NDArray[Any], multiple: int) -> NDArray[Any]:
    missing = -values.shape[1] % multiple
    return np.pad(values, ((0, 0), (0, missing))) if missing else values


def _tiles(values: NDArray[Any]) -> NDArray[Any]:
    """(rows, K) -> (row tile, 2: row + 8, 8: g, column tile, 4: kt, 2: half, 4: t, 2: e)"""
    rows, columns = values.shape
    return values.reshape(rows // TILE_ROWS, 2, 8, columns // TILE_COLUMNS, 4, 2, 4, 2)


def _to_f16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


# ---- the file's blocks


def _nibbles(field: U8) -> U8:
    """(..., B) -> (..., 2B): all low nibbles, then all high ones"""
    return np.concatenate([field & np.uint8(15), field >> np.uint8(4)], axis=-1)


def _quants(form: Form, source: U8) -> U8:
    """File blocks (rows, row bytes) -> the stored integers (rows, K), without a sign: Q8_0 as q + 128."""
    rows = source.shape[0]
    b = source.reshape(-1, form.block_nbytes)
    if form.name == "Q8_0":
        return (b[:, 2:] ^ np.uint8(128)).reshape(rows, -1)
    if form.scaling == "block":
        q = _nibbles(b[:, -16:])
        if form.bits == 5:
            q |= np.unpackbits(b[:, -20:-16], axis=1, bitorder="little") << np.uint8(4)
        return q.reshape(rows, -1)
    if form.bits == 6:
        low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
        high = b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)
        return (low | high << np.uint8(4)).reshape(rows, -1)
    q = _nibbles(b[:, -128:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    if form.bits == 5:
        fifth = b[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & np.uint8(1)  # (n, 32, 8)
        q |= fifth.transpose(0, 2, 1) << np.uint8(4)
    return q.reshape(rows, -1)


def _scales(form: Form, blocks: U8, slices: int) -> NDArray[Any]:
    """(row tiles, slices, 16 rows, 16 bytes in some dtype)"""
    rows = blocks.shape[0]
    if form.scaling == "block":
        scales: NDArray[Any] = _pad_columns(blocks[:, :, :2].copy().view(np.uint16)[:, :, 0], 8)
    elif form.bits == 6:
        scales = blocks[:, :, 192:208] ^ np.uint8(128)
    else:
        scales = blocks[:, :, :16]
    return scales.reshape(rows // TILE_ROWS, TILE_ROWS, slices, -1).transpose(0, 2, 1, 3)


def _high_bits(form: Form, high: U8) -> U8:
    """The bits above the lowest four, (rows, whole slices), in the order of `linear_forms`."""
    tiles = _tiles(high)
    row_tiles, slices = tiles.shape[0], tiles.shape[3] // 4
    if form.bits == 5:
        # row tile, row + 8, g, slice, tile, kt / 2, kt % 2, half, t, e
        #   -> row tile, slice | g, t | tile | e, kt / 2, row + 8, kt % 2, half
        bits = tiles.reshape(row_tiles, 2, 8, slices, 4, 2, 2, 2, 4, 2).transpose(0, 3, 2, 8, 4, 9, 5, 1, 6, 7)
    else:
        # row tile, row + 8, g, slice, tile / 2, tile % 2, kt / 2, kt % 2, half, t, e, bit
        #   -> row tile, slice, tile / 2 | g, t | tile % 2, kt / 2 | e, kt % 2, row + 8, half, bit
        split = np.stack([tiles & np.uint8(1), tiles >> np.uint8(1)], axis=-1)
        split = split.reshape(row_tiles, 2, 8, slices, 2, 2, 2, 2, 2, 4, 2, 2)
        bits = split.transpose(0, 3, 4, 2, 9, 5, 6, 10, 7, 1, 8, 11)
    return np.packbits(np.ascontiguousarray(bits).reshape(-1), bitorder="little")
