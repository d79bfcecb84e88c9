"""Checks every kernel on the GPU at hand against numpy, and times it against its roofline and what else is installed.

    python scripts/gpu_check.py                        all checks and timings; about four minutes on a fast GPU
    python scripts/gpu_check.py --quick                all checks, a dozen timings
    python scripts/gpu_check.py --only linear          what has "linear" in its name
    python scripts/gpu_check.py --emulated             the checks alone, small, with no GPU

Compiling takes most of the first run. It can be done before, on a machine with no GPU:

    python scripts/gpu_check.py --build kernels --architecture sm_90
    python scripts/gpu_check.py --prebuilt kernels     on the GPU's machine

Prints one table, and writes docs/gpu_check.json (-o). Everything runs in a second process, which is started again after
a kernel that faults or hangs: that one is reported, and the others still run. The exit status is 1 if a check failed.

A timing is the median of graph replays between CUDA events, its inputs rotated until they exceed the second-level
cache. The roofline's floor is the larger of bytes over the bandwidth of a large copy and operations over the rate of
cuBLAS's product of large matrices, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gpu_checks.prebuilt import PrebuiltCompiler, RecordingRuntime, build
from gpu_checks.suite import Check, Context, Timing
from gpu_checks.worker import CEILINGS, FAULTED, all_items, device_facts, floor_seconds, run_items
from rich.console import Console
from rich.table import Table

from cuda_kernels.compile import Compiler
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import CudaKernelError
from cuda_kernels.gpu import GpuRuntime
from cuda_kernels.launch import Runtime
from cuda_kernels.roofline import Ceilings

CACHE = Path.home() / ".cache" / "tinyllm" / "cuda"
WORKER = Path(__file__).resolve()  # the program of the second process: this one, with --worker
ITEM_SECONDS = 60.0  # an item that takes longer hangs
EMULATED_ITEM_SECONDS = 600.0


@dataclass
class Run:
    """What the options ask for, and what is known so far.

    Attributes:
        device: facts of the device, once a worker has told.
        results: by item id.
        trouble: why no worker could start.
    """

    options: argparse.Namespace
    device: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    trouble: str = ""


def main() -> None:
    options = _options()
    if options.list:
        print("\n".join(_chosen(options)))
        return
    if options.worker is not None:
        sys.exit(_worker(options))
    if options.build is not None:
        sys.exit(_build(options))
    chosen = _chosen(options)
    if chosen in ([], [CEILINGS]):
        _mistake(f"nothing is called {options.only!r} (see --list)")
    console = Console(width=None if sys.stdout.isatty() else 150)
    run, begin = Run(options), time.monotonic()
    _run_all(run, chosen, console)
    if not run.device:
        _mistake(run.trouble)
    facts = {**run.device, "seconds": round(time.monotonic() - begin, 1), **_facts(run)}
    _print(console, facts)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        _mistake(f"cannot write {options.output}: {error.strerror}")
    sys.exit(1 if facts["failed_checks"] else 0)


def _mistake(message: str) -> NoReturn:
    print(f"gpu_check.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a dozen timings instead of all")
    parser.add_argument("--only", metavar="TEXT", help="only what has this in its name")
    parser.add_argument("--checks-only", action="store_true", help="no timings")
    parser.add_argument("--emulated", action="store_true", help="the checks, on the emulator")
    parser.add_argument("--list", action="store_true", help="what there is, without running it")
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="kernels that --build made")
    parser.add_argument("--build", type=Path, metavar="FOLDER", help="compile all kernels into a folder, and stop")
    parser.add_argument("--architecture", default="sm_90", help="what --build compiles for (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of --build (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="compiled kernels (default: %(default)s)")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="start nothing later (default: 220, on the emulator 3600)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/gpu_check.json"), help="default: %(default)s")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time_limit is None:
        options.time_limit = 3600.0 if options.emulated else 220.0
    return options


def _chosen(options: argparse.Namespace) -> list[str]:
    chosen = [] if options.emulated or options.checks_only else [CEILINGS]
    for id_, item in all_items().items():
        if options.only and options.only not in id_:
            continue
        if isinstance(item, Check) or not (
            options.emulated or options.checks_only or (options.quick and not item.quick)
        ):
            chosen.append(id_)
    return chosen


# ---- the second process


def _runtime(options: argparse.Namespace) -> Runtime:
    if options.emulated:
        return EmulatedRuntime(Compiler(options.cache))
    prebuilt = options.prebuilt
    return GpuRuntime(Compiler(options.cache) if prebuilt is None else PrebuiltCompiler(prebuilt, options.cache))


def _worker(options: argparse.Namespace) -> int:
    """Runs the items named on standard input, and appends to a file what comes of them."""
    ids = sys.stdin.read().splitlines()
    with options.worker.open("a") as file:

        def say(message: dict[str, Any]) -> None:
            file.write(json.dumps(message) + "\n")
            file.flush()

        deadline = time.monotonic() + options.time_limit
        try:
            rt = _runtime(options)
        except CudaKernelError as error:
            print(error, file=sys.stderr)
            return 2
        say({"device": device_facts(rt)})
        return run_items(rt, ids, say, small=options.emulated, quick=options.quick, deadline=deadline)


def _run_all(run: Run, todo: list[str], console: Console) -> None:
    """Starts worker after worker until each item has a result."""
    options, begin = run.options, time.monotonic()
    while todo:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "results")
            path.touch()
            left = max(options.time_limit - (time.monotonic() - begin), 0)
            status, running, errors = _run_worker(run, path, todo, left, console)
        todo = [id_ for id_ in todo if id_ not in run.results]
        if not todo or status == FAULTED:
            continue
        run.trouble = f"{status}: {errors}" if isinstance(status, str) else errors or f"exit status {status}"
        if running is None:  # it never got going
            run.results.update((id_, {"failed": run.trouble}) for id_ in todo)
            return
        run.results[running] = {"failed": run.trouble}
        todo.remove(running)


def _run_worker(
    run: Run, path: Path, todo: Sequence[str], left: float, console: Console
) -> tuple[int | str, str | None, str]:
    """(exit status or what happened, the item that was running, the last of what it wrote to standard error)"""
    options = run.options
    command = [sys.executable, str(WORKER), "--worker", str(path), "--time-limit", str(left)]
    command += ["--cache", str(options.cache)]
    command += [f"--{flag}" for flag in ("quick", "emulated") if getattr(options, flag)]
    command += ["--prebuilt", str(options.prebuilt)] if options.prebuilt is not None else []
    patience = EMULATED_ITEM_SECONDS if options.emulated else ITEM_SECONDS
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        assert process.stdin is not None
        process.stdin.write("\n".join(todo))
        process.stdin.close()
        running: str | None = None
        heard = time.monotonic()
        status: int | str | None = None
        with path.open() as file:
            for message in _messages(file, process):
                if message is not None:
                    heard = time.monotonic()
                    running = message.get("start")
                    run.device.update(message.get("device", {}))
                    if "id" in message:
                        run.results[message.pop("id")] = message
                        _progress(console, len(run.results), message)
                elif time.monotonic() - heard > patience:
                    os.killpg(process.pid, signal.SIGKILL)
                    status = f"nothing for {patience:.0f} s"
        code = process.wait()
        errors.seek(0)
        return code if status is None else status, running, " ".join(errors.read().split())[-300:]


def _messages(file: Any, process: subprocess.Popen[str]) -> Iterator[dict[str, Any] | None]:
    """The lines of a file while a process writes it; None while nothing comes."""
    partial = ""
    while True:
        ended = process.poll() is not None
        line = file.readline()
        if line.endswith("\n"):
            yield json.loads(partial + line)
            partial = ""
        elif line:
            partial += line
        elif ended:
            return
        else:
            yield None
            time.sleep(0.02)


def _progress(console: Console, count: int, message: dict[str, Any]) -> None:
    if console.is_terminal:
        console.print(f"{count} done, the last in {message['seconds']:.1f} s", end="\r")


# ---- building ahead


def _build(options: argparse.Namespace) -> int:
    rt = RecordingRuntime()
    context = Context(rt, np.random.default_rng(7), l2_nbytes=1)
    items = all_items()
    chosen = [items[id_] for id_ in _chosen(options) if id_ in items]
    for item in sorted(chosen, key=lambda item: not getattr(item, "quick", False)):  # the most telling first
        try:
            if isinstance(item, Check):
                item.run(context)
            elif isinstance(item, Timing):
                for launch in item.prepare(context).launches[:1]:
                    launch()
        except Exception as error:  # results are none here: kernels launched before are noted all the same
            print(f"{item.id}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
    failed = build(list(rt.kernels), options.build, options.architecture, options.cache, options.jobs, print)
    print(f"{len(rt.kernels) - failed} kernels for {options.architecture} in {options.build}, {failed} failed")
    return 1 if failed else 0


# ---- results


def _facts(run: Run) -> dict[str, Any]:
    """Results in the order of the items, timings held against the ceilings."""
    found = run.results.get(CEILINGS, {})
    ceilings = None
    if "bandwidth" in found:
        ceilings = Ceilings(found["bandwidth"], found["tensor_flops"], found["f32_flops"])
    checks, timings = [], []
    for id_ in _chosen(run.options):
        kind, _, rest = id_.partition(":")
        family, _, name = rest.partition(":")
        entry = {"family": family, "name": name, **run.results.get(id_, {"failed": "not run"})}
        if kind == "check":
            checks.append(entry)
        elif kind == "time":
            if ceilings is not None and "time" in entry:
                entry["floor"] = floor_seconds(ceilings, entry)
            timings.append(entry)
    failed = [f"{c['family']}: {c['name']}" for c in checks if not c.get("passed")]
    return {"ceilings": found, "failed_checks": failed, "checks": checks, "timings": timings}


def _print(console: Console, facts: dict[str, Any]) -> None:
    console.print(f"{facts['device']}, {facts['seconds']} s")
    table = Table("family", "check", "error", "bound", "", title="Against numpy", title_justify="left")
    for check in facts["checks"]:
        if "error" in check:
            verdict = "ok" if check["passed"] else "[bold red]WRONG[/]"
            table.add_row(check["family"], check["name"], f"{check['error']:.3g}", f"{check['bound']:.3g}", verdict)
        else:
            reason = check.get("missing") or check["failed"]
            table.add_row(check["family"], check["name"], "", "", f"[red]{_escape(reason)}[/]")
    console.print(table)
    if facts["timings"]:
        _print_timings(console, facts)
    passed = len(facts["checks"]) - len(facts["failed_checks"])
    console.print(f"{passed} of {len(facts['checks'])} checks passed")


def _print_timings(console: Console, facts: dict[str, Any]) -> None:
    found = facts["ceilings"]
    if "bandwidth" in found:
        console.print(
            f"Ceilings: copy {found['bandwidth'] / 1e12:.2f} TB/s, cuBLAS f16 {found['tensor_flops'] / 1e12:.0f}"
            f" and f32 {found['f32_flops'] / 1e12:.1f} TFLOP/s"
        )
    table = Table("family", "launch", title="Timings", title_justify="left")
    for heading in ("us", "GB/s", "TFLOP/s", "of roofline"):
        table.add_column(heading, justify="right")
    table.add_column("others, us (x: times as long as ours)")
    for timing in facts["timings"]:
        if "time" not in timing:
            reason = timing.get("missing") or timing["failed"]
            table.add_row(timing["family"], timing["name"], "", "", "", "", f"[red]{_escape(reason)}[/]")
            continue
        seconds = timing["time"]
        rivals = [
            f"{name} {other * 1e6:.1f} ({other / seconds:.2f}x)"
            if isinstance(other, float)
            else f"{name}: {_escape(other)}"
            for name, other in timing["rivals"].items()
        ]
        table.add_row(
            timing["family"],
            timing["name"],
            f"{seconds * 1e6:.1f}",
            f"{timing['nbytes'] / seconds / 1e9:.0f}",
            f"{timing['flop'] / seconds / 1e12:.1f}" if timing["flop"] else "",
            f"{timing['floor'] / seconds:.0%}" if "floor" in timing else "",
            ", ".join(rivals),
        )
    console.print(table)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("gpu_check.py: interrupted", file=sys.stderr)
        sys.exit(130)
