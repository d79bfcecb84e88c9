"""Llama 1 to 3 and its many descendants (SmolLM2 among them): arXiv:2302.13971, arXiv:2407.21783.

Pre-norm layers with RMSNorm, rotary attention with grouped keys and values, a gated MLP, no biases as a rule.
"""

from __future__ import annotations

from functools import partial

from tinyllm.backends.base import Backend, Batch, F32Array, KVCache
from tinyllm.config import ModelConfig
from tinyllm.models import gguf, huggingface
from tinyllm.models.layers import Attention, Decoder, GatedMLP
from tinyllm.models.parameters import Adaptation, Parameters
from tinyllm.models.settings import Settings
from tinyllm.models.workspace import Workspace
from weights import Checkpoint

__all__ = ["Llama", "adapt_gguf", "from_gguf", "from_huggingface"]


def from_huggingface(settings: Settings) -> ModelConfig:
    attention_bias = settings.flag("attention_bias", False)
    return ModelConfig(
        architecture="llama",
        **huggingface.decoder_fields(settings),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=settings.flag("mlp_bias", False),
    )


def from_gguf(settings: Settings, checkpoint: Checkpoint) -> ModelConfig:
    """Mistral's files call themselves llama too."""
    return ModelConfig(architecture="llama", **gguf.decoder_fields(settings, checkpoint))


def adapt_gguf(config: ModelConfig) -> dict[str, Adaptation]:
    undo = Adaptation(partial(gguf.undo_interleaving, head_dim=config.head_dim))
    return {"q": undo, "k": undo, "q_bias": undo, "k_bias": undo}


class LlamaLayer:
    def __init__(
        self, config: ModelConfig, backend: Backend, parameters: Parameters, layer: int, *, qk_norm: bool
    ) -> None:
        M = config.hidden_size
        self.attention_norm = parameters.vector((f"layers.{layer}.attention_norm", (M,)))
        self.attention = Attention(config, backend, parameters, layer, qk_norm=qk_norm)
        self.mlp_norm = parameters.vector((f"layers.{layer}.mlp_norm", (M,)))
        self.mlp = GatedMLP(config, backend, parameters, layer)


class Llama(Decoder):
    """The decoder that mistral, qwen2 and qwen3 are variations of."""

    qk_norm = False

    def __init__(self, config: ModelConfig, backend: Backend, parameters: Parameters) -> None:
        super().__init__(config, backend, parameters)
        self.layers = [
            LlamaLayer(config, backend, parameters, layer, qk_norm=self.qk_norm) for layer in range(config.num_layers)
        ]

    def forward(self, batch: Batch, cache: KVCache, workspace: Workspace) -> F32Array:
        """See tinyllm.models.model.Model."""
        ops, eps = self.backend, self.config.norm_eps
        a = self.begin(batch, workspace)
        ops.rms_norm(a.residual, self.layers[0].attention_norm, eps, out=a.normed)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            layer.attention(a, a.rotation, batch, cache)
            ops.add_rms_norm(a.residual, a.branch, layer.mlp_norm, eps, out=a.normed)
            layer.mlp(a)
            ops.add_rms_norm(a.residual, a.branch, next_norm, eps, out=a.normed)
        return a.normed
