"""The tiny model with a flatter head of its own, and what transformers' beam search makes of it (fixtures/beams)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import CONFIG, MemoryCheckpoint, tiny_checkpoint
from tinyllm.backends import create_backend
from tinyllm.config import EngineConfig
from tinyllm.engine.kv_cache import kv_cache_spec
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.models.model import Model
from tinyllm.models.registry import load_model, model_config

FIXTURE = Path(__file__).parent / "fixtures" / "beams" / "transformers.json"
BEAM_CONFIG = CONFIG | {"tie_word_embeddings": False}


def beam_arrays() -> dict[str, np.ndarray]:
    """Tied to the embedding, the head would repeat the last token for ever."""
    rng = np.random.default_rng(1)
    arrays = {name: tensor.dequantize() for name, tensor in tiny_checkpoint().tensors.items()}
    return arrays | {"lm_head.weight": (0.35 * rng.standard_normal((61, 32))).astype(np.float32)}


@lru_cache
def beam_model(device: str, threads: int | None = None) -> Model:
    checkpoint = MemoryCheckpoint(BEAM_CONFIG, beam_arrays())
    return load_model(checkpoint, model_config(checkpoint), create_backend(device, threads))


def beam_engine(
    device: str = "reference", *, threads: int | None = None, eos: tuple[int, ...] = (), **options: Any
) -> LLMEngine:
    """An engine over that model, with its invariants checked at every step."""
    options = {"num_blocks": 64, "block_size": 16, "max_batch_tokens": 64, "debug_checks": True} | options
    config = EngineConfig(device=device, **options)
    model = beam_model(device, threads)
    return LLMEngine(model, config, kv_cache_spec(model.config, config, model.backend), eos_token_ids=eos)


def last_logits(arrays: dict[str, np.ndarray], token_ids: np.ndarray) -> np.ndarray:
    """What follows each of N sequences of equal length, (N, T) -> (N, V), by a plain forward over all of them.

    It shares no code with what it judges.
    """
    (N, T), H, KH, D = token_ids.shape, 4, 2, 8

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-5)) * arrays[f"{name}.weight"]

    def rope(x: np.ndarray) -> np.ndarray:
        """(N, T, heads, D), pairs (i, i + D / 2)"""
        angle = np.arange(T)[:, None, None] * 10000.0 ** (-np.arange(0, D, 2) / D)  # (T, 1, D / 2)
        rotated = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angle)
        return np.concatenate([rotated.real, rotated.imag], axis=-1).astype(np.float32)

    x = arrays["model.embed_tokens.weight"][token_ids]  # (N, T, M)
    for layer in range(2):
        p = f"model.layers.{layer}"
        y = norm(x, f"{p}.input_layernorm")
        q, k, v = (
            (y @ arrays[f"{p}.self_attn.{name}_proj.weight"].T).reshape(N, T, heads, D)
            for name, heads in (("q", H), ("k", KH), ("v", KH))
        )
        q, k, v = rope(q), np.repeat(rope(k), H // KH, axis=2), np.repeat(v, H // KH, axis=2)
        scores = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(np.float32(D))
        scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        heads_out = np.einsum("nhqk,nkhd->nqhd", probs, v).reshape(N, T, H * D)
        x = x + heads_out @ arrays[f"{p}.self_attn.o_proj.weight"].T
        y = norm(x, f"{p}.post_attention_layernorm")
        gate, up = (y @ arrays[f"{p}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ arrays[f"{p}.mlp.down_proj.weight"].T
    return norm(x[:, -1], "model.norm") @ arrays["lm_head.weight"].T


@lru_cache
def beam_cases() -> list[dict[str, Any]]:
    """Each case: prompt, eos, beams, length_penalty, early_stopping, max_tokens, min_tokens, token_ids, scores."""
    cases: list[dict[str, Any]] = json.loads(FIXTURE.read_text())["cases"]
    return cases
