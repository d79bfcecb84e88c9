"""The operands of one arithmetic instruction, as expressions with its modifiers applied."""

from __future__ import annotations

from collections.abc import Callable

from cuda_kernels.emulator.emitter import Emitter
from cuda_kernels.emulator.ptx import DTYPES, SIZES, Instruction

Handler = Callable[[Emitter, Instruction], list[str]]

ROUNDINGS = ("rn", "rz", "rm", "rp")
HALVES = ("f16", "f16x2", "bf16", "bf16x2")
_FLOATS = ("f32", "f64")


class Operands:
    """The operands of one arithmetic instruction, with its `.ftz` and `.sat` modifiers applied."""

    def __init__(self, emitter: Emitter, instruction: Instruction) -> None:
        self.emitter, self.instruction = emitter, instruction
        self.parts = instruction.parts
        self.type = emitter.operand_type()
        self.dtype = DTYPES[self.type]
        self.is_float = self.type in _FLOATS
        self.flushes = "ftz" in self.parts and self.dtype == "f4"
        self.rounding = next((part for part in self.parts if part in ROUNDINGS), "rn")

    def __call__(self, position: int, dtype: str | None = None) -> str:
        """The expression of an input operand."""
        dtype = dtype or self.dtype
        text = self.emitter.source(self.instruction.operands[position], dtype)
        return f"flush({text})" if self.flushes and dtype == "f4" else text

    def vector(self, position: int, dtype: str) -> str:
        """An input operand as a contiguous vector."""
        return self.emitter.vector(self.instruction.operands[position], dtype)

    def put(self, expression: str, dtype: str | None = None) -> list[str]:
        """Write a result with the modifiers applied."""
        dtype = dtype or self.dtype
        if self.flushes and dtype == "f4":
            expression = f"flush({expression})"
        if "sat" in self.parts and dtype[0] == "f":
            expression = f"saturate({expression})"
        return self.emitter.put(self.instruction.operands[0], dtype, expression)

    def apply(self, name: str, *positions: int) -> list[str]:
        """A numpy function of input operands."""
        arguments = [self(position) for position in positions]
        if self.flushes or "sat" in self.parts or not self.emitter_fits():
            return self.put(f"np.{name}({', '.join(arguments)})")
        return self.emitter.ufunc(name, self.instruction.operands[0], self.dtype, *arguments)

    def emitter_fits(self) -> bool:
        """Whether the destination is as wide as the type, so that a function may write straight into it."""
        register = self.emitter.registers.get(self.instruction.operands[0])
        return register is None or SIZES[register] == SIZES[self.dtype]
