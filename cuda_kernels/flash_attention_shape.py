"""What the dense attention kernels take, checked once: shapes, dtypes, and the causal mask as one number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, require

__all__ = [
    "BACKWARD_HEAD_DIMS",
    "FORWARD_HEAD_DIMS",
    "LN2",
    "LOG2_E",
    "AttentionShape",
    "check_like",
    "constant_of",
    "words",
]

FORWARD_HEAD_DIMS = (64, 80, 96, 128, 256)
BACKWARD_HEAD_DIMS = (64, 80, 96, 128)

LOG2_E = np.float32(math.log2(math.e))
LN2 = np.float32(math.log(2))

_STORED: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
}


@dataclass(frozen=True)
class AttentionShape:
    """Shapes of one call: queries (N, Q, H, D), keys and values (N, K, KH, D)."""

    N: int
    Q: int
    K: int
    H: int
    KH: int
    D: int
    dtype: str
    causal: bool

    @staticmethod
    def of(q: Array, k: Array, v: Array, *, dtype: str, causal: bool, head_dims: tuple[int, ...]) -> AttentionShape:
        """Checks the inputs. Raises KernelArgumentError."""
        require(dtype in _STORED, f"attention takes f32, f16 or bf16, not {dtype}")
        require(q.ndim == 4 and k.ndim == 4, f"q and k have four axes, not {q.ndim} and {k.ndim}")
        (N, Q, H, D), (K, KH) = q.shape, k.shape[1:3]
        require(k.shape == (N, K, KH, D), f"q of shape {q.shape} does not go with k of shape {k.shape}")
        require(min(N, Q, K, H, KH) >= 1, f"empty input: q {q.shape}, k {k.shape}")
        require(H % KH == 0, f"{H} query heads cannot share {KH} key heads evenly")
        require(D in head_dims, f"head size {D} is none of {', '.join(map(str, head_dims))}")
        require(max(Q * H, K * KH) * D < 1 << 31 and Q + K < 1 << 30, "one sequence has 2**31 elements or more")
        for name, array, like in (("q", q, q), ("k", k, k), ("v", v, k)):
            check_like(name, array, like.shape, _STORED[dtype])
        return AttentionShape(N, Q, K, H, KH, D, dtype, causal)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of q, k, v, out and dout."""
        return _STORED[self.dtype]

    @property
    def shift(self) -> int:
        """Query i sees the keys j <= i + shift. The mask is aligned at the end: the last query sees all keys."""
        return self.K - self.Q if self.causal else self.K

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.H // self.KH


def check_like(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """One array's shape, dtype and layout. Raises KernelArgumentError."""
    require(array.shape == shape, f"{name} must have the shape {shape}, not {array.shape}")
    require(array.dtype == dtype, f"{name} must be {dtype}, not {array.dtype}")
    require(array.flags.c_contiguous, f"{name} must be C-contiguous")
    address = array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data
    require(address % 16 == 0, f"{name} must start at a multiple of 16 bytes")


def words(array: Array) -> Array:
    """An array as the 32-bit words that kernels load: float32, or pairs of halves."""
    return array if array.dtype == np.float32 else array.view(np.uint32)


def constant_of(kernel: Kernel, name: str) -> int:
    """One of the numbers that a kernel was built with."""
    value = dict(kernel.constants)[name]
    assert isinstance(value, int)
    return value
