"""What a kernel became: registers and memory from ptxas's report, instructions and the main loop from nvdisasm's text.

SASS, the machine code of NVIDIA GPUs, is documented only as a list of opcodes (CUDA Binary Utilities, "Instruction Set
Reference"). Control flow is read from branches (BRA), convergence barriers (BSSY names where BSYNC goes on) and exits.
BRA.DIV is taken only by a warp whose lanes went apart before a shuffle: what it leads to counts as no part of a loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_kernels.compile import assemble, find_tool
from cuda_kernels.errors import KernelCompileError

__all__ = ["CodeStatistics", "Instruction", "Loop", "disassemble", "measure", "parse_sass", "statistics"]

_FUNCTION = re.compile(r"^\.text\.([\w$.]+):$")
_LABEL = re.compile(r"^([.$\w]+):$")
_INSTRUCTION = re.compile(r"^/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\(([^)]+)\)")
_BARRIER = re.compile(r"\bB\d+\b")

_F64 = frozenset({"DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA"})
_MEMORY = frozenset({"LDG", "STG", "LDS", "STS", "LD", "ST", "LDL", "STL", "LDGSTS", "LDC", "ATOMG", "ATOMS", "RED"})
_TENSOR = ("HMMA", "IMMA", "QMMA")
_WEIGHTS = (
    _TENSOR,
    ("FFMA", "HFMA2"),
    ("LDG", "LDGSTS"),
)  # what makes a loop the main one; the first kind found counts


@dataclass(frozen=True)
class Instruction:
    """One instruction, or what of it matters here.

    Attributes:
        opcode: with its modifiers: "LDG.E.128.CONSTANT".
        operands: the text after it.
        predicated: whether it may be skipped.
        labels: what stands before it.
    """

    opcode: str
    operands: str = ""
    predicated: bool = False
    labels: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_f64(self) -> bool:
        return self.base in _F64 or ".F64" in self.opcode

    @property
    def name(self) -> str:
        """The opcode as it is counted: of its modifiers, only a memory access's width is kept: "LDG.128"."""
        if self.base not in _MEMORY:
            return self.base
        width = re.search(r"\.(?:[US](8|16)|(64|128))(?=\.|$)", self.opcode)
        return f"{self.base}.{(width.group(1) or width.group(2)) if width else 32}"


@dataclass(frozen=True)
class Loop:
    """A loop's instructions, by name."""

    opcodes: Mapping[str, int]

    @property
    def num_instructions(self) -> int:
        return sum(self.opcodes.values())


@dataclass(frozen=True)
class CodeStatistics:
    """One kernel's machine code.

    Attributes:
        registers: of a thread.
        shared_nbytes: static shared memory of a block.
        stack_nbytes, spill_store_nbytes, spill_load_nbytes: local memory of a thread.
        opcodes: how many instructions of each name.
        f64_instructions, local_instructions: on doubles; loads and stores in local memory.
        main_loop: the innermost loop with the most tensor-core instructions; of those with none, the most FFMA, or
            else the most global loads.
    """

    registers: int
    shared_nbytes: int
    stack_nbytes: int
    spill_store_nbytes: int
    spill_load_nbytes: int
    opcodes: Mapping[str, int]
    f64_instructions: int
    local_instructions: int
    main_loop: Loop | None

    @property
    def num_instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def spill_nbytes(self) -> int:
        return self.spill_store_nbytes + self.spill_load_nbytes


def measure(ptx: str, name: str, architecture: str) -> CodeStatistics:
    """The statistics of entry `name` of a PTX text. Raises KernelCompileError, ToolMissingError."""
    code, log = assemble(ptx, architecture)
    return statistics(name, log, disassemble(code))


def disassemble(code: bytes) -> str:
    """nvdisasm's text of a cubin. Raises KernelCompileError, ToolMissingError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        done = subprocess.run([str(find_tool("nvdisasm")), "-c", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise KernelCompileError(f"nvdisasm: {' '.join(done.stderr.split())[:400]}")
    return done.stdout


def statistics(name: str, log: str, sass: str) -> CodeStatistics:
    """Statistics of entry `name` from the report of `ptxas -v` and the text of `nvdisasm -c`.

    Raises KernelCompileError where either does not speak of it.
    """
    part = re.search(rf"Function properties for {re.escape(name)}\n(.*?)(?=Function properties|\Z)", log, re.DOTALL)
    found = part and re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part[1])
    registers = part and re.search(r"Used (\d+) registers", part[1])
    if part is None or not found or not registers:
        raise KernelCompileError(f"ptxas reports nothing of {name}")
    shared = re.search(r"(\d+) bytes smem", part[1])
    code = parse_sass(sass, name)
    names = Counter(instruction.name for instruction in code)
    return CodeStatistics(
        registers=int(registers[1]),
        shared_nbytes=int(shared[1]) if shared else 0,
        stack_nbytes=int(found[1]),
        spill_store_nbytes=int(found[2]),
        spill_load_nbytes=int(found[3]),
        opcodes=dict(names.most_common()),
        f64_instructions=sum(instruction.is_f64 for instruction in code),
        local_instructions=sum(instruction.base in ("LDL", "STL") for instruction in code),
        main_loop=_main_loop(code),
    )


def parse_sass(text: str, name: str) -> list[Instruction]:
    """The instructions of kernel `name`, its subroutines (division, for one) included. Raises KernelCompileError."""
    code: list[Instruction] = []
    labels: list[str] = []
    inside = False
    for line in map(str.strip, text.splitlines()):
        if function := _FUNCTION.match(line):
            inside = function[1] == name
        elif line.startswith("//---"):
            inside = False
        elif not inside:
            continue
        elif label := _LABEL.match(line):
            labels.append(label[1])
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction(found[3], found[4].strip(), found[2] is not None, tuple(labels)))
            labels = []
    if not code:
        raise KernelCompileError(f"the machine code has no kernel {name}")
    return code


# ---- loops


def _main_loop(code: Sequence[Instruction]) -> Loop | None:
    bodies = _natural_loops(code)
    for kind in _WEIGHTS:
        weight = {body: sum(code[i].base in kind for i in body) for body in bodies}
        heavy = [body for body in bodies if weight[body]]
        innermost = [body for body in heavy if not any(other < body for other in heavy)]
        if innermost:
            best = max(innermost, key=lambda body: (weight[body], -min(body)))
            return Loop(dict(Counter(code[i].name for i in sorted(best)).most_common()))
    return None


def _natural_loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The instructions of each loop: what reaches a backward branch without passing the loop's head.

    Loops of one head are one loop. Blocks that the assembler moved out of the way are found too, and a loop of one
    instruction, the trap after the end, is none.
    """
    successors = _successors(code)
    reached, todo = {0}, [0]
    while todo:
        fresh = set(successors[todo.pop()]) - reached
        reached |= fresh
        todo += fresh
    predecessors: list[list[int]] = [[] for _ in code]
    for i in sorted(reached):
        for j in successors[i]:
            predecessors[j].append(i)
    bodies: dict[int, set[int]] = {}
    for i in sorted(reached):
        for head in successors[i]:
            if head < i and code[i].base != "BSYNC":
                body = bodies.setdefault(head, {head})
                todo = [i]
                while todo:
                    j = todo.pop()
                    if j not in body:
                        body.add(j)
                        todo += predecessors[j]
    # A block moved out of the way jumps backward too, to a place that does not dominate it: no loop.
    return [frozenset(body) for head, body in bodies.items() if _is_entered_by(head, body, predecessors)]


def _is_entered_by(head: int, body: set[int], predecessors: Sequence[Sequence[int]]) -> bool:
    """Whether a loop is entered through its head alone: of the others, each comes after one of the loop."""
    return all(predecessors[i] and body.issuperset(predecessors[i]) for i in body if i != head)


def _successors(code: Sequence[Instruction]) -> list[list[int]]:
    at = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    reconvergence: dict[str, list[int]] = {}
    for instruction in code:
        if instruction.base == "BSSY":
            for barrier in _BARRIER.findall(instruction.operands)[:1]:
                reconvergence.setdefault(barrier, []).extend(_targets(instruction, at))

    def following(i: int) -> Iterator[int]:
        instruction = code[i]
        jumps = instruction.base in ("BRA", "BRX", "JMP", "EXIT", "RET", "BSYNC")
        conditional = instruction.predicated or _has_condition(instruction)
        if instruction.base in ("BRA", "JMP") and ".DIV" not in instruction.opcode:
            yield from _targets(instruction, at)
        if (
            instruction.base == "BSYNC"
        ):  # goes on where the BSSY of its barrier said: behind it in the text, if not next
            ahead = [j for j in reconvergence.get(instruction.operands, []) if j > i]
            yield from [min(ahead)] if ahead else [i + 1]
        if (not jumps or (conditional and instruction.base != "BSYNC")) and i + 1 < len(code):
            yield i + 1

    return [sorted(set(following(i))) for i in range(len(code))]


def _has_condition(instruction: Instruction) -> bool:
    """BRA takes further conditions as operands: "BRA !P2, `(.L_x_8)`", "BRA.DIV UR4, `(.L_x_3)`"."""
    return instruction.base == "BRA" and not instruction.operands.startswith("`")


def _targets(instruction: Instruction, at: Mapping[str, int]) -> list[int]:
    return [at[label] for label in _TARGET.findall(instruction.operands) if label in at]
