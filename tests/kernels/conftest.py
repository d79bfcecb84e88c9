"""The backends under test. Kernels are compiled once and cached, so the first run takes a minute longer."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels.amx import has_amx
from tinyllm.backends.reference import ReferenceBackend


def linear_backend(form: str, threads: int) -> CpuBackend:
    """A backend whose linear layers take one of the forms that there are: "float32", "digits", "matrix", "int8".

    "matrix" is "digits" on AMX, "int8" the form of digits that the option asks for, on AMX where there is one.
    """
    if form == "matrix" and not has_amx():
        pytest.skip("this CPU has no AMX")
    backend = CpuBackend(threads, activations="int8" if form == "int8" else "f32")
    backend.exact_digits = 0 if form == "float32" else 3
    backend.matrix_unit = has_amx() and form in ("matrix", "int8")
    return backend


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
