"""Turns operands into numpy expressions: what the translation of every instruction is built from."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from cuda_kernels.emulator.errors import PtxError
from cuda_kernels.emulator.parser import split_operands
from cuda_kernels.emulator.ptx import DTYPES, SIZES, SPECIAL_REGISTERS, Array, Instruction

_ADDRESS = re.compile(r"(.+?)\s*\+\s*(-?\s*(?:0x[0-9a-fA-F]+|\d+))$")


class Emitter:
    """State of the translation of one kernel.

    registers: name -> numpy code. symbols: variable -> (state space, address). parameters: kernel parameter -> index.
    views: (register, numpy code) -> the name in the generated code. where, mask: the lane mask of the instruction at
    hand, as a ufunc argument and as an expression.
    """

    def __init__(
        self, registers: dict[str, str], symbols: dict[str, tuple[str, int]], parameters: dict[str, int]
    ) -> None:
        self.registers, self.symbols, self.parameters = registers, symbols, parameters
        self.views: dict[tuple[str, str], str] = {}
        self.constants: dict[str, np.generic] = {}
        self._constant_names: dict[tuple[str, bytes], str] = {}
        self._register_numbers: dict[str, int] = {}
        self.where, self.mask = "", "None"
        self.instruction = Instruction("")
        self.index = 0
        self.shared_granule = self.global_granule = 8

    # operands

    def register(self, name: str, dtype: str) -> str:
        """The vector of a register, seen as `dtype` (its low bytes where it is wider)."""
        if name not in self.registers:
            raise PtxError(f"unknown register or name {name}: {self.instruction.where()}")
        own = self.registers[name]
        if (own == "?") != (dtype == "?") or SIZES[dtype] > SIZES[own]:
            raise PtxError(f"the register {name} does not fit the type of: {self.instruction.where()}")
        if (name, dtype) not in self.views:
            number = self._register_numbers.setdefault(name, len(self._register_numbers))
            self.views[name, dtype] = f"r{number}_{dtype.replace('?', 'pred')}"
        return self.views[name, dtype]

    def constant(self, value: Any) -> str:
        """The name of a constant in the generated code."""
        key = (value.dtype.str, value.tobytes())
        if key not in self._constant_names:
            name = self._constant_names[key] = f"c{len(self.constants)}"
            self.constants[name] = value
        return self._constant_names[key]

    def source(self, text: str, dtype: str) -> str:
        """An input operand as an expression of `dtype`: a vector, or a numpy scalar."""
        if text.startswith("-") and text[1:].lstrip() in self.registers:
            return f"(-{self.source(text[1:].lstrip(), dtype)})"
        if text.startswith("!"):
            return f"(~{self.source(text[1:].lstrip(), dtype)})"
        if text in self.registers:
            return self.register(text, dtype)
        if text in SPECIAL_REGISTERS:
            return f"np.asarray(special[{text!r}]).astype({dtype!r})"
        name, offset = text, 0
        if match := _ADDRESS.match(text):
            name, offset = match[1], int(match[2].replace(" ", ""), 0)
        if name in self.symbols:
            space, position = self.symbols[name]
            address = self.constant(np.uint64(position + offset).astype(dtype))
            return f"(global_base + {address})" if space == "global" else address
        return self.constant(self.immediate(text, dtype))

    def vector(self, text: str, dtype: str) -> str:
        """An input operand as a contiguous vector over all lanes."""
        expression = self.source(text, dtype)
        if text in self.registers and SIZES[self.registers[text]] == SIZES[dtype]:
            return expression
        return f"spread({expression})"

    def immediate(self, text: str, dtype: str) -> Any:
        """A literal as a numpy scalar of `dtype` (PTX ISA, "Constants")."""
        try:
            return immediate(text, dtype)
        except (ValueError, OverflowError) as error:
            raise PtxError(f"unknown register or name {text!r}: {self.instruction.where()}") from error

    def literal(self, text: str) -> int:
        """An operand that must be an integer literal."""
        try:
            return int(text.rstrip("U"), 0)
        except ValueError as error:
            raise PtxError(f"{text!r} must be a number: {self.instruction.where()}") from error

    def address(self, text: str) -> tuple[str, int]:
        """`[register + offset]` or `[variable + offset]` as (expression, offset)."""
        text = text.strip()
        if not (text.startswith("[") and text.endswith("]")):
            raise PtxError(f"{text!r} is no address: {self.instruction.where()}")
        base, offset = text[1:-1].strip(), 0
        if match := _ADDRESS.match(base):
            base, offset = match[1].strip(), int(match[2].replace(" ", ""), 0)
        if base in self.registers:
            size = SIZES[self.registers[base]]
            if size < 4:
                raise PtxError(f"the register {base} is too narrow for an address: {self.instruction.where()}")
            return self.register(base, f"u{size}"), offset
        if base in self.symbols:
            space, position = self.symbols[base]
            return ("global_base", position + offset) if space == "global" else (str(position), offset)
        return str(self.literal(base)), offset

    @staticmethod
    def elements(text: str) -> list[str]:
        """`{a, b}` or `a` as a list."""
        return split_operands(text[1:-1]) if text.startswith("{") and text.endswith("}") else [text]

    def operand_type(self, *allowed: str) -> str:
        """The PTX type of the instruction: its last one. Raises PtxError where there is none (or none allowed)."""
        types = [part for part in self.instruction.parts[1:] if part in DTYPES]
        if not types or (allowed and types[-1] not in allowed):
            raise self.unsupported()
        return types[-1]

    def unsupported(self) -> PtxError:
        """The error for an instruction, or a form of one, that the emulator does not know."""
        return PtxError(f"unsupported instruction: {self.instruction.where()}")

    # results

    def put(self, destination: str, dtype: str, expression: str) -> list[str]:
        """Write an expression of `dtype` to a register, sign- or zero-extended where the register is wider."""
        if destination == "_":
            return []
        if destination not in self.registers:
            raise PtxError(f"unknown register {destination}: {self.instruction.where()}")
        size = SIZES[self.registers[destination]]
        if dtype != "?" and size > SIZES[dtype]:
            dtype = f"{'i' if dtype[0] == 'i' else 'u'}{size}" if dtype[0] != "f" else dtype
        return [f"np.copyto({self.register(destination, dtype)}, {expression}, casting='unsafe'{self.where})"]

    def ufunc(self, name: str, destination: str, dtype: str, *arguments: str) -> list[str]:
        """Apply a numpy function straight into a register."""
        if destination == "_":
            return []
        return [f"np.{name}({', '.join(arguments)}, out={self.register(destination, dtype)}{self.where})"]


def immediate(text: str, dtype: str) -> Any:
    """A literal of PTX as a numpy scalar. Raises ValueError for anything else."""
    scalar = np.dtype(dtype).type
    bits: Array | None = None
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        bits = np.array(int(text[2:], 16), "u4")
    elif re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        bits = np.array(int(text[2:], 16), "u8")
    if bits is not None:
        if dtype[0] == "f":
            return bits.view(f"f{bits.itemsize}").astype(dtype)[()]
        return bits.astype(f"u{SIZES[dtype]}").view(dtype)[()]
    if dtype == "?":
        return np.bool_(int(text, 0))
    if dtype == "f2" and re.match(r"0[xX][0-9a-fA-F]+$|-?\d+$", text):
        return np.array(int(text, 0) & 0xFFFF, "u2").view("f2")[()]
    if dtype[0] == "f":
        return scalar(float(text))
    digits = re.sub(r"U$", "", text)
    octal = re.match(r"(-?)0([0-7]+)$", digits)
    number = int(octal[1] + octal[2], 8) if octal else int(digits, 0)
    width = 8 * SIZES[dtype]
    if not -(1 << 64) < number < 1 << 64:
        raise ValueError("a literal of more than 64 bits")
    return np.array(number & ((1 << width) - 1), f"u{SIZES[dtype]}").view(dtype)[()]
