"""Reading configurations: the forms that files come in, and one clear line for each that cannot be used."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.models.harness import ALL, EditedCheckpoint, edited, fixture_path, load_fixture
from tinyllm.config import ModelConfig, RopeConfig
from tinyllm.errors import ConfigError
from tinyllm.models.registry import model_config
from weights import Tensor, open_checkpoint

LLAMA3 = {"factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 16}


def config_of(name: str, kind: str = "huggingface") -> ModelConfig:
    return load_fixture(name, kind, "reference").config


# ---- forms


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_older_files_name_theta_and_scaling_apart(type_key: str) -> None:
    old = {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": {type_key: "llama3", **LLAMA3}}
    assert model_config(edited("llama", "huggingface", old)) == config_of("llama")


def test_older_files_without_scaling() -> None:
    found = model_config(
        edited("qwen3", "huggingface", {"rope_parameters": ..., "rope_theta": 123, "rope_scaling": None})
    )
    assert found.rope == RopeConfig(theta=123.0, rotary_dim=8)
    assert model_config(edited("qwen3", "huggingface", {"rope_parameters": ...})).rope == RopeConfig(rotary_dim=8)


def test_llama3_scaling_falls_back_on_the_model_s_own_context() -> None:
    scaling = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": None}
    found = model_config(edited("llama", "huggingface", {"rope_parameters": scaling})).rope
    assert found is not None
    assert found.original_max_position == 64


def test_older_gemma_files_have_flat_fields() -> None:
    """rope_scaling is the global layers' alone; a pattern of n makes every n-th layer global."""
    old: dict[str, Any] = {
        "rope_parameters": ...,
        "rope_theta": 2000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "layer_types": ...,
        "sliding_window_pattern": 2,
    }
    found = model_config(edited("gemma3_capped", "huggingface", old))
    assert found == replace(config_of("gemma3_capped"), sliding_layers=(True, False, True))


def test_gemma_files_may_leave_out_what_the_architecture_fixes() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    metadata = {
        "model_type": "gemma3",
        "text_config": {**text, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "eos_token_id": [1, 106],
    }
    found = model_config(EditedCheckpoint(open_checkpoint(fixture_path("gemma3", "huggingface")), metadata=metadata))
    assert (found.num_heads, found.num_kv_heads, found.head_dim, found.vocab_size) == (8, 4, 256, 262_208)
    assert found.rope == RopeConfig(theta=1e6, rotary_dim=256, scaling="linear", factor=8.0)
    assert found.local_rope == RopeConfig(theta=1e4, rotary_dim=256)
    assert found.sliding_layers == tuple(layer % 6 != 5 for layer in range(34))
    assert found.attention_scale == 256**-0.5
    assert found.eos_token_ids == (1, 106)
    assert found.tie_word_embeddings


def test_defaults_of_llama_files() -> None:
    removed: dict[str, Any] = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias"), ...
    )
    found = model_config(edited("llama", "huggingface", removed))
    assert (found.num_kv_heads, found.head_dim, found.norm_eps, found.activation) == (4, 4, 1e-6, "silu")
    assert (found.qkv_bias, found.attention_output_bias, found.mlp_bias) == (False, False, False)


def test_qwen2_windows() -> None:
    everywhere = {"use_sliding_window": True, "sliding_window": 9}
    by_index = model_config(edited("qwen2", "huggingface", {**everywhere, "layer_types": ..., "max_window_layers": 2}))
    assert (by_index.sliding_window, by_index.sliding_layers) == (9, (False, False, True))
    types = ["sliding_attention", "full_attention", "full_attention"]
    by_type = model_config(edited("qwen2", "huggingface", {**everywhere, "layer_types": types}))
    assert by_type.sliding_layers == (True, False, False)
    off = model_config(
        edited("qwen2", "huggingface", {"sliding_window": 9, "layer_types": ..., "max_window_layers": 0})
    )
    assert (off.sliding_window, off.sliding_layers) == (None, ())


def test_gguf_linear_scaling_under_its_older_key() -> None:
    old = {"llama.rope.scaling.type": ..., "llama.rope.scaling.factor": ..., "llama.rope.scale_linear": 2.5}
    assert model_config(edited("llama_biased", "gguf", old)) == config_of("llama_biased", "gguf")


@pytest.mark.parametrize("edits", [{"llama.rope.scaling.type": "none"}, {"llama.rope.scaling.factor": 1.0}])
def test_gguf_without_scaling(edits: dict[str, Any]) -> None:
    found = model_config(edited("llama_biased", "gguf", edits)).rope
    assert found == RopeConfig(theta=500.0, rotary_dim=4)


def test_gguf_patterns_of_windows() -> None:
    key = "gemma3.attention.sliding_window_pattern"
    assert model_config(edited("gemma3", "gguf", {key: 3})).sliding_layers == (True, True, False) * 2
    assert model_config(edited("gemma3", "gguf", {key: 1})).sliding_layers == (False,) * 6
    given_each = np.array([True, False, False, True, True, False])
    assert model_config(edited("gemma3", "gguf", {key: given_each})).sliding_layers == tuple(given_each.tolist())
    assert model_config(edited("gemma3", "gguf", {"gemma3.attention.sliding_window": ...})).sliding_layers == ()


def test_gguf_gemma_keys() -> None:
    edits = {
        "gemma3.rope.freq_base_swa": 77.0,
        "gemma3.final_logit_softcapping": 30.0,
        "gemma3.attn_logit_softcapping": 50.0,
    }
    found = model_config(edited("gemma3", "gguf", edits))
    assert found.local_rope == RopeConfig(theta=77.0, rotary_dim=8)
    assert (found.logit_softcap, found.attention_softcap) == (30.0, 50.0)
    assert model_config(edited("gemma3", "gguf", {"gemma3.block_count": 62})).attention_scale == 8**-0.5  # 16 / 2 heads


def test_gguf_ends_of_turns() -> None:
    edits = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 7}
    assert model_config(edited("llama", "gguf", edits)).eos_token_ids == (2, 9, 7)


# ---- mistakes

HUGE = 10**400
HUGGINGFACE_MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": ...}, "model_type is missing"),
    ("llama", {"model_type": "mixtral"}, "'mixtral' is not supported; llama, mistral, qwen2"),
    ("llama", {"model_type": "x" * 10**6}, "xxx... is not supported"),
    ("llama", {"hidden_act": "\x1b[31m\n"}, r"hidden_act '\x1b[31m\n' is not supported"),
    ("llama", {"rope_parameters": {"k" * 10**6: 1}}, "kkk... is not supported"),
    ("llama", {"model_type": 3}, "model_type must be a string, not 3"),
    ("llama", {"model_type": ["llama"]}, "model_type must be a string"),
    ("llama", {"vocab_size": ...}, "vocab_size is missing"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": ...}, "num_hidden_layers is missing"),
    ("llama", {"num_hidden_layers": 1 << 20}, "num_hidden_layers must be an integer from 1 to 4096"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
    ("llama", {"num_attention_heads": -4}, "num_attention_heads must be an integer"),
    ("llama", {"num_attention_heads": "4"}, "num_attention_heads must be an integer from 1 to 1099511627776, not '4'"),
    ("llama", {"num_attention_heads": 4.0}, "num_attention_heads must be an integer"),
    ("llama", {"num_attention_heads": True}, "num_attention_heads must be an integer"),
    ("llama", {"num_key_value_heads": 3}, "num_heads (4) is not divisible by num_kv_heads (3)"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be an integer"),
    ("llama", {"head_dim": ..., "num_attention_heads": 6}, "hidden_size 16 is not divisible by num_attention_heads 6"),
    ("llama", {"head_dim": ..., "num_attention_heads": HUGE}, "num_attention_heads must be an integer"),
    ("llama", {"head_dim": 7}, "rotary_dim must be even"),
    ("llama", {"hidden_size": HUGE}, "hidden_size must be an integer"),
    ("llama", {"vocab_size": 1 << 30}, "vocab_size must be an integer from 1 to 16777216"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a finite number, not '1e-5'"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    ("llama", {"rms_norm_eps": HUGE}, "rms_norm_eps must be a finite number"),
    ("llama", {"rms_norm_eps": -1.0}, "norm_eps -1.0 is not in [0, 1)"),
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ("llama", {"hidden_act": 5}, "hidden_act must be a string"),
    ("llama", {"attention_bias": "no"}, "attention_bias must be true or false"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    ("llama", {"eos_token_id": 64}, "token id lies outside the vocabulary of 64"),
    ("llama", {"eos_token_id": [2, "3"]}, "eos_token_id must be a token id or a list"),
    ("llama", {"bos_token_id": -1}, "bos_token_id must be an integer from 0"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
    ("llama", {"num_local_experts": 8}, "num_local_experts is not supported"),
    ("llama", {"rope_parameters": 5}, "rope_parameters must be an object"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope factor must be positive"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor <"),
    ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "rope theta must be positive"),
    ("llama", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be a finite number"),
    ("llama", {"rope_parameters": {"mrope_section": [1, 2, 3]}}, "'mrope_section' is not supported"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be an integer from 1"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types that differ"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types must be a list of 3 layer types"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention", 3]}, "'linear_attention' is not supported"),
    ("qwen2", {"layer_types": "full_attention"}, "layer_types must be a list"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding layers need a sliding_window"),
    ("qwen2", {"layer_types": ..., "max_window_layers": -1}, "max_window_layers must be an integer from 0"),
    ("qwen3", {"num_experts": 128}, "num_experts is not supported"),
    ("gpt2", {"n_embd": ...}, "n_embd is missing"),
    ("gpt2", {"n_head": 5}, "n_embd 16 is not divisible by n_head 5"),
    ("gpt2", {"n_head": 0}, "n_head must be an integer"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' is not supported"),
    ("gpt2", {"activation_function": "silu"}, "activation_function 'silu' is not supported"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is not supported"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is not supported"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive"),
    ("gemma3", {"final_logit_softcapping": -1.0}, "logit_softcap must be 0 or positive"),
    ("gemma3", {"rope_parameters": {"chunked_attention": {}}}, "'chunked_attention' is not supported"),
    ("gemma3", {"text_config": []}, "text_config must be an object"),
    ("gemma3", {"text_config": {}}, "text_config: num_hidden_layers is missing"),
]

GGUF_MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"general.architecture": ...}, "general.architecture is missing"),
    ("llama", {"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported"),
    ("llama", {"general.architecture": "mistral"}, "general.architecture 'mistral' is not supported"),
    ("llama", {"llama.embedding_length": ...}, "llama.embedding_length is missing"),
    ("llama", {"llama.block_count": 10**9}, "llama.block_count must be an integer from 1 to 4096"),
    ("llama", {"llama.attention.head_count": 0}, "llama.attention.head_count must be an integer from 1"),
    ("llama", {"llama.attention.head_count": np.array([4, 4, 4])}, "llama.attention.head_count must be an integer"),
    ("llama", {"llama.attention.head_count_kv": 3}, "not divisible by num_kv_heads (3)"),
    ("llama", {"llama.attention.key_length": ..., "llama.attention.head_count": 3}, "16 is not divisible by 3 heads"),
    ("llama", {"llama.attention.value_length": 4}, "keys and values of different lengths"),
    ("llama", {"llama.attention.layer_norm_rms_epsilon": ...}, "layer_norm_rms_epsilon is missing"),
    ("llama", {"llama.expert_count": 8}, "llama.expert_count is not supported"),
    ("llama", {"llama.rope.dimension_count": 4}, "rope.dimension_count"),
    ("llama", {"llama.attention.key_length": 6, "llama.attention.value_length": 6}, "rope.dimension_count"),
    ("llama_biased", {"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' is not supported"),
    ("llama_biased", {"llama.rope.scaling.factor": -2.0}, "rope factor must be positive"),
    ("llama_biased", {"llama.rope.freq_base": "1e4"}, "llama.rope.freq_base must be a finite number"),
    ("llama", {"tokenizer.ggml.eos_token_id": 64}, "token id lies outside the vocabulary"),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": np.array([True])}, "1 layer types for 6 layers"),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": -1}, "sliding_window_pattern must be an integer from 0"),
]


@pytest.mark.parametrize(
    ("name", "kind", "edits", "message"),
    [(n, "huggingface", e, m) for n, e, m in HUGGINGFACE_MISTAKES] + [(n, "gguf", e, m) for n, e, m in GGUF_MISTAKES],
)
def test_each_mistake_gets_one_line_that_names_it(name: str, kind: str, edits: dict[str, Any], message: str) -> None:
    checkpoint = edited(name, kind, edits)
    with pytest.raises(ConfigError) as caught:
        model_config(checkpoint)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(checkpoint.path))
    assert "\n" not in text
    assert len(text) < 300


def test_gguf_divisors_are_checked() -> None:
    original = edited("llama", "gguf", {})
    for values, message in (
        (np.ones(3, np.float32), "has shape (3,) where (4,) is due"),
        (np.zeros(4, np.float32), "finite and positive"),
        (np.full(4, np.nan, np.float32), "finite and positive"),
    ):
        tensors = original.tensors | {"rope_freqs.weight": Tensor.from_float32("rope_freqs.weight", values)}
        with pytest.raises(ConfigError) as caught:
            model_config(EditedCheckpoint(original, tensors=tensors))
        assert message in str(caught.value)


def test_gguf_needs_an_embedding() -> None:
    original = edited("llama", "gguf", {})
    del original.tensors["token_embd.weight"]
    with pytest.raises(ConfigError, match="there is no matrix token_embd"):
        model_config(original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("linear"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ALL), st.data())
def test_any_value_anywhere_gives_a_configuration_or_a_config_error(name: str, data: st.DataObject) -> None:
    metadata = json.loads((fixture_path(name, "huggingface") / "config.json").read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=3))
    checkpoint = edited(name, "huggingface", {key: data.draw(JSON) for key in keys})
    with contextlib.suppress(ConfigError):
        model_config(checkpoint)
