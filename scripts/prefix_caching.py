"""What prefix caching saves when many requests share the beginning of their prompt.

    python scripts/prefix_caching.py

Each request is a shared prompt and some tokens of its own, and asks for one token. Prefill work is the number of tokens
that go through the model, counted batch by batch. Three runs: without the cache; with it, one request first and all
the others after; with it, all of them in the same step. The answers must be the same bits in each.

Writes OUTPUT.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from measurement import (
    Criterion,
    MeteredRunner,
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
    run_to_end,
    write_json,
)

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.sampling_params import SamplingParams

MAX_SHARE = 0.2


@dataclass(frozen=True)
class Run:
    """How all requests were served.

    Attributes:
        prefill_tokens: tokens that went through the model.
        seconds: from the first request's arrival until the last one's end.
        answers: each request's token and its log-probability.
    """

    prefill_tokens: int
    seconds: float
    answers: list[tuple[int, float]]

    def facts(self, without_cache: Run) -> dict[str, Any]:
        return {
            "prefill_tokens": self.prefill_tokens,
            "share_of_prefill": round(self.prefill_tokens / without_cache.prefill_tokens, 6),
            "seconds": round(self.seconds, 3),
            "share_of_time": round(self.seconds / without_cache.seconds, 6),
        }


def measure(engine: LLMEngine, meter: MeteredRunner, waves: Sequence[Sequence[list[int]]]) -> Run:
    """Serves the prompts of each wave together, one wave after the other."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1, logprobs=0)
    meter.take()
    begin = time.perf_counter()
    answers: list[tuple[int, float]] = []
    for number, prompts in enumerate(waves):
        for index, prompt in enumerate(prompts):
            engine.add_request(f"{number}.{index}", prompt, params)
        outputs = run_to_end(engine)
        for index in range(len(prompts)):
            completion = outputs[f"{number}.{index}"].outputs[0]
            assert completion.logprobs is not None
            token = completion.token_ids[0]
            answers.append((token, completion.logprobs[0][token].logprob))
    seconds = time.perf_counter() - begin
    return Run(sum(step.num_tokens for step in meter.take()), seconds, answers)


def main() -> None:
    parser = Parser(__doc__, "docs/prefix_caching")
    parser.add_argument("--requests", type=positive_int, default=64, metavar="N", help="how many requests (64)")
    parser.add_argument("--shared", type=positive_int, default=1000, metavar="N", help="tokens that they share (1000)")
    parser.add_argument("--own", type=positive_int, default=16, metavar="N", help="tokens of each one's own (16)")
    args = parser.parse_args()
    if args.requests < 2:
        raise MistakeError("--requests must be at least 2, to share anything")
    output = prepare_output(args.output, plots=False)

    runs: dict[str, Run] = {}
    for label, caching, first_wave in (
        ("without the cache", False, args.requests),
        ("one request, then the others", True, 1),
        ("all in the same step", True, args.requests),
    ):
        llm = load(args, prefix_caching=caching)
        notice(f"{label} ...")
        meter = MeteredRunner(llm.engine)
        measure(llm.engine, meter, [[ordinary_token_ids(llm, 64, seed=1)]])  # what only a first request pays for
        shared = ordinary_token_ids(llm, args.shared, seed=2)
        prompts = [shared + ordinary_token_ids(llm, args.own, seed=10 + i) for i in range(args.requests)]
        waves = [wave for wave in (prompts[:first_wave], prompts[first_wave:]) if wave]
        runs[label] = measure(llm.engine, meter, waves)
        del llm, meter  # its cache, before the next one is reserved

    base, *cached = runs.values()
    print(f"{'':30}{'prefill tokens':>16}{'share':>9}{'seconds':>10}{'share':>9}")
    for label, run in runs.items():
        print(
            f"{label:30}{run.prefill_tokens:16,}{run.prefill_tokens / base.prefill_tokens:9.1%}"
            f"{run.seconds:10.2f}{run.seconds / base.seconds:9.1%}"
        )
    same = all(run.answers == base.answers for run in cached)
    print(f"tokens and log-probabilities {'are' if same else 'are NOT'} the same bits in all runs")
    criteria = [
        Criterion(f"share of the prefill work, {label}", run.prefill_tokens / base.prefill_tokens, "under", MAX_SHARE)
        for label, run in runs.items()
        if run is not base
    ]
    report_criteria(criteria)
    write_json(
        output.with_name(f"{output.name}.json"),
        {
            "what": "prefill work of requests that share the beginning of their prompt",
            "machine": machine_facts(args.threads),
            "model": model_facts(args.model),
            "requests": args.requests,
            "shared_tokens": args.shared,
            "own_tokens": args.own,
            "runs": {label: run.facts(base) for label, run in runs.items()},
            "same_bits": same,
            "criteria": [one.facts() for one in criteria],
        },
    )


if __name__ == "__main__":
    run_script(main)
