"""Arithmetic of integers and floats as lines of numpy code."""

from __future__ import annotations

import numpy as np

from cuda_kernels.emulator.emitter import Emitter
from cuda_kernels.emulator.operands import HALVES, Handler, Operands
from cuda_kernels.emulator.ptx import SIZES, Instruction

_FUNCTIONS = {
    "ex2": "exp2",
    "lg2": "log2",
    "sin": "sine",
    "cos": "cosine",
    "tanh": "hyperbolic_tangent",
    "rsqrt": "reciprocal_root",
}


def _carry(emitter: Emitter, instruction: Instruction) -> list[str]:
    """add.cc, addc, sub.cc, subc, mad.cc, madc: with a carry register of the emulator's own."""
    x = Operands(emitter, instruction)
    base, parts = instruction.base, x.parts
    unsigned = f"u{SIZES[x.dtype]}"
    emitter.registers.setdefault("%carry", "?")
    carry = emitter.register("%carry", "?")
    carry_in = f"{carry}.astype('{unsigned}')" if base.endswith("c") else emitter.constant(np.dtype(unsigned).type(0))
    if base.startswith("mad"):
        product = (
            f"spread(multiply_high({x(1)}, {x(2)}, '{x.dtype}').astype('{unsigned}'))"
            if "hi" in parts
            else f"spread({x(1, unsigned)} * {x(2, unsigned)})"
        )
        lines = [f"total, carry = add_carry({product}, {x.vector(3, unsigned)}, {carry_in})"]
    else:
        function = "subtract_borrow" if base.startswith("sub") else "add_carry"
        lines = [f"total, carry = {function}({x.vector(1, unsigned)}, {x.vector(2, unsigned)}, {carry_in})"]
    if "cc" in parts:
        lines.append(f"np.copyto({carry}, carry{emitter.where})")
    return lines + emitter.put(instruction.operands[0], unsigned, "total")


def _add_subtract(emitter: Emitter, instruction: Instruction) -> list[str]:
    if "cc" in instruction.parts:
        return _carry(emitter, instruction)
    x = Operands(emitter, instruction)
    subtract = instruction.base == "sub"
    if x.type in HALVES:
        return _half(emitter, instruction)
    if x.is_float and x.rounding != "rn":
        _only_f32(x)
        return x.put(f"add_f32({x(1)}, {'-' if subtract else ''}{x(2)}, '{x.rounding}')")
    if "sat" in x.parts and x.type == "s32":
        return x.put(f"add_saturating({x(1)}, {x(2)}, {subtract})")
    return x.apply("subtract" if subtract else "add", 1, 2)


def _only_f32(x: Operands) -> None:
    if x.dtype != "f4":
        raise x.emitter.unsupported()


def _multiply(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if x.type in HALVES:
        return _half(emitter, instruction)
    if x.is_float:
        if x.rounding != "rn":
            _only_f32(x)
            return x.put(f"mul_f32({x(1)}, {x(2)}, '{x.rounding}')")
        return x.apply("multiply", 1, 2)
    if "wide" in x.parts:
        wide = _wide(x)
        return emitter.put(instruction.operands[0], wide, _wide_product(x, wide))
    if "hi" in x.parts:
        return x.put(f"multiply_high({x(1)}, {x(2)}, '{x.dtype}')")
    return x.apply("multiply", 1, 2)


def _wide(x: Operands) -> str:
    if SIZES[x.dtype] > 4:
        raise x.emitter.unsupported()
    return f"{x.dtype[0]}{2 * SIZES[x.dtype]}"


def _wide_product(x: Operands, wide: str) -> str:
    return f"np.multiply({x(1)}, {x(2)}, dtype='{wide}', casting='unsafe')"


def _multiply_add(emitter: Emitter, instruction: Instruction) -> list[str]:
    if instruction.base == "madc" or "cc" in instruction.parts:
        return _carry(emitter, instruction)
    x = Operands(emitter, instruction)
    if x.type in HALVES:
        return _half(emitter, instruction)
    if x.dtype == "f4":
        return x.put(f"fma_f32({x(1)}, {x(2)}, {x(3)}, '{x.rounding}')")
    if x.dtype == "f8":
        if x.rounding != "rn":
            raise emitter.unsupported()
        return x.put(f"fma_f64({x(1)}, {x(2)}, {x(3)})")
    if "wide" in x.parts:
        wide = _wide(x)
        return emitter.put(instruction.operands[0], wide, f"{_wide_product(x, wide)} + {x(3, wide)}")
    if "hi" in x.parts:
        return x.put(f"multiply_high({x(1)}, {x(2)}, '{x.dtype}') + {x(3)}")
    return x.put(f"{x(1)} * {x(2)} + {x(3)}")


def _multiply_24(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if SIZES[x.dtype] != 4 or "sat" in x.parts:
        raise emitter.unsupported()
    product = f"multiply_24({x(1)}, {x(2)}, '{x.dtype}', {'hi' in x.parts})"
    return x.put(f"{product} + {x(3)}" if instruction.base == "mad24" else product)


def _divide(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if not x.is_float:
        return x.put(f"divide({x(1)}, {x(2)})")
    if x.rounding != "rn":
        raise emitter.unsupported()
    return x.apply("divide", 1, 2)


def _remainder(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return x.put(f"remainder({x(1)}, {x(2)})")


def _min_max(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if x.type in HALVES:
        return _half(emitter, instruction)
    name = "minimum" if instruction.base == "min" else "maximum"
    if "xorsign" in x.parts or len(instruction.operands) != 3:
        raise emitter.unsupported()
    if x.is_float and "NaN" not in x.parts:
        return x.put(f"{name}({x(1)}, {x(2)})")
    return x.apply(name, 1, 2)


def _negate(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return _half(emitter, instruction) if x.type in HALVES else x.apply("negative", 1)


def _absolute(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return _half(emitter, instruction) if x.type in HALVES else x.apply("absolute", 1)


def _half(emitter: Emitter, instruction: Instruction) -> list[str]:
    """f16 and bf16, alone or in pairs: exact in float64 (rounded to odd), then rounded once."""
    kind, parts, base = emitter.operand_type(), instruction.parts, instruction.base
    packed, brain = kind.endswith("x2"), kind.startswith("bf")
    if any(rounding in parts for rounding in ("rz", "rm", "rp")):
        raise emitter.unsupported()

    def x(position: int) -> str:
        bits = emitter.vector(instruction.operands[position], "u4" if packed else "u2") + ".view('u2')"
        return f"bf16_to_f32({bits})" if brain else f"{bits}.view('f2')"

    suffix = "imum" if base in ("min", "max") else ""
    expression = {
        "add": lambda: f"fused({x(1)}, 1.0, {x(2)})",
        "sub": lambda: f"fused({x(1)}, 1.0, -{x(2)})",
        "mul": lambda: f"fused({x(1)}, {x(2)}, -0.0)",
        "fma": lambda: f"fused({x(1)}, {x(2)}, {x(3)})",
        "min": lambda: f"{'np.' if 'NaN' in parts else ''}min{suffix}({x(1)}, {x(2)})",
        "max": lambda: f"{'np.' if 'NaN' in parts else ''}max{suffix}({x(1)}, {x(2)})",
        "neg": lambda: f"-{x(1)}",
        "abs": lambda: f"np.abs({x(1)})",
        "ex2": lambda: f"exp2({x(1)}.astype('f4'))",
        "tanh": lambda: f"hyperbolic_tangent({x(1)}.astype('f4'))",
    }[base]()
    if "relu" in parts:
        expression = f"maximum({expression}, 0.0)"
    if "sat" in parts:
        expression = f"saturate({expression})"
    if brain:
        expression = f"odd_f64_to_bf16(np.asarray({expression}).astype('f8'))"
    else:
        expression = f"np.asarray({expression}).astype('f2').view('u2')"
    if packed:
        return emitter.put(instruction.operands[0], "u4", f"{expression}.view('u4')")
    return emitter.put(instruction.operands[0], "u2", expression)


def _copysign(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return x.apply("copysign", 2, 1)


def _function(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if x.type in HALVES and instruction.base in ("ex2", "tanh"):
        return _half(emitter, instruction)
    if not x.is_float:
        raise emitter.unsupported()
    return x.put(f"{_FUNCTIONS[instruction.base]}({x(1)})")


def _root(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if not x.is_float or x.rounding != "rn":
        raise emitter.unsupported()
    return x.apply("sqrt", 1)


def _reciprocal(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if not x.is_float or x.rounding != "rn":
        raise emitter.unsupported()
    return x.put(f"({emitter.constant(np.dtype(x.dtype).type(1))} / {x(1)})")


def _classify(emitter: Emitter, instruction: Instruction) -> list[str]:
    """testp.{finite,infinite,number,notanumber,normal,subnormal}."""
    x = Operands(emitter, instruction)
    if not x.is_float:
        raise emitter.unsupported()
    value, tiny = x(1), emitter.constant(np.finfo(x.dtype).tiny)
    tests = {
        "finite": f"np.isfinite({value})",
        "infinite": f"np.isinf({value})",
        "number": f"~np.isnan({value})",
        "notanumber": f"np.isnan({value})",
        "normal": f"(np.isfinite({value}) & (np.abs({value}) >= {tiny}))",
        "subnormal": f"((np.abs({value}) < {tiny}) & ({value} != 0))",
    }
    if x.parts[1] not in tests:
        raise emitter.unsupported()
    return emitter.put(instruction.operands[0], "?", tests[x.parts[1]])


def _sum_of_differences(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return x.put(f"absolute_difference({x(1)}, {x(2)}, {x(3)})")


def _dot(emitter: Emitter, instruction: Instruction) -> list[str]:
    kinds = instruction.parts[-2:]
    if any(kind not in ("s32", "u32") for kind in kinds):
        raise emitter.unsupported()
    x = Operands(emitter, instruction)
    bytes_of = {"s32": "'i1'", "u32": "'u1'"}
    arguments = f"{x.vector(1, 'u4')}, {x.vector(2, 'u4')}, {x(3, 'i4')}, {bytes_of[kinds[0]]}, {bytes_of[kinds[1]]}"
    return emitter.put(instruction.operands[0], "i4", f"dot_bytes({arguments})")


HANDLERS: dict[str, Handler] = {
    "add": _add_subtract,
    "sub": _add_subtract,
    "addc": _carry,
    "subc": _carry,
    "mul": _multiply,
    "mad": _multiply_add,
    "madc": _multiply_add,
    "fma": _multiply_add,
    "mul24": _multiply_24,
    "mad24": _multiply_24,
    "div": _divide,
    "rem": _remainder,
    "min": _min_max,
    "max": _min_max,
    "neg": _negate,
    "abs": _absolute,
    "copysign": _copysign,
    "sqrt": _root,
    "rcp": _reciprocal,
    "testp": _classify,
    "sad": _sum_of_differences,
    "dp4a": _dot,
}
HANDLERS.update(dict.fromkeys(_FUNCTIONS, _function))
