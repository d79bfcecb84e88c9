"""Loads, stores, atomics, cp.async and address instructions: calls of the launch's memory unit."""

from __future__ import annotations

import re

import numpy as np

from cuda_kernels.emulator.emitter import Emitter
from cuda_kernels.emulator.operands import Handler
from cuda_kernels.emulator.ptx import DTYPES, LOCAL_WINDOW, SHARED_WINDOW, SIZES, Instruction

_PARAMETER = re.compile(r"\[\s*([\w$%]+)\s*(?:\+\s*(\d+)\s*)?\]$")
_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0, "param": 0}
ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _space(emitter: Emitter, instruction: Instruction) -> str:
    """The state space of an access; also notes its width, the granule of the race checks."""
    spaces = [part.split("::")[0] for part in instruction.parts]
    return next((space for space in spaces if space in ("global", "shared", "local", "const", "param")), "generic")


def _note_width(emitter: Emitter, space: str, width: int) -> None:
    if space in ("shared", "generic"):
        emitter.shared_granule = min(emitter.shared_granule, width)
    if space in ("global", "generic"):
        emitter.global_granule = min(emitter.global_granule, width)


def _parameter(emitter: Emitter, text: str) -> tuple[str, int]:
    match = _PARAMETER.match(text.strip())
    if not match:
        raise emitter.unsupported()
    return match[1], int(match[2] or 0)


def _slot(emitter: Emitter, name: str, offset: int) -> str:
    """The pseudo register that stands for a parameter of an inlined call."""
    slot = f"[{name}+{offset}]"
    emitter.registers.setdefault(slot, "u8")
    return slot


def _load(emitter: Emitter, instruction: Instruction) -> list[str]:
    dtype, space = DTYPES[emitter.operand_type()], _space(emitter, instruction)
    destinations = emitter.elements(instruction.operands[0])
    lines: list[str] = []
    if space == "param":
        name, offset = _parameter(emitter, instruction.operands[1])
        for index, destination in enumerate(destinations):
            at = offset + index * SIZES[dtype]
            if name in emitter.parameters:
                lines += emitter.put(destination, dtype, f"parameter({emitter.parameters[name]}, {at}, '{dtype}')")
            else:
                lines += emitter.put(destination, dtype, emitter.register(_slot(emitter, name, at), dtype))
        return lines
    _check_width(emitter, instruction, dtype, len(destinations))
    address, offset = emitter.address(instruction.operands[1])
    _note_width(emitter, space, SIZES[dtype])
    where = f"{emitter.index}, '{space}', {address}, {offset}"
    lines = [f"loaded = load({where}, '{dtype}', {len(destinations)}, {emitter.mask})"]
    for index, destination in enumerate(destinations):
        lines += emitter.put(destination, dtype, f"loaded[{index}]")
    return lines


def _check_width(emitter: Emitter, instruction: Instruction, dtype: str, count: int) -> None:
    declared = next((int(part[1:]) for part in instruction.parts if part in ("v2", "v4", "v8")), 1)
    if count != declared or SIZES[dtype] * count > 16 or dtype == "?":
        raise emitter.unsupported()


def _store(emitter: Emitter, instruction: Instruction) -> list[str]:
    dtype, space = DTYPES[emitter.operand_type()], _space(emitter, instruction)
    sources = emitter.elements(instruction.operands[1])
    if space == "param":
        name, offset = _parameter(emitter, instruction.operands[0])
        lines = []
        for index, source in enumerate(sources):
            slot = emitter.register(_slot(emitter, name, offset + index * SIZES[dtype]), dtype)
            lines.append(f"np.copyto({slot}, {emitter.source(source, dtype)}, casting='unsafe'{emitter.where})")
        return lines
    _check_width(emitter, instruction, dtype, len(sources))
    address, offset = emitter.address(instruction.operands[0])
    _note_width(emitter, space, SIZES[dtype])
    values = ", ".join(emitter.source(source, dtype) for source in sources)
    return [f"store({emitter.index}, '{space}', {address}, {offset}, '{dtype}', ({values},), {emitter.mask})"]


def _atomic(emitter: Emitter, instruction: Instruction) -> list[str]:
    kind, space = emitter.operand_type(), _space(emitter, instruction)
    dtype, operands = DTYPES[kind], list(instruction.operands)
    operation = next((part for part in instruction.parts[1:] if part in ATOMICS), None)
    destination = operands.pop(0) if instruction.base == "atom" else "_"
    if operation is None or "vec" in instruction.opcode or re.search(r"\.v\d", instruction.opcode):
        raise emitter.unsupported()
    if len(operands) != (3 if operation == "cas" else 2):
        raise emitter.unsupported()
    address, offset = emitter.address(operands[0])
    _note_width(emitter, space, SIZES[dtype])
    values = ", ".join(emitter.vector(operand, dtype) for operand in operands[1:])
    returns = destination != "_"
    where = f"{emitter.index}, '{space}', {address}, {offset}, '{dtype}'"
    lines = [f"loaded = atomic({where}, '{kind}', '{operation}', ({values},), {emitter.mask}, {returns})"]
    return lines + emitter.put(destination, dtype, "loaded")


def _copy_async(emitter: Emitter, instruction: Instruction) -> list[str]:
    """cp.async.{ca,cg}.shared.global with src-size or ignore-src; commit_group, wait_group, wait_all."""
    parts, operands = instruction.parts, instruction.operands
    if parts[1:2] != ["async"]:
        raise emitter.unsupported()
    if parts[2:] == ["wait_all"]:
        return [f"async_wait({emitter.index}, 0, {emitter.mask}, True)"]
    if parts[2:] == ["wait_group"]:
        return [f"async_wait({emitter.index}, {emitter.literal(operands[0])}, {emitter.mask}, False)"]
    if parts[2:] == ["commit_group"]:
        return [f"async_commit({emitter.mask})"]
    if parts[2] not in ("ca", "cg") or parts[3].split("::")[0] != "shared" or parts[4] != "global":
        raise emitter.unsupported()
    to, to_offset = emitter.address(operands[0])
    source, source_offset = emitter.address(operands[1])
    nbytes = emitter.literal(operands[2])
    if nbytes not in ((16,) if parts[2] == "cg" else (4, 8, 16)):
        raise emitter.unsupported()
    emitter.shared_granule = min(emitter.shared_granule, 4)
    emitter.global_granule = min(emitter.global_granule, 4)
    size = "None"
    if len(operands) > 3:
        size = _source_size(emitter, operands[3], nbytes)
    where = f"{to}, {to_offset}, {source}, {source_offset}"
    return [f"async_copy({emitter.index}, {where}, {nbytes}, {size}, {emitter.mask})"]


def _source_size(emitter: Emitter, operand: str, nbytes: int) -> str:
    """Bytes that cp.async reads (the rest is zero-filled), from a src-size or an ignore-src predicate."""
    if emitter.registers.get(operand.lstrip("!").strip()) == "?":
        zero, full = (emitter.constant(np.uint32(size)) for size in (0, nbytes))
        return f"np.where({emitter.source(operand, '?')}, {zero}, {full})"
    if operand in emitter.registers or re.match(r"\d", operand):
        return emitter.source(operand, "u4")
    return "None"


def _to_address(emitter: Emitter, instruction: Instruction) -> list[str]:
    """cvta: between generic addresses and those of a state space."""
    dtype, space = DTYPES[emitter.operand_type()], _space(emitter, instruction)
    value = emitter.source(instruction.operands[1], dtype)
    window = _WINDOWS.get(space)
    if window is None or dtype != "u8":
        raise emitter.unsupported()
    if window:
        value = f"{value} {'-' if 'to' in instruction.parts else '+'} {emitter.constant(np.uint64(window))}"
    return emitter.put(instruction.operands[0], dtype, value)


def _is_space(emitter: Emitter, instruction: Instruction) -> list[str]:
    value, space = emitter.source(instruction.operands[1], "u8"), _space(emitter, instruction)
    tests = {
        "shared": f"(({value} >= {SHARED_WINDOW}) & ({value} < {LOCAL_WINDOW}))",
        "local": f"({value} >= {LOCAL_WINDOW})",
        "global": f"({value} < {SHARED_WINDOW})",
    }
    if space not in tests:
        raise emitter.unsupported()
    return emitter.put(instruction.operands[0], "?", tests[space])


def _nothing(emitter: Emitter, instruction: Instruction) -> list[str]:
    """Fences and hints: every access of the emulator is visible to everybody at once."""
    return []


_HINTS = frozenset(
    ["membar", "fence", "prefetch", "prefetchu", "nanosleep", "discard", "applypriority", "pmevent", "createpolicy"]
)

HANDLERS: dict[str, Handler] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp": _copy_async,
    "cvta": _to_address,
    "isspacep": _is_space,
}
HANDLERS.update(dict.fromkeys(_HINTS, _nothing))
