"""What a kernel's machine code may use: registers by the budget file, and nothing that makes a kernel slow in silence.

`budgets.json` gives each kernel's registers of a thread by architecture, {kernel: {architecture: registers}}. They are
written down as measured, rounded up to 8, the unit in which a GPU hands them out, so that a change that needs more is
seen. Spills, a stack frame, local memory and float64 instructions have no budget: they must not be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cuda_kernels.sass import CodeStatistics

__all__ = ["BUDGETS_FILE", "Budgets", "load_budgets", "register_budget", "save_budgets", "violations"]

BUDGETS_FILE = Path(__file__).with_name("budgets.json")
REGISTER_UNIT = 8

Budgets = Mapping[str, Mapping[str, int]]


def load_budgets(path: Path = BUDGETS_FILE) -> dict[str, dict[str, int]]:
    """The budget file."""
    budgets: dict[str, dict[str, int]] = json.loads(path.read_text())
    return budgets


def save_budgets(budgets: Budgets, path: Path = BUDGETS_FILE) -> None:
    """Writes the budget file, a line for each kernel."""
    lines = [f"  {json.dumps(name)}: {json.dumps(dict(budgets[name]))}" for name in sorted(budgets)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def register_budget(code: CodeStatistics) -> int:
    """What the budget file says of a kernel as it is."""
    return -(-code.registers // REGISTER_UNIT) * REGISTER_UNIT


def violations(name: str, architecture: str, code: CodeStatistics, budgets: Budgets) -> list[str]:
    """What is wrong with a kernel's code, a line for each; empty if nothing is."""
    where = f"{name} on {architecture}"
    forbidden = {
        "bytes of spills": code.spill_nbytes,
        "bytes of stack": code.stack_nbytes,
        "instructions in local memory": code.local_instructions,
        "float64 instructions": code.f64_instructions,
    }
    found = [f"{where}: {count} {what}" for what, count in forbidden.items() if count]
    budget = budgets.get(name, {}).get(architecture)
    if budget is None:
        found.append(f"{where}: no budget (python scripts/kernel_report.py --write-budgets)")
    elif code.registers > budget:
        found.append(f"{where}: {code.registers} registers, the budget is {budget}")
    return found
