"""What serving costs: the server's throughput beside that of LLM.generate, and streams while a long prompt comes in.

    python scripts/serving.py

Starts `python -m tinyllm serve`, and loads the same model into this process as well. Two parts:

1. Some chats at once, each for so many tokens: over HTTP, streamed and not, and by LLM.generate, in turn. The client
   shares the cores with the server. Sampled with top_k and top_p, as chats are.
2. Some streams decode; then a prompt of thousands of tokens arrives. The gaps between the tokens of each stream are
   measured until the long prompt's first token.

Writes OUTPUT.json.
"""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
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
    write_json,
)
from served import served

from tinyllm import LLM, SamplingParams
from tinyllm.loadgen.http_client import HTTPClient
from tinyllm.loadgen.openai_client import OpenAIClient, RequestSettings
from tinyllm.loadgen.record import RequestRecord
from tinyllm.loadgen.url import ServerURL
from tinyllm.loadgen.workload import PlannedRequest

MIN_SHARE = 0.85
MAX_RATIO = 3.0
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
TOPICS = (
    *("rivers", "colours", "planets", "tools", "birds", "songs", "games", "trees"),
    *("boats", "foods", "cities", "books", "clouds", "stones", "dances", "shoes"),
)
STREAM_PROMPT_TOKENS = 32


# ---- throughput


def chat(index: int) -> str:
    return f"Tell me a long story about {TOPICS[index % len(TOPICS)]}, number {index}, and how they came to be."


def offline_seconds(llm: LLM, count: int, tokens: int) -> float:
    prompts = [llm.encode_chat([{"role": "user", "content": chat(i)}]) for i in range(count)]
    params = [SamplingParams(max_tokens=tokens, seed=i, ignore_eos=True, **SAMPLING) for i in range(count)]
    begin = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - begin


async def served_seconds(url: str, model: str, count: int, tokens: int, *, stream: bool) -> float:
    http = HTTPClient(ServerURL.parse(url))
    records: list[RequestRecord] = []
    clients = []
    for index in range(count):
        extra = {**SAMPLING, "seed": index}
        if not stream:
            extra |= {"stream": False, "stream_options": None}
        settings = RequestSettings(model, chat=True, extra_body=extra)
        clients.append(OpenAIClient(http, settings, records.append))
    planned = [PlannedRequest(index, 0.0, chat(index), tokens) for index in range(count)]
    bodies = [client.prepare(request) for client, request in zip(clients, planned, strict=True)]
    begin = time.perf_counter()
    await asyncio.gather(*(c.send(r, b, begin) for c, r, b in zip(clients, planned, bodies, strict=True)))
    seconds = time.perf_counter() - begin
    http.close()
    if stream and any(record.error for record in records):
        raise MistakeError(f"a request failed: {next(r.message for r in records if r.error)}")
    return seconds


def throughput(args: Any, llm: LLM, url: str, model: str) -> dict[str, Any]:
    """Tokens a second, of each kind of run; one of each to warm up."""
    total = args.chats * args.tokens
    found: dict[str, list[float]] = {"LLM.generate": [], "streamed": [], "not streamed": []}
    for _ in range(args.repeats + 1):
        found["LLM.generate"].append(total / offline_seconds(llm, args.chats, args.tokens))
        for name, stream in (("streamed", True), ("not streamed", False)):
            seconds = asyncio.run(served_seconds(url, model, args.chats, args.tokens, stream=stream))
            found[name].append(total / seconds)
    kept = {name: values[1:] for name, values in found.items()}
    shares = {
        name: median(a / b for a, b in zip(values, kept["LLM.generate"], strict=True)) for name, values in kept.items()
    }
    for name, values in kept.items():
        print(f"{args.chats} chats, {name:14}{median(values):10,.0f} tokens/s{100 * shares[name]:8.1f}%")
    return {
        "chats": args.chats,
        "tokens_each": args.tokens,
        "tokens_per_second": {name: [round(value, 1) for value in values] for name, values in kept.items()},
        "share_of_offline": {name: round(share, 4) for name, share in shares.items()},
    }


# ---- a long prompt among streams


async def long_prompt(
    url: str, model: str, streams: list[list[int]], prompt: list[int], before: float
) -> dict[str, Any]:
    """Gaps in seconds between the tokens of the streams, before the long prompt arrives and until its first token."""
    http = HTTPClient(ServerURL.parse(url))
    records: dict[str, list[RequestRecord]] = {"stream": [], "long": []}
    begin = time.perf_counter()

    async def send(kind: str, ids: list[int], tokens: int) -> None:
        client = OpenAIClient(http, RequestSettings(model), records[kind].append)
        request = PlannedRequest(0, 0.0, ids, tokens)
        await client.send(request, client.prepare(request), begin)

    running = [asyncio.create_task(send("stream", ids, 7000)) for ids in streams]
    await asyncio.sleep(before)
    arrival = time.perf_counter() - begin
    await send("long", prompt, 1)
    await asyncio.sleep(before / 2)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    http.close()
    (long,) = records["long"]
    if long.error is not None:
        raise MistakeError(f"the long prompt failed: {long.message}")
    first = long.times[0]
    gaps = [(end - start, end) for record in records["stream"] for start, end in pairwise(record.times)]
    calm = [length for length, end in gaps if end <= arrival and end > arrival - before / 2]
    during = [length for length, end in gaps if arrival < end <= first]
    return {
        "prompt_tokens": len(prompt),
        "streams": len(streams),
        "first_token_s": round(first - arrival, 3),
        "median_before_s": round(median(calm), 5),
        "median_during_s": round(median(during), 5),
        "p99_during_s": round(float(np.percentile(during, 99)), 5),
        "longest_during_s": round(max(during), 5),
        "longest_over_median_during": round(max(during) / median(during), 3),
        "longest_over_median_before": round(max(during) / median(calm), 3),
    }


def main() -> None:
    parser = Parser(__doc__ or "", "docs/serving")
    parser.add_argument("--chats", type=positive_int, default=16)
    parser.add_argument("--tokens", type=positive_int, default=128, help="of each chat (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--streams", type=positive_int, default=8)
    parser.add_argument("--prompt-tokens", type=positive_int, default=8000)
    parser.add_argument(
        "--max-stall", default="default,3,none", help="settings of the second part, with commas (default: %(default)s)"
    )
    args = parser.parse_args()
    output = prepare_output(args.output, plots=False)
    common = ["--model", args.model, *([] if args.threads is None else ["--threads", str(args.threads)])]
    name = "model"
    llm = load(args)
    with served([*common, "--served-model-name", name]) as url:
        speed = throughput(args, llm, url, name)
    streams = [ordinary_token_ids(llm, STREAM_PROMPT_TOKENS, seed=10 + i) for i in range(args.streams)]
    prompt = ordinary_token_ids(llm, args.prompt_tokens, seed=2)
    del llm
    arrivals: dict[str, dict[str, Any]] = {}
    for stall in args.max_stall.split(","):
        option = {"default": [], "none": ["--max-stall", "1000000"]}.get(stall, ["--max-stall", stall])
        with served([*common, "--served-model-name", name, *option]) as url:
            asyncio.run(served_seconds(url, name, 2, 8, stream=True))  # warms up
            fact = arrivals[stall] = asyncio.run(long_prompt(url, name, streams, prompt, 4.0))
        notice(f"max_stall {stall}: {fact}")
    criteria = [
        Criterion(
            "streamed chats, share of LLM.generate", speed["share_of_offline"]["streamed"], "at least", MIN_SHARE
        ),
        *(
            Criterion(
                f"max_stall {stall}: longest gap / median gap while the prompt comes in",
                fact["longest_over_median_during"],
                "under",
                MAX_RATIO,
            )
            for stall, fact in arrivals.items()
        ),
    ]
    report_criteria(criteria)
    write_json(
        output.with_name(f"{output.name}.json"),
        {
            "what": "a server's throughput beside LLM.generate, and streams while a long prompt comes in",
            "machine": machine_facts(args.threads),
            "model": model_facts(args.model),
            "throughput": speed,
            "long_prompt": arrivals,
            "criteria": [one.facts() for one in criteria],
        },
    )


if __name__ == "__main__":
    run_script(main)
