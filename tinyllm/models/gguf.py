"""What the metadata of all architectures share in GGUF, and llama's order of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm.config import RopeConfig
from tinyllm.models.settings import MAX_LAYERS, Settings
from weights import Checkpoint, Tensor
from weights.errors import quoted

__all__ = ["decoder_fields", "general_fields", "read_rope", "sliding_fields", "undo_interleaving"]


def general_fields(settings: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """ModelConfig's fields that every architecture has. settings: under the architecture's prefix."""
    settings.refuse("expert_count")
    tensors = checkpoint.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise settings.error("there is no matrix token_embd.weight, which gives the vocabulary's size")
    hidden_size = settings.integer("embedding_length")
    num_heads = settings.integer("attention.head_count")
    if not settings.has("attention.key_length") and hidden_size % num_heads:
        raise settings.error(f"embedding_length {hidden_size} is not divisible by {num_heads} heads")
    head_dim = settings.integer("attention.key_length", max(1, hidden_size // num_heads))
    if settings.integer("attention.value_length", head_dim) != head_dim:
        raise settings.error("keys and values of different lengths are not supported")
    tokenizer = Settings(checkpoint.metadata, settings.source, "tokenizer.ggml.")
    ends = [tokenizer.optional_integer(f"{name}_token_id", low=0) for name in ("eos", "eot", "eom")]
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": settings.integer("feed_forward_length"),
        "num_layers": settings.integer("block_count", high=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": settings.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position": settings.integer("context_length"),
        "attention_scale": head_dim**-0.5,
        "qkv_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "attention_output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": tokenizer.optional_integer("bos_token_id", low=0),
        "eos_token_ids": tuple(dict.fromkeys(i for i in ends if i is not None)),
    }


def decoder_fields(settings: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """Those that llama and its descendants share."""
    fields = general_fields(settings, checkpoint)
    return {
        **fields,
        "norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope": read_rope(settings, checkpoint, fields["head_dim"]),
        **sliding_fields(settings, fields["num_layers"], default_pattern=0),
    }


def read_rope(settings: Settings, checkpoint: Checkpoint, head_dim: int) -> RopeConfig:
    """RoPE; Llama 3's scaling comes as a tensor of divisors, rope_freqs.weight."""
    if settings.integer("rope.dimension_count", head_dim) != head_dim:
        raise settings.error("rotating a part of each head (rope.dimension_count) is not supported")
    theta = settings.number("rope.freq_base", 10000.0)
    divisors = checkpoint.tensors.get("rope_freqs.weight")
    if divisors is not None:
        if divisors.shape != (head_dim // 2,):
            raise settings.error(f"rope_freqs.weight has shape {divisors.shape} where {(head_dim // 2,)} is due")
        values = tuple(float(d) for d in divisors.dequantize())
        return RopeConfig(theta=theta, rotary_dim=head_dim, freq_divisors=values)
    scaling = settings.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise settings.error(f"RoPE scaling {quoted(scaling)} is not supported")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    if scaling == "none" or factor in (0.0, 1.0):
        return RopeConfig(theta=theta, rotary_dim=head_dim)
    return RopeConfig(theta=theta, rotary_dim=head_dim, scaling="linear", factor=factor)


def sliding_fields(settings: Settings, num_layers: int, *, default_pattern: int) -> dict[str, Any]:
    """The window and which layers have it: all but every n-th for a pattern of n, all for one of 0.

    A pattern may also come as one boolean a layer.
    """
    window = settings.optional_integer("attention.sliding_window", low=0)
    if not window:
        return {}
    pattern = settings.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_:
        return {"sliding_window": window, "sliding_layers": tuple(map(bool, pattern))}
    every = settings.integer("attention.sliding_window_pattern", default_pattern, low=0)
    slides = tuple(every == 0 or (layer + 1) % every != 0 for layer in range(num_layers))
    return {"sliding_window": window, "sliding_layers": slides}


def undo_interleaving(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, or their bias, from pairs (2i, 2i + 1) back to pairs (i, i + D / 2).

    llama's files order the rows of each head for a RoPE that rotates neighbours; here all models rotate halves.
    """
    heads = tensor.shape[0] // head_dim
    order = np.arange(tensor.shape[0]).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    if len(tensor.shape) == 1:
        return Tensor.from_float32(tensor.name, tensor.dequantize()[order])
    return tensor.take_rows(order)
