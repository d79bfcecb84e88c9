"""A tiny random llama, made in memory: engines over it are what the scheduling tests run."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tinyllm.backends import create_backend
from tinyllm.backends.base import Backend
from tinyllm.config import EngineConfig
from tinyllm.engine.kv_cache import kv_cache_spec
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.matcher import MakeMatcher
from tinyllm.engine.sequence import Task
from tinyllm.models.model import Model
from tinyllm.models.registry import load_model, model_config
from tinyllm.outputs import RequestOutput
from tinyllm.sampling import SamplingParams
from weights import Tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


class MemoryCheckpoint:
    """A Hugging Face checkpoint that is not on a disk."""

    kind = "huggingface"
    path = Path("memory")

    def __init__(self, metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.metadata = MappingProxyType(metadata)
        self.tensors = {name: Tensor.from_float32(name, values) for name, values in arrays.items()}

    def release(self, tensor: Tensor) -> None: ...

    def close(self) -> None: ...


def tiny_checkpoint(head_dim: int = 8) -> MemoryCheckpoint:
    rng = np.random.default_rng(0)
    M, D, H, KH, V, mlp = 32, head_dim, 4, 2, 61, 48

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * (2.0 / shape[-1]) ** 0.5).astype(np.float32)

    arrays = {"model.embed_tokens.weight": rng.standard_normal((V, M)).astype(np.float32)}
    arrays["model.norm.weight"] = 1 + 0.1 * rng.standard_normal(M).astype(np.float32)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (H * D, M)),
            ("self_attn.k_proj", (KH * D, M)),
            ("self_attn.v_proj", (KH * D, M)),
            ("self_attn.o_proj", (M, H * D)),
            ("mlp.gate_proj", (mlp, M)),
            ("mlp.up_proj", (mlp, M)),
            ("mlp.down_proj", (M, mlp)),
        ):
            arrays[f"{prefix}{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"{prefix}{name}.weight"] = 1 + 0.1 * rng.standard_normal(M).astype(np.float32)
    return MemoryCheckpoint(CONFIG | {"head_dim": head_dim}, arrays)


@lru_cache
def tiny_model(device: str, threads: int | None = None) -> Model:
    backend: Backend = create_backend(device, threads)
    checkpoint = tiny_checkpoint()
    return load_model(checkpoint, model_config(checkpoint), backend)


def tiny_engine(
    device: str = "reference",
    *,
    threads: int | None = None,
    eos: tuple[int, ...] = (),
    make_matcher: MakeMatcher | None = None,
    **options: Any,
) -> LLMEngine:
    """An engine over the tiny model, with its invariants checked at every step."""
    options = {"num_blocks": 64, "block_size": 16, "max_batch_tokens": 64, "debug_checks": True} | options
    config = EngineConfig(device=device, **options)
    model = tiny_model(device, threads)
    spec = kv_cache_spec(model.config, config, model.backend)
    return LLMEngine(model, config, spec, eos_token_ids=eos, make_matcher=make_matcher)


def run_all(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Steps until nothing is left to do; the finished requests by id."""
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step().finished}
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    return done


def generate(engine: LLMEngine, prompt: list[int], **params: Any) -> list[int]:
    """One request by itself: the generated ids of its first sequence."""
    engine.add_request("only", prompt, SamplingParams(**params))
    return run_all(engine)["only"].outputs[0].token_ids


def logits(engine: LLMEngine, prompt: list[int]) -> np.ndarray:
    """The logits (T, V) of one request by itself."""
    engine.add_request("only", prompt, SamplingParams(), task=Task.LOGITS)
    rows = run_all(engine)["only"].rows
    assert rows is not None
    return rows


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, 61, length).tolist()
