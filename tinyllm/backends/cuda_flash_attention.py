"""The CUDA backend's dense attention. Head sizes that no kernel has, and views, raise KernelArgumentError."""

from __future__ import annotations

import numpy as np

from cuda_kernels.flash_attention import flash_attention
from cuda_kernels.flash_attention_backward import flash_attention_backward, flash_attention_backward_scratch_nbytes
from cuda_kernels.launch import Array, Runtime
from tinyllm.backends.base import F32Array

__all__ = ["CudaFlashAttention"]


class CudaFlashAttention:
    """`flash_attention` and `flash_attention_backward` of `Backend`, in float32."""

    runtime: Runtime

    def _scratch_of(self, nbytes: int) -> Array:
        raise NotImplementedError

    def _out(self, out: F32Array | None, shape: tuple[int, ...]) -> F32Array:
        raise NotImplementedError

    def flash_attention(
        self,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        *,
        scale: float,
        causal: bool = True,
        out: F32Array | None = None,
        lse: F32Array | None = None,
    ) -> tuple[F32Array, F32Array]:
        N, Q, H, _ = q.shape
        out, lse = self._out(out, q.shape), self._out(lse, (N, H, Q))
        flash_attention(self.runtime, q, k, v, out, lse, dtype="f32", scale=scale, causal=causal)
        return out, lse

    def flash_attention_backward(
        self,
        dout: F32Array,
        q: F32Array,
        k: F32Array,
        v: F32Array,
        out: F32Array,
        lse: F32Array,
        *,
        scale: float,
        causal: bool = True,
        dq: F32Array | None = None,
        dk: F32Array | None = None,
        dv: F32Array | None = None,
    ) -> tuple[F32Array, F32Array, F32Array]:
        N, Q, H, _ = q.shape
        dq, dk, dv = self._out(dq, q.shape), self._out(dk, k.shape), self._out(dv, v.shape)
        nbytes = flash_attention_backward_scratch_nbytes(N, Q, H)
        flash_attention_backward(
            *(self.runtime, q, k, v, out, lse, dout, dq, dk, dv),
            dtype="f32",
            scale=scale,
            causal=causal,
            scratch=self._scratch_of(nbytes)[:nbytes].view(np.float32),
        )
        return dq, dk, dv
