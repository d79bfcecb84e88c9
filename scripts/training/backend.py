"""The CPU backend with the ops that only training has. See kernels.py for what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array, I32Array
from tinyllm.backends.cpu import CpuBackend
from training import kernels

__all__ = ["TrainingBackend"]


def _address(x: NDArray[np.generic]) -> int:
    assert x.flags.c_contiguous
    return int(x.ctypes.data)


class TrainingBackend(CpuBackend):
    """A CpuBackend with backward ops. One op at a time, as the base: each thread of the trainer has its own."""

    def rms_norm_backward(
        self, x: F32Array, dy: F32Array, weight: F32Array, eps: float, dx: F32Array, dweight: F32Array
    ) -> None:
        """dx (T, M) += and dweight (M,) += the gradients of rms_norm."""
        T, M = x.shape
        assert dy.shape == dx.shape == x.shape and weight.shape == dweight.shape == (M,)
        self._run(
            kernels.rms_norm_backward, 1, 0, _address(x), _address(dy), _address(weight), eps, T, M, _address(dx),
            _address(dweight),
        )  # fmt: skip

    def silu_mul_backward(self, x: F32Array, dout: F32Array, dx: F32Array) -> None:
        """dx (T, 2I) = the gradient of silu_mul of x (T, 2I)."""
        T, columns = dout.shape
        assert x.shape == dx.shape == (T, 2 * columns)
        work = 16 * T * columns
        self._run(kernels.silu_mul_backward, T, work, _address(x), _address(dout), columns, _address(dx))

    def rope_backward(self, dq: F32Array, dk: F32Array, cos: F32Array, sin: F32Array) -> None:
        """The gradients before rope's rotation, in place: the rotation by the opposite angles."""
        self.rope(dq, dk, cos, -sin)

    def cross_entropy(self, logits: F32Array, targets: I32Array, scale: float, losses: F32Array) -> None:
        """losses (T,) in nats; logits (T, V) become scale times their gradients."""
        T, V = logits.shape
        assert targets.shape == losses.shape == (T,) and targets.dtype == np.int32
        self._run(kernels.cross_entropy, T, 16 * T * V, _address(logits), _address(targets), V, scale, _address(losses))

    def add_rows_at(self, x: F32Array, indices: I32Array, out: F32Array) -> None:
        """out (V, M): out[indices[t]] += x[t] (T, M), t ascending."""
        T, M = x.shape
        assert indices.shape == (T,) and indices.dtype == np.int32 and out.shape[1] == M
        assert T == 0 or (indices.min() >= 0 and indices.max() < out.shape[0])
        self._run(kernels.add_rows_at, 1, 0, _address(x), _address(indices), T, M, _address(out))

    def sum_gradients(self, gradients: Sequence[F32Array], out: F32Array) -> float:
        """out (n,) = their sum, in order; returns its norm. out may be one of them."""
        addresses = np.array([_address(gradient) for gradient in gradients], np.int64)
        assert all(gradient.shape == out.shape for gradient in gradients)
        blocks = -(-out.size // kernels.BLOCK)
        squares = np.empty(blocks, np.float32)
        self._run(
            kernels.sum_gradients, blocks, out.size * (1 + len(gradients)), _address(addresses), len(gradients),
            out.size, _address(out), _address(squares),
        )  # fmt: skip
        return float(np.sqrt(np.sum(squares, dtype=np.float64)))

    def adamw(
        self,
        parameters: F32Array,
        gradient: F32Array,
        moments: tuple[F32Array, F32Array],
        average: F32Array,
        *,
        decayed: int,
        clip: float,
        lr: float,
        betas: tuple[float, float],
        step: int,
        eps: float,
        weight_decay: float,
        average_rate: float,
    ) -> None:
        """Step `step` (the first is 1) of AdamW on the flat parameters; see kernels.adamw."""
        size = parameters.size
        assert gradient.size == moments[0].size == moments[1].size == average.size == size and decayed % 16 == 0
        beta1, beta2 = betas
        self._run(
            kernels.adamw, -(-size // kernels.BLOCK), 8 * size, _address(parameters), _address(gradient),
            _address(moments[0]), _address(moments[1]), _address(average), size, decayed, clip, lr, beta1, beta2,
            1 - beta1**step, 1 - beta2**step, eps, weight_decay, average_rate,
        )  # fmt: skip
