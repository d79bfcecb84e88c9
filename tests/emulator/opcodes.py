"""The opcodes that an instruction test runs, read from the tests' own PTX."""

from __future__ import annotations

from cuda_kernels.emulator import opcodes_of
from tests.emulator import instruction_cases, warp_cases
from tests.emulator.ptx_text import parse_only
from tests.emulator.test_tensor_core import LDMATRIX_TEXTS, MMA_TEXTS

TESTED_OPCODES: frozenset[str] = frozenset().union(
    *(opcodes_of(parse_only(case.body)) for case in instruction_cases.CASES),
    *(opcodes_of(case.ptx) for case in warp_cases.CASES),
    *(opcodes_of(text) for text in (*MMA_TEXTS.values(), *LDMATRIX_TEXTS.values())),
)
