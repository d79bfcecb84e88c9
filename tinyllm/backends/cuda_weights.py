"""Weights on the GPU: which form each tensor takes there, and tensors of one form stacked into one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from cuda_kernels.launch import Runtime
from cuda_kernels.matrix import Matrix, matrix_nbytes, pack_matrix
from weights import Tensor

__all__ = ["CudaWeight", "load_weight", "weight_form", "weight_nbytes"]

_DENSE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class CudaWeight:
    """A matrix (out, in) as its first rows and parts, each of one form."""

    shape: tuple[int, int]
    parts: tuple[tuple[int, Matrix], ...]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for _, matrix in self.parts)


def weight_form(dtype: str, compute_dtype: str) -> str:
    """The Matrix form of a tensor stored as `dtype`, a key of weights.quants.FORMATS.

    "auto" keeps the storage: quantised tensors are multiplied as they are, in f16. So does "f16" with these; any other
    choice turns all tensors into dense ones of that dtype.
    """
    if compute_dtype == "auto" or (compute_dtype == "f16" and dtype not in _DENSE):
        return _DENSE.get(dtype, dtype)
    return compute_dtype


def weight_nbytes(parts: Sequence[tuple[str, tuple[int, int]]], compute_dtype: str) -> int:
    """Bytes that load_weight will hold for parts given as (dtype, (out_i, in))."""
    total = 0
    for form, group in groupby(parts, lambda part: weight_form(part[0], compute_dtype)):
        shapes = [shape for _, shape in group]
        total += matrix_nbytes(form, sum(rows for rows, _ in shapes), shapes[0][1])
    return total


def load_weight(runtime: Runtime, tensors: Sequence[Tensor], compute_dtype: str) -> CudaWeight:
    """Packs tensors (out_i, in), stacked along their rows."""
    parts, first = [], 0
    for form, group in groupby(tensors, lambda tensor: weight_form(tensor.dtype, compute_dtype)):
        stacked = list(group)
        rows, columns = sum(tensor.shape[0] for tensor in stacked), stacked[0].shape[1]
        dense = form in _DENSE.values()
        source = np.concatenate([tensor.dequantize() if dense else tensor.rows() for tensor in stacked])
        parts.append((first, pack_matrix(runtime, form, source, rows, columns)))
        first += rows
    return CudaWeight((first, tensors[0].shape[1]), tuple(parts))
