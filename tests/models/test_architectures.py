"""Every architecture against transformers, from both file formats; and the same bits however it is scheduled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.models.harness import (
    ALL,
    DEVICES,
    FILES,
    WITH_GGUF,
    difference,
    expected,
    fixture_path,
    load_fixture,
    load_with,
    run,
)
from tinyllm.config import ModelConfig, RopeConfig
from tinyllm.models.registry import model_config
from weights import open_checkpoint


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "kind"), FILES)
def test_logits_agree_with_transformers(name: str, kind: str, device: str) -> None:
    sequences, wanted = expected(name)
    found = run(load_fixture(name, kind, device), sequences)
    assert found.shape == wanted.shape
    assert difference(found, wanted) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_scheduling_changes_no_bit(name: str, device: str) -> None:
    model, (sequences, _) = load_fixture(name, "huggingface", device), expected(name)
    at_once = run(model, sequences)
    for schedule in ("one_by_one", "odd_chunks"):
        assert run(model, sequences, schedule, seed=1).tobytes() == at_once.tobytes(), schedule
    alone = np.concatenate([run(model, [ids], seed=2) for ids in sequences])
    assert alone.tobytes() == at_once.tobytes()


@pytest.mark.parametrize("name", WITH_GGUF)
def test_both_formats_give_one_configuration(name: str) -> None:
    with open_checkpoint(fixture_path(name, "huggingface")) as folder, open_checkpoint(fixture_path(name, "gguf")) as f:
        wanted, found = model_config(folder), model_config(f)
    assert found.norm_eps == pytest.approx(wanted.norm_eps)
    found = replace(found, norm_eps=wanted.norm_eps)  # a float32 in GGUF
    if name == "mistral":
        found = replace(found, architecture="mistral")
    if name == "llama":  # the scaling comes as divisors
        assert found.rope is not None
        assert found.rope.freq_divisors is not None
        found = replace(found, rope=wanted.rope)
    assert found == wanted


def rope(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.rope is not None
    return replace(config, rope=replace(config.rope, **changes))


CHANGES: list[tuple[str, Callable[[ModelConfig], ModelConfig]]] = [
    ("llama", lambda c: rope(c, scaling="none")),
    ("llama", lambda c: rope(c, factor=5.0)),
    ("llama", lambda c: rope(c, original_max_position=17)),
    ("llama", lambda c: rope(c, high_freq_factor=5.0)),
    ("llama", lambda c: replace(c, attention_scale=0.34)),
    ("llama", lambda c: replace(c, activation="gelu_tanh")),
    ("llama_biased", lambda c: rope(c, factor=2.4)),
    ("llama_biased", lambda c: rope(c, theta=600.0)),
    ("mistral", lambda c: replace(c, sliding_layers=())),
    ("mistral", lambda c: replace(c, sliding_window=5)),
    ("mistral", lambda c: replace(c, sliding_window=7)),
    ("qwen2_window", lambda c: replace(c, sliding_layers=(True, True, True))),
    ("qwen2_window", lambda c: replace(c, sliding_layers=(False, False, True))),
    ("qwen2_window", lambda c: replace(c, sliding_window=6)),
    ("gemma3", lambda c: replace(c, local_rope=c.rope)),
    ("gemma3", lambda c: replace(c, rope=c.local_rope)),
    ("gemma3", lambda c: replace(c, sliding_layers=(True,) * 6)),
    ("gemma3", lambda c: replace(c, sliding_window=4)),
    ("gemma3", lambda c: replace(c, embedding_scale=1.0)),
    ("gemma3", lambda c: replace(c, activation="silu")),
    ("gemma3_capped", lambda c: replace(c, attention_softcap=0.0)),
    ("gemma3_capped", lambda c: replace(c, attention_softcap=2.5)),
    ("gemma3_capped", lambda c: replace(c, logit_softcap=0.0)),
    ("gemma3_capped", lambda c: replace(c, attention_scale=8**-0.5)),
    ("gemma3_capped", lambda c: rope(c, factor=2.0)),
    ("gemma3_capped", lambda c: replace(c, local_rope=RopeConfig(theta=60.0, rotary_dim=8))),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_the_fixtures_would_notice(name: str, change: Callable[[ModelConfig], ModelConfig]) -> None:
    """A model configured otherwise misses the expected logits by far: what the agreement above is worth."""
    sequences, wanted = expected(name)
    config = load_fixture(name, "huggingface", "reference").config
    assert difference(run(load_with(change(config), name), sequences), wanted) > 1e-3
