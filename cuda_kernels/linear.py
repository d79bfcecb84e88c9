"""Linear layers: out = x W^T + bias, the same bits for a row of x whatever rows stand beside it.

x (T, K) float32, W (out, K) in any storage form. The order of operations depends on K and the form alone: columns are
cut into slices of 256; a slice is one chain of accumulations in ascending order, and slices are added in ascending
order. Two kernels per form, for few tokens and for many, keep to it and give equal bits:

- f32: float32 arithmetic (`linear_f32`);
- f16, bf16 and the quantised forms: tensor cores (`linear_decode`, `linear_prefill`) with float32 accumulation, on x
  rounded to float16 (scaled per token by a power of two, so that any float32 fits) or to bfloat16
  (`linear_activations`), and weights that are exact but for Q6_K's largest (`linear_fragments`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.linear_activations import activation_kernels, activations_nbytes, cast_activations
from cuda_kernels.linear_decode import MAX_TOKENS, decode_kernels, decode_shared_nbytes, linear_decode
from cuda_kernels.linear_f32 import f32_kernels, f32_shared_nbytes, linear_f32
from cuda_kernels.linear_forms import FORMS
from cuda_kernels.linear_prefill import linear_prefill, prefill_kernels, prefill_shared_nbytes
from cuda_kernels.matrix import Matrix
from cuda_kernels.views import aligned16, check_array, rows_of, strides_of

__all__ = ["kernels_for_report", "linear", "linear_scratch_nbytes", "shared_nbytes_of"]


def linear_scratch_nbytes(max_tokens: int, max_in_features: int) -> int:
    """Bytes of scratch that `linear` needs for x of up to (max_tokens, max_in_features), in any form."""
    return activations_nbytes(max_tokens, max_in_features)


def linear(rt: Runtime, x: Array, matrix: Matrix, bias: Array | None, out: Array, scratch: Array) -> None:
    """x (T, K) float32, W (out, K) -> out (T, out) float32; rows of x and out may be strided.

    Args:
        bias: (out,) float32 or None.
        scratch: contiguous, of any dtype, linear_scratch_nbytes(T, K) bytes or more, starting at a multiple of 256
        bytes; its
            content is lost.

    Raises:
        KernelArgumentError: shapes or dtypes that do not fit; a row of x not at a multiple of 16 bytes, with an f32
        matrix.
    """
    check_array(x, "x", np.float32, (None, matrix.columns))
    tokens, _, x_row = rows_of(x, "x")
    check_array(out, "out", np.float32, (tokens, matrix.rows))
    out_row = rows_of(out, "out").stride
    if bias is not None:
        check_array(bias, "bias", np.float32, (matrix.rows,))
        strides_of(bias, "bias")
    if tokens == 0:
        return
    if matrix.form == "f32":
        require(aligned16(x), "rows of x must start at multiples of 16 bytes")
        linear_f32(rt, x, x_row, tokens, matrix, bias, out, out_row)
        return
    activations = cast_activations(rt, x, FORMS[matrix.form], scratch)
    product = linear_decode if tokens <= MAX_TOKENS else linear_prefill
    product(rt, activations, tokens, matrix, bias, out, out_row)


def kernels_for_report() -> list[Kernel]:
    """Every variant."""
    return [*activation_kernels(), *f32_kernels(), *decode_kernels(), *prefill_kernels()]


def shared_nbytes_of(kernel: Kernel) -> int:
    """Dynamic shared memory of a block, for long rows."""
    constants: dict[str, Any] = dict(kernel.constants)
    if kernel in f32_kernels():
        return f32_shared_nbytes(constants.get("tokens_at_most"))
    if kernel in decode_kernels():
        return decode_shared_nbytes(constants["token_tiles"])
    if kernel in prefill_kernels():
        return prefill_shared_nbytes(constants["form"], constants["row_tiles"], constants["token_tiles"])
    return 0
