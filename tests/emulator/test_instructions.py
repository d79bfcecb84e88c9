"""Every form of an instruction against Python's integers and fractions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cuda_kernels.emulator import Program
from tests.emulator.instruction_cases import CASES, THREADS, Case
from tests.emulator.ptx_text import DTYPES, WIDTHS


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_gives_what_the_isa_says_for_every_thread(case: Case) -> None:
    output = np.zeros(THREADS, DTYPES[case.output])

    Program(case.ptx).launch(1, THREADS, [*case.values, output])

    for thread in range(THREADS):
        arguments = [values[thread].item() for values in case.values]
        expected = case.expected(*arguments)
        got = output[thread]
        if output.dtype.kind in "iu":
            bits = WIDTHS[case.output]
            assert int(got) & ((1 << bits) - 1) == int(expected) & ((1 << bits) - 1), (thread, arguments)
        elif math.isnan(expected):
            assert math.isnan(got), (thread, arguments)
        elif case.tolerance:
            assert abs(float(got) - expected) <= case.tolerance * abs(expected), (thread, arguments)
        else:
            assert float(got) == expected, (thread, arguments)
            assert np.signbit(got) == (math.copysign(1, expected) < 0), (thread, arguments)
