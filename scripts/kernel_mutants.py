"""Breaks the GPU kernels on purpose, in one way at a time, and checks that the emulator or a comparison notices.

    python scripts/kernel_mutants.py [NAME ...] [--family FAMILY ...] [--module MODULE ...] [--jobs N] [--json FILE]

What is changed is told by tests/cuda/kernel_mutants.py, what notices by tests/cuda/kernel_probes.py, and which changes
make no difference, and why, by tests/cuda/equivalent_mutants.py. One line is printed for each mutant that nothing
noticed, then a table; the exit status is 1 if there are any. Words choose the mutants
whose names contain one of them. With --json results are added to those that the file has of other mutants.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cuda.equivalent_mutants import EQUIVALENT  # noqa: E402
from tests.cuda.kernel_mutants import KINDS, Mutant, mutants  # noqa: E402
from tests.cuda.kernel_probes import FAMILIES  # noqa: E402
from tests.cuda.mutant_runs import Outcome, outcomes  # noqa: E402
from tinyllm.cache import cache_root  # noqa: E402

CAUGHT = ("check", "result", "same code", "equivalent")
STATUSES = ("check", "result", "same code", "no code", "equivalent", "survived")


def status_of(mutant: Mutant, outcome: Outcome) -> str:
    """The outcome's status; "equivalent" for a survivor that is known to make no difference."""
    return "equivalent" if outcome.status == "survived" and mutant.name in EQUIVALENT else outcome.status


def record(mutant: Mutant, outcome: Outcome, family: str) -> dict[str, Any]:
    status = status_of(mutant, outcome)
    detail = EQUIVALENT[mutant.name] if status == "equivalent" else outcome.detail
    return {"mutant": mutant.name, "family": family, "kind": mutant.kind, "status": status, "detail": detail}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Mutants by family and by kind."""
    lines = [f"{'':16} {'sites':>6}" + "".join(f" {status:>11}" for status in STATUSES)]
    for key, names in (("family", list(FAMILIES)), ("kind", list(KINDS))):
        for name in names:
            counts = Counter(r["status"] for r in records if r[key] == name)
            if counts:
                row = "".join(f" {counts[status]:11}" for status in STATUSES)
                lines.append(f"{name:16} {counts.total():6}{row}")
        lines.append("")
    counts = Counter(r["status"] for r in records)
    lines.append(f"{'all':16} {counts.total():6}" + "".join(f" {counts[status]:11}" for status in STATUSES))
    return "\n".join(lines)


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by family, for the file."""
    return {
        family: dict(sorted(Counter(r["status"] for r in records if r["family"] == family).items()))
        for family in FAMILIES
        if any(r["family"] == family for r in records)
    }


def save(file: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds records to a file, in place of older ones of the same mutants; mutants that are no more are dropped.

    Returns what the file has now.
    """
    kept = json.loads(file.read_text("utf-8"))["mutants"] if file.is_file() else []
    found = {r["mutant"]: r for r in (*kept, *records)}
    order = [m.name for family in FAMILIES.values() for module in family for m in mutants(module)]
    merged = [found[name] for name in order if name in found]
    lines = ",\n".join(f"  {json.dumps(r)}" for r in merged)
    file.write_text(f'{{"families": {json.dumps(summary(merged))},\n"mutants": [\n{lines}\n]}}\n', encoding="utf-8")
    return merged


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--module", nargs="+", metavar="MODULE")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are added")
    parser.add_argument("--missing", action="store_true", help="only mutants that the file has no result of")
    options = parser.parse_args(argv)
    done = set()
    if options.missing and options.json is not None and options.json.is_file():
        done = {r["mutant"] for r in json.loads(options.json.read_text("utf-8"))["mutants"]}
    family_of, chosen = {}, []
    for family in options.family:
        for module in FAMILIES[family]:
            if options.module is None or module in options.module:
                family_of[module] = family
                wanted = [m for m in mutants(module) if not options.names or any(w in m.name for w in options.names)]
                chosen += [m for m in wanted if m.name not in done]
    if not chosen:
        parser.error("no mutant is meant")
    start, records = time.monotonic(), []
    for mutant, outcome in outcomes(chosen, cache_root() / "cuda", options.jobs):
        records.append(record(mutant, outcome, family_of[mutant.module]))
        status = records[-1]["status"]
        if status not in CAUGHT or options.names:
            print(
                f"{status:9} {outcome.seconds:5.1f} s  {mutant.name} (line {mutant.line}) {outcome.detail}", flush=True
            )
        if options.json is not None:
            save(options.json, records)
    print(f"\n{table(records)}\n{len(records)} mutants in {time.monotonic() - start:.0f} s")
    return 0 if all(r["status"] in CAUGHT for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
