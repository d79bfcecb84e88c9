"""What tests of every tier share."""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda-device", choices=("emulated", "gpu"), default="emulated", help="what tests of GPU kernels run on"
    )


@pytest.fixture(scope="session")
def bundled_path() -> Path:
    """The folder of the model that comes with tinyllm."""
    from tinyllm.hub import DEFAULT_MODEL, resolve

    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, pulled on first use. For tests that are marked `network`."""
    from tinyllm.hub import LARGER_MODEL, resolve

    return resolve(LARGER_MODEL)


@pytest.fixture(params=["bundled_path", pytest.param("smollm2_path", marks=pytest.mark.network)])
def real_model(request: pytest.FixtureRequest) -> Path:
    """The one and the other."""
    return request.getfixturevalue(request.param)
