"""What a launch found and what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cuda_kernels.emulator.ptx import Array, Instruction

_SHOWN = 10  # problems in a report's text


@dataclass(frozen=True)
class Problem:
    """One fault of the program, at one instruction.

    kind: a stable slug ("out-of-bounds", "shared-race", ...; docs/emulator.md lists them).
    message: the fault in words, with addresses and the other party where there is one.
    instruction: the PTX instruction. file, line: the source line it was compiled from, where the PTX has `.loc` lines.
    thread: the first thread at fault, "block (x, y, z) thread (x, y, z)". count: occurrences, over all threads.
    """

    kind: str
    message: str
    instruction: str
    file: str | None
    line: int | None
    thread: str | None
    count: int

    def __str__(self) -> str:
        where = f"\n    at {self.file}:{self.line}" if self.file is not None else ""
        who = f" ({self.count} times, first {self.thread})" if self.thread is not None else ""
        return f"{self.kind}: {self.message}{who}{where}\n    in {self.instruction}"


@dataclass(frozen=True)
class Report:
    """The outcome of one launch.

    thread_instructions: instructions times active threads. basic_blocks: steps of the interpreter.
    global_read_nbytes, global_written_nbytes: bytes that threads asked for.
    global_read_sectors, global_written_sectors: distinct 32-byte sectors, counted for each instruction of each warp.
    opcodes: thread-instructions by PTX opcode.
    """

    problems: tuple[Problem, ...] = ()
    thread_instructions: int = 0
    basic_blocks: int = 0
    global_read_nbytes: int = 0
    global_written_nbytes: int = 0
    global_read_sectors: int = 0
    global_written_sectors: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.problems:
            return "no problems"
        rest = len(self.problems) - _SHOWN
        return "\n".join(map(str, self.problems[:_SHOWN])) + (f"\n... and {rest} more" if rest > 0 else "")


@dataclass
class _Entry:
    message: str
    thread: str | None
    count: int


class ProblemLog:
    """Collects problems during a launch: one entry for each (instruction, kind), the first in full and then a count."""

    def __init__(self, instructions: list[Instruction], thread_name: Callable[[int], str]) -> None:
        self._instructions = instructions
        self._thread_name = thread_name
        self._entries: dict[tuple[int, str], _Entry] = {}

    def add(self, kind: str, message: str, instruction: int, threads: Array | None) -> None:
        """Record a problem of the threads [n] (indices in the batch) at an instruction (index)."""
        count = 1 if threads is None else len(threads)
        if count == 0:
            return
        entry = self._entries.get((instruction, kind))
        if entry is None:
            thread = self._thread_name(int(np.min(threads))) if threads is not None else None
            self._entries[instruction, kind] = _Entry(message, thread, count)
        else:
            entry.count += count

    def __bool__(self) -> bool:
        return bool(self._entries)

    def problems(self) -> tuple[Problem, ...]:
        """The problems so far, in the order in which they were met."""
        found = []
        for (index, kind), entry in self._entries.items():
            instruction = self._instructions[index]
            file, line = instruction.location or (None, None)
            found.append(Problem(kind, entry.message, instruction.text, file, line, entry.thread, entry.count))
        return tuple(found)
