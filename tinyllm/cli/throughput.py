"""The measurements of `tinyllm bench`: batches from prompt to end, and single decode steps at a context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING

from tinyllm.costs import step_nbytes

if TYPE_CHECKING:
    from tinyllm.engine.llm_engine import LLMEngine
    from tinyllm.llm import LLM

__all__ = ["BatchResult", "ContextResult", "DecodeRun", "decode", "measure_batch", "measure_contexts"]


@dataclass(frozen=True)
class BatchResult:
    """For one batch size: seconds of the whole batch, medians and each run, and tokens per second."""

    batch_size: int
    first_token_seconds: float
    all_tokens_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    total_tokens_per_second: float
    first_token_seconds_runs: list[float]
    all_tokens_seconds_runs: list[float]


@dataclass(frozen=True)
class ContextResult:
    """For one context: seconds of a step, their median over all runs and in each, and what a step reads at least."""

    context: int
    step_seconds: float
    decode_tokens_per_second: float
    step_seconds_runs: list[float]
    step_nbytes: int


@dataclass(frozen=True)
class DecodeRun:
    """The times of some decode steps, and how many keys each sequence's token saw in the middle one of them."""

    seconds: list[float]
    contexts: list[int]


def measure_batch(llm: LLM, batch_size: int, prompt_length: int, output_length: int, repeats: int) -> BatchResult:
    import numpy as np

    from tinyllm.sampling_params import SamplingParams

    random = np.random.default_rng(0)

    def seconds(max_tokens: int) -> float:
        """The time of one batch; each has new prompts, so that nothing is reused."""
        shape = (batch_size, prompt_length)
        prompts = random.integers(0, llm.config.vocab_size, shape, dtype=np.int32).tolist()
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - begin

    seconds(2)
    pairs = [(seconds(1), seconds(output_length)) for _ in range(repeats)]
    first_runs, total_runs = map(list, zip(*pairs, strict=True))
    first, total = median(first_runs), median(total_runs)
    return BatchResult(
        batch_size=batch_size,
        first_token_seconds=first,
        all_tokens_seconds=total,
        prefill_tokens_per_second=batch_size * prompt_length / first,
        decode_tokens_per_second=batch_size * (output_length - 1) / max(total - first, 1e-9),
        total_tokens_per_second=batch_size * (prompt_length + output_length) / total,
        first_token_seconds_runs=first_runs,
        all_tokens_seconds_runs=total_runs,
    )


def measure_contexts(llm: LLM, contexts: Sequence[int], steps: int, repeats: int) -> list[ContextResult]:
    """Decodes one sequence after a prompt of each length; they take turns, so that a slow moment meets all of them."""
    import numpy as np

    prompt = np.random.default_rng(0).integers(0, llm.config.vocab_size, max(contexts, default=0)).tolist()
    runs: dict[int, list[DecodeRun]] = {context: [] for context in contexts}
    for _ in range(repeats):
        for context, of_context in runs.items():
            of_context.append(decode(llm.engine, [prompt[:context]], steps))
    results = []
    for context, of_context in runs.items():
        seconds = median(chain.from_iterable(run.seconds for run in of_context))
        each = [median(run.seconds) for run in of_context]
        results.append(ContextResult(context, seconds, 1 / seconds, each, step_nbytes(llm, of_context[0].contexts)))
    return results


def decode(engine: LLMEngine, prompts: Sequence[Sequence[int]], steps: int) -> DecodeRun:
    """Prefills the prompts, then times decode steps of all of them together.

    A prompt that was computed before is found in the prefix cache, so that repeating a long one costs little.
    """
    from tinyllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=1 << 30, temperature=0, ignore_eos=True)
    names = [f"decode {index}" for index in range(len(prompts))]
    seconds: list[float] = []
    contexts: list[int] = []
    try:
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, prompt, params)
        sequences = [engine.requests[name].sequences[0] for name in names]
        while any(sequence.num_tokens == sequence.num_prompt_tokens for sequence in sequences):
            engine.step()
        for number in range(steps):
            if number == steps // 2:
                contexts = [sequence.num_tokens for sequence in sequences]
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
    finally:
        for name in names:
            engine.abort(name)
    return DecodeRun(seconds, contexts)
