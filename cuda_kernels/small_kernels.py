"""The kernels bound by memory, over rows of activations and over the cache, for reports."""

from __future__ import annotations

from cuda_kernels import activations, elementwise, gather, kv_cache_kernels, norms, rope
from cuda_kernels.kernel import Kernel

__all__ = ["kernels_for_report"]


def kernels_for_report() -> list[Kernel]:
    """All of them."""
    families = (norms, rope, activations, elementwise, gather, kv_cache_kernels)
    return [kernel for family in families for kernel in family.kernels()]
