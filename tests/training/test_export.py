"""The exported folder: tinyllm reads it and computes what the trainer does."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from tests.training import runs
from tests.training.test_gradients import random_parameters
from tinyllm.llm import LLM
from training.export import bfloat16, write_folder
from training.llama import Llama
from training.parameters import ModelShape, Parameters
from training.text import END_OF_TEXT, train_tokenizer

SHAPE = ModelShape(
    vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=96,
    rope_theta=500.0, rms_norm_eps=1e-4,
)  # fmt: skip


def rounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return random_parameters(SHAPE)


@pytest.fixture(scope="module")
def folder(parameters: Parameters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    corpus = runs.write_corpus(folder / "corpus")
    tokenizer = train_tokenizer([corpus / "one.txt", corpus / "two.txt"], SHAPE.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_folder(folder / "new" / "model", SHAPE, parameters.flat, folder / "tokenizer.json", 256)
    return folder / "new" / "model"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", kv_dtype="f32", num_blocks=64)


def test_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert config["tie_word_embeddings"] is True
    assert (config["rope_theta"], config["rms_norm_eps"]) == (500.0, 1e-4)


def test_tensors_as_the_safetensors_package_reads_them(folder: Path, parameters: Parameters) -> None:
    """All names of a llama with tied embeddings, in bfloat16, and every parameter exactly once."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    M, I, D, H, KH = 64, 96, 32, 4, 2  # noqa: E741
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (300, M), "model.norm.weight": (M,)}
    for i in range(2):
        expected |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (M,),
                "self_attn.q_proj": (H * D, M),
                "self_attn.k_proj": (KH * D, M),
                "self_attn.v_proj": (KH * D, M),
                "self_attn.o_proj": (M, H * D),
                "post_attention_layernorm": (M,),
                "mlp.gate_proj": (I, M),
                "mlp.up_proj": (I, M),
                "mlp.down_proj": (M, I),
            }.items()
        }
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    exported = np.sort(np.concatenate([tensor.astype(np.float32).ravel() for tensor in tensors.values()]))
    own = np.sort(np.concatenate([rounded(array).ravel() for array in parameters.arrays.values()]))
    assert (exported == own).all()
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_tinyllm_computes_the_losses_of_the_rounded_weights(llm: LLM, parameters: Parameters) -> None:
    weights = Parameters(SHAPE, rounded(parameters.flat))
    tokens = np.random.default_rng(0).integers(300, size=(1, 151)).astype(np.int32)
    losses = Llama(SHAPE, 1, 150).losses(weights, tokens)[0]
    score = llm.score(tokens[0].tolist())
    np.testing.assert_allclose(-score.logprobs, losses, rtol=0, atol=1e-4)
    logits = llm.logits(tokens[0, :-1].tolist()).astype(np.float64)
    from_logits = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(150), tokens[0, 1:]]
    np.testing.assert_allclose(from_logits, losses, rtol=0, atol=1e-4)
    own = Llama(SHAPE, 1, 150).losses(parameters, tokens)[0]  # of the weights before they were rounded
    assert 1e-3 < np.abs(own + score.logprobs).max() < 0.1


def test_the_tokenizer_is_the_runs(llm: LLM, folder: Path) -> None:
    text = "the old hen saw a café, then slept."
    ids = llm.encode(text)
    assert ids[0] == 0
    assert llm.tokenizer is not None
    assert llm.tokenizer.token_text(0) == END_OF_TEXT
    assert llm.tokenizer.eos_token_ids == (0,) or set(llm.tokenizer.eos_token_ids) == {0}
    assert llm.tokenizer.decode(ids[1:]) == text
    assert (folder / "tokenizer.json").read_bytes() == (folder.parents[1] / "tokenizer.json").read_bytes()


# ---- rounding


@given(st.floats(width=32, allow_nan=False) | st.integers(0, 0x7F7F).map(lambda i: float(_tie(i))))
def test_rounding(value: float) -> None:
    """To nearest, ties to even."""
    x = np.array([value, -value], np.float32)
    assert bfloat16(x).tolist() == x.astype(ml_dtypes.bfloat16).view(np.uint16).tolist()


def _tie(upper: int) -> np.float32:
    """Half-way between two bfloat16."""
    return np.array([upper << 16 | 0x8000], np.uint32).view(np.float32)[0]
