"""A GGUF model as a Hugging Face folder, in float32: what transformers, and so ONNX Runtime's model builder, reads."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.interface import UnavailableError
from tinyllm.config import ModelConfig
from tinyllm.models.llama import adapt_gguf
from tinyllm.models.registry import model_config
from weights import Checkpoint, open_checkpoint
from weights.names import name_map

__all__ = ["write_huggingface", "write_safetensors"]

F32Array = NDArray[np.float32]

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def write_huggingface(gguf: Path, target: Path) -> None:
    """The model as a folder that transformers loads: its weights dequantised to float32, which holds them exactly."""
    with open_checkpoint(gguf) as checkpoint:
        config = model_config(checkpoint)
        tokenizer = _tokenizer(checkpoint.metadata)
        described = _config(config)
        target.mkdir()
        write_safetensors(target / "model.safetensors", _tensors(checkpoint, config))
        ends = {name: checkpoint.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ids = {f"{name}_token_id": id_ for name, id_ in ends.items()}
    tokens = {f"{name}_token": tokenizer.id_to_token(id_) for name, id_ in ends.items() if id_ is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position}
    (target / "config.json").write_text(json.dumps(described | ids, indent=2))
    (target / "tokenizer_config.json").write_text(json.dumps(settings | tokens, indent=2))
    tokenizer.save(str(target / "tokenizer.json"))


def _tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, F32Array]:
    """All parameters by the names that transformers gives them, rotary rows in its order."""
    ours, theirs = name_map("gguf", "llama", ()), name_map("huggingface", "llama", ())
    canonical_names = [
        role.replace("layers.", f"layers.{layer}.")
        for role in theirs.templates
        for layer in (range(config.num_layers) if role.startswith("layers.") else (0,))
    ]
    canonical = {ours.file_name(name): name for name in canonical_names}
    adaptations = adapt_gguf(config)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in canonical:
            raise UnavailableError(f"the tensor {name} has no place in a Hugging Face folder")
        adaptation = adaptations.get(canonical[name].rpartition(".")[2])
        values = (tensor if adaptation is None else adaptation.apply(tensor)).dequantize()
        tensors[theirs.file_name(canonical[name])] = values
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, F32Array]) -> None:
    """float32 tensors as a file: header length u64, header, data (github.com/huggingface/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data)


def _config(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    if config.architecture != "llama" or rope is None or rope.scaling != "none" or rope.freq_divisors is not None:
        raise UnavailableError("only llama models without RoPE scaling can be written as a Hugging Face folder")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
    }


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    """A byte-level BPE that cuts text as GPT-2 and SmolLM do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in ("gpt-2", "smollm"):
        raise UnavailableError(f"a tokenizer {kind}/{cut} cannot be written as a Hugging Face one (gpt-2, smollm can)")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    words: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if cut == "smollm":
        words.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
