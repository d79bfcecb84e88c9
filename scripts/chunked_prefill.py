"""How long running requests wait for a token while a long prompt is admitted, with chunked prefill and without.

    python scripts/chunked_prefill.py

Some requests decode. After a number of steps a long prompt arrives; the gaps between the tokens of each running
request are measured until the prompt's first token and a little beyond. Once with the default budget of tokens a step,
so that the prompt is prefilled in chunks, and once with a budget that takes it whole.

Writes OUTPUT.json and OUTPUT.png. A gap is drawn over the time that it took, at the height of its length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from measurement import (
    Criterion,
    MistakeError,
    Parser,
    load,
    machine_facts,
    model_facts,
    notice,
    ordinary_token_ids,
    positive_int,
    prepare_output,
    report_criteria,
    run_script,
    save_figure,
    write_json,
)

from tinyllm.config import EngineConfig
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.llm import LLM
from tinyllm.sampling_params import SamplingParams

RUNNING_PROMPT_TOKENS = 32
MAX_RATIO = 3.0
MIN_WORSE = 10.0


@dataclass(frozen=True)
class Admission:
    """Times in seconds, 0 when the long prompt arrived.

    Attributes:
        token_times: for each running request, when each of its tokens came.
        first_token_time: when the long prompt's first token came.
    """

    token_times: list[list[float]]
    first_token_time: float

    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) of every gap between two tokens of one running request."""
        return [pair for times in self.token_times for pair in pairwise(times)]

    def lengths(self, begin: float, end: float) -> list[float]:
        """The lengths of the gaps that ended in (begin, end]."""
        return [stop - start for start, stop in self.gaps() if begin < stop <= end]

    def facts(self) -> dict[str, Any]:
        before, during = self.lengths(-float("inf"), 0.0), self.lengths(0.0, self.first_token_time)
        return {
            "first_token_s": self.first_token_time,
            "median_before_s": statistics.median(before),
            "median_during_s": statistics.median(during),
            "longest_during_s": max(during),
            "longest_over_median": max(during) / statistics.median(during),
        }


def measure(
    engine: LLMEngine, running: Sequence[Sequence[int]], long_prompt: Sequence[int], *, before: int, after: int
) -> Admission:
    """Runs the requests `running`, then lets the long prompt in, `before` tokens later, and goes on for `after` steps.

    Raises:
        InvalidRequestError: a prompt does not fit.
    """
    endless = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1 << 30)
    times: dict[str, list[float]] = {}
    first_token_time = None

    def step() -> None:
        nonlocal first_token_time
        chunks = engine.step().chunks
        now = time.perf_counter()
        for request_id, _ in chunks:
            if request_id == "long":
                first_token_time = now
            else:
                times[request_id].append(now)

    for index, prompt in enumerate(running):
        times[f"running {index}"] = []
        engine.add_request(f"running {index}", prompt, endless)
    while min(map(len, times.values())) <= before:
        step()
    arrival = time.perf_counter()
    engine.add_request("long", long_prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=1))
    while first_token_time is None:
        step()
    for _ in range(after):
        step()
    for request_id in times:
        engine.abort(request_id)
    return Admission([[t - arrival for t in ts] for ts in times.values()], first_token_time - arrival)


def blocks_for(num_tokens: int) -> int:
    """KV blocks of the default size for a sequence, with one to spare."""
    return num_tokens // EngineConfig().block_size + 2


def warm_up(llm: LLM) -> None:
    """Kernels compiled, pages of workspace and cache touched: what only a first request pays for."""
    count = min(llm.engine_config.max_batch_tokens, 1024)
    llm.generate([ordinary_token_ids(llm, count, seed=1)], SamplingParams(max_tokens=4, ignore_eos=True))


def draw(admissions: dict[str, Admission], prompt_tokens: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, admission), colour in zip(admissions.items(), ("#0072B2", "#D55E00"), strict=True):
        begins, ends = zip(*admission.gaps(), strict=True)
        heights = [end - begin for begin, end in admission.gaps()]
        axes.hlines(heights, begins, ends, colors=colour, linewidth=2.5, label=label)
        axes.plot(ends, heights, ".", color=colour, markersize=4)  # short gaps are too narrow to see
    axes.axvline(0, color="#555555", linewidth=1, linestyle=":")
    axes.annotate(
        f"a prompt of {prompt_tokens:,} tokens arrives",
        (0, 0.4),
        xycoords=("data", "axes fraction"),
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=9,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time since the long prompt arrived (s)")
    axes.set_ylabel("gap between two tokens of a\nrunning request (s, log scale)")
    axes.grid(axis="y", which="both", linewidth=0.3, color="#bbbbbb")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def main() -> None:
    parser = Parser(__doc__, "docs/chunked_prefill")
    parser.add_argument("--prompt-tokens", type=positive_int, default=8000, metavar="N", help="of the long one (8000)")
    parser.add_argument("--running", type=positive_int, default=4, metavar="N", help="requests that decode (4)")
    parser.add_argument("--before", type=positive_int, default=32, metavar="N", help="steps before it arrives (32)")
    parser.add_argument("--after", type=positive_int, default=32, metavar="N", help="steps after its first token (32)")
    args = parser.parse_args()
    chunked = EngineConfig().max_batch_tokens
    if args.running >= chunked:
        raise MistakeError(f"--running must be below {chunked}, the default budget of a step")
    output = prepare_output(args.output, plots=True)
    whole = max(8192, args.prompt_tokens + args.running)
    steps = args.before + -(-args.prompt_tokens // (chunked - args.running)) + args.after
    num_blocks = blocks_for(args.prompt_tokens) + args.running * blocks_for(RUNNING_PROMPT_TOKENS + steps)
    admissions = {}
    for label, budget in ((f"chunked: {chunked:,} tokens a step", chunked), ("not chunked", whole)):
        llm = load(args, max_batch_tokens=budget, num_blocks=num_blocks)
        notice(f"{label} ...")
        warm_up(llm)
        admissions[label] = measure(
            llm.engine,
            [ordinary_token_ids(llm, RUNNING_PROMPT_TOKENS, seed=10 + i) for i in range(args.running)],
            ordinary_token_ids(llm, args.prompt_tokens, seed=2),
            before=args.before,
            after=args.after,
        )
        del llm  # its cache and workspace, before the next are reserved

    facts = [admission.facts() for admission in admissions.values()]
    print(f"{'':34}{'median before':>15}{'median during':>15}{'longest':>11}{'first token':>13}")
    for label, fact in zip(admissions, facts, strict=True):
        print(
            f"{label:34}{fact['median_before_s'] * 1e3:12,.1f} ms{fact['median_during_s'] * 1e3:12,.1f} ms"
            f"{fact['longest_during_s'] * 1e3:8,.0f} ms{fact['first_token_s']:11.2f} s"
        )
    on, off = facts
    worse = off["longest_during_s"] / on["longest_during_s"]
    criteria = [
        Criterion("chunked: longest gap / median gap", on["longest_over_median"], "under", MAX_RATIO),
        Criterion("longest gap, not chunked / chunked", worse, "at least", MIN_WORSE),
    ]
    report_criteria(criteria)
    write_json(
        output.with_name(f"{output.name}.json"),
        {
            "what": "gaps between tokens of running requests while a long prompt is admitted",
            "machine": machine_facts(args.threads),
            "model": model_facts(args.model),
            "prompt_tokens": args.prompt_tokens,
            "running_requests": args.running,
            "budgets": [chunked, whole],
            "runs": {
                label: {key: round(value, 6) for key, value in fact.items()}
                for label, fact in zip(admissions, facts, strict=True)
            },
            "token_times_s": {
                label: [[round(t, 4) for t in times] for times in admission.token_times]
                for label, admission in admissions.items()
            },
            "criteria": [one.facts() for one in criteria],
        },
    )
    save_figure(draw(admissions, args.prompt_tokens), output.with_name(f"{output.name}.png"))


if __name__ == "__main__":
    run_script(main)
