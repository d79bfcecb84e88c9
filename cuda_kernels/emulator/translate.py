"""One kernel to Python source: a function for every basic block, in which each instruction is a numpy call.

Registers are vectors over the threads of a batch of blocks. `block7(m)` runs block 7 for the lanes of the mask m,
`block7_all(m)` for all lanes and without masks; either returns where the lanes go: a block number (EXIT at the end),
or a list of (lanes, block number). A warp- or block-wide instruction is a basic block of its own, `collective7(m)`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import CodeType

from cuda_kernels.emulator import (
    translate_arithmetic,
    translate_convert,
    translate_logic,
    translate_memory,
    translate_warp,
)
from cuda_kernels.emulator.emitter import Emitter
from cuda_kernels.emulator.errors import PtxError
from cuda_kernels.emulator.ptx import COLLECTIVE, TERMINATORS, Function, Instruction, Label, normalised_opcode

EXIT = -1
_HANDLERS = {
    **translate_arithmetic.HANDLERS,
    **translate_logic.HANDLERS,
    **translate_convert.HANDLERS,
    **translate_memory.HANDLERS,
    **translate_warp.HANDLERS,
}


@dataclass(frozen=True)
class Block:
    """A basic block. collective: its only instruction, when lanes wait for one another at it."""

    instructions: tuple[Instruction, ...]
    collective: Instruction | None
    first: int
    opcodes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Translation:
    """The generated code and what it refers to.

    instructions: in order; the generated code names them by index. masks: collective block -> the name of its member
    mask's register in the generated code, or the mask itself, or None for whoever is there.
    """

    source: str
    code: CodeType
    blocks: list[Block]
    instructions: list[Instruction]
    emitter: Emitter
    masks: dict[int, str | int | None]


def split_blocks(code: list[Instruction | Label]) -> tuple[list[list[Instruction]], dict[str, int]]:
    """Basic blocks, and the block of every label. The last block is an exit."""
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for item in code:
        if isinstance(item, Label):
            if blocks[-1]:
                blocks.append([])
            labels[item.name] = len(blocks) - 1
        elif item.base in COLLECTIVE:
            if blocks[-1]:
                blocks.append([])
            blocks[-1].append(item)
            blocks.append([])
        else:
            blocks[-1].append(item)
            if item.base in TERMINATORS:
                blocks.append([])
    blocks.append([Instruction("ret", text="ret")])
    return blocks, labels


def translate(function: Function, emitter: Emitter) -> Translation:
    """Translate a kernel without calls. Raises PtxError for what the emulator does not know."""
    return _Translator(function, emitter).run()


class _Translator:
    def __init__(self, function: Function, emitter: Emitter) -> None:
        self.function, self.emitter = function, emitter
        self.code_blocks, self.labels = split_blocks(function.code)
        self.instructions: list[Instruction] = []

    def run(self) -> Translation:
        chunks, blocks = [], []
        masks: dict[int, str | int | None] = {}
        for number, block in enumerate(self.code_blocks):
            first = len(self.instructions)
            self.instructions += block
            collective = block[0] if block and block[0].base in COLLECTIVE else None
            if collective is not None:
                chunks.append(self.collective(collective, number, first))
                masks[number] = self.member_mask(collective)
            else:
                chunks += [self.block(block, number, first, masked) for masked in (False, True)]
            opcodes = Counter(normalised_opcode(instruction.opcode) for instruction in block)
            blocks.append(Block(tuple(block), collective, first, opcodes))
        source = "\n".join(chunks)
        code = compile(source, f"<ptx {self.function.name[:40]}>", "exec")
        return Translation(source, code, blocks, self.instructions, self.emitter, masks)

    def member_mask(self, instruction: Instruction) -> str | int | None:
        if translate_warp.is_block_barrier(instruction):
            return None
        operand = translate_warp.member_mask(instruction)
        if operand is None or operand == "":
            return None if operand is None else 0xFFFFFFFF
        if operand in self.emitter.registers:
            return self.emitter.register(operand, "u4")
        return self.emitter.literal(operand) & 0xFFFFFFFF

    def lines(self, instruction: Instruction, index: int) -> list[str]:
        """The code of one instruction, its predicate aside."""
        self.emitter.instruction, self.emitter.index = instruction, index
        handler = _HANDLERS.get(instruction.base)
        if handler is None:
            raise self.emitter.unsupported()
        try:
            return handler(self.emitter, instruction)
        except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise PtxError(f"malformed instruction: {instruction.where()}") from error

    def predicate(self, instruction: Instruction) -> str:
        if instruction.predicate is None:
            return ""
        self.emitter.instruction = instruction
        name = self.emitter.register(instruction.predicate, "?")
        return f"~{name}" if instruction.negated else name

    def block(self, block: list[Instruction], number: int, first: int, masked: bool) -> str:
        body: list[str] = []
        ended = False
        for index, instruction in enumerate(block, first):
            if instruction.base in TERMINATORS:
                body += self.terminator(instruction, index, number)
                ended = True
                break
            predicate = self.predicate(instruction)
            self.emitter.where = ", where=p" if predicate else ", where=m" if masked else ""
            self.emitter.mask = "p" if predicate else "m" if masked else "None"
            lines = self.lines(instruction, index)
            if predicate and lines:
                body += [f"p = {predicate} & m" if masked else f"p = {predicate}", "if p.any():"]
                body += ["    " + line for line in lines]
            else:
                body += lines
        if not ended:
            body.append(f"return {number + 1}")
        name = f"block{number}" if masked else f"block{number}_all"
        return f"def {name}(m):\n" + "".join(f"    {line}\n" for line in body)

    def collective(self, instruction: Instruction, number: int, index: int) -> str:
        if instruction.predicate is not None:
            raise PtxError(f"a predicated warp- or block-wide instruction is not supported: {instruction.where()}")
        self.emitter.where, self.emitter.mask = ", where=m", "m"
        body = self.lines(instruction, index) or ["pass"]
        return f"def collective{number}(m):\n" + "".join(f"    {line}\n" for line in body)

    def terminator(self, instruction: Instruction, index: int, number: int) -> list[str]:
        self.emitter.instruction, self.emitter.index = instruction, index
        base, predicate = instruction.base, self.predicate(instruction)
        if base == "brx":
            return self.jump_table(instruction, predicate)
        if base == "trap":
            if predicate:
                return [
                    f"trap({index}, m & {predicate})",
                    f"return [({predicate}, {EXIT}), (~{predicate}, {number + 1})]",
                ]
            return [f"trap({index}, m)", f"return {EXIT}"]
        target = EXIT
        if base == "bra":
            target = self.target(instruction.operands[0] if instruction.operands else "")
        if not predicate:
            return [f"return {target}"]
        return [f"p = {predicate}", f"return [(p, {target}), (~p, {number + 1})]"]

    def target(self, label: str) -> int:
        if label not in self.labels:
            raise PtxError(f"a branch to the unknown label {label!r}: {self.emitter.instruction.where()}")
        return self.labels[label]

    def jump_table(self, instruction: Instruction, predicate: str) -> list[str]:
        """brx.idx index, table."""
        if predicate or len(instruction.operands) != 2 or instruction.operands[1] not in self.function.tables:
            raise self.emitter.unsupported()
        index = self.emitter.source(instruction.operands[0], "u4")
        labels = self.function.tables[instruction.operands[1]]
        ways = ", ".join(f"({index} == {way}, {self.target(label)})" for way, label in enumerate(labels))
        return [f"return [{ways}]"]
