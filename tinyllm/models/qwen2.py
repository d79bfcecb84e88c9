"""Qwen 2 and 2.5: llama with biases on q, k and v, and optionally a window in the upper layers (arXiv:2407.10671)."""

from __future__ import annotations

from typing import Any

from tinyllm.config import ModelConfig
from tinyllm.models import gguf, huggingface
from tinyllm.models.settings import Settings
from weights import Checkpoint

__all__ = ["from_gguf", "from_huggingface", "window_fields"]


def window_fields(settings: Settings, num_layers: int) -> dict[str, Any]:
    """The window of the layers from max_window_layers on, or of those that layer_types names."""
    slides = settings.layer_types(num_layers)
    window = settings.optional_integer("sliding_window") if settings.flag("use_sliding_window", False) else None
    if slides is None:
        first = settings.integer("max_window_layers", 28, low=0)
        slides = tuple(window is not None and layer >= first for layer in range(num_layers))
    return {"sliding_window": window, "sliding_layers": slides if any(slides) else ()}


def from_huggingface(settings: Settings) -> ModelConfig:
    fields = huggingface.decoder_fields(settings)
    return ModelConfig(architecture="qwen2", **fields, qkv_bias=True, **window_fields(settings, fields["num_layers"]))


def from_gguf(settings: Settings, checkpoint: Checkpoint) -> ModelConfig:
    fields = gguf.decoder_fields(settings, checkpoint) | {"qkv_bias": True}
    return ModelConfig(architecture="qwen2", **fields)
