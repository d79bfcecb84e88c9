"""The emulator's instruction tests cover every instruction of every kernel: what is emulated was tested by itself."""

from __future__ import annotations

import pytest

from cuda_kernels.compile import Compiler
from cuda_kernels.emulator import opcodes_of
from cuda_kernels.registry import all_kernels
from tests.cuda.test_budgets import representatives
from tests.emulator.opcodes import TESTED_OPCODES

KERNELS = {kernel.name: kernel for kernel in all_kernels()}


def check(compiler: Compiler, name: str) -> None:
    untested = opcodes_of(compiler.ptx(KERNELS[name])) - TESTED_OPCODES
    assert not untested, f"{name}: {', '.join(sorted(untested))}"


@pytest.mark.parametrize("name", representatives())
def test_every_instruction_of_a_kernel_of_each_kind_has_a_test(name: str, compiler: Compiler) -> None:
    check(compiler, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_instruction_of_every_kernel_has_a_test(name: str, compiler: Compiler) -> None:
    check(compiler, name)
