"""An independent float32 forward of a llama: read by the `gguf` or `safetensors` package, naive numpy, BLAS.

It shares no code with what it judges: the whole sequence at once, no cache, interleaved RoPE as a GGUF stores Q, K.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  (numpy's bfloat16)
import numpy as np
from safetensors.numpy import load_file


class LlamaOracle:
    """Float32 weights of a llama with tied embeddings, by a GGUF's names and with its order of rows in Q and K."""

    def __init__(
        self, weights: dict[str, np.ndarray], *, num_layers: int, num_heads: int, num_kv_heads: int, eps: float,
        theta: float,
    ) -> None:  # fmt: skip
        self.weights = weights
        self.num_layers, self.num_heads, self.num_kv_heads = num_layers, num_heads, num_kv_heads
        self.eps, self.theta = np.float32(eps), theta

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weights[name]

    def rope(self, x: np.ndarray) -> np.ndarray:
        """(T, heads, D), pairs (2i, 2i + 1)"""
        T, _, D = x.shape
        angle = np.arange(T)[:, None] * self.theta ** (-np.arange(0, D, 2) / D)  # (T, D / 2)
        rotated = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape).astype(np.float32)

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """(T, V) float32"""
        w, T = self.weights, len(token_ids)
        x = w["token_embd.weight"][token_ids]
        hidden = np.triu(np.ones((T, T), bool), 1)
        for layer in range(self.num_layers):
            p = f"blk.{layer}."
            y = self.norm(x, p + "attn_norm.weight")
            q = self.rope((y @ w[p + "attn_q.weight"].T).reshape(T, self.num_heads, -1))
            k = self.rope((y @ w[p + "attn_k.weight"].T).reshape(T, self.num_kv_heads, -1))
            v = (y @ w[p + "attn_v.weight"].T).reshape(T, self.num_kv_heads, -1)
            k, v = (np.repeat(t, self.num_heads // self.num_kv_heads, axis=1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k, optimize=True) / np.sqrt(np.float32(q.shape[-1]))
            scores[:, hidden] = -np.inf
            probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probs /= probs.sum(axis=-1, keepdims=True)
            heads = np.einsum("hqk,khd->qhd", probs, v, optimize=True).reshape(T, -1)
            x = x + heads @ w[p + "attn_output.weight"].T
            y = self.norm(x, p + "ffn_norm.weight")
            gate = y @ w[p + "ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w[p + "ffn_up.weight"].T)) @ w[p + "ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ w["token_embd.weight"].T


def gguf_oracle(path: Path) -> LlamaOracle:
    reader = gguf.GGUFReader(path)

    def field(name: str) -> float:
        value = reader.fields[f"llama.{name}"].contents()
        assert isinstance(value, (int, float))
        return value

    return LlamaOracle(
        {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors},
        num_layers=int(field("block_count")),
        num_heads=int(field("attention.head_count")),
        num_kv_heads=int(field("attention.head_count_kv")),
        eps=field("attention.layer_norm_rms_epsilon"),
        theta=field("rope.freq_base"),
    )


def folder_oracle(folder: Path) -> LlamaOracle:
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    weights = {}
    for name, stored in load_file(folder / "model.safetensors").items():
        values = stored.astype(np.float32)
        if (n := heads.get(name.split(".")[-2])) is not None:  # the file pairs halves of a head
            values = values.reshape(n, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        weights[str(names.get_name(name, try_suffixes=(".weight",)))] = values
    return LlamaOracle(
        weights,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
    )
