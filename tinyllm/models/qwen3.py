"""Qwen 3, dense: llama with a norm over each head of q and k, and its own head dimension (arXiv:2505.09388)."""

from __future__ import annotations

from tinyllm.config import ModelConfig
from tinyllm.models import gguf, huggingface
from tinyllm.models.llama import Llama
from tinyllm.models.qwen2 import window_fields
from tinyllm.models.settings import Settings
from weights import Checkpoint

__all__ = ["Qwen3", "from_gguf", "from_huggingface"]


def from_huggingface(settings: Settings) -> ModelConfig:
    fields = huggingface.decoder_fields(settings, head_dim=128)
    attention_bias = settings.flag("attention_bias", False)
    return ModelConfig(
        architecture="qwen3",
        **fields,
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        **window_fields(settings, fields["num_layers"]),
    )


def from_gguf(settings: Settings, checkpoint: Checkpoint) -> ModelConfig:
    return ModelConfig(architecture="qwen3", **gguf.decoder_fields(settings, checkpoint))


class Qwen3(Llama):
    qk_norm = True
