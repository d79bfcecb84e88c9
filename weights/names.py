"""What each tensor is called in a file: maps from canonical names to the names of Hugging Face and GGUF files.

A canonical name is a role ("embedding", "final_norm", "lm_head") or, for the layers, "layers.{i}.{role}" with the
roles below. Everything past the loaders speaks of tensors by canonical names only.

| role | what it is |
| --- | --- |
| attention_norm, mlp_norm | the norms before attention and MLP (with `_bias`: a LayerNorm's) |
| post_attention_norm, post_mlp_norm | the norms after them (gemma) |
| q, k, v, o; qkv | the projections (out, in); qkv where the file fuses them |
| q_norm, k_norm | norms over a head's dimensions |
| gate, up, down | the MLP |
| rope_divisors | divisors of the rotary frequencies |

Any projection's bias is its role with `_bias`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

__all__ = ["NameMap", "name_map"]


def _with_biases(roles: Mapping[str, str]) -> dict[str, str]:
    """Adds a `.bias` beside each `.weight`."""
    return {
        **{role: f"{stem}.weight" for role, stem in roles.items()},
        **{f"{role}_bias": f"{stem}.bias" for role, stem in roles.items()},
    }


_HF_LLAMA = _with_biases(
    {
        "embedding": "embed_tokens",
        "final_norm": "norm",
        "layers.attention_norm": "layers.{i}.input_layernorm",
        "layers.q": "layers.{i}.self_attn.q_proj",
        "layers.k": "layers.{i}.self_attn.k_proj",
        "layers.v": "layers.{i}.self_attn.v_proj",
        "layers.o": "layers.{i}.self_attn.o_proj",
        "layers.q_norm": "layers.{i}.self_attn.q_norm",
        "layers.k_norm": "layers.{i}.self_attn.k_norm",
        "layers.mlp_norm": "layers.{i}.post_attention_layernorm",
        "layers.gate": "layers.{i}.mlp.gate_proj",
        "layers.up": "layers.{i}.mlp.up_proj",
        "layers.down": "layers.{i}.mlp.down_proj",
    }
)

_HF_GEMMA3 = _HF_LLAMA | _with_biases(
    {
        "layers.post_attention_norm": "layers.{i}.post_attention_layernorm",
        "layers.mlp_norm": "layers.{i}.pre_feedforward_layernorm",
        "layers.post_mlp_norm": "layers.{i}.post_feedforward_layernorm",
    }
)

_HF_GPT2 = _with_biases(
    {
        "embedding": "wte",
        "position_embedding": "wpe",
        "final_norm": "ln_f",
        "layers.attention_norm": "h.{i}.ln_1",
        "layers.qkv": "h.{i}.attn.c_attn",
        "layers.o": "h.{i}.attn.c_proj",
        "layers.mlp_norm": "h.{i}.ln_2",
        "layers.up": "h.{i}.mlp.c_fc",
        "layers.down": "h.{i}.mlp.c_proj",
    }
)

_GGUF = _with_biases(
    {
        "embedding": "token_embd",
        "position_embedding": "position_embd",
        "final_norm": "output_norm",
        "lm_head": "output",
        "rope_divisors": "rope_freqs",
        "layers.attention_norm": "blk.{i}.attn_norm",
        "layers.qkv": "blk.{i}.attn_qkv",
        "layers.q": "blk.{i}.attn_q",
        "layers.k": "blk.{i}.attn_k",
        "layers.v": "blk.{i}.attn_v",
        "layers.o": "blk.{i}.attn_output",
        "layers.q_norm": "blk.{i}.attn_q_norm",
        "layers.k_norm": "blk.{i}.attn_k_norm",
        "layers.post_attention_norm": "blk.{i}.post_attention_norm",
        "layers.mlp_norm": "blk.{i}.ffn_norm",
        "layers.post_mlp_norm": "blk.{i}.post_ffw_norm",
        "layers.gate": "blk.{i}.ffn_gate",
        "layers.up": "blk.{i}.ffn_up",
        "layers.down": "blk.{i}.ffn_down",
    }
)

# Where a Hugging Face file keeps the decoder: alone, under a language-model head, or inside a multimodal model.
_HF_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "transformer.", "")
_HF_HEADS = {"language_model.model.": "language_model.lm_head.weight"}

# Buffers and towers that files carry beside the decoder's parameters.
_HF_EXTRAS = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq"
    r"|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
    r"|(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*"
)
_GGUF_EXTRAS = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


@dataclass(frozen=True)
class NameMap:
    """The names that one file gives to canonical tensors.

    Attributes:
        templates: canonical role ("layers.q" for one of a layer) -> name in the file, with {i} for the layer.
        extras: matches names that a file may carry and a decoder does not need.
    """

    templates: Mapping[str, str]
    extras: re.Pattern[str]

    def file_name(self, canonical: str) -> str:
        """The name in the file of a canonical one, e.g. "layers.3.q" -> "blk.3.attn_q.weight"."""
        if not canonical.startswith("layers."):
            return self.templates[canonical]
        _, layer, role = canonical.split(".")
        return self.templates[f"layers.{role}"].replace("{i}", layer)

    def is_extra(self, name: str) -> bool:
        """Whether a file's tensor is a known one that is not a parameter of the decoder."""
        return self.extras.fullmatch(name) is not None


def name_map(kind: str, architecture: str, names: Collection[str]) -> NameMap:
    """The map for a checkpoint of `kind` ("gguf" or "huggingface") that holds tensors called `names`."""
    if kind == "gguf":
        return NameMap(_GGUF, _GGUF_EXTRAS)
    templates = {"gpt2": _HF_GPT2, "gemma3": _HF_GEMMA3}.get(architecture, _HF_LLAMA)
    embedding = templates["embedding"]
    prefix = next((p for p in _HF_PREFIXES if p + embedding in names), "model.")
    prefixed = {role: prefix + template for role, template in templates.items()}
    return NameMap({**prefixed, "lm_head": _HF_HEADS.get(prefix, "lm_head.weight")}, _HF_EXTRAS)
