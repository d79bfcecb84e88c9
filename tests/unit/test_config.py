"""Configuration is frozen and rejects what contradicts itself, in one line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from tinyllm.config import EngineConfig, ModelConfig, RopeConfig
from tinyllm.errors import ConfigError

GOOD: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position": 128,
    "norm_eps": 1e-5,
    "attention_scale": 0.35,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "num_heads must be an integer"),
        ({"num_kv_heads": 3}, "not divisible"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"attention_scale": 0.0}, "attention_scale"),
        ({"activation": "relu9"}, "activation 'relu9' is not supported"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_layers": (True, False)}, "need a sliding_window"),
        ({"sliding_layers": (True,), "sliding_window": 4}, "1 layer types for 2 layers"),
        ({"eos_token_ids": (64,)}, "outside the vocabulary"),
        ({"bos_token_id": -1}, "outside the vocabulary"),
        ({"rope": RopeConfig(rotary_dim=16)}, "larger than head_dim"),
        ({"attention_softcap": -1.0}, "attention_softcap"),
        ({"logit_softcap": float("inf")}, "logit_softcap"),
        ({"embedding_scale": float("nan")}, "embedding_scale"),
    ],
)
def test_a_model_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    ModelConfig(**GOOD)
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**GOOD | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_dim": 7},
        {"rotary_dim": 0},
        {"theta": 0.0},
        {"theta": float("inf")},
        {"scaling": "magic"},
        {"factor": -1.0},
        {"scaling": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        {"freq_divisors": (1.0,)},
        {"freq_divisors": (1.0, 1.0, 1.0, float("nan"))},
    ],
)
def test_a_rope_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RopeConfig(**{"rotary_dim": 8} | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocksize": 16}, "unknown engine option 'blocksize'; the options are"),
        ({"block_size": 0}, "block_size"),
        ({"max_batch_tokens": -1}, "max_batch_tokens"),
        ({"max_batch_tokens": 1.5}, "max_batch_tokens"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"kv_dtype": "int3"}, "kv_dtype must be one of f32, f16, bf16"),
        ({"activations": "int4"}, "activations must be one of f32, int8, not 'int4'"),
        ({"num_threads": 0}, "num_threads"),
        ({"debug_checks": 1}, "debug_checks"),
        ({"device": 3}, "device"),
    ],
)
def test_engine_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_options(options)


def test_configuration_is_frozen() -> None:
    config = EngineConfig()
    with pytest.raises(FrozenInstanceError):
        config.block_size = 3  # type: ignore[misc]


def test_the_window_of_a_layer() -> None:
    config = ModelConfig(**GOOD, sliding_window=5, sliding_layers=(True, False))
    assert [config.window_of_layer(i) for i in range(2)] == [5, None]
    assert ModelConfig(**GOOD).window_of_layer(0) is None
