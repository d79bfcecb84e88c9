"""A weight matrix on the device, in one storage form, packed for the linear and embedding kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.linear_forms import F32_ROWS, TILE_ROWS, form_named, tiles_of
from cuda_kernels.linear_packing import pack_f32, pack_headers, pack_weights
from cuda_kernels.views import ceil_div

__all__ = ["Matrix", "matrix_nbytes", "pack_matrix"]

_CHUNK_VALUES = 1 << 22  # weights packed at a time: temporaries stay at some tens of megabytes


@dataclass(frozen=True)
class Matrix:
    """(rows, columns) = (out, in); the layout of the arrays is described in `linear_forms`.

    Attributes:
        form: "f32", "f16", "bf16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K" or "Q6_K".
        weights: float32 for f32, else uint32.
        headers: scales and what goes with them, uint32; `weights` again where the form has none.
        nbytes: of both arrays.
    """

    form: str
    rows: int
    columns: int
    weights: Array
    headers: Array
    nbytes: int


def _shapes(name: str, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of `weights` and `headers`. Raises KernelArgumentError."""
    form = form_named(name)
    require(rows > 0 and columns > 0, f"no matrix of {rows} x {columns}")
    if name == "f32":
        require(columns % 4 == 0, f"f32 matrices need a multiple of 4 columns, not {columns}")
        return (ceil_div(rows, F32_ROWS), columns // 4, F32_ROWS, 4), None
    require(
        columns % form.block_size == 0,
        f"{name} has blocks of {form.block_size} columns: {columns} are not whole blocks",
    )
    row_tiles, column_tiles, slices = tiles_of(rows, columns)
    weights = (row_tiles, column_tiles, form.words // 4, 32, 4)
    return weights, (row_tiles, slices, form.header_words) if form.quantised else None


def matrix_nbytes(form: str, rows: int, columns: int) -> int:
    """Bytes that a packed matrix takes on the device. Raises KernelArgumentError for a shape that the form cannot
    have."""
    return sum(4 * int(np.prod(shape)) for shape in _shapes(form, rows, columns) if shape is not None)


def pack_matrix(rt: Runtime, form: str, source: NDArray[Any], rows: int, columns: int) -> Matrix:
    """Packs a matrix and copies it to the device.

    Args:
        source: (rows, columns) float32 for f32, f16 and bf16 (rounded to nearest even, which changes nothing in values
        that
            were stored so); (rows, row bytes) uint8, the blocks of a GGUF file, for the quantised forms.

    Raises:
        KernelArgumentError: an unknown form, or a shape or dtype that it cannot have.
    """
    spec = form_named(form)
    weights_shape, headers_shape = _shapes(form, rows, columns)
    expected = (rows, columns // spec.block_size * spec.block_nbytes if spec.quantised else columns)
    dtype: np.dtype[Any] = np.dtype(np.uint8 if spec.quantised else np.float32)
    require(
        source.shape == expected and source.dtype == dtype,
        f"a {form} matrix of {rows} x {columns} is packed from {dtype} {expected}, not {source.dtype} {source.shape}",
    )
    weights = rt.empty(weights_shape, np.float32 if form == "f32" else np.uint32)
    headers = weights if headers_shape is None else rt.empty(headers_shape, np.uint32)
    group = F32_ROWS if form == "f32" else TILE_ROWS
    step = max(1, _CHUNK_VALUES // (group * columns)) * group
    for first in range(0, rows, step):
        part = np.ascontiguousarray(source[first : first + step])
        missing = -len(part) % group
        if missing:
            part = np.pad(part, ((0, missing), (0, 0)))
        at = slice(first // group, first // group + len(part) // group)
        rt.upload(weights[at], pack_f32(part) if form == "f32" else pack_weights(spec, part, columns))
        if headers_shape is not None:
            rt.upload(headers[at], pack_headers(spec, part, columns))
    return Matrix(form, rows, columns, weights, headers, matrix_nbytes(form, rows, columns))
