"""How the cost of a decode step grows with the batch and with the context, beside the limits of the machine.

    python scripts/cost_growth.py

Two series of points: batches of 1 to 64 short sequences, and one sequence at contexts up to the model's longest. Each
repeat visits all points in turn, in every mode (exact float32 activations, and int8 where the engine has them), and
measures the machine's limits beside them; medians and quartiles are over all steps of all repeats.

The roofline of a step is the longer of two times: the bytes that it reads at least, its weights and the keys and values
that it attends to, over the measured bandwidth of memory; and its multiply-adds over the measured float32 peak. Where
caches hold the weights between two steps the first can be beaten; the bandwidth of reading as many bytes again and
again says by how much.

Writes OUTPUT.json and OUTPUT.svg.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from measurement import (
    Parser,
    load,
    machine_facts,
    model_facts,
    notice,
    ordinary_token_ids,
    positive_int,
    prepare_output,
    run_script,
    save_figure,
    write_json,
)
from roofline import LimitMeter, Limits

from tinyllm.backends.cpu import CpuBackend
from tinyllm.cli.throughput import decode
from tinyllm.config import EngineConfig
from tinyllm.costs import multiply_adds, step_nbytes, step_weights_nbytes
from tinyllm.errors import ConfigError
from tinyllm.llm import LLM

SHORT_PROMPT = 33  # two whole blocks, which the prefix cache keeps, and one token
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 256, 512, 1024, 2048, 4096, 8192)
MODES: dict[str, dict[str, Any]] = {"exact": {}, "int8": {"activations": "int8"}}
COLOURS = {"exact": "#0072B2", "int8": "#D55E00"}
Prompts = list[list[int]]
Point = tuple[str, int]  # ("batch", size) or ("context", tokens of the prompt)


@dataclass
class Cost:
    """The steps measured at one point.

    Attributes:
        contexts: keys that each sequence's token saw, in the middle step of the last repeat.
    """

    nbytes: int = 0
    multiply_adds: int = 0
    contexts: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile of a step's time."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    def divisor(self, of: str) -> int:
        """What a step's time is divided by for the time of "a step" or of "a token"."""
        return len(self.contexts) if of == "a token" else 1

    def facts(self, limits: Limits) -> dict[str, Any]:
        low, middle, high = self.quartiles()
        roof = limits.seconds(self.nbytes, self.multiply_adds)
        return {
            "sequences": len(self.contexts),
            "mean_context": round(statistics.mean(self.contexts), 1),
            "step_s": [round(x, 7) for x in (middle, low, high)],
            "token_s": round(middle / len(self.contexts), 7),
            "nbytes": self.nbytes,
            "multiply_adds": self.multiply_adds,
            "memory_s": round(limits.memory_seconds(self.nbytes), 7),
            "compute_s": round(limits.compute_seconds(self.multiply_adds), 7),
            "share_of_roofline": round(roof / middle, 4),
        }


Costs = dict[Point, Cost]


def prompts_of(llm: LLM, batch_sizes: Sequence[int], contexts: Sequence[int], steps: int) -> dict[Point, Prompts]:
    """For each point; a context that leaves no room for its steps becomes the longest that does."""
    longest = min(max(contexts), llm.memory.max_sequence_len - steps - 2)
    short = [ordinary_token_ids(llm, SHORT_PROMPT, seed=10 + index) for index in range(max(batch_sizes))]
    long = ordinary_token_ids(llm, longest, seed=1)  # contexts begin alike: the cache then has most of the next one
    prompts = {("batch", size): short[:size] for size in sorted(set(batch_sizes))}
    return prompts | {("context", n): [long[:n]] for n in sorted({min(n, longest) for n in contexts})}


def visit(llm: LLM, prompts: Prompts, steps: int, cost: Cost) -> None:
    """Measures some steps more of a point."""
    run = decode(llm.engine, prompts, steps + 1)
    cost.seconds += run.seconds[1:]  # the one after the prefill finds other things in the caches
    cost.contexts = run.contexts
    cost.nbytes = step_nbytes(llm, run.contexts)
    cost.multiply_adds = multiply_adds(llm.config, run.contexts)


def measure(
    llms: Mapping[str, LLM], prompts: Mapping[Point, Prompts], meter: LimitMeter, *, steps: int, repeats: int
) -> dict[str, Costs]:
    """Costs by mode and point. Prompts are computed in the first repeat alone, and found in the cache then."""
    costs: dict[str, Costs] = {mode: {point: Cost() for point in prompts} for mode in llms}
    for number in range(repeats):
        notice(f"repeat {number + 1} of {repeats}{', and the prefill of all prompts' if number == 0 else ''} ...")
        meter.measure()
        for point, of_point in prompts.items():
            for mode, llm in llms.items():
                visit(llm, of_point, steps, costs[mode][point])
    return costs


def load_modes(args: argparse.Namespace) -> dict[str, LLM]:
    """A model for each mode that the engine has, with room in the cache for all prompts at once."""
    batch, block_size = max(args.batch_sizes), EngineConfig().block_size
    of_sequence = -(-(SHORT_PROMPT + args.steps + batch // 8) // block_size) + 1
    of_tails = len(args.contexts) * (args.steps // block_size + 3)
    num_blocks = -(-max(args.contexts) // block_size) + of_tails + batch * of_sequence
    llms = {}
    for mode, options in MODES.items():
        if not set(options) <= {one.name for one in fields(EngineConfig)}:
            notice(f"{mode} is left out: the engine has no option {', '.join(options)}")
            continue
        try:
            llms[mode] = load(args, device="cpu", num_blocks=num_blocks, max_num_seqs=batch, **options)
        except ConfigError as error:
            if not options:
                raise
            notice(f"{mode} is left out: {error}")
    return llms


# ---- what is written


def draw(costs: Mapping[str, Costs], limits: Limits) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "cost_growth"  # the same names in every file
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    batch, context = figure.subplots(1, 2)
    for axes, kind in ((batch, "batch"), (context, "context")):
        for of in ("a step", "a token") if kind == "batch" else ("a step",):
            roofs: list[list[float]] = []
            for mode, of_mode in costs.items():
                series = {n: cost for (k, n), cost in of_mode.items() if k == kind}
                draw_series(axes, mode, of, series)
                roof = roofline(series, of, limits)
                if roof not in roofs:  # modes that read as much share one
                    colour, label = (COLOURS[mode], f"roofline of {mode}") if roofs else ("#222222", "roofline")
                    axes.plot(list(series), roof, "--", color=colour, linewidth=1.2, label=label, zorder=1)
                    roofs.append(roof)
        axes.grid(linewidth=0.4, color="#bbbbbb")
        axes.spines[["top", "right"]].set_visible(False)
    sizes = [n for kind, n in next(iter(costs.values())) if kind == "batch"]
    batch.set_xscale("log", base=2)
    batch.set_yscale("log")
    batch.set_xticks(sizes, [str(n) for n in sizes])
    batch.yaxis.set_major_formatter("{x:g}")
    batch.set_xlabel("sequences in the batch, contexts under 100")
    batch.set_ylabel("time (ms, log scale)")
    context.set_xlim(left=0)
    context.set_ylim(bottom=0)
    context.xaxis.set_major_formatter("{x:,.0f}")
    context.set_xlabel("context of one sequence (tokens)")
    context.set_ylabel("time of a step (ms)")
    handles = {label: line for line, label in zip(*batch.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: label.startswith("roofline"))
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        title=f"roofline: the longer of bytes / {limits.read / 1e9:.1f} GB/s "
        f"and multiply-adds / {limits.fma / 1e9:.0f} G/s in float32",
    )
    return figure


def draw_series(axes: Any, mode: str, of: str, series: Mapping[int, Cost]) -> None:
    """Median times of a step or of a token, and a band between the quartiles."""
    times = [[1e3 * t / cost.divisor(of) for t in cost.quartiles()] for cost in series.values()]
    low, middle, high = zip(*times, strict=True)
    colour, inside = COLOURS[mode], "white" if of == "a token" else COLOURS[mode]
    axes.fill_between(list(series), low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(list(series), middle, "o-", color=colour, markerfacecolor=inside, markersize=5, label=f"{mode}, {of}")


def roofline(series: Mapping[int, Cost], of: str, limits: Limits) -> list[float]:
    """In milliseconds."""
    return [1e3 * limits.seconds(cost.nbytes, cost.multiply_adds) / cost.divisor(of) for cost in series.values()]


def print_table(costs: Mapping[str, Costs], limits: Limits) -> None:
    print(
        f"memory reads {limits.read / 1e9:.1f} GB/s, as many bytes as a step's again and again "
        f"{limits.reread / 1e9:.1f} GB/s, float32 multiply-adds {limits.fma / 1e9:.0f} G/s"
    )
    print(f"{'':23}{'ms a step':>12}{'quartiles':>19}{'ms a token':>12}{'roofline':>10}{'share':>8}")
    for mode, of_mode in costs.items():
        for (kind, n), cost in of_mode.items():
            low, middle, high = (1e3 * t for t in cost.quartiles())
            roof = 1e3 * limits.seconds(cost.nbytes, cost.multiply_adds)
            print(
                f"{mode:8}{kind:>8}{n:7,}{middle:12.2f}{low:10.2f}..{high:7.2f}{middle / len(cost.contexts):12.2f}"
                f"{roof:10.2f}{roof / middle:8.0%}"
            )


def main() -> None:
    parser = Parser(__doc__, "docs/cost_growth")
    add = parser.add_argument
    add("--batch-sizes", type=positive_int, nargs="+", default=list(BATCH_SIZES), metavar="B", help="(1 to 64)")
    add("--contexts", type=positive_int, nargs="+", default=list(CONTEXTS), metavar="N", help="(32 to 8192)")
    add("--steps", type=positive_int, default=8, metavar="N", help="timed at each visit of a point (8)")
    add("--repeats", type=positive_int, default=7, metavar="N", help="visits of each point (7)")
    args = parser.parse_args()
    output = prepare_output(args.output, plots=True)
    llms = load_modes(args)
    first = next(iter(llms.values()))
    prompts = prompts_of(first, args.batch_sizes, args.contexts, args.steps)
    meter = LimitMeter(CpuBackend(args.threads, notice), step_weights_nbytes(first))
    costs = measure(llms, prompts, meter, steps=args.steps, repeats=args.repeats)
    limits = meter.best()
    print_table(costs, limits)
    write_json(
        output.with_name(f"{output.name}.json"),
        {
            "what": "decode steps beside the machine's limits; step_s: median, lower and upper quartile",
            "machine": machine_facts(args.threads),
            "model": model_facts(args.model),
            "steps": args.steps,
            "repeats": args.repeats,
            "limits": meter.facts(),
            **{
                mode: {f"{kind} {n}": cost.facts(limits) for (kind, n), cost in of_mode.items()}
                for mode, of_mode in costs.items()
            },
        },
    )
    save_figure(draw(costs, limits), output.with_name(f"{output.name}.svg"))


if __name__ == "__main__":
    run_script(main)
