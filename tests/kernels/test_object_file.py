"""Loading object files: by this project's loader and by LLVM, which must run the same code."""

from __future__ import annotations

import ctypes
import math
import platform
import struct
import sys

import numpy as np
import pytest

from tinyllm.backends.cpu_kernels import jit, object_file
from tinyllm.backends.cpu_kernels.simd import load_f32, store_f32

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="LLVM alone loads object files here"
)


@jit.kernel
def logarithms(worker: int, begin: int, end: int, x: int, out: int) -> None:
    """out[i] = log(x[i]) + 1.25: constants, and a call of the C library"""
    for i in range(begin, end):
        store_f32(out + 4 * i, math.log(load_f32(x + 4 * i)) + 1.25)


@pytest.fixture(scope="module")
def compiled() -> bytes:
    logarithms.build(lambda: None)
    content = jit._read(logarithms.name)
    assert content is not None
    return content


def results_of(address: int, x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)
    params = np.array([x.ctypes.data, out.ctypes.data], np.int64)
    task = ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 4)(address)
    task(params.ctypes.data, 0, 0, len(x))
    return out


def test_both_loaders_run_the_same_code(compiled: bytes) -> None:
    x = np.linspace(0.5, 40, 100, dtype=np.float32)
    ours = results_of(object_file._load_elf(compiled, jit._ENTRY), x)
    np.testing.assert_allclose(ours, np.log(x) + np.float32(1.25), rtol=1e-6)
    assert np.array_equal(ours, results_of(object_file._load_with_llvm(compiled, jit._ENTRY), x))


def test_what_the_own_loader_does_not_know(compiled: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A symbol that this process has not, another machine's code, an unknown kind of relocation: LLVM's turn."""
    another_machine = compiled[:18] + struct.pack("<H", 183) + compiled[20:]
    for content in (compiled.replace(b"\0logf\0", b"\0zzzz\0"), another_machine):
        with pytest.raises(object_file._UnsupportedError):
            object_file._load_elf(content, jit._ENTRY)
    monkeypatch.setattr(object_file, "_ABS64", 98)
    with pytest.raises(object_file._UnsupportedError):
        object_file._load_elf(compiled, jit._ENTRY)
    x = np.ones(3, np.float32)
    assert results_of(object_file.load_object(compiled, jit._ENTRY), x).tolist() == [1.25, 1.25, 1.25]
