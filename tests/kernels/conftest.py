"""The backends under test. Kernels are compiled once and cached, so the first run takes a minute longer."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.reference import ReferenceBackend


@pytest.fixture(scope="session")
def cpu() -> CpuBackend:
    return CpuBackend(2)


@pytest.fixture(scope="session")
def single() -> CpuBackend:
    return CpuBackend(1)


@pytest.fixture(scope="session")
def reference() -> ReferenceBackend:
    return ReferenceBackend()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
