"""Memory, warp and block instructions against lists of Python integers."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.emulator import Program
from tests.emulator.instruction_cases import THREADS
from tests.emulator.warp_cases import CASES, WarpCase


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_gives_what_the_isa_says_for_every_warp(case: WarpCase) -> None:
    args = [arg.copy() for arg in case.args]

    report = Program(case.ptx).launch(1, THREADS, args)

    np.testing.assert_array_equal(args[-1], case.expected)
    assert not report.problems
