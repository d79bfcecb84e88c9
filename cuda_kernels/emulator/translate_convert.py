"""The cvt instruction: between integers, floats and packed narrow floats (PTX ISA, "cvt")."""

from __future__ import annotations

import numpy as np

from cuda_kernels.emulator.emitter import Emitter
from cuda_kernels.emulator.operands import ROUNDINGS, Handler
from cuda_kernels.emulator.ptx import DTYPES, SIZES, Instruction

_FLOATS = ("f16", "f32", "f64", "bf16")
_WHOLE = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


def _convert(emitter: Emitter, instruction: Instruction) -> list[str]:
    kinds = [part for part in instruction.parts[1:] if part in DTYPES]
    if len(kinds) != 2:
        raise emitter.unsupported()
    to, source = kinds
    if to.endswith("x2") or source.endswith("x2"):
        return _packed(emitter, instruction, to, source)
    if to == "tf32":
        rounding = next((part for part in instruction.parts if part in ("rna", "rn")), None)
        if rounding is None or source != "f32":
            raise emitter.unsupported()
        value = emitter.source(instruction.operands[1], "f4")
        return emitter.put(instruction.operands[0], "u4", f"f32_to_tf32({value}, {rounding == 'rna'})")
    return _scalar(emitter, instruction, to, source)


def _scalar(emitter: Emitter, instruction: Instruction, to: str, source: str) -> list[str]:
    destination, operand = instruction.operands
    parts, dtype, source_dtype = instruction.parts, DTYPES[to], DTYPES[source]
    whole = next((part for part in parts if part in _WHOLE), None)
    rounding = next((part for part in parts if part in ROUNDINGS), "rn")
    value = emitter.source(operand, source_dtype)
    if source == "bf16":
        value = f"bf16_to_f32({value})"
    if source == "f32" and "ftz" in parts:
        value = f"flush({value})"
    if to in _FLOATS:
        if whole and source in _FLOATS:
            value = f"np.{_WHOLE[whole]}({value})"
        if "sat" in parts:
            value = f"saturate({value})"
        if "relu" in parts:
            value = f"maximum({value}, 0.0)"
        if to == "bf16":
            if rounding != "rn" or source not in _FLOATS:
                raise emitter.unsupported()
            return emitter.put(destination, "u2", f"odd_f64_to_bf16(np.asarray({value}).astype('f8'))")
        if rounding != "rn" and not _exact(to, source):
            if to != "f32" or source in ("s64", "u64"):
                raise emitter.unsupported()
            value = f"directed_f32(np.asarray({value}).astype('f8'), 0.0, '{rounding}')"
        value = f"np.asarray({value}).astype('{dtype}')"
        if to == "f32" and "ftz" in parts:
            value = f"flush({value})"
        return emitter.put(destination, dtype, value)
    if source in _FLOATS:
        return emitter.put(destination, dtype, f"to_integer({value}, '{dtype}', '{whole or 'rzi'}')")
    if "sat" in parts:
        limits = np.iinfo(dtype)
        value = f"clamp({value}, {limits.min}, {limits.max})"
    return emitter.put(destination, dtype, f"np.asarray({value}).astype('{dtype}')")


def _exact(to: str, source: str) -> bool:
    """Whether every value of `source` is one of the float type `to`."""
    return source in _FLOATS and to in _FLOATS and SIZES[DTYPES[to]] >= SIZES[DTYPES[source]]


def _packed(emitter: Emitter, instruction: Instruction, to: str, source: str) -> list[str]:
    """Two narrow floats in one register: the first operand is the upper half."""
    parts, operands = instruction.parts, instruction.operands
    if any(rounding in parts for rounding in ("rz", "rm", "rp")):
        raise emitter.unsupported()
    if to in ("f16x2", "bf16x2") and source == "f32" and len(operands) == 3:
        halves = []
        for operand in operands[1:]:
            value = f"spread({emitter.source(operand, 'f4')})"
            if "relu" in parts:
                value = f"maximum({value}, np.float32(0))"
            halves.append(f"f32_to_bf16({value})" if to == "bf16x2" else f"{value}.astype('f2').view('u2')")
        high, low = halves
        return emitter.put(operands[0], "u4", f"({high}.astype('u4') << np.uint32(16)) | {low}")
    if to in ("e4m3x2", "e5m2x2") and source == "f32" and len(operands) == 3 and "satfinite" in parts:
        halves = []
        for operand in operands[1:]:
            value = f"spread({emitter.source(operand, 'f4')})"
            if "relu" in parts:
                value = f"maximum({value}, np.float32(0))"
            halves.append(f"f64_to_f8({value}, '{to}')")
        high, low = halves
        return emitter.put(operands[0], "u2", f"({high}.astype('u2') << np.uint16(8)) | {low}")
    if to in ("e4m3x2", "e5m2x2") and source == "f16x2" and len(operands) == 2 and "satfinite" in parts:
        value = f"{emitter.vector(operands[1], 'u4')}.view('f2')"
        if "relu" in parts:
            value = f"maximum({value}, np.float16(0))"
        return emitter.put(operands[0], "u2", f"f64_to_f8({value}, '{to}').view('u2')")
    if to == "f16x2" and source in ("e4m3x2", "e5m2x2") and len(operands) == 2:
        value = f"f8_to_f16({emitter.vector(operands[1], 'u2')}.view('u1'), '{source}')"
        if "relu" in parts:
            value = f"maximum({value}, np.float16(0)).astype('f2')"
        return emitter.put(operands[0], "u4", f"{value}.view('u4')")
    raise emitter.unsupported()


HANDLERS: dict[str, Handler] = {"cvt": _convert}
