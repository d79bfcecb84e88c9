"""What a kernel's machine code may use: registers by the budget file, and nothing that makes a kernel slow in silence.

`budgets.json` has two parts, each {kernel: {architecture: number}}:

- registers: of a thread, written down as measured and rounded up to 8, the unit in which a GPU hands them out, so that
  a change that needs more is seen;
- spills: bytes that a thread may spill, for the few kernels that ptxas makes spill on some architecture in spite of
  all; written by hand. Where there is none, spills, stack and local memory must not be.

Float64 instructions have no budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cuda_kernels.sass import CodeStatistics

__all__ = ["BUDGETS_FILE", "Budgets", "load_budgets", "register_budget", "save_budgets", "violations"]

BUDGETS_FILE = Path(__file__).with_name("budgets.json")
REGISTER_UNIT = 8

Limits = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Budgets:
    """The budget file: limits by kernel and architecture."""

    registers: Limits
    spills: Limits


def load_budgets(path: Path = BUDGETS_FILE) -> Budgets:
    """Reads the budget file."""
    parts = json.loads(path.read_text())
    return Budgets(parts["registers"], parts["spills"])


def save_budgets(budgets: Budgets, path: Path = BUDGETS_FILE) -> None:
    """Writes the budget file, a line for each kernel."""

    def part(name: str, limits: Limits) -> str:
        lines = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(dict(limits[kernel]))}" for kernel in sorted(limits))
        return f'  "{name}": {{\n{lines}\n  }}' if lines else f'  "{name}": {{}}'

    path.write_text("{\n" + part("registers", budgets.registers) + ",\n" + part("spills", budgets.spills) + "\n}\n")


def register_budget(code: CodeStatistics) -> int:
    """What the budget file says of a kernel as it is."""
    return -(-code.registers // REGISTER_UNIT) * REGISTER_UNIT


def violations(name: str, architecture: str, code: CodeStatistics, budgets: Budgets) -> list[str]:
    """What is wrong with a kernel's code, a line for each; empty if nothing is."""
    where = f"{name} on {architecture}"
    spills = budgets.spills.get(name, {}).get(architecture, 0)
    counted = {"bytes of spills": max(code.spill_nbytes - spills, 0), "float64 instructions": code.f64_instructions}
    if not spills:
        counted |= {"bytes of stack": code.stack_nbytes, "instructions in local memory": code.local_instructions}
    found = [f"{where}: {count} {what} too many" for what, count in counted.items() if count]
    budget = budgets.registers.get(name, {}).get(architecture)
    if budget is None:
        found.append(f"{where}: no budget (python scripts/kernel_report.py --write-budgets)")
    elif code.registers > budget:
        found.append(f"{where}: {code.registers} registers, the budget is {budget}")
    return found
