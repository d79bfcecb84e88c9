"""Dense attention in float64, its gradients, and how far float32 may be from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import Backend

NAMES = ("out", "lse", "dq", "dk", "dv")

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Dense:
    """q, dout (N, Q, H, D) and k, v (N, K, KH, D)."""

    q: F32
    k: F32
    v: F32
    dout: F32
    scale: float
    causal: bool

    @staticmethod
    def random(
        rng: np.random.Generator, N: int, Q: int, K: int, H: int, KH: int, D: int, *, causal: bool = True
    ) -> Dense:
        q, dout = rng.standard_normal((2, N, Q, H, D), np.float32)
        k, v = rng.standard_normal((2, N, K, KH, D), np.float32)
        return Dense(q, k, v, dout, 1.3 * D**-0.5, causal)

    def run(self, backend: Backend) -> tuple[F32, ...]:
        """out, lse, dq, dk, dv"""
        options = {"scale": self.scale, "causal": self.causal}
        out, lse = backend.flash_attention(self.q, self.k, self.v, **options)
        return out, lse, *backend.flash_attention_backward(self.dout, self.q, self.k, self.v, out, lse, **options)

    def __getitem__(self, batch: slice) -> Dense:
        return self.copied(**{name: getattr(self, name)[batch] for name in ("q", "k", "v", "dout")})

    def copied(self, **arrays: F32) -> Dense:
        """With other arrays in place of some, all of them contiguous."""
        return replace(self, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})


def wide(x: NDArray[np.generic], group: int) -> F64:
    """(N, K, KH, D) -> (N, H, K, D): float64, a key head for each query head."""
    return np.repeat(x.astype(np.float64).transpose(0, 2, 1, 3), group, axis=1)


def summed(x: F64, group: int) -> F64:
    """(N, H, K, D) -> (N, K, KH, D): over the heads of a group."""
    N, H, K, D = x.shape
    return x.reshape(N, H // group, group, K, D).sum(2).transpose(0, 2, 1, 3)


def exact_probs(case: Dense) -> tuple[F64, F64]:
    """P (N, H, Q, K), lse (N, H, Q)"""
    Q, K = case.q.shape[1], case.k.shape[1]
    scores = case.scale * wide(case.q, 1) @ wide(case.k, case.q.shape[2] // case.k.shape[2]).swapaxes(2, 3)
    if case.causal:
        scores[..., np.arange(K) > np.arange(Q)[:, None] + K - Q] = -np.inf
    top = scores.max(-1, keepdims=True)
    exps = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = exps.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return exps / np.where(total > 0, total, 1), (top + np.log(total))[..., 0]


def exact_out(case: Dense) -> F64:
    """(N, Q, H, D)"""
    probs, _ = exact_probs(case)
    return (probs @ wide(case.v, case.q.shape[2] // case.k.shape[2])).transpose(0, 2, 1, 3)


def exact(case: Dense) -> tuple[F64, ...]:
    """out, lse, dq, dk, dv"""
    group = case.q.shape[2] // case.k.shape[2]
    q, k, v, dout = wide(case.q, 1), wide(case.k, group), wide(case.v, group), wide(case.dout, 1)
    probs, lse = exact_probs(case)
    dprobs = dout @ v.swapaxes(2, 3)
    dscores = case.scale * probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True))
    dk, dv = summed(dscores.swapaxes(2, 3) @ q, group), summed(probs.swapaxes(2, 3) @ dout, group)
    return (probs @ v).transpose(0, 2, 1, 3), lse, (dscores @ k).transpose(0, 2, 1, 3), dk, dv


def sizes(case: Dense) -> tuple[F64, ...]:
    """The sums of `exact` over absolute values: an element's rounding error is a small multiple of eps times its size.

    A row's probabilities are uncertain by the rounding of its scores, which grows with the largest of them.
    """
    group = case.q.shape[2] // case.k.shape[2]
    q, k, v, dout = (np.abs(wide(x, n)) for x, n in ((case.q, 1), (case.k, group), (case.v, group), (case.dout, 1)))
    probs, lse = exact_probs(case)
    largest = 1 + case.scale * np.where(probs > 0, q @ k.swapaxes(2, 3), 0).max(-1, keepdims=True)
    dprobs = dout @ v.swapaxes(2, 3)
    dscores = case.scale * largest * probs * (dprobs + (probs * dprobs).sum(-1, keepdims=True))
    probs = largest * probs
    dk, dv = summed(dscores.swapaxes(2, 3) @ q, group), summed(probs.swapaxes(2, 3) @ dout, group)
    lse = np.abs(np.where(np.isfinite(lse), lse, 0)) + largest[..., 0]
    return (probs @ v).transpose(0, 2, 1, 3), lse, (dscores @ k).transpose(0, 2, 1, 3), dk, dv


def assert_exact(case: Dense, results: Sequence[F32], *, roundings: float) -> None:
    """out, lse, dq, dk, dv are right but for some rounding errors of each element's size."""
    for name, result, expected, size in zip(NAMES, results, exact(case), sizes(case), strict=True):
        assert result.dtype == np.float32
        assert result.shape == expected.shape
        blind = np.isneginf(expected)  # a row's log-sum-exp where it sees nothing
        assert np.array_equal(np.isneginf(result), blind), name
        error = np.abs(np.where(blind, 0, result) - np.where(blind, 0, expected))
        assert (error <= roundings * 2.0**-24 * size).all(), name
