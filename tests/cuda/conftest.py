"""The GPU that the kernel tests run on: an emulated one, which runs the compiled PTX under all checks.

With `--cuda-device gpu` the same tests run on a real one. Kernels are compiled once and kept.
"""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.compile import Compiler
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.launch import Runtime
from tinyllm.cache import cache_root


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    return Compiler(cache_root() / "cuda")


@pytest.fixture(scope="session")
def runtime(compiler: Compiler, request: pytest.FixtureRequest) -> Runtime:
    """The emulated one raises on races in shared and global memory, bounds, uninitialised reads, and more."""
    if request.config.getoption("--cuda-device") == "gpu":
        from cuda_kernels.gpu import GpuRuntime

        return GpuRuntime(compiler)
    return EmulatedRuntime(compiler)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
