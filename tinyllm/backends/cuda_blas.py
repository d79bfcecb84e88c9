"""Linear layers by cuBLAS: faster for long prompts, but not the same bits.

cuBLAS picks its kernel, and with it the order of sums, by the size of the batch. So this is asked for
(`fast_matmul`), and weights are dense here: quantised ones are dequantised once, to float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuda_kernels.launch import Array, Runtime
from tinyllm.backends.cuda_weights import weight_form
from weights import Tensor

__all__ = ["Cublas", "DenseWeight", "dense_nbytes"]

# cudaDataType and cublasComputeType_t of the cuBLAS manual
_REAL = {"f32": 0, "f16": 2, "bf16": 14}
_COMPUTE_F32 = 68
_TRANSPOSE, _AS_IT_IS = 1, 0
_DEFAULT_ALGORITHM = -1


@dataclass(frozen=True)
class DenseWeight:
    """A row-major matrix (out, in); f16 and bf16 as the bits in uint16."""

    form: str
    values: Array

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)


def _dense_form(dtype: str, compute_dtype: str) -> str:
    """The form of a tensor stored as `dtype`: quantised ones become f16."""
    form = weight_form(dtype, compute_dtype)
    return form if form in _REAL else "f16"


def dense_nbytes(parts: Sequence[tuple[str, tuple[int, int]]], compute_dtype: str) -> int:
    """Bytes that Cublas.load will hold for parts given as (dtype, (out_i, in))."""
    item = 4 if _dense_form(parts[0][0], compute_dtype) == "f32" else 2
    return item * sum(rows * columns for _, (rows, columns) in parts)


class Cublas:
    """cuBLAS on a GPU's stream."""

    def __init__(self, runtime: Any) -> None:
        from cupy.cuda import device
        from cupy_backends.cuda.libs import cublas

        self._runtime: Runtime = runtime
        self._library = cublas
        self._handle = device.get_cublas_handle()
        cublas.setStream(self._handle, runtime.stream.ptr)
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)

    def load(self, tensors: Sequence[Tensor], compute_dtype: str) -> DenseWeight:
        """Stacks tensors (out_i, in) in the form of the first."""
        form = _dense_form(tensors[0].dtype, compute_dtype)
        values = np.concatenate([tensor.dequantize() for tensor in tensors])
        return DenseWeight(form, self._runtime.from_host(_narrowed(np, values, form)))

    def embedding(self, token_ids: Array, weight: DenseWeight, out: Array) -> Array:
        """token_ids (T,) -> out (T, in)"""
        with self._runtime.stream:  # type: ignore[attr-defined]
            rows = weight.values[token_ids]
            if weight.form == "bf16":
                out[...] = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
            else:
                out[...] = rows.view(np.float16) if weight.form == "f16" else rows
        return out

    def linear(self, x: Array, weight: DenseWeight, bias: Array | None, out: Array) -> None:
        """x (T, in) float32, out (T, out) float32; both may have rows further apart than they are long."""
        T, columns = x.shape
        rows = weight.shape[0]
        with self._runtime.stream:  # type: ignore[attr-defined]
            operand = _narrowed(self._runtime.xp, x, weight.form)
            if not operand.flags.c_contiguous:
                operand = self._runtime.xp.ascontiguousarray(operand)
            self._library.gemmEx(
                *(self._handle, _TRANSPOSE, _AS_IT_IS, rows, T, columns),
                self._one.ctypes.data,
                *(weight.values.data.ptr, _REAL[weight.form], columns),
                *(operand.data.ptr, _REAL[weight.form], columns),
                self._zero.ctypes.data,
                *(out.data.ptr, _REAL["f32"], out.strides[0] // 4),
                *(_COMPUTE_F32, _DEFAULT_ALGORITHM),
            )
            if bias is not None:
                out += bias


def _narrowed(xp: Any, values: Any, form: str) -> Any:
    """float32 -> the form's bits, rounded to nearest even; CuPy has no bfloat16."""
    if form == "f32":
        return values
    if form == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = xp.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
