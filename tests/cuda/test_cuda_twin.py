"""The tensor-core prefill against the same algorithm in CUDA C++ compiled by nvcc: instructions of the main loop."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cuda_kernels.compile import Compiler, find_tool
from cuda_kernels.errors import ToolMissingError

COMPARE = Path(__file__).parents[2] / "scripts" / "cuda_twin" / "compare.py"


def _missing() -> str:
    try:
        find_tool("nvcc")
    except ToolMissingError as error:
        return str(error)
    return "" if shutil.which("g++") else "nvcc needs g++"


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "nvcc is there")


@pytest.fixture(scope="module")
def twin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", COMPARE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bf16", 128), *(pytest.param("f16", d, marks=pytest.mark.slow) for d in (64, 80, 96, 128))],
)
def test_the_main_loop_is_within_five_percent_of_nvcc(
    twin: ModuleType, compiler: Compiler, dtype: str, head_dim: int
) -> None:
    found = twin.compare(dtype, head_dim, "sm_90a", compiler)
    ours, theirs = found.ours.main_loop, found.theirs.main_loop
    # The same algorithm: as many products, matrix loads, copies, exponentials and barriers.
    for opcode in ("HMMA", "LDSM", "LDGSTS.128", "MUFU", "BAR", "F2FP", "SHFL"):
        assert ours.opcodes.get(opcode) == theirs.opcodes.get(opcode), opcode
    assert found.ratio <= 1.05, f"{ours.num_instructions} to {theirs.num_instructions}: {dict(ours.opcodes)}"


def test_attention_on_hopper_has_no_spills_stack_or_float64(twin: ModuleType, compiler: Compiler) -> None:
    code = twin.compare("bf16", 128, "sm_90a", compiler).ours
    assert (code.spill_nbytes, code.stack_nbytes, code.local_instructions, code.f64_instructions) == (0, 0, 0, 0)
    assert code.opcodes["LDGSTS.128"] >= 16
    assert not any(name.startswith("LDGSTS.") and name != "LDGSTS.128" for name in code.opcodes)
