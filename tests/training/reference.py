"""The layers in plain numpy and float64, without backward passes: gradients are finite differences of these.

n sequences of T tokens, hidden size M, H query heads and KH key heads of size D, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from training.parameters import ModelShape, Parameters

F64Array = NDArray[np.float64]


def linear(x: F64Array, weight: F64Array) -> F64Array:
    """x (..., M), weight (N, M) -> (..., N), in parts so small that BLAS takes one thread: tests run side by side."""
    rows = x.reshape(-1, x.shape[-1])
    parts = np.array_split(rows, -(-rows.size * len(weight) // 2**18))
    return np.concatenate([part @ weight.T for part in parts]).reshape(*x.shape[:-1], -1)


def rms_norm(x: F64Array, weight: F64Array, eps: float) -> F64Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu_mul(x: F64Array) -> F64Array:
    """(..., 2I) -> (..., I)"""
    gate, up = np.split(x, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def rope(x: F64Array, theta: float) -> F64Array:
    """x (n, T, heads, D), rotated by the positions 0 to T - 1."""
    half = x.shape[3] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # (T, 1, D / 2)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q: F64Array, k: F64Array, v: F64Array) -> F64Array:
    """q (n, T, H, D), k and v (n, T, KH, D) -> (n, T, H, D), causal."""
    T, H, D = q.shape[1:]
    k, v = (np.repeat(x, H // x.shape[2], axis=2).swapaxes(1, 2) for x in (k, v))  # (n, H, T, D)
    scores = q.swapaxes(1, 2) @ k.swapaxes(2, 3) / np.sqrt(D)  # (n, H, T, T)
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2)


def cross_entropy(logits: F64Array, targets: NDArray[np.int32]) -> F64Array:
    """(..., V), (...) -> (...) in nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    at_targets = np.take_along_axis(shifted, targets[..., None].astype(np.int64), axis=-1)[..., 0]
    return np.log(np.exp(shifted).sum(axis=-1)) - at_targets


def losses(shape: ModelShape, p: Mapping[str, F64Array], tokens: NDArray[np.int32]) -> F64Array:
    """The whole model: tokens (n, T + 1) -> (n, T)."""
    n, T = tokens.shape[0], tokens.shape[1] - 1
    H, KH, eps = shape.num_heads, shape.num_kv_heads, shape.rms_norm_eps
    x = p["embedding"][tokens[:, :-1]]
    for i in range(shape.num_layers):
        qkv = linear(rms_norm(x, p[f"{i}.attention_norm"], eps), p[f"{i}.qkv"])
        q, k, v = np.split(qkv.reshape(n, T, -1, shape.head_dim), [H, H + KH], axis=2)
        mixed = attention(rope(q, shape.rope_theta), rope(k, shape.rope_theta), v)
        x = x + linear(mixed.reshape(n, T, -1), p[f"{i}.o"])
        gate_up = linear(rms_norm(x, p[f"{i}.mlp_norm"], eps), p[f"{i}.gate_up"])
        x = x + linear(silu_mul(gate_up), p[f"{i}.down"])
    return cross_entropy(linear(rms_norm(x, p["norm"], eps), p["embedding"]), tokens[:, 1:])


def in_float64(parameters: Parameters) -> dict[str, F64Array]:
    return {name: array.astype(np.float64) for name, array in parameters.arrays.items()}


# ---- gradients


def slope(f: Callable[[F64Array], float], x: F64Array, direction: F64Array, h: float) -> float:
    """The derivative of f at x in a direction: central differences of the fourth order."""
    near = f(x + h * direction) - f(x - h * direction)
    far = f(x + 2 * h * direction) - f(x - 2 * h * direction)
    return (8 * near - far) / (12 * h)


def check_gradient(
    f: Callable[[F64Array], float],
    x: F64Array,
    gradient: NDArray[np.float32],
    rng: np.random.Generator,
    *,
    directions: int = 3,
    coordinates: int = 4,
    h: float = 1e-4,
    tolerance: float = 1e-5,
) -> None:
    """Compares a gradient with finite differences in random directions, and in single coordinates.

    A slope in a direction of standard normals is about as large as the gradient's norm, which the error is relative to.
    """
    assert gradient.shape == x.shape and np.isfinite(gradient).all()
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    for _ in range(directions):
        direction = rng.standard_normal(x.shape)
        error = abs(slope(f, x, direction, h) - float(np.sum(gradient * direction)))
        assert error <= tolerance * norm, f"{error:.2e} in a random direction, of {norm:.2e}"
    for place in rng.integers(x.size, size=coordinates):
        direction = np.zeros(x.shape)
        direction.flat[place] = 1
        error = abs(slope(f, x, direction, 10 * h) - float(gradient.flat[place]))
        assert error <= tolerance * np.abs(gradient).max(), f"{error:.2e} at {place}"
