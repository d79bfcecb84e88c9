"""Run a numba.cuda script without a GPU, under checks: python -m cuda_kernels.emulator script.py [arguments].

Exit status: that of the script, 1 where a launch had problems, 2 for a mistake in using the emulator.
"""

from __future__ import annotations

import argparse
import linecache
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cuda_kernels.emulator.checks import Checks
from cuda_kernels.emulator.report import Problem
from cuda_kernels.errors import CudaKernelError

if TYPE_CHECKING:
    from cuda_kernels.emulator.script import KernelTotals, Session


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    if not Path(options.script).is_file():
        return _mistake(f"no such script: {options.script}")
    try:
        from cuda_kernels.emulator.script import Session
    except ImportError as error:
        return _mistake(f"numba-cuda is needed to run scripts ({error}): pip install 'tinyllm[emulator]'")
    checks = Checks(races=options.races, global_races=options.global_races, raise_on_problem=False)
    printer = _Printer(options.max_problems)
    session = Session(checks, options.target, printer.show)
    try:
        status = _run(session, options.script, options.arguments)
    except CudaKernelError as error:
        return _mistake(" ".join(str(error).split()))
    _summarise(session.totals)
    return 1 if printer.count else status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cuda_kernels.emulator",
        description="Run a numba.cuda script on the CPU and report races, stray accesses and the like, by source line.",
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--races", action=flag, default=True, help="races in shared memory")
    parser.add_argument("--global-races", action=flag, default=True, help="races in global memory")
    parser.add_argument("--max-problems", type=int, default=20, metavar="N", help="print at most N problems")
    parser.add_argument("--target", type=_target, default="sm_80", metavar="sm_80", help="architecture to compile for")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _target(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"sm_(\d+)(\d)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture such as sm_80")
    return int(match[1]), int(match[2])


def _mistake(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _run(session: Session, script: str, arguments: list[str]) -> int:
    """Run a script as `python script arguments` would. Returns its exit status."""
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        with session.installed():
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except CudaKernelError:
        raise
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0


class _Printer:
    """Prints problems as they are met, up to a number of them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def show(self, kernel: str, problems: Sequence[Problem]) -> None:
        for problem in problems:
            self.count += 1
            if self.count == self.limit + 1:
                print("... and more problems", file=sys.stderr)
            if self.count <= self.limit:
                print(_described(kernel, problem), file=sys.stderr)


def _described(kernel: str, problem: Problem) -> str:
    lines = [f"{problem.kind} in {kernel}: {problem.message}"]
    if problem.file is not None and problem.line is not None:
        lines.append(f"  {problem.file}:{problem.line}: {linecache.getline(problem.file, problem.line).strip()}")
    lines.append(f"  {problem.instruction}")
    if problem.thread is not None:
        lines.append(f"  {problem.count} times, first in {problem.thread}")
    return "\n".join(lines)


def _summarise(totals: dict[str, KernelTotals]) -> None:
    if not totals:
        print("no kernel was launched", file=sys.stderr)
    for name, kernel in totals.items():
        print(
            f"{name}: {kernel.launches} launches, {kernel.thread_instructions:,} thread-instructions, "
            f"{kernel.read_nbytes:,} bytes read, {kernel.written_nbytes:,} written, {len(kernel.problems)} problems",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
