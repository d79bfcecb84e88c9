"""Attention with the scores in memory, and the formulas for the memory traffic of both kinds of attention."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cuda_kernels.attention_f32_tiles import TileShape
from cuda_kernels.compile import Compiler
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.naive_attention import (
    kernels_for_report,
    naive_attention,
    naive_attention_nbytes,
    scores_shape,
    shared_nbytes_of,
)


@pytest.fixture(scope="module")
def runtime(compiler: Compiler) -> EmulatedRuntime:
    """Always the emulated GPU: it is what counts bytes."""
    return EmulatedRuntime(compiler)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/attention_traffic.py"""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import attention_traffic

    return attention_traffic


@pytest.mark.parametrize("shape", [(2, 1, 8), (3, 63, 8), (1, 64, 8), (1, 65, 40), (2, 131, 8)])
def test_it_matches_float64_and_moves_what_the_formula_says(
    runtime: EmulatedRuntime, rng: np.random.Generator, shape: tuple[int, int, int]
) -> None:
    H, T, D = shape
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    scores, out = runtime.empty(scores_shape(H, T), np.float32), runtime.empty(shape, np.float32)
    runtime.totals.clear()
    naive_attention(runtime, *map(runtime.from_host, (q, k, v)), scores, out, scale=0.5)
    counted = sum(total.global_read_nbytes + total.global_written_nbytes for total in runtime.totals.values())
    assert counted == sum(naive_attention_nbytes(H, T, D))

    raw = np.where(np.tri(T) > 0, 0.5 * np.einsum("hqd,hkd->hqk", q, k, dtype=np.float64), -np.inf)
    probs = np.exp(raw - raw.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    size = 0.5 * np.einsum("hqd,hkd->hqk", abs(q), abs(k)).max(-1, keepdims=True)
    # scores: a chain of D and two roundings; exp2 and its argument; the sums of P and of P V
    bound = 2.0**-24 * (probs @ abs(v)) * (2 * ((D + 6) * size + 4) + 2 * T + 10)
    np.testing.assert_array_less(abs(runtime.download(out) - probs @ v), bound)


@pytest.mark.parametrize("num_tokens", [1, 64, 83])
def test_tiled_attention_moves_what_the_formula_says(
    runtime: EmulatedRuntime, rng: np.random.Generator, traffic: ModuleType, num_tokens: int
) -> None:
    q, k, v = (rng.standard_normal((1, num_tokens, 8)).astype(np.float32) for _ in range(3))
    _, counted = traffic.run_tiled(runtime, "f32", q, k, v)
    rows = TileShape(8, decode=False).rows
    assert counted.scores == 0
    assert counted.indices == traffic.tiled_f32_index_nbytes(num_tokens, rows)


def test_what_it_cannot_serve_is_refused(runtime: EmulatedRuntime) -> None:
    x = runtime.from_host(np.zeros((1, 10, 8), np.float32))
    scores = runtime.empty(scores_shape(1, 10), np.float32)
    with pytest.raises(KernelArgumentError, match="scores must be"):
        naive_attention(runtime, x, x, x, scores[:, :9], x, scale=1.0)
    with pytest.raises(KernelArgumentError, match="v must be"):
        naive_attention(runtime, x, x, x[:, :9], scores, x, scale=1.0)
    wide = runtime.from_host(np.zeros((1, 10, 12), np.float32))
    with pytest.raises(KernelArgumentError, match="not 12"):
        naive_attention(runtime, wide, wide, wide, scores, wide, scale=1.0)
    long = runtime.empty((1, 7000, 8), np.float32)
    with pytest.raises(KernelArgumentError, match="rows of 7000 scores"):
        naive_attention(runtime, long, long, long, runtime.empty(scores_shape(1, 7000), np.float32), long, scale=1.0)


def test_reported_kernels_fit_the_shared_memory_of_every_part(runtime: EmulatedRuntime) -> None:
    assert all(shared_nbytes_of(kernel) <= runtime.max_shared_nbytes for kernel in kernels_for_report())
