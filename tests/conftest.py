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
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, pulled on first use; where it cannot be had, tests fail."""
    from tinyllm.hub import resolve

    return resolve("smollm2-135m-instruct")
