"""What the config.json of all architectures share: sizes, RoPE, biases, and the features that are refused."""

from __future__ import annotations

from typing import Any

from tinyllm.config import RopeConfig
from tinyllm.models.settings import MAX_LAYERS, Settings
from weights.errors import quoted

__all__ = ["activation", "decoder_fields", "read_rope", "refuse_unsupported"]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}


def activation(settings: Settings, name: str, default: str) -> str:
    """The activation under `name`, as ModelConfig calls it."""
    value = settings.text(name, default)
    if value not in _ACTIVATIONS:
        raise settings.error(f"{name} {quoted(value)} is not supported")
    return _ACTIVATIONS[value]


def refuse_unsupported(settings: Settings) -> None:
    """Raises ConfigError for quantised checkpoints, mixtures of experts and models that are no decoders."""
    settings.refuse("quantization_config", "compression_config")
    settings.refuse("num_experts", "num_local_experts", "n_routed_experts")
    settings.refuse("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention")


def decoder_fields(settings: Settings, *, head_dim: int | None = None) -> dict[str, Any]:
    """ModelConfig's fields that llama and its descendants spell alike. head_dim: the architecture's default."""
    refuse_unsupported(settings)
    num_heads = settings.integer("num_attention_heads")
    hidden_size = settings.integer("hidden_size")
    if head_dim is None and not settings.has("head_dim") and hidden_size % num_heads:
        raise settings.error(f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_heads}")
    head_dim = settings.integer("head_dim", head_dim or max(1, hidden_size // num_heads))
    return {
        "vocab_size": settings.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": settings.integer("intermediate_size"),
        "num_layers": settings.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": settings.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "max_position": settings.integer("max_position_embeddings"),
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "attention_scale": head_dim**-0.5,
        "activation": activation(settings, "hidden_act", "silu"),
        "rope": read_rope(settings, head_dim),
        "tie_word_embeddings": settings.flag("tie_word_embeddings", False),
        **special_tokens(settings),
    }


def special_tokens(settings: Settings) -> dict[str, Any]:
    return {
        "bos_token_id": settings.optional_integer("bos_token_id", low=0),
        "eos_token_ids": settings.token_ids("eos_token_id"),
    }


def read_rope(settings: Settings, head_dim: int) -> RopeConfig:
    """RoPE from `rope_theta` and `rope_scaling`, or from the `rope_parameters` that newer files have instead."""
    section = settings.section("rope_parameters") or settings.section("rope_scaling")
    theta = settings.number("rope_theta", 10000.0)
    if settings.number("partial_rotary_factor", 1.0) != 1.0:
        raise settings.error("partial_rotary_factor is not supported")
    return rope_of_section(section, theta, head_dim, settings.integer("max_position_embeddings"))


def rope_of_section(section: Settings | None, theta: float, head_dim: int, max_position: int) -> RopeConfig:
    """RoPE from one set of rope parameters. theta: the base where the section names none."""
    if section is None:
        return RopeConfig(theta=theta, rotary_dim=head_dim)
    for key in section.values:
        if key not in _ROPE_KEYS:
            raise section.error(f"{quoted(key)} is not supported")
    if section.number("partial_rotary_factor", 1.0) != 1.0:
        raise section.error("partial_rotary_factor is not supported")
    theta = section.number("rope_theta", theta)
    scaling = section.text("rope_type", section.text("type", "default"))
    if scaling == "default":
        return RopeConfig(theta=theta, rotary_dim=head_dim)
    if scaling == "linear":
        return RopeConfig(theta=theta, rotary_dim=head_dim, scaling="linear", factor=section.number("factor"))
    if scaling == "llama3":
        return RopeConfig(
            theta=theta,
            rotary_dim=head_dim,
            scaling="llama3",
            factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
            original_max_position=section.integer("original_max_position_embeddings", max_position),
        )
    raise section.error(f"RoPE scaling {quoted(scaling)} is not supported")
