"""Numba's type of sixteen float32 lanes, and its arithmetic. Imported when a kernel is compiled; see simd.py."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

__all__ = ["vec"]


class _VecType(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="f32x16")


vec = _VecType()


@register_model(_VecType)
class _VecModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(ir.FloatType(), 16))


def _register_operator(function: Any, emit: Callable[[Any, Any, Any], Any]) -> None:
    @infer_global(function)
    class _Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            return signature(vec, vec, vec) if args == (vec, vec) else None

    @lower_builtin(function, vec, vec)  # type: ignore[untyped-decorator]
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, *args)


_register_operator(operator.add, lambda b, x, y: b.fadd(x, y))
_register_operator(operator.sub, lambda b, x, y: b.fsub(x, y))
_register_operator(operator.mul, lambda b, x, y: b.fmul(x, y))
_register_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))
