"""Forward and backward of the model, layer by layer. Matrix products are numpy's BLAS, on this thread alone.

n sequences of T tokens, R = n T rows, hidden size M. Gradients are named d...; they are of the sum of the losses times
`scale`. What the backward pass needs is kept in the workspace; the probabilities of attention and the logits are not:
FlashAttention recomputes the first, and the head runs in slices of rows, forward and backward at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinyllm.backends.base import F32Array, I32Array
from training.backend import TrainingBackend
from training.parameters import LayerParameters, ModelShape, Parameters

__all__ = ["Llama"]

_HEAD_ROWS = 256  # rows of logits at once: small enough to stay in the cache


@dataclass(frozen=True)
class _LayerActivations:
    """What one layer keeps for its backward pass."""

    x: F32Array  # (R, M) its input
    normed: F32Array  # (R, M)
    qkv: F32Array  # (R, (H + 2 KH) D), rotated
    attention: F32Array  # (R, H D)
    lse: F32Array  # (n, H, T)
    middle: F32Array  # (R, M) x + attention's part
    mlp_normed: F32Array  # (R, M)
    gate_up: F32Array  # (R, 2 I)
    gated: F32Array  # (R, I)


class Llama:
    """Computes losses and gradients of `sequences` x `length` tokens on one thread."""

    def __init__(self, shape: ModelShape, sequences: int, length: int) -> None:
        self.shape, self.sequences, self.length = shape, sequences, length
        self.backend = TrainingBackend(1)
        R, M, W = sequences * length, shape.hidden_size, shape.num_heads * shape.head_dim
        I, S = shape.intermediate_size, shape.qkv_size  # noqa: E741

        def empty(*extent: int) -> F32Array:
            return np.empty(extent, np.float32)

        self._layers = [
            _LayerActivations(
                empty(R, M), empty(R, M), empty(R, S), empty(R, W), empty(sequences, shape.num_heads, length),
                empty(R, M), empty(R, M), empty(R, 2 * I), empty(R, I),
            )
            for _ in range(shape.num_layers)
        ]  # fmt: skip
        self._x, self._normed = empty(R, M), empty(R, M)  # what the last layer gives, and its norm
        self._dx, self._dnormed = empty(R, M), empty(R, M)
        self._dqkv, self._dattention = empty(R, S), empty(R, W)
        self._dgate_up, self._dgated = empty(R, 2 * I), empty(R, I)
        self._logits = empty(min(R, _HEAD_ROWS), shape.vocab_size)
        self._dhead = empty(shape.vocab_size, M)
        self._losses = empty(R)
        half = shape.head_dim // 2
        frequencies = shape.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
        angles = np.tile(np.arange(length, dtype=np.float64)[:, None] * frequencies, (sequences, 1))
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)  # (R, D / 2)

    # ---- one layer

    def _heads(self, qkv: F32Array) -> tuple[F32Array, F32Array, F32Array]:
        """(R, S) as q (R, H, D), k and v (R, KH, D): views."""
        shape = self.shape
        heads = qkv.reshape(qkv.shape[0], -1, shape.head_dim)
        first_value = shape.num_heads + shape.num_kv_heads
        return heads[:, : shape.num_heads], heads[:, shape.num_heads : first_value], heads[:, first_value:]

    def _dense(self, x: F32Array) -> F32Array:
        """(R, heads, D) as (n, T, heads, D)"""
        return x.reshape(self.sequences, self.length, *x.shape[1:])

    def _forward_layer(self, p: LayerParameters, a: _LayerActivations, out: F32Array) -> None:
        backend, eps = self.backend, self.shape.rms_norm_eps
        backend.rms_norm(a.x, p.attention_norm, eps, out=a.normed)
        np.matmul(a.normed, p.qkv.T, out=a.qkv)
        q, k, v = self._heads(a.qkv)
        backend.rope(q, k, self._cos, self._sin)
        attention = a.attention.reshape(self.sequences, self.length, -1, self.shape.head_dim)
        scale = 1 / math.sqrt(self.shape.head_dim)
        backend.flash_attention(self._dense(q), self._dense(k), self._dense(v), scale=scale, out=attention, lse=a.lse)
        np.matmul(a.attention, p.o.T, out=a.middle)
        np.add(a.middle, a.x, out=a.middle)
        backend.rms_norm(a.middle, p.mlp_norm, eps, out=a.mlp_normed)
        np.matmul(a.mlp_normed, p.gate_up.T, out=a.gate_up)
        backend.silu_mul(a.gate_up, out=a.gated)
        np.matmul(a.gated, p.down.T, out=out)
        out += a.middle

    def _backward_layer(self, p: LayerParameters, a: _LayerActivations, g: LayerParameters) -> None:
        """Turns self._dx from the gradient of the layer's output into that of its input; fills g."""
        backend, eps, dx, dnormed = self.backend, self.shape.rms_norm_eps, self._dx, self._dnormed
        np.matmul(dx.T, a.gated, out=g.down)
        np.matmul(dx, p.down, out=self._dgated)
        backend.silu_mul_backward(a.gate_up, self._dgated, self._dgate_up)
        np.matmul(self._dgate_up.T, a.mlp_normed, out=g.gate_up)
        np.matmul(self._dgate_up, p.gate_up, out=dnormed)
        g.mlp_norm[...] = 0
        backend.rms_norm_backward(a.middle, dnormed, p.mlp_norm, eps, dx, g.mlp_norm)

        np.matmul(dx.T, a.attention, out=g.o)
        np.matmul(dx, p.o, out=self._dattention)
        dq, dk, dv = self._heads(self._dqkv)
        q, k, v = (self._dense(x) for x in self._heads(a.qkv))
        dense = (self.sequences, self.length, self.shape.num_heads, self.shape.head_dim)
        backend.flash_attention_backward(
            self._dattention.reshape(dense), q, k, v, a.attention.reshape(dense), a.lse,
            scale=1 / math.sqrt(self.shape.head_dim), dq=self._dense(dq), dk=self._dense(dk), dv=self._dense(dv),
        )  # fmt: skip
        backend.rope_backward(dq, dk, self._cos, self._sin)
        np.matmul(self._dqkv.T, a.normed, out=g.qkv)
        np.matmul(self._dqkv, p.qkv, out=dnormed)
        g.attention_norm[...] = 0
        backend.rms_norm_backward(a.x, dnormed, p.attention_norm, eps, dx, g.attention_norm)

    # ---- the whole model

    def _forward(self, parameters: Parameters, tokens: I32Array) -> None:
        """tokens (R,) -> self._normed (R, M), what the head multiplies."""
        outputs = [a.x for a in self._layers] + [self._x]
        np.take(parameters.embedding, tokens, axis=0, out=outputs[0])
        for p, a, out in zip(parameters.layers, self._layers, outputs[1:], strict=True):
            self._forward_layer(p, a, out)
        self.backend.rms_norm(self._x, parameters.norm, self.shape.rms_norm_eps, out=self._normed)

    def _slices(self) -> list[slice]:
        R = self._normed.shape[0]
        return [slice(first, min(first + _HEAD_ROWS, R)) for first in range(0, R, _HEAD_ROWS)]

    def losses(self, parameters: Parameters, tokens: I32Array) -> F32Array:
        """Cross-entropy in nats of each token but the first: tokens (n, T + 1) -> (n, T), valid until the next call."""
        inputs, targets = self._split(tokens)
        self._forward(parameters, inputs)
        for rows in self._slices():
            logits = self._logits[: rows.stop - rows.start]
            np.matmul(self._normed[rows], parameters.embedding.T, out=logits)
            self.backend.cross_entropy(logits, targets[rows], 1.0, self._losses[rows])
        return self._losses.reshape(self.sequences, self.length)

    def gradients(self, parameters: Parameters, tokens: I32Array, scale: float, out: Parameters) -> float:
        """The sum of the losses of tokens (n, T + 1); out = scale times the sum's gradients."""
        inputs, targets = self._split(tokens)
        self._forward(parameters, inputs)
        for i, rows in enumerate(self._slices()):
            logits = self._logits[: rows.stop - rows.start]
            np.matmul(self._normed[rows], parameters.embedding.T, out=logits)
            self.backend.cross_entropy(logits, targets[rows], scale, self._losses[rows])
            np.matmul(logits, parameters.embedding, out=self._dnormed[rows])
            np.matmul(logits.T, self._normed[rows], out=self._dhead if i else out.embedding)
            if i:
                out.embedding += self._dhead
        self._dx[...] = 0
        out.norm[...] = 0
        eps = self.shape.rms_norm_eps
        self.backend.rms_norm_backward(self._x, self._dnormed, parameters.norm, eps, self._dx, out.norm)
        for p, a, g in zip(parameters.layers[::-1], self._layers[::-1], out.layers[::-1], strict=True):
            self._backward_layer(p, a, g)
        self.backend.add_rows_at(self._dx, inputs, out.embedding)
        return float(np.sum(self._losses, dtype=np.float64))

    def _split(self, tokens: I32Array) -> tuple[I32Array, I32Array]:
        """(n, T + 1) -> inputs and targets, (R,) each."""
        assert tokens.shape == (self.sequences, self.length + 1) and tokens.dtype == np.int32
        assert tokens.min() >= 0 and tokens.max() < self.shape.vocab_size
        return np.ascontiguousarray(tokens[:, :-1]).reshape(-1), np.ascontiguousarray(tokens[:, 1:]).reshape(-1)
