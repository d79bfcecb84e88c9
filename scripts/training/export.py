"""The trained weights as a folder that tinyllm (and transformers) loads: safetensors in bf16, config, tokenizer."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array
from training.parameters import ModelShape, Parameters
from training.text import END_OF_TEXT

__all__ = ["bfloat16", "named_tensors", "write_folder"]


def bfloat16(x: F32Array) -> NDArray[np.uint16]:
    """Rounded to nearest even, as the upper halves of float32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def named_tensors(shape: ModelShape, parameters: Parameters) -> dict[str, F32Array]:
    """The parameters under the names that llama checkpoints use."""
    tensors = {"model.embed_tokens.weight": parameters.embedding, "model.norm.weight": parameters.norm}
    D, H, KH, I = shape.head_dim, shape.num_heads, shape.num_kv_heads, shape.intermediate_size  # noqa: E741
    for i, layer in enumerate(parameters.layers):
        prefix = f"model.layers.{i}."
        q, k, v = np.split(layer.qkv, [H * D, (H + KH) * D])
        tensors |= {
            prefix + "input_layernorm.weight": layer.attention_norm,
            prefix + "self_attn.q_proj.weight": q,
            prefix + "self_attn.k_proj.weight": k,
            prefix + "self_attn.v_proj.weight": v,
            prefix + "self_attn.o_proj.weight": layer.o,
            prefix + "post_attention_layernorm.weight": layer.mlp_norm,
            prefix + "mlp.gate_proj.weight": layer.gate_up[:I],
            prefix + "mlp.up_proj.weight": layer.gate_up[I:],
            prefix + "mlp.down_proj.weight": layer.down,
        }
    return tensors


def _config(shape: ModelShape, positions: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": positions,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
    }


def _safetensors(tensors: dict[str, NDArray[np.uint16]]) -> bytes:
    """bfloat16 tensors as a file: header length u64, header, data (github.com/huggingface/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(tensor.tobytes() for tensor in tensors.values())])


def write_folder(out: Path, shape: ModelShape, flat: F32Array, tokenizer: Path, positions: int) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: bfloat16(t) for name, t in named_tensors(shape, Parameters(shape, flat)).items()}
    (out / "model.safetensors").write_bytes(_safetensors(tensors))
    (out / "config.json").write_text(json.dumps(_config(shape, positions), indent=2) + "\n")
    shutil.copyfile(tokenizer, out / "tokenizer.json")
    settings = {
        "add_bos_token": True,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
