"""The same-bits gate on the GPU's kernels, under the emulator: see tests/e2e/same_bits.py for what a Run does.

Every row of logits that tokens are sampled from, and the keys and values in the cache, byte for byte as by single
passes alone. Prompts of 37 tokens run in chunks of all kinds; those of 257 cross the first split of attention.
"""

from __future__ import annotations

import pytest

from tests.e2e.same_bits import ALL, Combination, Run, Setting

SHORT = Setting(device="cuda-emulated", prompt_len=37, new_tokens=3)
LONG = Setting(device="cuda-emulated", prompt_len=257, new_tokens=1)


def failures(setting: Setting, combinations: list[Combination], **options: int | bool) -> list[str]:
    run = Run(setting, **{"batch": 3, "block_size": 16, **options})
    return run.go(combinations)


def test_chunks_warmth_forks_preemption_and_restoring_change_no_bit() -> None:
    """Probes of six kinds in one engine, neighbours coming and going, one aborted before every step."""
    combinations = [
        Combination(chunk=7, warm=True),
        Combination(chunk=15, fork=True),
        Combination(chunk=16, preempt=True),
        Combination(chunk=17, preempt=True, fork=True, warm=True),
        Combination(chunk=ALL, restore=True, split=20),
        Combination(chunk=ALL, fork=True, warm=True),
    ]
    assert not failures(SHORT, combinations, batch=8, abort=True)


@pytest.mark.slow
def test_a_token_at_a_time() -> None:
    assert not failures(SHORT, [Combination(chunk=1), Combination(chunk=1, preempt=True, stride=4)], batch=4)


def test_a_lone_request_has_the_bits_of_one_among_neighbours() -> None:
    assert not failures(SHORT, [Combination(chunk=ALL)], batch=1)
    assert not failures(SHORT, [Combination(chunk=5)], batch=2, block_size=8)


def test_prompts_beyond_the_first_split() -> None:
    combinations = [Combination(chunk=ALL), Combination(chunk=255, warm=True)]
    assert not failures(LONG, combinations, batch=2)


@pytest.mark.parametrize("kv_dtype", ["f16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_tensor_core_attention(kv_dtype: str) -> None:
    setting = Setting(device="cuda-emulated", kv_dtype=kv_dtype, prompt_len=37, new_tokens=2)
    assert not failures(setting, [Combination(chunk=7, fork=True), Combination(chunk=16, preempt=True)], batch=3)


def test_windows_and_sinks() -> None:
    setting = Setting(device="cuda-emulated", window=20, sinks=3, prompt_len=37, new_tokens=2)
    combinations = [Combination(chunk=7), Combination(chunk=ALL, fork=True), Combination(chunk=16, preempt=True)]
    assert not failures(setting, combinations, batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 15, 16, 17, 255, 256, 257, ALL])
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_the_long_prompt_in_every_chunk_and_block_size(chunk: int, block_size: int) -> None:
    flags = [(warm, preempt, fork) for warm in (False, True) for preempt in (False, True) for fork in (False, True)]
    stride = max(1, 40 // chunk)
    combinations = [
        Combination(chunk, warm=warm, preempt=preempt, fork=fork, stride=stride, offset=index)
        for index, (warm, preempt, fork) in enumerate(flags)
    ]
    assert not failures(LONG, combinations, batch=9, block_size=block_size, abort=True)
