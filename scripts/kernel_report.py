"""What every kernel becomes on every architecture: registers, memory, instructions, occupancy, and where its roof is.

    python scripts/kernel_report.py                               all kernels, docs/kernel_report.{json,html}
    python scripts/kernel_report.py --family linear --architecture sm_90a
    python scripts/kernel_report.py --write-budgets               also cuda_kernels/budgets.json, from what is found

Needs no GPU: numba-cuda makes PTX of each kernel, ptxas machine code, nvdisasm its text. Compiling takes a few seconds
a kernel the first time. The exit status is 1 when a kernel spills, uses a stack, local memory or float64, or goes over
its registers in cuda_kernels/budgets.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kernel_report_page import main_architecture, render_page
from measurement import MistakeError, notice
from rich.console import Console
from rich.table import Table

from cuda_kernels.budgets import BUDGETS_FILE, Budgets, load_budgets, register_budget, save_budgets, violations
from cuda_kernels.compile import Compiler
from cuda_kernels.errors import CudaKernelError
from cuda_kernels.kernel import Kernel
from cuda_kernels.registry import all_kernels, families, shared_nbytes_of, work_of
from cuda_kernels.roofline import ARCHITECTURES, Occupancy, TileWork, occupancy
from cuda_kernels.sass import CodeStatistics, measure
from tinyllm.cache import cache_root


@dataclass(frozen=True)
class Entry:
    """One kernel on one architecture.

    Attributes:
        shared_nbytes: of a block, static and dynamic.
        work: of one tile, where the family says.
    """

    family: str
    kernel: Kernel
    architecture: str
    code: CodeStatistics
    shared_nbytes: int
    occupancy: Occupancy
    work: TileWork | None

    def facts(self, detailed: bool) -> dict[str, Any]:
        """For the result file; detailed: what the main loop is made of, too."""
        code, fits = self.code, self.occupancy
        loop = code.main_loop
        facts: dict[str, Any] = {
            "family": self.family,
            "kernel": self.kernel.name,
            "architecture": self.architecture,
            "threads": self.kernel.threads,
            "registers": code.registers,
            "shared_nbytes": self.shared_nbytes,
            "spill_nbytes": code.spill_nbytes,
            "stack_nbytes": code.stack_nbytes,
            "f64_instructions": code.f64_instructions,
            "local_instructions": code.local_instructions,
            "instructions": code.num_instructions,
            "loop_instructions": loop.num_instructions if loop is not None else 0,
            "occupancy": round(fits.fraction, 4),
            "blocks": fits.blocks,
            "limited_by": fits.limit,
        }
        if detailed:
            facts["main_loop"] = dict(loop.opcodes) if loop is not None else {}
        if self.work is not None:
            facts["tile"] = {
                "flop": self.work.flop,
                "nbytes": self.work.nbytes,
                "intensity": round(self.work.intensity, 3),
                "tensor": self.work.tensor,
            }
        return facts


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MistakeError(f"{message} (see --help)")


def _options() -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--architecture", action="append", choices=list(ARCHITECTURES), help="may be repeated (default: all)"
    )
    parser.add_argument("--family", metavar="MODULE", help="a module of cuda_kernels that defines kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: docs/kernel_report.json for all kernels")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: docs/kernel_report.html for all kernels")
    parser.add_argument("--write-budgets", action="store_true", help=f"write {BUDGETS_FILE.name}; all families at once")
    parser.add_argument("--cache", type=Path, default=cache_root() / "cuda", help="compiled kernels (%(default)s)")
    options = parser.parse_args()
    partial = options.family is not None or options.architecture is not None
    if options.write_budgets and partial:
        raise MistakeError("--write-budgets needs all families and architectures")
    if options.family is not None and options.family not in families():
        raise MistakeError(f"no family {options.family!r}: one of {', '.join(families())}")
    if not partial:
        options.json = options.json or Path("docs/kernel_report.json")
        options.html = options.html or Path("docs/kernel_report.html")
    return options


def collect(kernels: dict[Kernel, str], architectures: Sequence[str], compiler: Compiler) -> list[Entry]:
    """Compiles and measures. Raises CudaKernelError."""

    def entry(kernel: Kernel, ptx: str, architecture: str) -> Entry:
        family = kernels[kernel]
        code = measure(ptx, kernel.name, architecture)
        shared_nbytes = code.shared_nbytes + shared_nbytes_of(family, kernel)
        fits = occupancy(
            ARCHITECTURES[architecture],
            threads=kernel.threads,
            registers=code.registers,
            shared_nbytes=shared_nbytes,
        )
        return Entry(family, kernel, architecture, code, shared_nbytes, fits, work_of(family, kernel))

    with ThreadPoolExecutor(2) as pool:  # ptxas runs while the next kernel is made into PTX
        pending = []
        for kernel in kernels:
            ptx = compiler.ptx(kernel)
            pending += [pool.submit(entry, kernel, ptx, architecture) for architecture in architectures]
        return [future.result() for future in pending]


def _print(entries: Sequence[Entry], architectures: Sequence[str]) -> None:
    """Registers and occupancy on each architecture; the rest as on the one that stands for all."""
    main = main_architecture(architectures)
    table = Table("kernel", f"threads, KB shared ({main})", f"main loop ({main})", title_justify="left")
    table.title = "registers / occupancy; spills, stack, local memory and float64 are named where there are any"
    for architecture in architectures:
        table.add_column(architecture, justify="right")
    by_kernel: dict[str, dict[str, Entry]] = {}
    for one in entries:
        by_kernel.setdefault(one.kernel.name, {})[one.architecture] = one
    for name, found in by_kernel.items():
        at = found[main]
        loop = at.code.main_loop
        cells = [_cell(found[architecture]) for architecture in architectures]
        mix = "" if loop is None else f"{loop.num_instructions}: " + _mix(loop.opcodes)
        table.add_row(name, f"{at.kernel.threads}, {at.shared_nbytes / 1024:.1f}", mix, *cells)
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def _mix(opcodes: Any) -> str:
    wanted = ("HMMA", "FFMA", "LDSM", "LDGSTS.128", "LDG.128", "MUFU", "SHFL", "BAR")
    return " ".join(f"{opcodes[name]} {name}" for name in wanted if name in opcodes)


def _cell(entry: Entry) -> str:
    code = entry.code
    bad = {
        "spill": code.spill_nbytes,
        "stack": code.stack_nbytes,
        "local": code.local_instructions,
        "f64": code.f64_instructions,
    }
    wrong = "".join(f" [red]{name} {count}[/]" for name, count in bad.items() if count)
    return f"{code.registers} / {entry.occupancy.fraction:.0%}{wrong}"


def main() -> None:
    options = _options()
    architectures = options.architecture or list(ARCHITECTURES)
    kernels = all_kernels(options.family)
    notice(f"{len(kernels)} kernels for {', '.join(architectures)}")
    entries = collect(kernels, architectures, Compiler(options.cache))
    if options.write_budgets:
        registers: dict[str, dict[str, int]] = {}
        for one in entries:
            registers.setdefault(one.kernel.name, {})[one.architecture] = register_budget(one.code)
        save_budgets(Budgets(registers, load_budgets().spills))
    _print(entries, architectures)
    main = main_architecture(architectures)
    facts = [one.facts(detailed=one.architecture == main) for one in entries]
    if options.json is not None:
        _write(options.json, "[\n" + ",\n".join(json.dumps(fact) for fact in facts) + "\n]\n")
    if options.html is not None:
        _write(options.html, render_page(facts))
    found = load_budgets()
    wrong = [line for one in entries for line in violations(one.kernel.name, one.architecture, one.code, found)]
    print("\n".join(wrong) if wrong else "every kernel keeps its budget")
    sys.exit(1 if wrong else 0)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise MistakeError(f"cannot write {path}: {error.strerror or error}") from None


if __name__ == "__main__":
    try:
        main()
    except (MistakeError, CudaKernelError) as error:
        print(f"kernel_report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
