"""Moves, logic, bit fields, comparisons and selections as lines of numpy code."""

from __future__ import annotations

import numpy as np

from cuda_kernels.emulator.emitter import Emitter
from cuda_kernels.emulator.operands import Handler, Operands
from cuda_kernels.emulator.ptx import DTYPES, SIZES, SPECIAL_REGISTERS, Instruction

_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "lo": "less",
    "ls": "less_equal",
    "hi": "greater",
    "hs": "greater_equal",
}
_BOOLEANS = {"and": "&", "or": "|", "xor": "^"}


def _move(emitter: Emitter, instruction: Instruction) -> list[str]:
    destination, source = instruction.operands
    dtype = DTYPES[emitter.operand_type()]
    if destination.startswith("{"):
        parts = emitter.elements(destination)
        width = _part_width(emitter, dtype, parts)
        lines = [f"parts = {emitter.vector(source, f'u{SIZES[dtype]}')}.view('u{width}')"]
        for index, part in enumerate(parts):
            lines += emitter.put(part, f"u{width}", f"parts[{index}::{len(parts)}]")
        return lines
    if source.startswith("{"):
        parts = emitter.elements(source)
        width, unsigned = _part_width(emitter, dtype, parts), f"u{SIZES[dtype]}"
        pieces = [
            f"(np.asarray({emitter.source(part, f'u{width}')}).astype('{unsigned}')"
            f" << {emitter.constant(np.dtype(unsigned).type(8 * width * index))})"
            for index, part in enumerate(parts)
        ]
        return emitter.put(destination, unsigned, " | ".join(pieces))
    if dtype == "?" or source in SPECIAL_REGISTERS or source in emitter.registers:
        return emitter.put(destination, dtype, emitter.source(source, dtype))
    return emitter.put(destination, dtype, emitter.source(source, dtype))


def _part_width(emitter: Emitter, dtype: str, parts: list[str]) -> int:
    if not parts or SIZES[dtype] % len(parts):
        raise emitter.unsupported()
    return SIZES[dtype] // len(parts)


def _bitwise(emitter: Emitter, instruction: Instruction) -> list[str]:
    return Operands(emitter, instruction).apply(f"bitwise_{instruction.base}", 1, 2)


def _not(emitter: Emitter, instruction: Instruction) -> list[str]:
    return Operands(emitter, instruction).apply("invert", 1)


def _is_zero(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return x.put(f"({x(1)} == 0)")


def _shift(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    bits, amount = 8 * SIZES[x.dtype], instruction.operands[2]
    left = instruction.base == "shl"
    function = "shift_left" if left else "shift_right"
    if amount in emitter.registers:
        return x.put(f"{function}({x(1)}, {x(2, 'u4')}, {bits})")
    count = emitter.literal(amount)
    if not 0 <= count < bits:
        return x.put(f"{function}({x(1)}, {emitter.constant(np.uint32(count & 0xFFFFFFFF))}, {bits})")

    name = "left_shift" if left else "right_shift"
    return x.put(f"np.{name}({x(1)}, {emitter.constant(np.dtype(x.dtype).type(count))})")


def _compare(emitter: Emitter, instruction: Instruction) -> list[str]:
    """setp and set: a comparison, and an optional Boolean operation with a predicate."""
    parts, operands = instruction.parts, instruction.operands
    relation = parts[1] if len(parts) > 1 else ""
    boolean = next((part for part in parts[2:3] if part in _BOOLEANS), None)
    kind = emitter.operand_type()
    dtype = {"bf16": "u2", "f16": "f2"}.get(kind, DTYPES[kind])
    if kind.endswith("x2") or len(operands) != (4 if boolean else 3):
        raise emitter.unsupported()
    a, b = (emitter.source(operands[position], dtype) for position in (1, 2))
    if kind == "bf16":
        a, b = f"bf16_to_f32({a})", f"bf16_to_f32({b})"
    if "ftz" in parts and dtype == "f4":
        a, b = f"flush({a})", f"flush({b})"
    is_float = kind in ("f16", "bf16", "f32", "f64")
    unordered = f"(np.isnan({a}) | np.isnan({b}))"
    if relation in ("nan", "num") and is_float:
        test = unordered if relation == "nan" else f"~{unordered}"
    elif is_float and len(relation) == 3 and relation[2] == "u" and relation[:2] in _COMPARISONS:
        test = f"(np.{_COMPARISONS[relation[:2]]}({a}, {b}) | {unordered})"
    elif is_float and relation == "ne":
        test = f"(np.not_equal({a}, {b}) & ~{unordered})"
    elif relation in _COMPARISONS:
        if instruction.base == "setp" and not boolean and "|" not in operands[0]:
            return emitter.ufunc(_COMPARISONS[relation], operands[0], "?", a, b)
        test = f"np.{_COMPARISONS[relation]}({a}, {b})"
    else:
        raise emitter.unsupported()
    combine = f" {_BOOLEANS[boolean]} {emitter.source(operands[3], '?')}" if boolean else ""
    lines = [f"test = {test}"]
    if instruction.base == "set":
        result = DTYPES.get(parts[-2], "")
        if result not in ("u4", "i4", "f4"):
            raise emitter.unsupported()
        true = "1.0" if result == "f4" else emitter.constant(np.array(-1, "i4").view(result)[()])
        return [*lines, *emitter.put(operands[0], result, f"np.where(test{combine}, {true}, 0)")]
    destinations = operands[0].split("|")
    lines += ["first, second = " + f"test{combine}, ~test{combine}"]
    for destination, name in zip(destinations, ("first", "second"), strict=False):
        lines += emitter.put(destination.strip(), "?", name)
    return lines


def _select(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return x.put(f"np.where({emitter.source(instruction.operands[3], '?')}, {x(1)}, {x(2)})")


def _select_by_sign(emitter: Emitter, instruction: Instruction) -> list[str]:
    """slct.dtype.{s32,f32} d, a, b, c: a where c >= 0."""
    parts, operands = instruction.parts, instruction.operands
    kinds = [DTYPES[part] for part in parts[1:] if part in DTYPES]
    if len(kinds) != 2:
        raise emitter.unsupported()
    a, b = (emitter.source(operands[position], kinds[0]) for position in (1, 2))
    return emitter.put(operands[0], kinds[0], f"np.where({emitter.source(operands[3], kinds[1])} >= 0, {a}, {b})")


def _bit_count(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    bits = 8 * SIZES[x.dtype]
    expression = {
        "popc": f"count_ones({x(1)})",
        "clz": f"leading_zeros({x(1)}, {bits})",
        "bfind": f"find_leading({x(1)}, {bits}, {'shiftamt' in x.parts})",
    }[instruction.base]
    return emitter.put(instruction.operands[0], "u4", expression)


def _reverse(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    return x.put(f"reverse_bits({x(1)}, {8 * SIZES[x.dtype]})")


def _permute(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    mode = x.parts[2] if len(x.parts) > 2 else ""
    if mode not in ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        raise emitter.unsupported()
    return x.put(f"permute_bytes({x.vector(1, 'u4')}, {x.vector(2, 'u4')}, {x(3, 'u4')}, '{mode}')", "u4")


def _lookup(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if len(instruction.operands) != 5:
        raise emitter.unsupported()
    return x.put(f"lookup_3({x(1)}, {x(2)}, {x(3)}, {emitter.literal(instruction.operands[4])})")


def _funnel(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    operands = f"{x.vector(1, 'u4')}, {x.vector(2, 'u4')}, {x(3, 'u4')}"
    return x.put(f"funnel_shift({operands}, {'l' in x.parts}, {'wrap' in x.parts})", "u4")


def _field(emitter: Emitter, instruction: Instruction) -> list[str]:
    x = Operands(emitter, instruction)
    if instruction.base == "bfe":
        return x.put(f"extract_field({x(1)}, {x(2, 'u4')}, {x(3, 'u4')}, '{x.dtype}')")
    return x.put(f"insert_field({x.vector(1, x.dtype)}, {x.vector(2, x.dtype)}, {x(3, 'u4')}, {x(4, 'u4')})")


HANDLERS: dict[str, Handler] = {
    "mov": _move,
    "and": _bitwise,
    "or": _bitwise,
    "xor": _bitwise,
    "not": _not,
    "cnot": _is_zero,
    "shl": _shift,
    "shr": _shift,
    "setp": _compare,
    "set": _compare,
    "selp": _select,
    "slct": _select_by_sign,
    "popc": _bit_count,
    "clz": _bit_count,
    "bfind": _bit_count,
    "brev": _reverse,
    "prmt": _permute,
    "lop3": _lookup,
    "shf": _funnel,
    "bfe": _field,
    "bfi": _field,
}
