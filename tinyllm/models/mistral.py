"""Mistral 7B and its successors: llama with a sliding window in every layer (arXiv:2310.06825), or none."""

from __future__ import annotations

from tinyllm.config import ModelConfig
from tinyllm.models import huggingface
from tinyllm.models.settings import Settings

__all__ = ["from_huggingface"]


def from_huggingface(settings: Settings) -> ModelConfig:
    fields = huggingface.decoder_fields(settings)
    window = settings.optional_integer("sliding_window")
    slides = (window is not None,) * fields["num_layers"]
    if settings.layer_types(fields["num_layers"]) not in (None, slides):
        raise settings.error("layer_types that differ between layers are not supported for mistral")
    return ModelConfig(
        architecture="mistral", **fields, sliding_window=window, sliding_layers=slides if window is not None else ()
    )
