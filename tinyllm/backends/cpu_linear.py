"""The CPU backend's linear layers and embedding: which form of kernel, and what it needs beside x and the weight.

Quantised weights meet activations cut into digits (see cpu_kernels/digits.py): one where that was asked for, three
where the CPU multiplies bytes fast enough for that to be the faster way of computing with float32 activations. All
other products are float32's. Activations of the last layer and of the LM head are never rounded to one digit: there it
would change the likeliest token most often, and only rows that are sampled go through the LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinyllm.backends.base import F32Array, I32Array
from tinyllm.backends.cpu_kernels.digits import (
    TILE_ROWS,
    matrix_step_nbytes,
    quantise_for_matrix,
    quantise_kernel,
    record_nbytes,
    row_nbytes,
    tile_nbytes,
)
from tinyllm.backends.cpu_kernels.formats import PACKED
from tinyllm.backends.cpu_kernels.integer_amx import amx_kernel, amx_worker_nbytes, groups_of_task
from tinyllm.backends.cpu_kernels.integer_dot import HAS_VNNI
from tinyllm.backends.cpu_kernels.integer_linear import (
    FEW_ROWS as INTEGER_FEW_ROWS,
    MANY_TILE,
    few_rows_kernel,
    integer_worker_nbytes,
    many_rows_kernel,
)
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.linear import FEW_ROWS, block_sums, linear_kernels, worker_nbytes
from tinyllm.backends.cpu_kernels.packing import PackedWeight, pack_matrix
from tinyllm.backends.cpu_ops import CpuOps
from weights import Tensor

__all__ = ["CpuLinear"]

_BLOCK_NBYTES = 3 << 18  # of the digits that a task's rows have: they stay in a core's own cache


class CpuLinear(CpuOps):
    """`load_matrix`, `embedding` and `linear` of `Backend`.

    Attributes:
        exact_digits: of float32 activations beside quantised weights: 3, or 0 where they stay as they are.
        matrix_unit: whether AMX multiplies many rows with codes of four bits.
    """

    activations: str
    exact_digits: int = 3 if HAS_VNNI else 0
    matrix_unit: bool

    def load_matrix(self, tensors: Sequence[Tensor], *, near_output: bool = False) -> PackedWeight:
        rounded = self.activations == "int8" and not near_output
        return pack_matrix(tensors, self._run, 1 if rounded else self.exact_digits)

    def embedding(self, token_ids: I32Array, weight: PackedWeight, *, out: F32Array | None = None) -> F32Array:
        address = self._address_of
        T, M = token_ids.shape[0], weight.shape[1]
        out = np.empty((T, M), np.float32) if out is None else out
        assert out.shape == (T, M) and out.flags.c_contiguous and token_ids.flags.c_contiguous
        assert T == 0 or (token_ids.min() >= 0 and token_ids.max() < weight.shape[0])
        for part in weight.parts:
            self._run(
                linear_kernels(part.dtype).embedding, T, 16 * T * M, address(token_ids), part.address,
                part.group_nbytes, part.first_row, part.rows, M, address(out), 4 * M,
            )  # fmt: skip
        return out

    def _linear_scratch(self, rows: int, in_features: int) -> tuple[int, int]:
        """The most bytes of scratch of a product, and bytes of one worker, whose parts come first."""
        worker = max(worker_nbytes(in_features), integer_worker_nbytes(in_features))
        if self.matrix_unit:
            worker = max(worker, amx_worker_nbytes(in_features))
        sums = 4 * rows * (in_features // 32) if rows > FEW_ROWS else 0
        tiles = -(-rows // TILE_ROWS)
        few = min(rows, INTEGER_FEW_ROWS) * row_nbytes(3, 16, in_features)
        records = max(few, tiles * max(tile_nbytes(3, 16, in_features), in_features // 32 * matrix_step_nbytes(3)))
        return self.num_threads * worker + max(sums, records), worker

    def linear(
        self, x: F32Array, weight: PackedWeight, bias: F32Array | None = None, *, out: F32Array | None = None
    ) -> F32Array:
        address = self._address_of
        T, in_features = x.shape
        out_features = weight.shape[0]
        out = np.empty((T, out_features), np.float32) if out is None else out
        assert in_features == weight.shape[1] and out.shape == (T, out_features)
        if x.shape[0] == 0:  # numpy gives empty arrays strides of 0
            return out
        assert x.strides[1] == 4 and out.strides[1] == 4 and (bias is None or bias.shape == (out_features,))
        scratch_nbytes, worker_nbytes = self._linear_scratch(T, in_features)
        scratch = self._reserve(scratch_nbytes)
        prepared = scratch + self.num_threads * worker_nbytes  # what all workers read of x besides or instead of it
        x_address, x_stride = address(x), x.strides[0]
        out_address, bias_address = address(out), 0 if bias is None else address(bias)
        holds: object = None
        for part in weight.parts:
            way = self._way(part.dtype, weight.digits, T, in_features)
            if way.prepare is not None and holds != way.made:
                blocks = in_features // way.block
                tasks, work = T * (blocks if way.by_block else 1), 4 * T * in_features
                self._run(way.prepare, tasks, work, x_address, x_stride, blocks, *way.before, prepared, *way.places)
                holds = way.made
            groups, first = -(-part.rows // 16), 4 * part.first_row
            blocks_of_rows = -(-T // way.block_rows) if way.block_rows else 1
            span = groups_of_task(T, part.rows, self.num_threads) if way.takes_span else 1
            tasks = blocks_of_rows * -(-groups // span)
            self._run(
                way.kernel, tasks, T * in_features * part.rows, part.address, part.group_nbytes,
                prepared if way.stride else x_address, way.stride or x_stride, T, in_features, part.rows,
                bias_address and bias_address + first, out_address + first, out.strides[0], scratch, worker_nbytes,
                *((prepared,) if way.takes_sums else ()), *((way.block_rows,) if way.block_rows else ()),
                *((span,) if way.takes_span else ()),
            )  # fmt: skip
        return out

    def _way(self, dtype: str, digits: int, T: int, in_features: int) -> _Way:
        """How T rows are multiplied with weights of one format."""
        form = PACKED[dtype]
        if form.dense or not digits:
            floats = linear_kernels(dtype)
            if T <= FEW_ROWS:
                return _Way(floats.one_row if T == 1 else floats.few_rows)
            sums = block_sums if form.has_minimum else None
            return _Way(floats.many_rows, sums, "sums", form.step, takes_sums=True)
        offset = form.offset
        made = digits, form.step, offset
        if self.matrix_unit and form.bits == 4 and T > MANY_TILE:
            stride = in_features // form.step * matrix_step_nbytes(digits)
            kernel, quantise = amx_kernel(dtype, digits), quantise_for_matrix(digits, offset != 0)
            way = _Way(kernel, quantise, ("matrix", *made), form.step, True, (offset,), (), stride)
            return replace(way, block_rows=_block_rows(stride), takes_span=True)
        record = record_nbytes(digits, form.step)
        quantise = quantise_kernel(digits, form.step, offset != 0)
        if T <= INTEGER_FEW_ROWS:
            row, kernel = row_nbytes(digits, form.step, in_features), few_rows_kernel(dtype, digits, T)
            return _Way(kernel, quantise, made, form.step, True, (offset,), (TILE_ROWS * row, row, record), row)
        tile = tile_nbytes(digits, form.step, in_features)
        places = tile, record, TILE_ROWS * record
        way = _Way(many_rows_kernel(dtype, digits), quantise, made, form.step, True, (offset,), places, tile)
        return replace(way, block_rows=_block_rows(tile))


def _block_rows(tile_nbytes: int) -> int:
    """Rows whose digits stay in a core's own cache."""
    return max(1, _BLOCK_NBYTES // tile_nbytes) * TILE_ROWS


@dataclass(frozen=True)
class _Way:
    """How a product runs.

    Attributes:
        kernel: multiplies.
        prepare: makes something of x first: digits, or sums.
        made: names what it makes; parts that need the same share it.
        block: values of a row that it takes together.
        by_block: a task of it is one block, not one row.
        before, places: its arguments before and after the address of what it makes.
        stride: of what the kernel reads instead of x, from row to row or from tile to tile; 0: it reads x.
        takes_sums: the kernel's last argument is what was made.
        block_rows: rows of a task, of kernels that take them; 0: all.
        takes_span: a task may take several groups of outputs, as many as the kernel's last argument says.
    """

    kernel: Kernel
    prepare: Kernel | None = None
    made: object = None
    block: int = 1
    by_block: bool = False
    before: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    stride: int = 0
    takes_sums: bool = False
    block_rows: int = 0
    takes_span: bool = False
