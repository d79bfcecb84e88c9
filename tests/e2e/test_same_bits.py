"""The same request gives the same bits, in every combination of what else happens; see same_bits.py for how.

The whole product of the gate, COMBINATIONS, is run; with large batches most of it as `slow` (scripts/test_slow.sh).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.same_bits import ALL, NUM_FORKS, Combination, FileSetting, Run, Setting, alone, run
from tests.models.quantised_files import make
from tinyllm.backends import cpu, reference
from tinyllm.backends.base import Batch
from tinyllm.backends.reference import ReferenceBackend
from tinyllm.engine import llm_engine
from tinyllm.engine.batch import build_batch
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.model_runner import ModelRunner
from tinyllm.engine.sequence import Task

BATCHES = (1, 2, 255, 256, 257)
BLOCK_SIZES = (16, 32, 48)
THREADS = (1, 2)
YES_NO = (False, True)
# of a block size B: 1, 7, B - 1, B, B + 1 tokens at once, all at once
CHUNKS: tuple[Callable[[int], int], ...] = (
    lambda _: 1,
    lambda _: 7,
    lambda block_size: max(1, block_size - 1),
    lambda block_size: block_size,
    lambda block_size: block_size + 1,
    lambda _: ALL,
)

RUNS = list(product(BATCHES, BLOCK_SIZES, THREADS, YES_NO))  # (batch, block size, threads, neighbours aborted)
PROBES = list(product(range(len(CHUNKS)), YES_NO, YES_NO, YES_NO, YES_NO))  # (chunk, warm, preempt, fork, restore)
COMBINATIONS = list(product(RUNS, PROBES))


def in_normal_run(batch: int, block_size: int, threads: int, abort: bool) -> bool:
    """All of the small batches; of the large ones each block size, thread count and abort, not all of their pairs."""
    at = BLOCK_SIZES.index(block_size)
    return batch <= 2 or (at == BATCHES.index(batch) - 2 and threads == (1, 2)[at % 2] and abort == (at != 1))


def probes(block_size: int, seed: int, prompt_len: int = 259) -> list[Combination]:
    """The combinations of PROBES. Where snapshots are taken and which steps are preempted goes round with the seed.

    A prompt in chunks of one token is preempted at one step in 16, and restored late: a sequence that was restored is
    computed again from there on, as it shares no blocks with others.
    """
    early = [1, block_size - 1, block_size, block_size + 1, 2 * block_size + 3, prompt_len // 2]
    late = [prompt_len - 4, prompt_len - 3, prompt_len - 1, prompt_len]
    result = []
    for i, (chunk, warm, preempt, fork, restore) in enumerate(PROBES):
        size = CHUNKS[chunk](block_size)
        splits = late if size == 1 and preempt else early + late
        result.append(
            Combination(
                size,
                warm,
                preempt,
                fork,
                restore,
                split=min(max(1, splits[(i + seed) % len(splits)]), prompt_len),
                stride=16 if size == 1 else 1,
                offset=i // 16 + seed,
            )
        )
    return result


def use_threads(number: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """With two threads even the smallest op is divided among them."""
    if number > 1:
        monkeypatch.setattr(cpu, "_PARALLEL_WORK", 0)
    return number


def test_nothing_is_left_out_of_the_product() -> None:
    assert len(RUNS) == 5 * 3 * 2 * 2
    assert len(PROBES) == 6 * 2 * 2 * 2 * 2
    assert len(set(COMBINATIONS)) == 5760
    normal = [options for options in RUNS if in_normal_run(*options)]
    assert len(normal) * len(PROBES) == 2592
    assert {batch for batch, _, _, _ in normal} == set(BATCHES)
    for block_size in BLOCK_SIZES:
        found = probes(block_size, seed=0)
        assert len(set(found)) == len(PROBES)
        sizes = {1, 7, block_size - 1, block_size, block_size + 1, ALL}
        for kind in product(YES_NO, YES_NO, YES_NO, YES_NO):
            assert {c.chunk for c in found if (c.warm, c.preempt, c.fork, c.restore) == kind} == sizes


@pytest.mark.parametrize(
    ("batch", "block_size", "threads", "abort"),
    [
        pytest.param(
            *options, marks=() if in_normal_run(*options) else pytest.mark.slow, id="-".join(map(str, options))
        )
        for options in RUNS
    ],
)
def test_the_gate(batch: int, block_size: int, threads: int, abort: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch x block size x threads x neighbours aborted x chunk x cold/warm x preempted x forked x restored."""
    use_threads(threads, monkeypatch)
    combinations = probes(block_size, seed=RUNS.index((batch, block_size, threads, abort)))
    together = batch if batch <= 2 else len(combinations)
    failures: list[str] = []
    preempted = copies = hits = 0
    for first in range(0, len(combinations), together):
        gate = Run(Setting(), batch=batch, block_size=block_size, threads=threads, abort=abort)
        failures += gate.go(combinations[first : first + together])
        preempted, copies, hits = preempted + gate.num_preempted, copies + gate.num_copies, hits + gate.num_hit_tokens
        assert gate.num_restored == sum(c.restore for c in combinations[first : first + together])
        if batch > 2:
            assert gate.sizes.most_common(1)[0][0] == batch
    assert not failures, "\n".join(failures[:10])
    assert preempted > 400 and copies > 100 and hits > 10_000, "what is to be covered did happen"


# ---- each factor to its end


@pytest.mark.parametrize("prefix_caching", YES_NO)
@pytest.mark.parametrize(
    ("chunk", "stride"), [(1, 16), pytest.param(1, 1, marks=pytest.mark.slow), (7, 1), (16, 1), (17, 1), (ALL, 1)]
)
def test_preemption_at_every_step(chunk: int, stride: int, prefix_caching: bool) -> None:
    combination = Combination(chunk, preempt=True, fork=True, stride=stride)
    gate = Run(Setting(), batch=1, block_size=16, prefix_caching=prefix_caching)
    assert gate.go([combination]) == []
    steps = -(-259 // chunk) // stride + NUM_FORKS * 7
    assert gate.num_preempted >= steps - 1


def test_restoring_at_every_split_point() -> None:
    """From an engine of other block and chunk sizes, within the prompt and within what was generated."""
    setting = Setting()
    expected = alone(setting)
    ids = expected.tokens[0]
    donor = setting.engine(block_size=48, max_batch_tokens=13)
    engine = setting.engine(block_size=16, max_batch_tokens=100)
    seen: dict[int, bytes] = {}

    def spy(token_ids: list[int], row: np.ndarray) -> np.ndarray:
        seen[len(token_ids) - 1] = row.tobytes()
        return row

    for split in range(1, len(ids)):
        donor.add_request("donor", ids[:split], setting.params(), task=Task.PREFILL, keep=True)
        while donor.has_unfinished_requests():
            donor.step()
        donated = donor.take_kept("donor")
        parked = engine.restore(donor.snapshot(donated))
        donor.release(donated)
        seen.clear()
        prompt = ids[: max(split, setting.prompt_len)]
        params = setting.params(max_tokens=min(2, len(ids) - len(prompt)), logits_processors=[spy])
        engine.add_request("resumed", prompt, params, resume_from=parked)
        while engine.has_unfinished_requests():
            engine.step()
        engine.release(parked)
        assert len(seen) == params.max_tokens
        for position, row in seen.items():
            assert row == expected.logits[0][position], f"split at {split}, position {position}"
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


@pytest.mark.parametrize("abort", YES_NO)
@pytest.mark.parametrize("prefix_caching", YES_NO)
def test_interrupted_steps(abort: bool, prefix_caching: bool) -> None:
    chosen = [c for c in probes(16, seed=5) if c.chunk > 7]
    gate = Run(Setting(), batch=80, block_size=16, abort=abort, interrupt=True, prefix_caching=prefix_caching)
    assert gate.go(chosen) == []
    assert gate.num_interrupts > 4


@pytest.mark.parametrize(("num_blocks", "prefix_caching"), [(22, True), (60, True), (60, False), (200, True)])
def test_a_shortage_of_blocks(num_blocks: int, prefix_caching: bool) -> None:
    """With room for one probe, for three, for some more; none is preempted on purpose."""
    chosen = [replace(c, preempt=False) for c in probes(16, seed=1) if c.chunk > 1]
    gate = Run(Setting(), batch=40, block_size=16, num_blocks=num_blocks, prefix_caching=prefix_caching)
    assert gate.go(chosen) == []


# ---- other settings


@pytest.mark.parametrize(
    ("kv_dtype", "window", "threads"), [("f16", None, 2), ("bf16", 37, 1), ("int8", None, 1), ("int8", 37, 2)]
)
def test_narrow_caches(kv_dtype: str, window: int | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(threads, monkeypatch)
    setting = Setting(kv_dtype=kv_dtype, window=window, sinks=5)
    chosen = [c for c in probes(32, seed=threads) if c.chunk > 1]
    assert run(setting, chosen, batch=100, block_size=32, threads=threads, abort=True) == []


WINDOWS = list(product([(37, 5), (1, 0), (16, 16), (200, 1)], BLOCK_SIZES, YES_NO))


@pytest.mark.parametrize(
    ("window", "sinks", "block_size", "abort"),
    [
        pytest.param(
            *streaming, block_size, abort, marks=() if streaming == (37, 5) or at % 7 == 0 else pytest.mark.slow
        )
        for at, (streaming, block_size, abort) in enumerate(WINDOWS)
    ],
)
def test_windows(window: int, sinks: int, block_size: int, abort: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """StreamingLLM: neither does it matter which of the blocks between sinks and window are others' by then."""
    threads = use_threads(1 + abort, monkeypatch)
    setting = Setting(window=window, sinks=sinks)
    chosen = [c for c in probes(block_size, seed=window) if c.chunk > 1 or window == 37]
    assert run(setting, chosen, batch=110, block_size=block_size, threads=threads, abort=abort) == []


@pytest.mark.parametrize("prefix_caching", YES_NO)
def test_windows_in_a_cache_smaller_than_the_prompt(prefix_caching: bool) -> None:
    setting = Setting(window=37, sinks=5)
    chosen = [replace(c, preempt=False, restore=False) for c in probes(16, seed=2) if c.chunk > 1]
    for pair in zip(chosen[::2], chosen[1::2], strict=True):
        assert run(setting, list(pair), batch=3, block_size=16, num_blocks=15, prefix_caching=prefix_caching) == []


@pytest.mark.parametrize("block_size", [1, 4, 7, 16])
@pytest.mark.parametrize("window", [None, 11])
def test_the_reference(block_size: int, window: int | None) -> None:
    setting = Setting("reference", window=window, sinks=3, prompt_len=22, new_tokens=4)
    chosen = probes(block_size, seed=block_size, prompt_len=22)[:: 1 if block_size == 4 else 5]
    assert run(setting, chosen, batch=1 + len(chosen), block_size=block_size, abort=True) == []


def test_the_reference_in_int8() -> None:
    setting = Setting("reference", kv_dtype="int8", window=11, sinks=3, prompt_len=22, new_tokens=4)
    chosen = probes(4, seed=3, prompt_len=22)[::4]
    assert run(setting, chosen, batch=1 + len(chosen), block_size=4, abort=True) == []


def test_the_reference_beyond_its_first_split() -> None:
    setting = Setting("reference", prompt_len=258, new_tokens=1)
    chosen = [
        Combination(100, fork=True),
        Combination(ALL, warm=True, preempt=True),
        Combination(51, restore=True, split=9),
    ]
    assert run(setting, chosen, batch=4, block_size=7) == []


# ---- a real model


def test_a_real_model(real_model: Path) -> None:
    """A sample of the product, over kernels of other sizes."""
    setting = FileSetting(path=real_model, prompt_len=50, new_tokens=3)
    chosen = [
        Combination(7, preempt=True, stride=3),
        Combination(16, fork=True),
        Combination(ALL, warm=True, preempt=True, fork=True),
        Combination(16, warm=True, restore=True, split=31),
        Combination(ALL, restore=True, preempt=True, split=33),
    ]
    failures = run(setting, chosen, batch=17, block_size=32, threads=2, abort=True)
    failures += run(setting, chosen[2:4], batch=2, block_size=16, threads=2)
    failures += run(setting, chosen[:1], batch=1, block_size=16, threads=1)
    failures += run(setting, chosen[4:], batch=1, block_size=48, threads=1)
    streaming = replace(setting, window=19, sinks=4)
    failures += run(streaming, chosen[1:4], batch=9, block_size=16, threads=2, abort=True)
    assert not failures, "\n".join(failures[:10])


def test_a_real_model_beyond_the_first_split(real_model: Path) -> None:
    setting = FileSetting(path=real_model, prompt_len=258, new_tokens=1)
    chosen = [Combination(48, fork=True), Combination(ALL, warm=True), Combination(100, restore=True, split=33)]
    assert run(setting, chosen, batch=4, block_size=16, threads=2) == []


# ---- quantised weights


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("kinds", [["Q4_1", "Q8_0"], ["Q6_K", "Q4_K", "Q5_0"]], ids="-".join)
def test_quantised_weights(kinds: list[str], activations: str, tmp_path: Path) -> None:
    """A sample of the product, over integer products of few and of many rows."""
    path, _ = make(tmp_path, kinds)
    setting = FileSetting(path=path, activations=activations, prompt_len=70, new_tokens=3)
    chosen = [
        Combination(1, preempt=True, stride=16),
        Combination(7, preempt=True, stride=3),
        Combination(17, fork=True),
        Combination(ALL, warm=True, preempt=True, fork=True),
        Combination(16, warm=True, restore=True, split=31),
    ]
    failures = run(setting, chosen, batch=17, block_size=16, threads=2, abort=True)
    failures += run(setting, chosen[1:3], batch=2, block_size=32, threads=1)
    failures += run(replace(setting, kv_dtype="f16"), chosen[2:4], batch=5, block_size=48, threads=2)
    failures += run(replace(setting, kv_dtype="int8"), chosen[1:], batch=6, block_size=16, threads=2)
    failures += run(replace(setting, kv_dtype="bf16"), chosen, batch=17, block_size=16, threads=2, abort=True)
    streaming = replace(setting, kv_dtype="bf16", window=37, sinks=5)  # heads of 32: on AMX where there is one
    failures += run(streaming, [c for c in chosen if not c.restore], batch=9, block_size=32, threads=2)
    assert not failures, "\n".join(failures[:10])


# ---- the gate notices what is wrong


def swapped_block_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block of each sequence stands where its first does."""

    def swap(*arguments: Any) -> Batch:
        batch = build_batch(*arguments)
        if batch.block_tables.shape[1] > 1:
            batch.block_tables[:, :2] = batch.block_tables[:, 1::-1].copy()
        return batch

    monkeypatch.setattr(llm_engine, "build_batch", swap)


def missed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ModelRunner.forward
    monkeypatch.setattr(ModelRunner, "forward", lambda runner, batch, copies: forward(runner, batch, copies[:-1]))


def chunk_dependent_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention splits its keys by the number of tokens in the step."""
    attention = ReferenceBackend.paged_attention

    def split_by_chunk(self: ReferenceBackend, q: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "SPLIT_KEYS", 2 + len(q))
            return attention(self, q, *arguments, **options)

    monkeypatch.setattr(ReferenceBackend, "paged_attention", split_by_chunk)


@pytest.mark.parametrize("break_it", [swapped_block_id, missed_copy, chunk_dependent_reduction])
def test_the_gate_notices(break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("reference", prompt_len=22, new_tokens=4)
    alone(setting)
    break_it(monkeypatch)
    for batch in (1, 9):
        failures = run(setting, [Combination(7, fork=True)], batch=batch, block_size=4)
        assert any("the logits" in failure for failure in failures)


def test_the_gate_notices_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are nobody's hold NaN, so that to read one shows."""
    setting = Setting("reference", prompt_len=22, new_tokens=4)
    alone(setting)
    monkeypatch.setattr(LLMEngine, "check_invariants", lambda engine: None)
    gate = Run(setting, batch=1, block_size=4)
    prepare = gate.engine.scheduler.schedule

    def lose_a_block() -> Any:
        output = prepare()
        table = output.scheduled[0].sequence.block_table
        table[0] = next(b for b in reversed(gate.engine.block_manager._free) if b != table[0])
        return output

    gate.engine.scheduler.schedule = lose_a_block  # type: ignore[method-assign]
    with pytest.raises((AssertionError, KeyError)):
        assert gate.go([Combination(7)]) == []
