"""Gemma 3's text decoder (arXiv:2503.19786): layers with a sliding window between global ones, with a RoPE each.

Norms before and after attention and MLP, norms over the heads of q and k, scaled embeddings, and soft-capping
(arXiv:2408.00118) where it is configured. Vision towers are left out.
"""

from __future__ import annotations

import math

import numpy as np

from tinyllm.backends.base import Backend, Batch, F32Array, KVCache
from tinyllm.config import ModelConfig, RopeConfig
from tinyllm.models import gguf, huggingface
from tinyllm.models.layers import Attention, Decoder, GatedMLP
from tinyllm.models.parameters import Adaptation, Parameters
from tinyllm.models.settings import MAX_LAYERS, Settings
from tinyllm.models.workspace import Workspace
from weights import Checkpoint, Tensor
from weights.errors import quoted

__all__ = ["Gemma3", "adapt_huggingface", "from_gguf", "from_huggingface"]

LOCAL_THETA, GLOBAL_THETA = 10_000.0, 1_000_000.0
GLOBAL_EVERY = 6  # in the released models, each sixth layer is global
LAYERS_OF_27B = 62


def from_huggingface(settings: Settings) -> ModelConfig:
    """A text model's config, or a multimodal one's `text_config`, which leaves out what is as in the 4B model.

    The factor on the embeddings is sqrt(hidden_size) in float32, as everything here is computed; run in bfloat16
    the original rounds it to that.
    """
    text = settings.section("text_config") or settings
    huggingface.refuse_unsupported(settings)
    huggingface.refuse_unsupported(text)
    num_layers = text.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden_size, head_dim = text.integer("hidden_size"), text.integer("head_dim", 256)
    attention_bias = text.flag("attention_bias", False)
    query_scalar = text.number("query_pre_attn_scalar", 256)
    if query_scalar <= 0:
        raise text.error(f"query_pre_attn_scalar must be positive, not {query_scalar}")
    tied = text.flag("tie_word_embeddings", settings.flag("tie_word_embeddings", True))
    tokens = huggingface.special_tokens(settings if settings.has("eos_token_id") else text)
    rope, local_rope = _read_ropes(text, head_dim)
    return ModelConfig(
        architecture="gemma3",
        vocab_size=text.integer("vocab_size", 262_208),
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=text.integer("num_attention_heads", 8),
        num_kv_heads=text.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        max_position=text.integer("max_position_embeddings", 131_072),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        attention_scale=query_scalar**-0.5,
        activation=huggingface.activation(text, "hidden_activation", "gelu_pytorch_tanh"),
        rope=rope,
        local_rope=local_rope,
        sliding_window=text.integer("sliding_window", 4096),
        sliding_layers=text.layer_types(num_layers) or _sliding_layers(text, num_layers),
        attention_softcap=text.number("attn_logit_softcapping", 0.0),
        logit_softcap=text.number("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(hidden_size),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        tie_word_embeddings=tied,
        **tokens,
    )


def _sliding_layers(text: Settings, num_layers: int) -> tuple[bool, ...]:
    every = text.integer("sliding_window_pattern", GLOBAL_EVERY)
    return tuple((layer + 1) % every != 0 for layer in range(num_layers))


def _read_ropes(text: Settings, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """The global and the local layers' RoPE: nested `rope_parameters`, or the older flat fields.

    `rope_scaling` is the global layers' alone.
    """
    max_position = text.integer("max_position_embeddings", 131_072)
    global_theta = text.number("rope_theta", GLOBAL_THETA)
    local_theta = text.number("rope_local_base_freq", LOCAL_THETA)
    nested = text.section("rope_parameters")
    if nested is None:
        local = RopeConfig(theta=local_theta, rotary_dim=head_dim)
        return huggingface.rope_of_section(text.section("rope_scaling"), global_theta, head_dim, max_position), local
    for key in nested.values:
        if key not in ("full_attention", "sliding_attention"):
            raise nested.error(f"{quoted(key)} is not supported")
    return (
        huggingface.rope_of_section(nested.section("full_attention"), global_theta, head_dim, max_position),
        huggingface.rope_of_section(nested.section("sliding_attention"), local_theta, head_dim, max_position),
    )


def from_gguf(settings: Settings, checkpoint: Checkpoint) -> ModelConfig:
    """The files leave unsaid what is alike in all released models, and the 27B model's attention scale."""
    fields = gguf.decoder_fields(settings, checkpoint)
    if fields["num_layers"] == LAYERS_OF_27B:
        fields["attention_scale"] = (fields["hidden_size"] / fields["num_heads"]) ** -0.5
    fields |= gguf.sliding_fields(settings, fields["num_layers"], default_pattern=GLOBAL_EVERY)
    return ModelConfig(
        architecture="gemma3",
        **fields,
        activation="gelu_tanh",
        local_rope=RopeConfig(theta=settings.number("rope.freq_base_swa", LOCAL_THETA), rotary_dim=fields["head_dim"]),
        attention_softcap=settings.number("attn_logit_softcapping", 0.0),
        logit_softcap=settings.number("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(fields["hidden_size"]),
    )


def adapt_huggingface(config: ModelConfig) -> dict[str, Adaptation]:
    """The original stores its norms' weights less one; GGUF files have them whole."""
    plus_one = Adaptation(lambda t: Tensor.from_float32(t.name, t.dequantize() + np.float32(1)))
    roles = ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm", "q_norm", "k_norm", "final_norm")
    return dict.fromkeys(roles, plus_one)


class Gemma3Layer:
    def __init__(self, config: ModelConfig, backend: Backend, parameters: Parameters, layer: int) -> None:
        M, prefix = config.hidden_size, f"layers.{layer}."
        self.attention_norm = parameters.vector((prefix + "attention_norm", (M,)))
        self.attention = Attention(config, backend, parameters, layer, qk_norm=True)
        self.post_attention_norm = parameters.vector((prefix + "post_attention_norm", (M,)))
        self.mlp_norm = parameters.vector((prefix + "mlp_norm", (M,)))
        self.mlp = GatedMLP(config, backend, parameters, layer)
        self.post_mlp_norm = parameters.vector((prefix + "post_mlp_norm", (M,)))
        self.is_local = config.window_of_layer(layer) is not None


class Gemma3(Decoder):
    def __init__(self, config: ModelConfig, backend: Backend, parameters: Parameters) -> None:
        super().__init__(config, backend, parameters)
        self.layers = [Gemma3Layer(config, backend, parameters, layer) for layer in range(config.num_layers)]
        self.embedding_scale = config.embedding_scale

    def forward(self, batch: Batch, cache: KVCache, workspace: Workspace) -> F32Array:
        """See tinyllm.models.model.Model."""
        ops, eps = self.backend, self.config.norm_eps
        a = self.begin(batch, workspace)
        ops.scale(a.residual, self.embedding_scale)
        ops.rms_norm(a.residual, self.layers[0].attention_norm, eps, out=a.normed)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            layer.attention(a, a.local_rotation if layer.is_local else a.rotation, batch, cache)
            ops.rms_norm(a.branch, layer.post_attention_norm, eps, out=a.branch)
            ops.add_rms_norm(a.residual, a.branch, layer.mlp_norm, eps, out=a.normed)
            layer.mlp(a)
            ops.rms_norm(a.branch, layer.post_mlp_norm, eps, out=a.branch)
            ops.add_rms_norm(a.residual, a.branch, next_norm, eps, out=a.normed)
        return a.normed
