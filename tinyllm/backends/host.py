"""What backends over numpy arrays share: the host is their device, so that staging and copying are nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import Batch, F32Array, I32Array, StepRunner
from tinyllm.step_cost import StepCost
from weights import Tensor

__all__ = ["EagerSteps", "HostBackend", "available_memory"]


def available_memory() -> int:
    """Bytes of memory that this process may still take, by the kernel's estimate and its control group's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):
            available = 4 << 30
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return available


class EagerSteps:
    """A StepRunner that runs every step op by op."""

    def run(self, batch: Batch, step: Callable[[], None]) -> None:
        step()


class HostBackend:
    """The part of `Backend` that is alike wherever ops work on numpy arrays."""

    on_host = True
    max_sampled_vocab = 0
    step_cost = StepCost(fixed=1.25, per_read=1 / 900, per_key=1 / 3000)  # of SmolLM2-135M on two cores with VNNI

    def load_vector(self, tensors: Sequence[Tensor]) -> F32Array:
        vectors = [tensor.dequantize() for tensor in tensors]
        return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)

    def allocate(self, shape: tuple[int, ...]) -> F32Array:
        return np.empty(shape, np.float32)

    def default_kv_dtype(self, head_dim: int) -> str:
        return "f32"

    def available_nbytes(self) -> int:
        return available_memory()

    def to_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def to_device(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array)

    def upload(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        target[...] = source

    def stage(self, batch: Batch) -> Batch:
        return batch

    def padded(self, batch: Batch) -> Batch:
        return batch

    def reserve(
        self, max_tokens: int, max_in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int,
        vocab_size: int = 0,
    ) -> None: ...  # scratch memory grows on demand  # fmt: skip

    def step_runner(self) -> StepRunner:
        return EagerSteps()

    def add(self, x: F32Array, y: F32Array) -> None:
        x += y

    def scale(self, x: F32Array, factor: float) -> None:
        np.multiply(x, np.float32(factor), out=x)

    def sample(self, logits: F32Array, draws: Sequence[tuple[int, int, float, int, float, float]]) -> list[int]:
        raise NotImplementedError("the host samples by itself; see tinyllm.sampling")

    def gather_rows(self, x: F32Array, rows: I32Array) -> F32Array:
        return x[rows]

    def rope(self, q: F32Array, k: F32Array, cos: F32Array, sin: F32Array) -> None:
        raise NotImplementedError  # each backend's own

    def rotate(self, q: F32Array, cos: F32Array, sin: F32Array, *, out: F32Array) -> None:
        out[...] = q
        self.rope(out, out[:, :0], cos, sin)
