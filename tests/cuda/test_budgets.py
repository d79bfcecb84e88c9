"""Every kernel's machine code against its budget: registers, and no spills, stack, local memory or float64.

The normal run takes one kernel of each kind: of each build function and form the one with the most registers.
The slow run takes all of them, on all architectures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_kernels.budgets import BUDGETS_FILE, load_budgets, save_budgets, violations
from cuda_kernels.compile import Compiler
from cuda_kernels.kernel import Kernel
from cuda_kernels.registry import all_kernels, families, shared_nbytes_of
from cuda_kernels.roofline import ARCHITECTURES, occupancy
from cuda_kernels.sass import CodeStatistics, measure

BUDGETS = load_budgets()
KERNELS = {kernel.name: kernel for kernel in all_kernels()}
MAIN = ("sm_80", "sm_90a")
MAX_SHARED = 99 << 10  # of a block, on the smallest of the architectures


def representatives() -> list[str]:
    """Of the kernels that differ in dtypes, sizes and options alone, the one with the most registers."""
    groups: dict[tuple[str, str], list[str]] = {}
    option = r"_(f32|f16|bf16|int8|fp8|Q\d_\w|[drt]?\d+|softcap|sinks|sums|unaligned)(?=_|$)"
    for name, kernel in KERNELS.items():
        form = re.sub(option, "", name)
        groups.setdefault((f"{kernel.build.__module__}.{kernel.build.__qualname__}", form), []).append(name)

    def cost(name: str) -> int:
        return max(BUDGETS.registers.get(name, {}).values(), default=256)

    return sorted(max(names, key=cost) for names in groups.values())


Measure = Callable[[str, tuple[str, ...]], dict[str, CodeStatistics]]


@pytest.fixture(scope="module")
def measured(compiler: Compiler) -> Measure:
    """Measures a kernel by name; what was measured before is kept."""
    kept: dict[tuple[str, str], CodeStatistics] = {}

    def measure_all(name: str, architectures: tuple[str, ...]) -> dict[str, CodeStatistics]:
        missing = [architecture for architecture in architectures if (name, architecture) not in kept]
        if missing:
            ptx = compiler.ptx(KERNELS[name])
            with ThreadPoolExecutor(2) as pool:
                found = pool.map(lambda architecture: measure(ptx, name, architecture), missing)
                kept.update(zip(((name, architecture) for architecture in missing), found, strict=True))
        return {architecture: kept[name, architecture] for architecture in architectures}

    return measure_all


def _check(measured: Measure, name: str, architectures: tuple[str, ...]) -> None:
    found: list[str] = []
    kernel: Kernel = KERNELS[name]
    dynamic = shared_nbytes_of(all_kernels()[kernel], kernel)
    for architecture, code in measured(name, architectures).items():
        found += violations(name, architecture, code, BUDGETS)
        assert code.shared_nbytes + dynamic <= MAX_SHARED, f"{name}: {code.shared_nbytes + dynamic} bytes shared"
        fits = occupancy(
            ARCHITECTURES[architecture],
            threads=kernel.threads,
            registers=code.registers,
            shared_nbytes=code.shared_nbytes + dynamic,
        )
        assert fits.blocks >= 1, f"{name} on {architecture}: no block fits a multiprocessor ({fits.limit})"
    assert not found, "\n".join(found)


def test_every_family_lists_kernels_and_every_name_is_one_kernel() -> None:
    assert all(listing() for listing in families().values())
    assert len(KERNELS) == len(all_kernels())


def test_the_budget_file_names_every_kernel_on_every_architecture_and_no_other() -> None:
    assert set(BUDGETS.registers) == set(KERNELS)
    assert all(set(budget) == set(ARCHITECTURES) for budget in BUDGETS.registers.values())


def test_no_budget_is_more_than_a_block_can_have() -> None:
    for name, budget in BUDGETS.registers.items():
        assert max(budget.values()) * KERNELS[name].threads <= 65536, name
        assert max(budget.values()) <= 256, name  # 255, rounded up


def test_spills_are_excused_for_kernels_that_are_there_and_never_on_the_main_architectures() -> None:
    assert set(BUDGETS.spills) <= set(KERNELS)
    excused = {architecture for budget in BUDGETS.spills.values() for architecture in budget}
    assert excused <= set(ARCHITECTURES) - set(MAIN)


def test_the_budget_file_is_written_as_it_is_read(tmp_path: Path) -> None:
    save_budgets(BUDGETS, tmp_path / "budgets.json")
    assert (tmp_path / "budgets.json").read_text() == BUDGETS_FILE.read_text()


@pytest.mark.parametrize("name", representatives())
def test_a_kernel_of_each_kind_keeps_its_budget(measured: Measure, name: str) -> None:
    _check(measured, name, MAIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_keeps_its_budget_on_every_architecture(measured: Measure, name: str) -> None:
    _check(measured, name, tuple(ARCHITECTURES))


@pytest.mark.parametrize("name", [name for name in representatives() if re.match(r"(paged_|flash_)?attention_", name)])
def test_attention_loads_16_bytes_at_a_time(measured: Measure, name: str) -> None:
    """In a main loop, global memory is read in 16-byte pieces, but for block ids, scales and row statistics."""
    loop = measured(name, ("sm_90a",))["sm_90a"].main_loop
    if loop is None:
        return
    wide = sum(count for opcode, count in loop.opcodes.items() if opcode in ("LDGSTS.128", "LDG.128"))
    narrow = sum(count for opcode, count in loop.opcodes.items() if re.match(r"LDG(STS)?\.(8|16)$", opcode))
    reads = sum(count for opcode, count in loop.opcodes.items() if opcode.startswith("LDG"))
    assert narrow == 0
    assert wide > 0 or reads == 0
