"""The model that is trained: its shape, and its parameters in one flat vector.

A flat vector makes the optimiser, the gradient's norm and a checkpoint one array each. Matrices come first, since only
they decay; each starts at a multiple of 16 numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tinyllm.backends.base import F32Array

__all__ = ["LayerParameters", "ModelShape", "Parameters"]


@dataclass(frozen=True)
class ModelShape:
    """A llama: RMSNorm, rotary embedding, grouped queries, SwiGLU, tied embeddings."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.num_layers < 0:
            raise ValueError(f"num_layers must not be negative, and is {self.num_layers}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key heads evenly")
        if self.head_dim < 16 or self.head_dim % 16:
            raise ValueError(f"head_dim must be a multiple of 16, not {self.head_dim}")

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Names and shapes (out, in), in the order of the flat vector."""
        M, D = self.hidden_size, self.head_dim
        shapes = {"embedding": (self.vocab_size, M)}
        for i in range(self.num_layers):
            shapes[f"{i}.qkv"] = (self.qkv_size, M)  # queries, keys, values
            shapes[f"{i}.o"] = (M, self.num_heads * D)
            shapes[f"{i}.gate_up"] = (2 * self.intermediate_size, M)
            shapes[f"{i}.down"] = (M, self.intermediate_size)
        return shapes

    def vectors(self) -> dict[str, tuple[int]]:
        """The norms' weights."""
        names = [f"{i}.{norm}" for i in range(self.num_layers) for norm in ("attention_norm", "mlp_norm")]
        return dict.fromkeys([*names, "norm"], (self.hidden_size,))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in (*self.matrices().values(), *self.vectors().values()))


class LayerParameters(NamedTuple):
    attention_norm: F32Array  # (M,)
    qkv: F32Array  # ((H + 2 KH) D, M)
    o: F32Array  # (M, H D)
    mlp_norm: F32Array  # (M,)
    gate_up: F32Array  # (2 I, M)
    down: F32Array  # (M, I)


class Parameters:
    """Named views into one flat float32 vector: parameters, or their gradients.

    Attributes:
        flat: (n,) everything.
        decayed: how many numbers at its front are matrices.
    """

    def __init__(self, shape: ModelShape, flat: F32Array | None = None) -> None:
        self.shape = shape
        self.arrays: dict[str, F32Array] = {}
        places, end = [], 0
        for name, extent in shape.matrices().items():
            places.append((name, extent, end))
            end += -(-math.prod(extent) // 16) * 16
        self.decayed = end
        for vector, length in shape.vectors().items():
            places.append((vector, length, end))  # type: ignore[arg-type]
            end += -(-length[0] // 16) * 16
        self.flat = np.zeros(end, np.float32) if flat is None else flat
        assert self.flat.shape == (end,) and self.flat.dtype == np.float32 and self.flat.flags.c_contiguous
        for name, extent, first in places:
            self.arrays[name] = self.flat[first : first + math.prod(extent)].reshape(extent)
        self.embedding, self.norm = self.arrays["embedding"], self.arrays["norm"]
        self.layers = [
            LayerParameters(*(self.arrays[f"{i}.{name}"] for name in LayerParameters._fields))
            for i in range(shape.num_layers)
        ]

    @classmethod
    def initial(cls, shape: ModelShape, seed: int) -> Parameters:
        """Normal with standard deviation 0.02; what writes to the residual stream is divided by sqrt(2 layers)."""
        parameters = cls(shape)
        rng = np.random.Generator(np.random.Philox(seed))
        for name in shape.matrices():
            matrix = parameters.arrays[name]
            matrix[...] = rng.standard_normal(matrix.shape, np.float32) * np.float32(0.02)
            if name.endswith((".o", ".down")):
                matrix /= np.float32(math.sqrt(2 * shape.num_layers))
        for name in shape.vectors():
            parameters.arrays[name][...] = 1
        return parameters
