"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, one fused QKV projection, an MLP with GELU, biases."""

from __future__ import annotations

from typing import Any

from tinyllm.backends.base import Backend, Batch, F32Array, KVCache
from tinyllm.config import ModelConfig
from tinyllm.models import gguf, huggingface
from tinyllm.models.layers import Attention, Decoder
from tinyllm.models.parameters import Adaptation, Parameters
from tinyllm.models.settings import MAX_LAYERS, Settings
from tinyllm.models.workspace import Workspace
from weights import Checkpoint, Tensor
from weights.errors import quoted

__all__ = ["GPT2", "adapt_huggingface", "from_gguf", "from_huggingface"]

BIASES: dict[str, Any] = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}


def from_huggingface(settings: Settings) -> ModelConfig:
    huggingface.refuse_unsupported(settings)
    settings.refuse("scale_attn_by_inverse_layer_idx")
    hidden_size, num_heads = settings.integer("n_embd"), settings.integer("n_head")
    if hidden_size % num_heads:
        raise settings.error(f"n_embd {hidden_size} is not divisible by n_head {num_heads}")
    head_dim = max(1, hidden_size // num_heads)
    return ModelConfig(
        architecture="gpt2",
        vocab_size=settings.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=settings.integer("n_inner", 4 * hidden_size),
        num_layers=settings.integer("n_layer", high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_position=settings.integer("n_positions"),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        attention_scale=head_dim**-0.5 if settings.flag("scale_attn_weights", True) else 1.0,
        activation=_gelu(settings),
        tie_word_embeddings=settings.flag("tie_word_embeddings", True),
        **BIASES,
        **huggingface.special_tokens(settings),
    )


def _gelu(settings: Settings) -> str:
    activation = huggingface.activation(settings, "activation_function", "gelu_new")
    if activation != "gelu_tanh":
        raise settings.error(f"activation_function {quoted(activation)} is not supported for gpt2")
    return activation


def from_gguf(settings: Settings, checkpoint: Checkpoint) -> ModelConfig:
    fields = gguf.general_fields(settings, checkpoint) | BIASES
    return ModelConfig(
        architecture="gpt2",
        norm_eps=settings.number("attention.layer_norm_epsilon"),
        activation="gelu_tanh",
        **fields,
    )


def adapt_huggingface(config: ModelConfig) -> dict[str, Adaptation]:
    """The original keeps its matrices as (in, out), for its Conv1D layers."""
    transpose = Adaptation(Tensor.transposed, transposes=True)
    return {"qkv": transpose, "o": transpose, "up": transpose, "down": transpose}


class GPT2Layer:
    def __init__(self, config: ModelConfig, backend: Backend, parameters: Parameters, layer: int) -> None:
        M, I = config.hidden_size, config.intermediate_size  # noqa: E741
        prefix = f"layers.{layer}."
        self.attention_norm = parameters.vector((prefix + "attention_norm", (M,)))
        self.attention_norm_bias = parameters.vector((prefix + "attention_norm_bias", (M,)))
        self.attention = Attention(config, backend, parameters, layer, fused=True)
        self.mlp_norm = parameters.vector((prefix + "mlp_norm", (M,)))
        self.mlp_norm_bias = parameters.vector((prefix + "mlp_norm_bias", (M,)))
        last = layer == config.num_layers - 1
        self.up = parameters.matrix((prefix + "up", (I, M)), near_output=last)
        self.up_bias = parameters.vector((prefix + "up_bias", (I,)))
        self.down = parameters.matrix((prefix + "down", (M, I)), near_output=last)
        self.down_bias = parameters.vector((prefix + "down_bias", (M,)))


class GPT2(Decoder):
    """Positions are learned, so a position past config.max_position has no embedding."""

    def __init__(self, config: ModelConfig, backend: Backend, parameters: Parameters) -> None:
        super().__init__(config, backend, parameters)
        M = config.hidden_size
        self.position_embedding = parameters.matrix(("position_embedding", (config.max_position, M)))
        self.final_norm_bias = parameters.vector(("final_norm_bias", (M,)))
        self.layers = [GPT2Layer(config, backend, parameters, layer) for layer in range(config.num_layers)]

    def stage(self, batch: Batch, workspace: Workspace) -> Batch:
        assert (batch.positions < self.config.max_position).all(), "a position past the learned ones"
        return super().stage(batch, workspace)

    def forward(self, batch: Batch, cache: KVCache, workspace: Workspace) -> F32Array:
        """See tinyllm.models.model.Model."""
        ops, eps = self.backend, self.config.norm_eps
        a = self.begin(batch, workspace)
        residual = a.residual
        ops.add(residual, ops.embedding(batch.positions, self.position_embedding, out=a.branch))
        for layer in self.layers:
            ops.layer_norm(residual, layer.attention_norm, layer.attention_norm_bias, eps, out=a.normed)
            layer.attention(a, None, batch, cache)
            ops.add(residual, a.branch)
            ops.layer_norm(residual, layer.mlp_norm, layer.mlp_norm_bias, eps, out=a.normed)
            ops.linear(a.normed, layer.up, layer.up_bias, out=a.mlp)
            ops.gelu(a.mlp, out=a.mlp)
            ops.add(residual, ops.linear(a.mlp, layer.down, layer.down_bias, out=a.branch))
        return ops.layer_norm(residual, self.final_norm, self.final_norm_bias, eps, out=a.normed)
