"""Loading parameters: exact sizes, pages let go, and files whose tensors are not those of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.harness import (
    DEVICES,
    FILES,
    EditedCheckpoint,
    backend,
    edited,
    expected,
    fixture_path,
    load_fixture,
    run,
)
from tinyllm.errors import ModelFileError
from tinyllm.models.model import Model
from tinyllm.models.registry import load_model, model_config, parameters_nbytes
from weights import Tensor, open_checkpoint

Tensors = dict[str, Tensor]


def reload(checkpoint: EditedCheckpoint) -> Model:
    return load_model(checkpoint, model_config(checkpoint), backend("reference"))


def same_logits(checkpoint: EditedCheckpoint, name: str, kind: str = "huggingface") -> bool:
    sequences, _ = expected(name)
    wanted = run(load_fixture(name, kind, "reference"), sequences)
    return run(reload(checkpoint), sequences).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "kind"), FILES)
def test_sizes_are_known_exactly_and_pages_are_let_go(name: str, kind: str, device: str) -> None:
    with open_checkpoint(fixture_path(name, kind)) as original:
        checkpoint = EditedCheckpoint(original)
        config = model_config(checkpoint)
        planned = parameters_nbytes(checkpoint, config, backend(device))
        assert checkpoint.released == []
        calls: list[tuple[int, int]] = []
        model = load_model(
            checkpoint, config, backend(device), progress=lambda done, total: calls.append((done, total))
        )
        assert model.nbytes == planned
        assert [total for _, total in calls] == [planned] * len(calls)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})
        assert calls[-1] == (planned, planned)
        assert sorted(checkpoint.released) == sorted(set(checkpoint.tensors) - {"rope_freqs.weight"})


def test_a_tied_head_is_held_once() -> None:
    with open_checkpoint(fixture_path("qwen2", "huggingface")) as checkpoint:
        config = model_config(checkpoint)
        values = sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values())
        assert parameters_nbytes(checkpoint, config, backend("reference")) == 4 * values
    model: Any = load_fixture("qwen2", "huggingface", "reference")
    assert model.lm_head is model.embedding


# ---- files that hold something else


def zeros(name: str, *shape: int) -> Tensor:
    return Tensor.from_float32(name, np.zeros(shape, np.float32))


def add(*tensors: Tensor) -> Callable[[Tensors], None]:
    return lambda found: found.update({t.name: t for t in tensors})


def remove(*names: str) -> Callable[[Tensors], None]:
    def edit(found: Tensors) -> None:
        for name in names:
            del found[name]

    return edit


Q = "model.layers.1.self_attn.q_proj.weight"
MISFITS: list[tuple[str, str, Callable[[Tensors], None], str]] = [
    ("llama", "huggingface", remove(Q), f"1 tensor missing ({Q})"),
    ("llama", "huggingface", remove("lm_head.weight"), "1 tensor missing (lm_head.weight)"),
    ("llama", "huggingface", lambda found: found.clear(), "tensors missing (model.embed_tokens.weight, "),
    ("llama", "huggingface", add(zeros("score.weight", 2, 16)), "1 tensor left over: a llama model does not have them"),
    ("llama", "huggingface", add(zeros("model.layers.3.mlp.up_proj.weight", 24, 16)), "(model.layers.3.mlp.up_proj"),
    ("llama", "huggingface", add(zeros("model.layers.01.mlp.up_proj.weight", 24, 16)), "left over"),
    ("llama", "huggingface", add(zeros("layers.1.mlp.up_proj.weight", 24, 16)), "left over"),
    (
        "llama",
        "huggingface",
        add(zeros("model.layers.1.self_attn.q_proj.bias", 32)),
        "(model.layers.1.self_attn.q_proj.b",
    ),
    ("llama", "huggingface", add(*(zeros(f"x{i}", 1) for i in range(9))), "9 tensors left over: a llama model"),
    ("llama", "huggingface", add(zeros("a\nb\x1b[31m", 1)), r"('a\nb\x1b[31m')"),
    (
        "llama",
        "huggingface",
        add(zeros(Q, 16, 32)),
        f"1 tensor of the wrong shape ({Q} has shape (16, 32) where (32, 16)",
    ),
    ("llama", "huggingface", add(zeros(Q, 512)), "has shape (512,) where (32, 16) is due"),
    ("llama", "huggingface", add(zeros("model.norm.weight", 16, 1)), "has shape (16, 1) where (16,) is due"),
    ("llama", "huggingface", add(zeros("model.embed_tokens.weight", 65, 16)), "where (64, 16) is due"),
    ("qwen2", "huggingface", remove("model.layers.0.self_attn.k_proj.bias"), "k_proj.bias)"),
    ("qwen3", "huggingface", remove("model.layers.2.self_attn.q_norm.weight"), "q_norm.weight)"),
    ("gpt2", "huggingface", add(zeros("transformer.h.0.mlp.c_fc.weight", 64, 16)), "(64, 16) where (16, 64) is due"),
    ("gpt2", "huggingface", add(zeros("transformer.wpe.weight", 23, 16)), "(23, 16) where (24, 16) is due"),
    (
        "llama",
        "huggingface",
        add(Tensor(Q, (32, 16), "I64", np.zeros(4096, np.uint8))),
        f"1 tensor of a dtype that is not supported ({Q} is I64)",
    ),
    ("llama", "gguf", remove("blk.0.attn_q.weight"), "1 tensor missing (blk.0.attn_q.weight)"),
    (
        "llama",
        "gguf",
        add(zeros("blk.0.ffn_gate_inp.weight", 8, 16)),
        "left over: a llama model does not have them (blk.0.",
    ),
    ("llama_biased", "gguf", remove("blk.2.attn_k.bias"), "1 tensor missing (blk.2.attn_k.bias)"),
    ("qwen2", "gguf", remove(*(f"blk.{i}.attn_q.bias" for i in range(3))), "3 tensors missing (blk.0.attn_q.bias, "),
    ("gpt2", "gguf", remove("output_norm.bias"), "missing (output_norm.bias)"),
]


@pytest.mark.parametrize(("name", "kind", "edit", "message"), MISFITS)
def test_misfits_are_named(name: str, kind: str, edit: Callable[[Tensors], None], message: str) -> None:
    checkpoint = edited(name, kind, {})
    config = model_config(checkpoint)
    edit(checkpoint.tensors)
    for attempt in (load_model, parameters_nbytes):
        with pytest.raises(ModelFileError) as caught:
            attempt(checkpoint, config, backend("reference"))  # type: ignore[operator]
        text = str(caught.value)
        assert message in text
        assert text.startswith(str(checkpoint.path))
        assert "\n" not in text
        assert len(text) < 500
    assert checkpoint.released == []  # nothing was packed


def test_biases_that_the_configuration_promises_must_be_there() -> None:
    with pytest.raises(ModelFileError, match="12 tensors missing"):
        reload(edited("llama", "huggingface", {"attention_bias": True}))


# ---- files that hold the same under other names


def rename(checkpoint: EditedCheckpoint, change: Callable[[str], str]) -> EditedCheckpoint:
    tensors = {change(name): tensor.renamed(change(name)) for name, tensor in checkpoint.tensors.items()}
    return EditedCheckpoint(checkpoint, metadata=checkpoint.metadata, tensors=tensors)


def test_prefixes_may_be_absent() -> None:
    assert same_logits(rename(edited("qwen2", "huggingface", {}), lambda n: n.removeprefix("model.")), "qwen2")
    assert same_logits(rename(edited("gpt2", "huggingface", {}), lambda n: n.removeprefix("transformer.")), "gpt2")


@pytest.mark.parametrize("prefixes", [("model.language_model.", "model."), ("language_model.model.", "")])
def test_the_text_part_of_a_multimodal_gemma(prefixes: tuple[str, str]) -> None:
    text_prefix, tower_prefix = prefixes
    text = edited("gemma3", "huggingface", {})
    checkpoint = rename(text, lambda n: n.replace("model.", text_prefix, 1))
    checkpoint.metadata = {"model_type": "gemma3", "text_config": text.metadata, "vision_config": {}}
    add(
        zeros(f"{tower_prefix}vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", 4, 4),
        zeros(f"{tower_prefix}multi_modal_projector.mm_soft_emb_norm.weight", 4),
    )(checkpoint.tensors)
    assert same_logits(checkpoint, "gemma3")


def test_known_extras_are_skipped() -> None:
    checkpoint = edited("gpt2", "huggingface", {})
    add(zeros("transformer.h.0.attn.bias", 1, 1, 24, 24), zeros("transformer.h.0.attn.masked_bias", 1))(
        checkpoint.tensors
    )
    mask = Tensor("transformer.h.1.attn.bias", (1, 1, 24, 24), "BOOL", np.zeros(576, np.uint8))
    add(mask)(checkpoint.tensors)
    assert same_logits(checkpoint, "gpt2")
    checkpoint = edited("llama", "huggingface", {})
    add(zeros("model.layers.0.self_attn.rotary_emb.inv_freq", 4))(checkpoint.tensors)
    assert same_logits(checkpoint, "llama")


def test_a_tied_head_may_come_as_a_copy() -> None:
    checkpoint = edited("qwen2", "huggingface", {})
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    checkpoint.tensors["lm_head.weight"] = embedding.renamed("lm_head.weight")
    assert model_config(checkpoint).tie_word_embeddings
    assert same_logits(checkpoint, "qwen2")


def test_a_head_that_differs_is_not_tied_whatever_the_configuration_says() -> None:
    checkpoint = edited("qwen2", "huggingface", {})
    checkpoint.tensors["lm_head.weight"] = zeros("lm_head.weight", 64, 16)
    assert not model_config(checkpoint).tie_word_embeddings
    assert not run(reload(checkpoint), expected("qwen2")[0]).any()


def test_gguf_heads_are_tied_where_there_is_none() -> None:
    checkpoint = edited("llama", "gguf", {})
    assert not model_config(checkpoint).tie_word_embeddings
    del checkpoint.tensors["output.weight"]
    assert model_config(checkpoint).tie_word_embeddings


def test_a_sharded_folder(tmp_path: Path) -> None:
    """Through the reader, with the tensors spread over two files."""
    import json

    from safetensors.numpy import load_file, save_file

    folder = fixture_path("mistral", "huggingface")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with open_checkpoint(tmp_path) as checkpoint:
        model = load_model(checkpoint, model_config(checkpoint), backend("reference"))
    sequences, _ = expected("mistral")
    wanted = run(load_fixture("mistral", "huggingface", "reference"), sequences)
    assert run(model, sequences).tobytes() == wanted.tobytes()
