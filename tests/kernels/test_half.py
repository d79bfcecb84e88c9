"""float16 and back, by the CPU's instructions and by integers, against numpy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels import half
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.simd import F16, F32, VF, VH, emit_load, i64, instruction, pointer, types

SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@pytest.fixture(params=["native", "integers"])
def way(request, monkeypatch):
    if request.param == "native" and not half._NATIVE:
        pytest.skip("this CPU has no such instructions")
    monkeypatch.setattr(half, "_NATIVE", request.param == "native")
    return request.param


def run(name, emit, tasks, source, target, source_nbytes, target_nbytes):
    convert = instruction(types.void, i64, i64)(emit)

    def body(worker: int, begin: int, end: int, x: int, out: int) -> None:
        for task in range(begin, end):
            convert(x + source_nbytes * task, out + target_nbytes * task)

    CpuBackend(1)._run(Kernel(f"test_half-{name}-{SOURCE}", body), tasks, 0, source.ctypes.data, target.ctypes.data)


def test_every_float16_is_read_exactly(way):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    floats = np.zeros(halves.shape, np.float32)

    def emit(b, x, out):
        b.store(half.emit_float_of_half(b, emit_load(b, x, VH)), pointer(b, out, VF), align=1)

    run(f"read-{way}", emit, len(halves) // 16, halves, floats, 32, 64)
    expected = halves.astype(np.float32)
    assert np.array_equal(np.isnan(floats), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(floats[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("lanes", [1, 16])
def test_float32_is_rounded_to_nearest_even(way, lanes, rng):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact = halves[np.isfinite(halves)].astype(np.float32)
    between = (exact[:-1] + exact[1:]) / 2  # ties, most of them
    near = [np.nextafter(between, side) for side in (np.float32(-np.inf), np.float32(np.inf))]
    special = np.array([65519.99, 65520, 65536, 1e30, 1e-30, 1e-8, np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32)
    random = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    floats = np.concatenate([special, exact, between, *near, random]).astype(np.float32)
    floats = floats[: len(floats) // lanes * lanes]
    found = np.zeros(len(floats), np.float16)

    def emit(b, x, out):
        source, target = (F32, F16) if lanes == 1 else (VF, VH)
        b.store(half.emit_half_of_float(b, emit_load(b, x, source)), pointer(b, out, target), align=1)

    run(f"write-{way}-{lanes}", emit, len(floats) // lanes, floats, found, 4 * lanes, 2 * lanes)
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(found[numbers].view(np.uint16), expected[numbers].view(np.uint16))
