"""How many KV blocks beam search holds, against beams that share nothing.

    python scripts/beam_blocks.py

For each number of beams: one request, a prompt of random tokens, continued past any end-of-sequence token. Held blocks
are counted in every step while the batch runs, and the peak is compared with beams x the blocks of one whole sequence.

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

MAX_SHARE = 1 / 3


@dataclass(frozen=True)
class BeamRun:
    """Blocks at the peak: held, and what as many beams would take that share nothing."""

    beams: int
    peak_blocks: int
    unshared_blocks: int
    seconds: float

    @property
    def share(self) -> float:
        return self.peak_blocks / self.unshared_blocks

    def facts(self) -> dict[str, Any]:
        return {
            "peak_blocks": self.peak_blocks,
            "unshared_blocks": self.unshared_blocks,
            "share": round(self.share, 6),
            "seconds": round(self.seconds, 3),
        }


def unshared_blocks(beams: int, num_tokens: int, block_size: int) -> int:
    """Blocks of `beams` sequences by themselves, whose KV cache holds num_tokens tokens each."""
    return beams * -(-num_tokens // block_size)


def measure(engine: LLMEngine, meter: MeteredRunner, prompt: Sequence[int], beams: int, max_tokens: int) -> BeamRun:
    meter.take()
    begin = time.perf_counter()
    params = SamplingParams(beams=beams, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request("beams", prompt, params)
    output = run_to_end(engine)["beams"]
    seconds = time.perf_counter() - begin
    assert len(output.outputs[0].token_ids) == max_tokens
    return BeamRun(
        beams=beams,
        peak_blocks=max(step.num_held_blocks for step in meter.take()),
        # the last token is never computed: nothing follows it
        unshared_blocks=unshared_blocks(beams, len(prompt) + max_tokens - 1, engine.block_manager.block_size),
        seconds=seconds,
    )


def main() -> None:
    parser = Parser(__doc__, "docs/beam_blocks")
    parser.add_argument(
        "--beams", type=positive_int, nargs="+", default=[4, 8, 16], metavar="N", help="numbers of beams (4 8 16)"
    )
    parser.add_argument("--prompt-tokens", type=positive_int, default=512, metavar="N", help="of the prompt (512)")
    parser.add_argument("--max-tokens", type=positive_int, default=64, metavar="N", help="tokens to generate (64)")
    args = parser.parse_args()
    output = prepare_output(args.output, plots=False)

    llm = load(args)
    meter = MeteredRunner(llm.engine)
    prompt = ordinary_token_ids(llm, args.prompt_tokens, seed=2)
    runs = []
    for beams in args.beams:
        notice(f"{beams} beams ...")
        runs.append(measure(llm.engine, meter, prompt, beams, args.max_tokens))

    print(f"{'beams':>5}{'blocks held':>14}{'unshared':>11}{'share':>9}{'seconds':>10}")
    for run in runs:
        print(f"{run.beams:5}{run.peak_blocks:14,}{run.unshared_blocks:11,}{run.share:9.1%}{run.seconds:10.2f}")
    criteria = [Criterion(f"share of blocks, {run.beams} beams", run.share, "at most", MAX_SHARE) for run in runs]
    report_criteria(criteria)
    write_json(
        output.with_name(f"{output.name}.json"),
        {
            "what": "KV blocks that beam search holds at its peak",
            "machine": machine_facts(args.threads),
            "model": model_facts(args.model),
            "prompt_tokens": args.prompt_tokens,
            "max_tokens": args.max_tokens,
            "block_size": llm.engine_config.block_size,
            "beams": {str(run.beams): run.facts() for run in runs},
            "criteria": [one.facts() for one in criteria],
        },
    )


if __name__ == "__main__":
    run_script(main)
