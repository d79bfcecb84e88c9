"""Keeps what `python -m tinyllm bench --json` measured, commit by commit, and says what became slower.

    python scripts/bench_history.py                            # measures, appends, compares, draws
    python scripts/bench_history.py --no-append --check        # compares only; exit status 1 where something is slower
    python scripts/bench_history.py --from report.json         # a report that was measured before; - is stdin
    python scripts/bench_history.py -- --kv-dtype f16          # what follows -- goes to bench

The benchmark runs in a process of its own. Its report becomes one line of OUTPUT.jsonl, with the commit's short id (and
a + where the packages differ from that commit), and is compared with the last entry of the same CPU, threads, model and
settings: ratios of medians, above 1 where it is faster now, beside the range from the slowest to the fastest run.
Something counts as slower where the ratio is below 1 by more than the tolerance and even the fastest run now is slower
than the median then. Neither tells a slower program from a machine that others used all the while; where the system
says that they did, a notice says so.

Writes OUTPUT.jsonl, and OUTPUT.svg from two entries on.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench_entries import (
    DEFAULTS,
    Change,
    Entry,
    Metric,
    append,
    changes,
    check_entry,
    comparable,
    configuration,
    grouped,
    memory_share,
    metrics,
    options_of,
    parse,
    read_history,
)
from measurement import MistakeError, Parser, notice, positive_int, prepare_output, run_script, save_figure

ROOT = Path(__file__).resolve().parents[1]
BUSY = 0.1  # of all cores' time
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvp*"


# ---- a new entry


def run_bench(args: argparse.Namespace) -> str:
    """What the benchmark prints, in a process of its own. Raises MistakeError."""
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    command = [sys.executable, "-m", "tinyllm", "bench", "--json", "--model", args.model, *threads]
    command += ["--repeats", str(args.repeats), "--batch-sizes", args.batch_sizes, "--contexts", args.contexts]
    done = subprocess.run([*command, *args.bench_options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise MistakeError(f"bench ended with status {done.returncode}")
    return done.stdout


def report_text(args: argparse.Namespace) -> tuple[str, str]:
    """The report as text, and where it comes from. Raises MistakeError."""
    if args.source is None:
        return run_bench(args), "bench"
    if args.source == "-":
        return sys.stdin.read(), "stdin"
    try:
        return Path(args.source).read_text(encoding="utf-8"), args.source
    except (OSError, ValueError) as error:
        raise MistakeError(f"cannot read {args.source}: {getattr(error, 'strerror', None) or error}") from None


def revision() -> str | None:
    """The short id of the commit that is checked out, with a + where the packages differ from it; None without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        changed = git("status", "--porcelain", "--", "tinyllm", "weights")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    return None


# ---- what is said and drawn


def print_metrics(entry: Entry) -> None:
    for name, metric in metrics(entry).items():
        print(f"{name:20}{_shown(metric):>36} tokens/s")


def print_changes(found: Sequence[Change], now: Entry, before: Entry, tolerance: float) -> None:
    print(f"{'tokens/s':20}{_label(now):>36}{_label(before):>36}{'ratio':>8}")
    for one in found:
        verdict = "  SLOWER" if one.slower(tolerance) else ""
        print(f"{one.name:20}{_shown(one.now):>36}{_shown(one.before):>36}{one.ratio:8.3f}{verdict}")
    speeds = [entry["memory_read_bytes_per_second"] for entry in (now, before)]
    if all(speeds):
        print(f"{'memory reads, GB/s':20}{speeds[0] / 1e9:36.1f}{speeds[1] / 1e9:36.1f}{speeds[0] / speeds[1]:8.3f}")


def warn_of_others(now: Entry, before: Entry | None) -> None:
    """A machine that others use is slower than itself, through whole runs: no median helps."""
    for what, entry in (("", now), ("the earlier entry: ", before)):
        share = None if entry is None else entry.get("others_cpu_share")
        if share is not None and share > BUSY:
            notice(f"{what}other processes took {share:.0%} of the cores' time; measure again when it is quiet")


def _shown(metric: Metric) -> str:
    return f"{metric.median:,.1f} ({metric.low:,.1f} .. {metric.high:,.1f})"


def _label(entry: Entry) -> str:
    return f"{entry.get('revision') or '?'}, {str(entry['date'])[:10]}"


def draw(entries: Sequence[Entry]) -> Any:
    """Speeds over the entries, and the share of the memory's limit that decoding reaches, for unlike machines too."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    matplotlib.rcParams["svg.hashsalt"] = "bench_history"  # the same names in every file
    figure = Figure(figsize=(10, 7), layout="constrained")
    speed, share = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    series = grouped(entries)
    names = list(dict.fromkeys(name for entry in entries for name in metrics(entry)))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    for group, marker in zip(series, itertools.cycle(MARKERS)):
        for name in names:
            points = [(i, found[name]) for i in group if name in (found := metrics(entries[i]))]
            xs, shown = [i for i, _ in points], [metric for _, metric in points]
            medians = [metric.median for metric in shown]
            spread = [[m.median - m.low for m in shown], [m.high - m.median for m in shown]]
            style: dict[str, Any] = {"color": colours[name], "marker": marker, "markersize": 5, "linewidth": 1.3}
            speed.errorbar(xs, medians, spread, elinewidth=0.7, capsize=2, **style)
            limits = [(i, one) for i in xs if (one := memory_share(entries[i], name)) is not None]
            share.plot([i for i, _ in limits], [one for _, one in limits], **style)
    for axes in (speed, share):
        axes.grid(axis="y", which="both", linewidth=0.3, color="#bbbbbb")
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_yscale("log")
    speed.yaxis.set_major_formatter("{x:,g}")
    speed.set_ylabel("tokens/s: medians, slowest to fastest run")
    share.axhline(1, color="#222222", linewidth=1, linestyle="--")
    share.set_ylim(bottom=0)
    share.set_ylabel("share of the limit\nof memory reads")
    share.set_xticks(range(len(entries)), [_label(entry) for entry in entries], rotation=30, ha="right", fontsize=8)
    handles = [Line2D([], [], color=colours[name], linewidth=2, label=name) for name in names]
    for group, marker in zip(series, itertools.cycle(MARKERS)):
        label = group_label(entries[group[0]])
        handles.append(Line2D([], [], color="#555555", marker=marker, linestyle="", label=label))
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def group_label(entry: Entry) -> str:
    cpu, threads, _, backend = configuration(entry)
    options = [
        f"{name} {value}" for name, value in options_of(entry).items() if value != DEFAULTS[name] and name != "device"
    ]
    return ", ".join([entry["model"]["name"], f"{cpu} x {threads}" if backend == "cpu" else backend, *options])


def main() -> None:
    parser = Parser(__doc__, "docs/bench_history")
    add = parser.add_argument
    add("--from", dest="source", metavar="FILE", help="a report of this commit's `bench --json`, - for stdin")
    add("--repeats", type=positive_int, default=5, metavar="N", help="measured runs of each (5)")
    add("--batch-sizes", default="1,8", metavar="N,N,...", help="see bench (1,8)")
    add("--contexts", default="32,1024", metavar="N,N,...", help="see bench (32,1024)")
    add("--tolerance", type=fraction, default=0.05, metavar="X", help="what a median may lose (0.05)")
    add("--check", action="store_true", help="exit with status 1 where something became slower")
    add("--no-append", action="store_true", help="compare only: write nothing")
    add("bench_options", nargs="*", help="further options of bench, after --")
    args = parser.parse_args()
    output = prepare_output(args.output, plots=not args.no_append)
    path = output.with_name(f"{output.name}.jsonl")
    history = read_history(path)  # a damaged one is found before minutes are spent
    text, source = report_text(args)
    now = {"revision": revision(), **check_entry(parse(text, source), source)}
    before = next((entry for entry in reversed(history) if comparable(entry, now)), None)
    found = [] if before is None else changes(now, before)
    if before is None:
        notice("no earlier entry was measured alike: nothing to compare with")
        print_metrics(now)
    else:
        print_changes(found, now, before, args.tolerance)
    warn_of_others(now, before)
    if not args.no_append:
        append(path, now)
        if history:
            save_figure(draw([*history, now]), output.with_name(f"{output.name}.svg"))
    slower = [one.name for one in found if one.slower(args.tolerance)]
    if slower:
        notice(f"slower by more than {args.tolerance:.0%}: {'; '.join(slower)}")
        if args.check:
            sys.exit(1)


def fraction(text: str) -> float:
    """An option's value from 0 to less than 1."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")


if __name__ == "__main__":
    run_script(main)
