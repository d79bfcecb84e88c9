"""An independent float32 forward of a llama GGUF: the `gguf` package's reader and dequantisation, naive numpy, BLAS.

It shares no code with what it judges: the whole sequence at once, no cache, interleaved RoPE as the file stores Q, K.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


class LlamaOracle:
    """Dequantised weights of a llama GGUF with tied embeddings, in memory."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
        }

        def field(name: str) -> float:
            value = reader.fields[f"llama.{name}"].contents()
            assert isinstance(value, (int, float))
            return value

        self.num_layers = int(field("block_count"))
        self.num_heads = int(field("attention.head_count"))
        self.num_kv_heads = int(field("attention.head_count_kv"))
        self.eps = np.float32(field("attention.layer_norm_rms_epsilon"))
        self.theta = field("rope.freq_base")

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
