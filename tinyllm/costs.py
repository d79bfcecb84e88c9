"""What a step has to read and to multiply, counted from the model's shape: what its time is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinyllm.config import ModelConfig

if TYPE_CHECKING:
    from tinyllm.llm import LLM

__all__ = ["multiply_adds", "step_nbytes", "step_weights_nbytes"]


def step_weights_nbytes(llm: LLM) -> int:
    """Bytes of packed parameters that every step reads once: all but tables of which a few rows are looked up."""
    model = llm.engine.runner.model
    tied = llm.config.tie_word_embeddings  # then it is read as the LM head
    tables = ("position_embedding",) if tied else ("position_embedding", "embedding")
    looked_up = [getattr(model, name, None) for name in tables]
    return llm.memory.weights_nbytes - sum(table.nbytes for table in looked_up if table is not None)


def step_nbytes(llm: LLM, contexts: Sequence[int]) -> int:
    """Bytes that a decode step reads at least: the weights, and what each sequence attends to.

    contexts: keys that each sequence's new token sees, itself included. Activations stay in the caches.
    """
    per_layer = llm.memory.kv_nbytes_per_token // llm.config.num_layers
    return step_weights_nbytes(llm) + per_layer * sum(_keys_seen(llm.config, context) for context in contexts)


def multiply_adds(model: ModelConfig, contexts: Sequence[int]) -> int:
    """Multiply-adds of a decode step, a sequence for each context: linear layers, LM head, and attention."""
    M, D, H, KH = model.hidden_size, model.head_dim, model.num_heads, model.num_kv_heads
    mlp_matrices = 2 if model.architecture == "gpt2" else 3
    layer = M * (H + 2 * KH) * D + H * D * M + mlp_matrices * M * model.intermediate_size
    linear = model.num_layers * layer + model.vocab_size * M
    return len(contexts) * linear + 2 * H * D * sum(_keys_seen(model, context) for context in contexts)


def _keys_seen(model: ModelConfig, context: int) -> int:
    """Keys that a token sees, over all layers."""
    windows = [model.window_of_layer(layer) for layer in range(model.num_layers)]
    return sum(context if window is None else min(context, window) for window in windows)
