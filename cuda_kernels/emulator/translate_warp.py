"""Instructions of a whole warp or block. They run when every lane that they name has arrived."""

from __future__ import annotations

import re

from cuda_kernels.emulator.emitter import Emitter
from cuda_kernels.emulator.operands import Handler
from cuda_kernels.emulator.ptx import DTYPES, Instruction

# shape, input type -> registers of A, B and C (PTX ISA, "Matrix Fragments for mma").
MMA_REGISTERS = {
    ("m16n8k8", "f16"): (2, 1),
    ("m16n8k16", "f16"): (4, 2),
    ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k16", "bf16"): (4, 2),
    ("m16n8k4", "tf32"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2),
    ("m16n8k16", "s8"): (2, 1),
    ("m16n8k32", "s8"): (4, 2),
}
_MMA_TYPES = ("f16", "bf16", "tf32", "f32", "s32", "s8", "u8")


def member_mask(instruction: Instruction) -> str | None:
    """The operand that names the lanes of a warp-wide instruction; "" for a whole warp, None for whoever is there."""
    parts = instruction.parts
    if instruction.base in ("bar", "barrier"):
        return instruction.operands[0]
    if instruction.base in ("mma", "ldmatrix"):
        return ""
    return instruction.operands[-1] if "sync" in parts else None


def is_block_barrier(instruction: Instruction) -> bool:
    """Whether a block waits, and not just a warp."""
    return instruction.base in ("bar", "barrier") and "warp" not in instruction.parts


def _barrier(emitter: Emitter, instruction: Instruction) -> list[str]:
    """bar.sync, barrier.sync and bar.warp.sync need nothing done; bar.red combines a predicate over the block."""
    parts = instruction.parts
    if "warp" in parts or "sync" in parts:
        return []
    operation = next((part for part in parts if part in ("popc", "and", "or")), None)
    if "red" not in parts or operation is None or len(instruction.operands) < 3:
        raise emitter.unsupported()
    destination, predicate = instruction.operands[0], instruction.operands[-1]
    lines = [f"result = block_reduce('{operation}', {emitter.source(predicate, '?')}, m)"]
    return lines + emitter.put(destination, "u4" if operation == "popc" else "?", "result")


def _shuffle(emitter: Emitter, instruction: Instruction) -> list[str]:
    parts, operands = instruction.parts, instruction.operands
    mode = next((part for part in parts if part in ("idx", "up", "down", "bfly")), None)
    if mode is None or "sync" not in parts or len(operands) != 5:
        raise emitter.unsupported()
    destinations = [name.strip() for name in operands[0].split("|")]
    value, lane, clamp = (emitter.source(operand, "u4") for operand in operands[1:4])
    lines = [f"value, inside = shuffle({emitter.index}, '{mode}', {value}, {lane}, {clamp}, m)"]
    lines += emitter.put(destinations[0], "u4", "value")
    return lines + (emitter.put(destinations[1], "?", "inside") if len(destinations) > 1 else [])


def _vote(emitter: Emitter, instruction: Instruction) -> list[str]:
    mode = next((part for part in instruction.parts if part in ("all", "any", "uni", "ballot")), None)
    if mode is None or "sync" not in instruction.parts:
        raise emitter.unsupported()
    predicate = emitter.source(instruction.operands[1], "?")
    lines = [f"result = vote('{mode}', {predicate}, m)"]
    return lines + emitter.put(instruction.operands[0], "u4" if mode == "ballot" else "?", "result")


def _active_mask(emitter: Emitter, instruction: Instruction) -> list[str]:
    return emitter.put(instruction.operands[0], "u4", "vote('ballot', np.True_, m)")


def _elect(emitter: Emitter, instruction: Instruction) -> list[str]:
    destinations = [name.strip() for name in instruction.operands[0].split("|")]
    if len(destinations) != 2:
        raise emitter.unsupported()
    lines = ["leader, elected = elect(m)"]
    return lines + emitter.put(destinations[0], "u4", "leader") + emitter.put(destinations[1], "?", "elected")


def _reduce(emitter: Emitter, instruction: Instruction) -> list[str]:
    operation = next((p for p in instruction.parts if p in ("add", "min", "max", "and", "or", "xor")), None)
    kind = emitter.operand_type("u32", "s32", "b32")
    if operation is None:
        raise emitter.unsupported()
    dtype = DTYPES[kind]
    lines = [f"result = reduce('{operation}', {emitter.source(instruction.operands[1], dtype)}, m)"]
    return lines + emitter.put(instruction.operands[0], dtype, "result")


def _match(emitter: Emitter, instruction: Instruction) -> list[str]:
    dtype = DTYPES[emitter.operand_type("b32", "b64")]
    mode = next((part for part in instruction.parts if part in ("all", "any")), None)
    if mode is None:
        raise emitter.unsupported()
    destinations = [name.strip() for name in instruction.operands[0].split("|")]
    lines = [f"value, agree = match('{mode}', {emitter.source(instruction.operands[1], dtype)}, m)"]
    lines += emitter.put(destinations[0], "u4", "value")
    return lines + (emitter.put(destinations[1], "?", "agree") if len(destinations) > 1 else [])


def _load_matrix(emitter: Emitter, instruction: Instruction) -> list[str]:
    parts = instruction.parts
    count = next((int(part[1]) for part in parts if part in ("x1", "x2", "x4")), 0)
    destinations = emitter.elements(instruction.operands[0])
    shared = any(part.split("::")[0] == "shared" for part in parts)
    if len(destinations) != count or "m8n8" not in parts or "b16" not in parts or not shared:
        raise emitter.unsupported()
    address, offset = emitter.address(instruction.operands[1])
    emitter.shared_granule = min(emitter.shared_granule, 4)
    lines = [f"loaded = load_matrix({emitter.index}, {address}, {offset}, {count}, {'trans' in parts}, m)"]
    for index, destination in enumerate(destinations):
        lines += emitter.put(destination, "u4", f"loaded[{index}]")
    return lines


def _multiply_matrix(emitter: Emitter, instruction: Instruction) -> list[str]:
    parts = instruction.parts
    shape = next((part for part in parts if re.match(r"m\d+n\d+k\d+$", part)), "")
    kinds = [part for part in parts if part in _MMA_TYPES]
    if len(kinds) != 4 or parts[4:6] != ["row", "col"] or "satfinite" in parts:
        raise emitter.unsupported()
    result, kind_a, kind_b, addend = kinds
    key = (shape, "s8" if kind_a in ("s8", "u8") else kind_a)
    integer = key[1] == "s8"
    fits = result == addend and (result == "s32" if integer else result in ("f32", "f16"))
    if key not in MMA_REGISTERS or not fits or (kind_a != kind_b and not (integer and kind_b in ("s8", "u8"))):
        raise emitter.unsupported()
    if result == "f16" and kind_a != "f16":
        raise emitter.unsupported()
    d, a, b, c = (emitter.elements(operand) for operand in instruction.operands)
    registers = 2 if result == "f16" else 4
    if (len(a), len(b)) != MMA_REGISTERS[key] or len(c) != registers or len(d) != registers:
        raise emitter.unsupported()
    dtype = {"f32": "f4", "s32": "i4", "f16": "u4"}[result]
    values = [
        ", ".join(emitter.source(name, kind) for name in names) for names, kind in ((a, "u4"), (b, "u4"), (c, dtype))
    ]
    fragments = ", ".join(f"({value},)" for value in values)
    lines = [f"loaded = multiply_matrix('{kind_a}', '{kind_b}', '{result}', {fragments})"]
    for index, destination in enumerate(d):
        lines += emitter.put(destination, dtype, f"loaded[{index}]")
    return lines


HANDLERS: dict[str, Handler] = {
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _active_mask,
    "elect": _elect,
    "redux": _reduce,
    "match": _match,
    "ldmatrix": _load_matrix,
    "mma": _multiply_matrix,
}
