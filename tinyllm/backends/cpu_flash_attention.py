"""The CPU backend's dense attention: shapes checked, keys and values transposed, then the kernels run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array
from tinyllm.backends.cpu_kernels import flash_attention as kernels
from tinyllm.backends.cpu_ops import CpuOps

__all__ = ["CpuFlashAttention"]


def _table(*arrays: F32Array) -> NDArray[np.int64]:
    """What the kernels call `arrays`: (n, 4) addresses and strides."""
    return np.array([(x.ctypes.data, *x.strides[:3]) for x in arrays], np.int64)


def _shapes(q: F32Array, k: F32Array, v: F32Array, causal: bool) -> tuple[int, int, int, int, int, int, int]:
    """(N, Q, K, H, KH, D, shift)"""
    (N, Q, H, D), (K, KH) = q.shape, k.shape[1:3]
    assert k.shape == v.shape == (N, K, KH, D), f"q {q.shape}, k {k.shape}, v {v.shape}"
    assert min(N, Q, K, KH) >= 1 and H % KH == 0, f"{H} query heads over {KH} key heads"
    assert D % 16 == 0, f"head size {D} is no multiple of 16"
    assert all(x.dtype == np.float32 and x.strides[3] == 4 for x in (q, k, v))
    return N, Q, K, H, KH, D, K - Q if causal else K


class CpuFlashAttention(CpuOps):
    """`flash_attention` and `flash_attention_backward` of `Backend`."""

    def _transpose(self, x: F32Array, target: int) -> None:
        N, K, KH, D = x.shape
        tasks = N * KH * -(-K // kernels.TILE)
        arrays = _table(x)
        self._run(kernels.transpose_tiles, tasks, 4 * x.size, int(arrays.ctypes.data), 0, K, KH, D, target)

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
        N, Q, K, H, KH, D, shift = _shapes(q, k, v, causal)
        out = np.empty((N, Q, H, D), np.float32) if out is None else out
        lse = np.empty((N, H, Q), np.float32) if lse is None else lse
        assert out.shape == q.shape and out.strides[3] == 4
        assert lse.shape == (N, H, Q) and lse.flags.c_contiguous
        q_tiles, k_tiles = -(-Q // kernels.TILE), -(-K // kernels.TILE)
        worker_nbytes, transposed = kernels.scratch_nbytes(D), N * KH * k_tiles * kernels.transposed_nbytes(D)
        keys = self._reserve(self.num_threads * worker_nbytes + transposed)
        scratch = keys + transposed
        self._transpose(k, keys)
        arrays = _table(q, v, out)
        self._run(
            kernels.flash_attention, N * H * q_tiles, N * H * Q * K * D // 4, int(arrays.ctypes.data), keys,
            int(lse.ctypes.data), Q, K, H, H // KH, D, shift, scale, scratch, worker_nbytes,
        )  # fmt: skip
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
        N, Q, K, H, KH, D, shift = _shapes(q, k, v, causal)
        dq = np.empty(q.shape, np.float32) if dq is None else dq
        dk = np.empty(k.shape, np.float32) if dk is None else dk
        dv = np.empty(v.shape, np.float32) if dv is None else dv
        assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
        assert dout.shape == out.shape == q.shape and lse.shape == (N, H, Q) and lse.flags.c_contiguous
        assert all(x.strides[3] == 4 for x in (dout, out, dq, dk, dv))
        q_tiles, k_tiles = -(-Q // kernels.TILE), -(-K // kernels.TILE)
        worker_nbytes, transposed = kernels.scratch_nbytes(D), N * KH * k_tiles * kernels.transposed_nbytes(D)
        keys = self._reserve(self.num_threads * worker_nbytes + 2 * transposed + 4 * N * H * Q)
        values = keys + transposed
        scratch = values + transposed
        delta = scratch + self.num_threads * worker_nbytes
        self._transpose(k, keys)
        self._transpose(v, values)
        results, queries, key_rows = _table(out, dout), _table(q, dout, k, dq), _table(q, dout, dk, dv)
        work = N * H * Q * K * D // 2
        rest = (
            keys, values, int(lse.ctypes.data), delta, Q, K, H, H // KH, D, shift, scale, scratch, worker_nbytes
        )  # fmt: skip
        address = int(results.ctypes.data)
        self._run(kernels.flash_attention_delta, N * H * Q, 2 * q.size, address, Q, H, D, delta)
        self._run(kernels.flash_attention_dq, N * H * q_tiles, work, int(queries.ctypes.data), *rest)
        self._run(kernels.flash_attention_dkv, N * KH * k_tiles, work, int(key_rows.ctypes.data), *rest)
        return dq, dk, dv
