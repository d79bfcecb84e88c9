"""Runs mutants of the kernels through the probes, each in a process of its own, and tells what became of them."""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from cuda_kernels.compile import Compiler
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.emulator import Checks, EmulatorError
from cuda_kernels.errors import KernelCompileError
from cuda_kernels.kernel import Kernel
from tests.cuda.kernel_mutants import Mutant, contains, installed

__all__ = ["Outcome", "outcomes"]

_CHECKS = Checks(global_races=True, max_basic_blocks=60_000)  # 10 times what a probe's longest launch takes
_PROBES = "tests.cuda.kernel_probes"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        status: "check": the emulator reported it; "result": a comparison failed; "same code": it compiles to what the
            original does, in every kernel that the probes launch; "no code": no probe's kernels compile; "survived".
        detail: the kinds of problem, or what failed.
        probe: the number of the probe that noticed, from 1.
        seconds: of processor time.
    """

    status: str
    detail: str
    probe: int
    seconds: float


@dataclass(frozen=True)
class _Original:
    """The kernels that a module's probes launch.

    Attributes:
        launched: for each probe, the definitions of its kernels.
        codes: by kernel name, a digest of the PTX.
    """

    launched: tuple[tuple[Kernel, ...], ...]
    codes: dict[str, str]


def _code_digest(ptx: str) -> str:
    """Of the instructions: not of source lines, nor of numba's unused variables, named by serial numbers."""
    lines = [line for line in ptx.splitlines() if not line.lstrip().startswith((".loc", ".file", ".common", "//"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _RecordingCompiler(Compiler):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.used: dict[Kernel, str] = {}

    def ptx(self, kernel: Kernel) -> str:
        self.used[kernel] = super().ptx(kernel)
        return self.used[kernel]


def _originals(modules: Iterable[str], folder: Path, probes: int | None) -> dict[str, _Original]:
    """Runs the modules' probes on the original, which must pass; those that several modules share, once."""
    table = import_module(_PROBES).PROBES
    recorded: dict[Any, dict[Kernel, str]] = {}
    originals = {}
    for module in modules:
        chosen = table[module][:probes]
        for probe in chosen:
            if probe not in recorded:
                compiler = _RecordingCompiler(folder)
                probe(EmulatedRuntime(compiler, checks=_CHECKS), np.random.default_rng(7))
                recorded[probe] = {kernel: _code_digest(ptx) for kernel, ptx in compiler.used.items()}
        codes = {kernel.name: digest for probe in chosen for kernel, digest in recorded[probe].items()}
        originals[module] = _Original(tuple(tuple(recorded[probe]) for probe in chosen), codes)
    return originals


class _MutantCompiler:
    """Compiles what a mutant may have changed in memory, and takes everything else from the folder."""

    def __init__(self, mutant: Mutant, folder: Path, original: _Original) -> None:
        self._mutant, self._original = mutant, original
        self._unaffected, self._affected = Compiler(folder), Compiler(None)
        self._kept: dict[str, str] = {}

    def ptx(self, kernel: Kernel) -> str:
        if not contains(kernel, self._mutant):
            return self._unaffected.ptx(kernel)
        if kernel.name not in self._kept:
            self._kept[kernel.name] = self._affected.ptx(kernel)
        return self._kept[kernel.name]

    def changed(self, kernels: Iterable[Kernel]) -> bool:
        """Whether one of the original's kernels, built by the mutant's module, has become other code."""
        for kernel in kernels:
            if not contains(kernel, self._mutant):
                continue
            build = getattr(import_module(kernel.build.__module__), kernel.build.__name__)
            mutated = Kernel(kernel.name, build, kernel.constants, kernel.signature, kernel.threads, kernel.min_blocks)
            if _code_digest(self.ptx(mutated)) != self._original.codes[kernel.name]:
                return True
        return False


def _outcome(mutant: Mutant, original: _Original, folder: Path) -> Outcome:
    """In a process of its own: imports the package with the mutant, and runs the probes until one notices."""
    start = time.process_time()
    number, status, detail = 0, "same code", ""
    with installed(mutant, ["tests.cuda"]):
        probes = import_module(_PROBES).PROBES[mutant.module][: len(original.launched)]
        emulated = import_module(EmulatedRuntime.__module__)
        errors = import_module(EmulatorError.__module__)
        compile_error = import_module(KernelCompileError.__module__).KernelCompileError
        checks = import_module(Checks.__module__).Checks(**vars(_CHECKS))
        compiler: Any = _MutantCompiler(mutant, folder, original)
        for number, probe in enumerate(probes, 1):
            try:
                if not compiler.changed(original.launched[number - 1]):
                    continue
                status, detail = "survived", ""
                probe(emulated.EmulatedRuntime(compiler, checks=checks), np.random.default_rng(7))
            except errors.EmulatorError as error:
                kinds = sorted({problem.kind for problem in error.report.problems}) if error.report else []
                status, detail = "check", ", ".join(kinds) or str(error)[:200]
                break
            except (compile_error, KernelCompileError) as error:
                if status != "survived":
                    status, detail = "no code", str(error)[:200]
            except Exception as error:  # a wrong result can break a comparison in any way
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                status, detail = "result", f"{type(error).__name__} {' '.join(lines)[:100]}".strip()
                break
        else:
            number = 0
    return Outcome(status, re.sub(r"0x[0-9a-f]+", "0x...", detail), number, round(time.process_time() - start, 1))


def _run(task: tuple[Mutant, _Original, Path]) -> tuple[Mutant, Outcome]:
    return task[0], _outcome(*task)


def outcomes(
    mutants: Iterable[Mutant], folder: Path, jobs: int = 1, probes: int | None = None
) -> Iterator[tuple[Mutant, Outcome]]:
    """Each mutant with its outcome, as they come.

    Args:
        folder: where compiled kernels are kept: the originals'; what mutants compile to is not.
        jobs: processes at a time.
        probes: how many of a module's probes to run; all by default.
    """
    chosen = list(mutants)
    originals = _originals(dict.fromkeys(mutant.module for mutant in chosen), folder, probes)
    tasks = [(mutant, originals[mutant.module], folder) for mutant in chosen]
    # where processes can be copied, the compiler is imported and warm in each
    Compiler(None).ptx(
        next(kernel for original in originals.values() for kernels in original.launched for kernel in kernels)
    )
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_run, tasks)
