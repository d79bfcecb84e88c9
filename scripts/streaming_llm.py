"""Perplexity and memory of StreamingLLM (arXiv:2309.17453) over a text longer than the model's context.

    python scripts/streaming_llm.py --text book.txt

Four ways to read the text, with a cache of 1,024 tokens in the first three:

    sinks       the first 4 tokens and a window of 1,020: StreamingLLM
    window      a window of 1,024 and no sinks
    recomputed  for each token a fresh request of the 1,024 tokens before it: slow, what the others stand in for
    full        everything before it, as far as the model's own context goes

Recomputing costs 1,024 tokens for each one, so it is done at every 64th position beyond the cache (--stride), and
perplexities are compared on those positions; the intervals are of a bootstrap over them. In the picture, the bins of
the recomputed window are the bins of `sinks`, times the ratio of the two at the bin's sampled positions.

Writes OUTPUT.json and OUTPUT.png. The recomputed positions are saved as they come: started again with the same text and
model, an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measurement import (
    Criterion,
    MeteredRunner,
    MistakeError,
    Parser,
    load,
    machine_facts,
    model_facts,
    notice,
    positive_int,
    prepare_output,
    report_criteria,
    run_script,
    run_to_end,
    save_figure,
    write_json,
)
from numpy.typing import NDArray

from tinyllm.config import EngineConfig
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Task
from tinyllm.llm import LLM, open_model
from tinyllm.models.registry import model_config
from tinyllm.outputs import RequestOutput
from tinyllm.sampling_params import SamplingParams

MAX_RATIO = 1.05
NUM_BOOTSTRAP = 10_000
SAVE_EVERY = 8  # recomputed positions
COLOURS = {"sinks": "#0072B2", "window": "#D55E00", "recomputed": "#000000", "full": "#009E73"}

F64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """One pass over T tokens.

    Attributes:
        logprobs: (T - 1,) entry i is log p of token i + 1, in nats.
        blocks: (tokens read, KV blocks held), a pair for each step.
    """

    logprobs: F64Array
    blocks: list[tuple[int, int]]
    seconds: float

    def at(self, positions: NDArray[np.int64]) -> F64Array:
        """log p of the tokens at these positions, all above 0."""
        return self.logprobs[positions - 1]


def read(engine: LLMEngine, meter: MeteredRunner, ids: list[int], window: int | None, sinks: int) -> Reading:
    """Scores the tokens in one pass."""
    meter.take()
    begin = time.perf_counter()
    params = SamplingParams(prompt_logprobs=0, window=window, sinks=sinks)
    engine.add_request("read", ids, params, task=Task.SCORE)
    entries = run_to_end(engine)["read"].prompt_logprobs
    seconds = time.perf_counter() - begin
    assert entries is not None
    logprobs = [entry[token].logprob for token, entry in zip(ids, entries, strict=True) if entry is not None]
    steps = meter.take()
    tokens = np.cumsum([step.num_tokens for step in steps]).tolist()
    held = [step.num_held_blocks for step in steps]
    return Reading(np.array(logprobs), list(zip(tokens, held, strict=True)), seconds)


def recompute(
    engine: LLMEngine,
    ids: list[int],
    positions: list[int],
    cache_tokens: int,
    on_result: Callable[[int, float], None],
) -> None:
    """log p of the tokens at `positions`, each after a fresh request of the cache_tokens tokens before it.

    One row through the LM head is enough: a bias makes the wanted token the one that is chosen, and log-probabilities
    are reported without biases.
    """
    for position in positions:
        target = ids[position]
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, logit_bias={target: 1e9})
        engine.add_request(str(position), ids[position - cache_tokens : position], params)

    def finished(output: RequestOutput) -> None:
        position = int(output.request_id)
        entries = output.outputs[0].logprobs
        assert entries is not None
        on_result(position, entries[0][ids[position]].logprob)

    run_to_end(engine, finished)


# ---- numbers


def sampled_positions(num_tokens: int, cache_tokens: int, stride: int) -> NDArray[np.int64]:
    """Every stride-th position that lies beyond the cache."""
    return np.arange(cache_tokens + stride, num_tokens, stride)


def perplexity(logprobs: F64Array) -> float:
    return float(np.exp(-logprobs.mean()))


def bin_perplexities(logprobs: F64Array, bin_tokens: int) -> F64Array:
    """Perplexity of the tokens in each whole bin of a text, of whose first token logprobs (T - 1,) says nothing."""
    ends = range(bin_tokens, len(logprobs) + 2, bin_tokens)
    return np.array([perplexity(logprobs[max(0, end - bin_tokens - 1) : end - 1]) for end in ends])


def bin_ratios(
    positions: NDArray[np.int64], logprobs: F64Array, others: F64Array, bin_tokens: int, count: int
) -> list[float | None]:
    """For each of `count` bins, the perplexity of logprobs over that of others, at the positions in the bin."""
    ratios: list[float | None] = []
    for index in range(count):
        inside = positions // bin_tokens == index
        ratios.append(float(np.exp((others - logprobs)[inside].mean())) if inside.any() else None)
    return ratios


def ratio_interval(logprobs: F64Array, others: F64Array) -> tuple[float, float, float]:
    """The perplexity of logprobs over that of others, position by position, and its 95% bootstrap interval."""
    differences = others - logprobs
    rng = np.random.default_rng(0)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(NUM_BOOTSTRAP)]
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return float(np.exp(differences.mean())), float(low), float(high)


def growth(blocks: list[tuple[int, int]]) -> float:
    """The most blocks held in the later half of a reading over the most in the earlier half."""
    half = blocks[-1][0] / 2
    earlier, later = ([held for tokens, held in blocks if (tokens > half) is wanted] for wanted in (False, True))
    return max(later) / max(earlier)


# ---- text and saved results


def read_text(path: Path) -> tuple[str, str]:
    """The text and the SHA-256 of the file. Raises MistakeError."""
    try:
        data = path.read_bytes()
        return data.decode(), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise MistakeError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise MistakeError(f"{path} is not UTF-8: byte {error.start}") from None


def encode_beginning(llm: LLM, text: str, num_tokens: int) -> list[int]:
    """The first num_tokens token ids of a text. Raises MistakeError if it has fewer."""
    if llm.tokenizer is None:
        raise MistakeError("this model has no tokenizer")
    length = 8 * num_tokens  # characters: English has about four a token
    while True:
        ids = llm.tokenizer.encode(text[:length])
        if len(ids) >= num_tokens + 64:  # the cut changes no more than the last of them
            return ids[:num_tokens]
        if length >= len(text):
            break
        length *= 2
    if len(ids) < num_tokens:
        raise MistakeError(f"the text has {len(ids):,} tokens, and --tokens asks for {num_tokens:,}")
    return ids[:num_tokens]


def saved_logprobs(path: Path, inputs: Mapping[str, Any]) -> dict[int, float]:
    """What an earlier run over the same inputs has recomputed: position -> log p."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        facts = json.loads(path.read_text())
        if facts["inputs"] == inputs:
            recomputed = facts["recomputed"]
            positions, logprobs = recomputed["positions"], recomputed["logprobs"]
            return {int(p): float(value) for p, value in zip(positions, logprobs, strict=True)}
    return {}


# ---- the picture


def draw(
    bins: Mapping[str, Any],
    readings: Mapping[str, Reading],
    labels: Mapping[str, str],
    *,
    bin_tokens: int,
    cache_tokens: int,
    context: int,
    block_size: int,
) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, values in bins.items():
        heights = np.array([np.nan if value is None else value for value in values])
        centres = (np.arange(len(heights)) + 0.5) * bin_tokens
        style = {"linestyle": "--", "zorder": 3} if name == "recomputed" else {}
        upper.plot(centres, heights, color=COLOURS[name], linewidth=1.6, label=labels[name], **style)
    upper.set_yscale("log")
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_minor_formatter("")
    upper.set_ylabel(f"perplexity (bins of {bin_tokens:,} tokens, log scale)")
    for name, reading in readings.items():
        tokens, held = zip((0, 0), *reading.blocks, strict=True)
        style = {"linestyle": "--", "zorder": 3} if name == "window" else {}  # lies on the curve of `sinks`
        lower.plot(tokens, held, color=COLOURS[name], linewidth=1.6, **style)
    lower.set_ylim(bottom=0)
    lower.set_ylabel(f"KV cache held (blocks of {block_size} tokens)")
    lower.xaxis.set_major_formatter("{x:,.0f}")
    lower.set_xlabel("tokens read")
    end = max(reading.blocks[-1][0] for reading in readings.values())
    events = [(cache_tokens, "cache full"), (context, "the model's context ends")]
    for at, what in [event for event in events if event[0] <= end]:
        upper.axvline(at, color="#777777", linewidth=0.8, linestyle=":")
        lower.axvline(at, color="#777777", linewidth=0.8, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        upper.annotate(what, (at, 1), xytext=(4, -10), fontsize=8, color="#444444", **place)
    for axes in (upper, lower):
        axes.set_xlim(0, end)
        axes.grid(axis="y", which="major", linewidth=0.4, color="#cccccc")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


# ---- the run


def main() -> None:
    parser = Parser(__doc__, "docs/streaming_llm")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text to read")
    parser.add_argument("--tokens", type=positive_int, default=20_000, metavar="N", help="how much of it (20000)")
    parser.add_argument("--cache", type=positive_int, default=1024, metavar="N", help="tokens in the cache (1024)")
    parser.add_argument("--sinks", type=positive_int, default=4, metavar="N", help="how many of them are sinks (4)")
    parser.add_argument("--stride", type=positive_int, default=64, metavar="N", help="recompute every N-th (64)")
    parser.add_argument("--bin", type=positive_int, default=500, metavar="N", help="tokens a bin of the curves (500)")
    args = parser.parse_args()
    if args.sinks >= args.cache:
        raise MistakeError("--sinks must be below --cache")
    if args.tokens <= args.cache + args.stride or args.tokens <= args.bin:
        raise MistakeError("--tokens must be above --cache plus --stride, and above --bin")
    output = prepare_output(args.output, plots=True)
    json_path = output.with_name(f"{output.name}.json")
    text, text_sha256 = read_text(args.text)
    checkpoint = open_model(args.model)
    context = model_config(checkpoint).max_position
    checkpoint.close()
    if args.cache >= context:
        raise MistakeError(f"--cache must be below the model's context of {context:,} tokens")

    # room for `full`, and no more: the windows must do with less than the text
    full_tokens = min(args.tokens, context)
    options = EngineConfig()
    num_blocks = -(-max(full_tokens, args.cache + 2 * options.max_batch_tokens) // options.block_size) + 1
    llm = load(args, num_blocks=num_blocks)
    ids = encode_beginning(llm, text, args.tokens)
    positions = sampled_positions(args.tokens, args.cache, args.stride)
    within = positions[positions < full_tokens]
    window = args.cache - args.sinks
    labels = {
        "sinks": f"StreamingLLM: {args.sinks} sinks + window of {window:,}",
        "window": f"window of {args.cache:,}, no sinks",
        "recomputed": f"last {args.cache:,} tokens, recomputed",
        "full": f"everything before, up to {full_tokens:,}",
    }

    meter = MeteredRunner(llm.engine)
    readings: dict[str, Reading] = {}
    for name, num_tokens, visible, sinks in (
        ("sinks", args.tokens, window, args.sinks),
        ("window", args.tokens, args.cache, 0),
        ("full", full_tokens, None, 0),
    ):
        notice(f"{labels[name]} ...")
        readings[name] = read(llm.engine, meter, ids[:num_tokens], visible, sinks)

    inputs = {
        "text_sha256": text_sha256,
        "model": model_facts(args.model),
        "tokens": args.tokens,
        "cache_tokens": args.cache,
        "kv_dtype": llm.engine_config.kv_dtype,
    }
    facts: dict[str, Any] = {
        "what": "perplexity and memory of StreamingLLM over a long text",
        "machine": machine_facts(args.threads),
        "inputs": inputs,
        "sinks": args.sinks,
        "stride": args.stride,
        "bin_tokens": args.bin,
        "block_size": options.block_size,
    }
    recomputed = saved_logprobs(json_path, inputs)

    def save() -> None:
        ordered = sorted(recomputed)
        facts["recomputed"] = {"positions": ordered, "logprobs": [recomputed[p] for p in ordered]}
        write_json(json_path, facts)

    wanted = [p for p in positions.tolist() if p not in recomputed]
    notice(f"{labels['recomputed']}: {len(wanted)} positions to do, {len(positions) - len(wanted)} done before ...")
    begin = time.perf_counter()

    def on_result(position: int, logprob: float) -> None:
        recomputed[position] = round(logprob, 6)  # as it is saved: interrupted or not, the result is the same
        done = sum(p in recomputed for p in wanted)
        if done % SAVE_EVERY == 0:
            save()
        if done % (4 * SAVE_EVERY) == 0:
            left = (time.perf_counter() - begin) / done * (len(wanted) - done)
            notice(f"  {done} of {len(wanted)}, about {left / 60:.0f} min left")

    recompute(llm.engine, ids, wanted, args.cache, on_result)

    fresh = np.array([recomputed[p] for p in positions.tolist()])
    common = {name: readings[name].at(positions) for name in ("sinks", "window")} | {"recomputed": fresh}
    ratios = {name: ratio_interval(common[name], fresh) for name in ("sinks", "window")}
    bins: dict[str, Any] = {
        name: bin_perplexities(reading.logprobs, args.bin).tolist() for name, reading in readings.items()
    }
    against_sinks = bin_ratios(positions, fresh, common["sinks"], args.bin, len(bins["sinks"]))
    bins["recomputed"] = [
        None if ratio is None else value * ratio for value, ratio in zip(bins["sinks"], against_sinks, strict=True)
    ]
    peaks = {name: max(held for _, held in reading.blocks) for name, reading in readings.items()}

    print(f"{'':42}{'perplexity':>12}{'over recomputed':>17}{'95% interval':>18}{'peak blocks':>13}")
    for name in ("sinks", "window", "recomputed"):
        line = f"{labels[name]:42}{perplexity(common[name]):12.3f}"
        if name in ratios:
            ratio, low, high = ratios[name]
            line += f"{ratio:17.4f}{f'{low:.4f} - {high:.4f}':>18}{peaks[name]:13,}"
        print(line)
    print(f"on {len(positions):,} positions, every {args.stride}-th beyond {args.cache:,}")
    facts_full = None
    if len(within):
        facts_full = {
            "positions": len(within),
            "full": perplexity(readings["full"].at(within)),
            **{name: perplexity(values[: len(within)]) for name, values in common.items()},
        }
        print(f"on the {len(within):,} of them below {full_tokens:,}: " + ", ".join(
            f"{name} {value:.3f}" for name, value in facts_full.items() if name != "positions"
        ))  # fmt: skip
        print(f"{labels['full']}: {peaks['full']:,} blocks at the peak")
    criteria = [
        Criterion("perplexity, sinks / recomputed", ratios["sinks"][0], "at most", MAX_RATIO),
        Criterion("most blocks held, second half / first half", growth(readings["sinks"].blocks), "at most", 1.0),
    ]
    report_criteria(criteria)
    facts |= {
        "perplexity_on_sampled_positions": {name: round(perplexity(values), 6) for name, values in common.items()},
        "perplexity_on_sampled_positions_within_context": facts_full
        and {name: round(value, 6) for name, value in facts_full.items()},
        "perplexity_over_recomputed_with_95_percent_interval": {
            name: [round(value, 6) for value in values] for name, values in ratios.items()
        },
        "perplexity_of_all_tokens": {
            name: round(perplexity(reading.logprobs), 6) for name, reading in readings.items()
        },
        "bin_perplexity": {
            name: [None if value is None else round(value, 4) for value in values] for name, values in bins.items()
        },
        "tokens_and_blocks_held": {name: reading.blocks for name, reading in readings.items()},
        "seconds": {name: round(reading.seconds, 1) for name, reading in readings.items()},
        "criteria": [one.facts() for one in criteria],
    }
    save()
    figure = draw(
        bins,
        readings,
        labels,
        bin_tokens=args.bin,
        cache_tokens=args.cache,
        context=context,
        block_size=options.block_size,
    )
    save_figure(figure, output.with_name(f"{output.name}.png"))


if __name__ == "__main__":
    run_script(main)
