"""What a step reads and multiplies, by the formulas and by what the loaded model holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.backends.cpu import PackedWeight
from tinyllm.costs import multiply_adds, step_nbytes, step_weights_nbytes
from tinyllm.llm import LLM

MODELS = Path(__file__).parents[1] / "fixtures" / "models"


def held(part: Any) -> Iterator[PackedWeight | np.ndarray]:
    """Every parameter of a model, once for each name that it has."""
    for name, value in vars(part).items():
        if isinstance(value, PackedWeight) or (isinstance(value, np.ndarray) and value.dtype == np.float32):
            yield value
        elif name in ("layers", "attention", "mlp"):
            for inner in value if isinstance(value, list) else [value]:
                yield from held(inner)


def load(name: str, **options: Any) -> LLM:
    return LLM(MODELS / name, device="cpu", num_threads=1, num_blocks=8, **options)


@pytest.mark.parametrize(
    "name", ["llama", "llama.gguf", "llama_biased", "mistral", "qwen2", "qwen3", "gpt2", "gpt2.gguf", "gemma3"]
)
def test_a_step_reads_and_multiplies_what_the_model_holds(name: str) -> None:
    llm = load(name)
    model: Any = llm.engine.runner.model
    tables = [model.position_embedding] if name.startswith("gpt2") else []
    if not llm.config.tie_word_embeddings:
        tables.append(model.embedding)
    parameters = {id(one): one for one in held(model)}
    assert sum(one.nbytes for one in parameters.values()) == llm.memory.weights_nbytes
    read = [one for one in parameters.values() if all(one is not table for table in tables)]
    assert step_weights_nbytes(llm) == sum(one.nbytes for one in read)
    matrices = [one.shape[0] * one.shape[1] for one in read if isinstance(one, PackedWeight)]
    assert multiply_adds(llm.config, [0]) == sum(matrices)
    assert multiply_adds(llm.config, [0, 0, 0]) == 3 * sum(matrices)


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
def test_keys_and_values_are_read_for_every_sequence(kv_dtype: str) -> None:
    llm = LLM("tales-4m", device="cpu", num_blocks=8, kv_dtype=kv_dtype)  # heads that need no padding
    c, plan = llm.config, llm.memory
    vector = {"f32": 4 * c.head_dim, "f16": 2 * c.head_dim, "int8": c.head_dim + 4}[kv_dtype]
    per_token = 2 * c.num_layers * c.num_kv_heads * vector
    assert plan.kv_nbytes_per_token == per_token
    assert step_nbytes(llm, [5, 12]) == step_weights_nbytes(llm) + 17 * per_token
    attention = multiply_adds(c, [5, 12]) - multiply_adds(c, [0, 0])
    assert attention == 17 * 2 * c.num_layers * c.num_heads * c.head_dim


def test_a_layer_that_slides_reads_its_window_alone() -> None:
    llm = load("gemma3")
    c = llm.config
    windows = [c.window_of_layer(layer) for layer in range(c.num_layers)]
    longest = max(window for window in windows if window is not None)
    assert None in windows
    short, long = (step_nbytes(llm, [context]) for context in (longest, longest + 9))
    assert long - short == 9 * windows.count(None) * llm.memory.kv_nbytes_per_token // c.num_layers
