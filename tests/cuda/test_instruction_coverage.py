"""The emulator's instruction tests cover every instruction of every kernel: what is emulated was tested by itself."""

from __future__ import annotations

import pytest

from cuda_kernels.compile import Compiler
from cuda_kernels.emulator import opcodes_of
from cuda_kernels.registry import families
from tests.emulator.opcodes import TESTED_OPCODES


@pytest.mark.parametrize("family", sorted(families()))
def test_every_instruction_of_the_kernels_has_a_test(family: str, compiler: Compiler) -> None:
    for kernel in families()[family]():
        untested = opcodes_of(compiler.ptx(kernel)) - TESTED_OPCODES
        assert not untested, f"{kernel.name}: {', '.join(sorted(untested))}"
