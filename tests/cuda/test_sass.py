"""Statistics of machine code: on texts written by hand, and on kernels made for one property each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from cuda_kernels.budgets import Budgets, register_budget, violations
from cuda_kernels.compile import Compiler
from cuda_kernels.errors import KernelCompileError
from cuda_kernels.kernel import Kernel
from cuda_kernels.sass import CodeStatistics, Instruction, measure, parse_sass, statistics

LOG = """ptxas info    : 8 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    400 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cumulative stack size
ptxas info    : Compiling entry function 'scale' for 'sm_90a'
ptxas info    : Function properties for scale
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 1040 bytes smem, 400 bytes cmem[0]
"""

# Two nested loops; the inner one has a block that stands behind the end, and the trap after the end is no loop.
SASS = """
//--------------------- .text.other    --------------------------
	.section	.text.other,"ax",@progbits
.text.other:
        /*0000*/                   DFMA R2, R2, R4, R6 ;
        /*0010*/                   EXIT ;
//--------------------- .text.scale    --------------------------
	.section	.text.scale,"ax",@progbits
        .global         scale
scale:
.text.scale:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_0:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R8], desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.U16 R9, desc[UR4][R2.64] ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0090*/               @P2 BRA !P3, `(.L_x_1) ;
        /*00a0*/              @!P4 BRA `(.L_x_0) ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   MUFU.EX2 R4, R4 ;
        /*00e0*/                   STL.64 [R1], R4 ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""


def test_the_report_is_that_of_the_kernel_named() -> None:
    code = statistics("scale", LOG, SASS)
    assert (code.registers, code.shared_nbytes, code.stack_nbytes, code.spill_nbytes) == (42, 1040, 0, 0)
    assert code.f64_instructions == 0
    other = statistics("other", LOG, SASS)
    assert (other.registers, other.stack_nbytes, other.spill_store_nbytes, other.spill_load_nbytes) == (
        255,
        400,
        16,
        24,
    )
    assert other.f64_instructions == 1


def test_opcodes_are_counted_with_the_width_of_memory_accesses() -> None:
    code = statistics("scale", LOG, SASS)
    assert code.num_instructions == 17
    expected = {"LDG.128": 1, "LDG.16": 1, "LDGSTS.128": 1, "STG.32": 1, "STL.64": 1, "HMMA": 1, "MUFU": 1, "BRA": 5}
    assert {name: code.opcodes[name] for name in expected} == expected
    assert code.local_instructions == 1


def test_the_main_loop_is_the_inner_one_with_its_block_behind_the_end() -> None:
    loop = statistics("scale", LOG, SASS).main_loop
    assert loop is not None
    assert loop.num_instructions == 9
    assert loop.opcodes["MUFU"] == loop.opcodes["HMMA"] == 1
    assert "IADD3" not in loop.opcodes and "STG.32" not in loop.opcodes


def test_a_block_after_a_barrier_belongs_to_its_loop() -> None:
    code = """
.text.k:
.L_x_0:
        /*0000*/                   BSSY B0, `(.L_x_1) ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   FFMA R0, R0, R0, R0 ;
        /*0030*/                   BSYNC B0 ;
.L_x_1:
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   MUFU.RCP R0, R0 ;
        /*0070*/                   BRA `(.L_x_1) ;
"""
    log = "Function properties for k\n 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 8 registers"
    loop = statistics("k", log, code).main_loop
    assert loop is not None
    assert sorted(loop.opcodes) == ["BRA", "BSSY", "BSYNC", "FFMA", "MUFU"]
    assert loop.num_instructions == 7


def test_what_only_a_diverged_warp_runs_is_no_part_of_a_loop() -> None:
    code = """
.text.k:
.L_x_0:
        /*0000*/                   BRA.DIV UR4, `(.L_x_2) ;
        /*0010*/                   SHFL.BFLY PT, R0, R0, 0x1, 0x1f ;
.L_x_1:
        /*0020*/                   FFMA R0, R0, R0, R0 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   WARPSYNC.COLLECTIVE R4, `(.L_x_3) ;
.L_x_3:
        /*0060*/                   SHFL.BFLY PT, R0, R0, 0x1, 0x1f ;
        /*0070*/                   BRA `(.L_x_1) ;
"""
    log = "Function properties for k\n 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 8 registers"
    loop = statistics("k", log, code).main_loop
    assert loop is not None
    assert dict(loop.opcodes) == {"BRA": 2, "SHFL": 1, "FFMA": 1}


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("LDG.E.CONSTANT", "LDG.32"),
        ("LDG.E.64.STRONG.GPU", "LDG.64"),
        ("LDS.S8", "LDS.8"),
        ("LDSM.16.MT88.4", "LDSM"),
        ("HMMA.16816.F32", "HMMA"),
        ("BAR.SYNC.DEFER_BLOCKING", "BAR"),
    ],
)
def test_names_of_opcodes(opcode: str, name: str) -> None:
    assert Instruction(opcode).name == name


@pytest.mark.parametrize(
    ("opcode", "f64"), [("DADD", True), ("F2F.F64.F32", True), ("I2F.F64", True), ("FADD", False), ("DEPBAR", False)]
)
def test_float64_is_told_from_the_opcode(opcode: str, f64: bool) -> None:
    assert Instruction(opcode).is_f64 == f64


def test_a_kernel_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KernelCompileError, match="absent"):
        statistics("absent", LOG, SASS)
    with pytest.raises(KernelCompileError, match="absent"):
        parse_sass(SASS, "absent")


# ---- real kernels: each breaks one rule of the budgets


def _build_clean() -> Callable[..., None]:
    def clean(x: Any, n: Any) -> None:
        i = types.int32(cuda.threadIdx.x)
        total = np.float32(0)
        while i < n:
            total = total + x[i]
            i = types.int32(i + 32)
        x[types.int32(cuda.threadIdx.x)] = total

    return clean


def _build_double() -> Callable[..., None]:
    def double(x: Any, n: Any) -> None:
        x[n] = x[n] * 0.1  # a bare constant is a float64

    return double


def _build_indexed() -> Callable[..., None]:
    def indexed(x: Any, n: Any) -> None:
        local = cuda.local.array(32, types.float32)
        for i in range(32):
            local[i] = x[i]
        for i in range(n):
            local[(i * 7) % 32] += x[i]  # an index that is known only at run time
        x[0] = local[n % 32]

    return indexed


def _build_spilling(*, count: int) -> Callable[..., None]:
    def spilling(x: Any, n: Any) -> None:
        kept = cuda.local.array(count, types.float32)
        for i in range(count):
            kept[i] = x[types.int32(n * i)]
        cuda.syncthreads()
        for i in range(count):
            for j in range(i):
                kept[i] = kept[i] * kept[j] + kept[i]
        for i in range(count):
            x[types.int32(n * i)] = kept[i]

    return spilling


def _kernel(build: Callable[..., Any], threads: int = 32, min_blocks: int = 0, **constants: Any) -> Kernel:
    name = build.__name__.removeprefix("_build_")
    return Kernel(name, build, tuple(constants.items()), ("f32*", "i32"), threads, min_blocks)


def _budgets(name: str, registers: int, spills: int = 0) -> Budgets:
    return Budgets({name: {"sm_90a": registers}}, {name: {"sm_90a": spills}} if spills else {})


def _measure(compiler: Compiler, kernel: Kernel) -> CodeStatistics:
    return measure(compiler.ptx(kernel), kernel.name, "sm_90a")


def test_a_clean_kernel_keeps_its_budget_and_not_a_smaller_one(compiler: Compiler) -> None:
    code = _measure(compiler, _kernel(_build_clean))
    assert code.opcodes["LDG.32"] >= 1 and code.main_loop is not None
    budget = register_budget(code)
    assert budget % 8 == 0 and 0 <= budget - code.registers < 8
    assert violations("clean", "sm_90a", code, _budgets("clean", budget)) == []
    over = violations("clean", "sm_90a", code, _budgets("clean", code.registers - 1))
    assert len(over) == 1 and f"{code.registers} registers" in over[0]
    assert "no budget" in violations("clean", "sm_90a", code, Budgets({}, {}))[0]


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        (_kernel(_build_double), "float64"),
        (_kernel(_build_indexed), "local memory"),
        (_kernel(_build_spilling, threads=1024, min_blocks=1, count=80), "spills"),
    ],
    ids=lambda value: value.name if isinstance(value, Kernel) else "",
)
def test_a_kernel_that_breaks_a_rule_is_caught(compiler: Compiler, kernel: Kernel, named: str) -> None:
    code = _measure(compiler, kernel)
    found = violations(kernel.name, "sm_90a", code, _budgets(kernel.name, 255))
    assert any(named in line for line in found), found


def test_spills_up_to_what_is_excused_are_let_through(compiler: Compiler) -> None:
    kernel = _kernel(_build_spilling, threads=1024, min_blocks=1, count=80)
    code = _measure(compiler, kernel)
    assert violations("spilling", "sm_90a", code, _budgets("spilling", 255, code.spill_nbytes)) == []
    (found,) = violations("spilling", "sm_90a", code, _budgets("spilling", 255, code.spill_nbytes - 4))
    assert found == "spilling on sm_90a: 4 bytes of spills too many"
