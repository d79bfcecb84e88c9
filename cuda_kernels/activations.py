"""What stands between the matrices of a decoder, over float32 rows: gated and plain activations, and the soft cap.

    silu_mul   silu(g) * u,  silu(x) = x sigmoid(x)                                           (arXiv:2002.05202)
    gelu_mul   gelu(g) * u,  gelu(x) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)    (arXiv:1606.08415)
    softcap    cap * tanh(x / cap)                                                            (arXiv:2408.00118)

(g, u) are the halves of a row. gelu is the tanh form, 0.5 x (1 + tanh(z)), written so that nothing cancels where z is
far below 0. Relative errors, in units of 2**-23: silu 6, gelu 6 + 4 |z|, softcap 6, and one more for a product by u.
Work is split as in `elementwise`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from cuda_kernels.elementwise import BINARY, THREADS, UNARY, build_binary, build_unary, elementwise_grid
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.primitives import Value, device_function, fma
from cuda_kernels.special_functions import sigmoid, tanh
from cuda_kernels.views import aligned16, check_array, rows_of

__all__ = ["gelu", "gelu_mul", "kernels", "silu_mul", "softcap"]

GELU_LINEAR = np.float32(2 * np.sqrt(2 / np.pi))
GELU_CUBIC = np.float32(2 * np.sqrt(2 / np.pi) * 0.044715)


@device_function
def _gelu(x: Value) -> Value:
    return x * sigmoid(x * fma(x * x, GELU_CUBIC, GELU_LINEAR))


@device_function
def _silu_mul(gate: Value, up: Value) -> Value:
    return gate * sigmoid(gate) * up


@device_function
def _gelu_mul(gate: Value, up: Value) -> Value:
    return _gelu(gate) * up


@device_function
def _gelu_alone(x: Value, unused: Value) -> Value:
    return _gelu(x)


def _build_silu_mul(*, vector: bool) -> Callable[..., None]:
    return build_binary(_silu_mul, vector)


def _build_gelu_mul(*, vector: bool) -> Callable[..., None]:
    return build_binary(_gelu_mul, vector)


def _build_gelu(*, vector: bool) -> Callable[..., None]:
    return build_unary(_gelu_alone, vector)


def _build_softcap(*, vector: bool) -> Callable[..., None]:
    @device_function
    def cap_tanh(x: Value, cap: Value) -> Value:
        return cap * tanh(x / cap)

    return build_unary(cap_tanh, vector)


_BUILDERS: dict[str, tuple[Callable[..., Callable[..., None]], tuple[str, ...]]] = {
    "silu_mul": (_build_silu_mul, BINARY),
    "gelu_mul": (_build_gelu_mul, BINARY),
    "gelu": (_build_gelu, UNARY),
    "softcap": (_build_softcap, UNARY),
}


@functools.cache
def _kernel(name: str, vector: bool) -> Kernel:
    build, signature = _BUILDERS[name]
    return Kernel(f"{name}{'' if vector else '_unaligned'}", build, (("vector", vector),), signature, THREADS)


def _gated(rt: Runtime, name: str, x: Array, out: Array) -> None:
    check_array(x, "x", np.float32, (None, None))
    tokens, both = x.shape
    require(both % 2 == 0, f"a row of {both} has no halves")
    check_array(out, "out", np.float32, (tokens, both // 2))
    gate, up = x[:, : both // 2], x[:, both // 2 :]
    source, to = rows_of(x, "x"), rows_of(out, "out")
    if to.length and to.columns:
        arguments = (gate, source.stride, up, source.stride, out, to.stride, to.columns)
        rt.launch(_kernel(name, aligned16(gate, up, out)), elementwise_grid(to), arguments)


def silu_mul(rt: Runtime, x: Array, out: Array) -> None:
    """x (T, 2 I) -> out (T, I): silu(x[:, :I]) * x[:, I:]; float32, rows may be strided. Raises KernelArgumentError."""
    _gated(rt, "silu_mul", x, out)


def gelu_mul(rt: Runtime, x: Array, out: Array) -> None:
    """x (T, 2 I) -> out (T, I): gelu(x[:, :I]) * x[:, I:]; float32, rows may be strided. Raises KernelArgumentError."""
    _gated(rt, "gelu_mul", x, out)


def gelu(rt: Runtime, x: Array, out: Array) -> None:
    """x (..., I) -> out, alike; float32, evenly spaced rows; out may be x. Raises KernelArgumentError."""
    check_array(x, "x", np.float32, (None,) * x.ndim)
    check_array(out, "out", np.float32, tuple(x.shape))
    source, to = rows_of(x, "x"), rows_of(out, "out")
    if to.length and to.columns:
        arguments = (x, source.stride, out, to.stride, to.columns, 0.0)
        rt.launch(_kernel("gelu", aligned16(x, out)), elementwise_grid(to), arguments)


def softcap(rt: Runtime, x: Array, cap: float) -> None:
    """x = cap * tanh(x / cap) in place, (..., N) float32, evenly spaced rows, cap > 0. Raises KernelArgumentError."""
    check_array(x, "x", np.float32, (None,) * x.ndim)
    require(0 < np.float32(cap) < np.inf, f"a cap of {cap}")
    rows = rows_of(x, "x")
    if rows.length and rows.columns:
        arguments = (x, rows.stride, x, rows.stride, rows.columns, float(cap))
        rt.launch(_kernel("softcap", aligned16(x)), elementwise_grid(rows), arguments)


def kernels() -> list[Kernel]:
    """Every variant."""
    return [_kernel(name, vector) for name in _BUILDERS for vector in (True, False)]
