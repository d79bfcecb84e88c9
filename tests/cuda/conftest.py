"""The emulated GPU that the kernel tests run on: compiled PTX under all checks. Kernels are compiled once and kept."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.compile import Compiler
from cuda_kernels.emulated import EmulatedRuntime
from tinyllm.cache import cache_root


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    return Compiler(cache_root() / "cuda")


@pytest.fixture(scope="session")
def runtime(compiler: Compiler) -> EmulatedRuntime:
    """Raises on races in shared and global memory, bounds, uninitialised reads, divergent barriers, and more."""
    return EmulatedRuntime(compiler)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
