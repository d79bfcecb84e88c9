"""mma.sync: a warp's fragments gathered into matrices, multiplied, and handed back (PTX ISA, "Matrix Fragments").

Lane l of a warp has group l >> 2 and place l & 3. A register of A holds 4 bytes of row `group` (or group + 8), of B of
column `group`; the accumulators hold columns 2 * place and 2 * place + 1 of rows group and group + 8.

Products are exact in float64 and added to the accumulator in the order of k, in float64, then rounded once. Hardware
adds in an order and with a truncation of its own: results agree to float32's accuracy, not in the last bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.emulator.formats import bf16_to_f32
from cuda_kernels.emulator.ptx import Array

_GROUPS, _PLACES = 8, 4


def _decode(register: Any, kind: str, count: int) -> Array:
    """The elements of one register [lanes] as [warps, group, place, element], float64 or int64."""
    bits = np.ascontiguousarray(np.broadcast_to(register, count))
    if kind == "f16":
        values = bits.view(np.float16).astype(np.float64)
    elif kind == "bf16":
        values = bf16_to_f32(bits.view(np.uint16)).astype(np.float64)
    elif kind == "tf32":
        values = (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    else:
        values = bits.view(np.int8 if kind == "s8" else np.uint8).astype(np.int64)
    return values.reshape(count // 32, _GROUPS, _PLACES, -1)


def multiply_matrix(
    count: int, kind_a: str, kind_b: str, result: str, a: tuple[Any, ...], b: tuple[Any, ...], c: tuple[Any, ...]
) -> list[Array]:
    """D = A * B + C for m16n8: vectors [lanes] of the registers of D.

    a: 2 or 4 registers uint32; b: 1 or 2; c: 4 of float32 or int32, or 2 of packed float16. count: lanes.
    """
    warps = count // 32
    # Registers of A run over the two halves of the rows first, then over the halves of k. Warps come last: numpy's
    # inner loops then run over them.
    pieces = np.stack([_decode(register, kind_a, count) for register in a])  # [k half * row half, W, 8, 4, e]
    halves = pieces.reshape(-1, 2, *pieces.shape[1:])  # [k half, row half, W, 8, 4, e]
    matrix_a = np.ascontiguousarray(halves.transpose(0, 4, 5, 1, 3, 2)).reshape(-1, 16, 1, warps)  # [k, 16, 1, W]
    pieces = np.stack([_decode(register, kind_b, count) for register in b])  # [k half, W, 8, 4, e]
    matrix_b = np.ascontiguousarray(pieces.transpose(0, 3, 4, 2, 1)).reshape(-1, 1, 8, warps)  # [k, 1, 8, W]

    sums = np.multiply(matrix_a[0], matrix_b[0])  # [16, 8, W]
    product = np.empty_like(sums)
    for k in range(1, len(matrix_a)):  # in the order of k, so that an element's bits depend on nothing else
        sums += np.multiply(matrix_a[k], matrix_b[k], out=product)
    total = sums.transpose(2, 0, 1) + _accumulator(result, c, count)  # [W, 16, 8]
    rows = total.reshape(warps, 2, _GROUPS, _PLACES, 2)  # [W, row half, group, place, element]
    if result == "f16":
        packed = rows.astype(np.float16).view(np.uint32)[..., 0]  # [W, row half, group, place]
        return [np.ascontiguousarray(packed[:, half]).reshape(-1) for half in range(2)]
    rounded = rows.astype(np.float32) if result == "f32" else rows.astype(np.int32)
    return [np.ascontiguousarray(rounded[:, half, :, :, e]).reshape(-1) for half in range(2) for e in range(2)]


def _accumulator(result: str, c: tuple[Any, ...], count: int) -> Array:
    """The registers of C as matrices [warps, 16, 8], float64 or int64."""
    warps = count // 32
    if result == "f16":
        halves = [_decode(register, "f16", count) for register in c]  # 2 of [W, 8, 4, 2]
        return np.stack(halves, axis=1).reshape(warps, 16, 8)
    wide = np.int64 if result == "s32" else np.float64
    values = np.stack([np.broadcast_to(register, count).astype(wide) for register in c])  # [row half * element, lanes]
    shaped = values.reshape(2, 2, warps, _GROUPS, _PLACES)  # [row half, element, W, group, place]
    return shaped.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
