"""Programs, launches and reports: what is refused by name, what is counted, what is hostile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from cuda_kernels.emulator import Checks, EmulatorError, LaunchError, Program, PtxError, opcodes_of
from tests.emulator import warp_cases
from tests.emulator.opcodes import TESTED_OPCODES
from tests.emulator.ptx_text import HEADER, kernel, parse_only, plain_kernel, with_lines

ADD = kernel(["u32", "u32"], "u32", "add.u32 %y, %a, %b;")
TEXTS = [ADD] + [case.ptx for case in warp_cases.CASES[::12]]


def words(count: int = 64) -> np.ndarray:
    return np.arange(count, dtype=np.uint32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("wgmma.fence.sync.aligned;", "unsupported instruction: wgmma.fence.sync.aligned"),
        ("frobnicate.u32 %y, %a;", "unsupported instruction: frobnicate.u32"),
        ("add.u32 %y, %a, %nowhere;", "unknown register or name '%nowhere'"),
        ("add.u32 %z, %a, %a;", "unknown register or name %z"),
        ("add.u64 %y, %a, %a;", "does not fit the type"),
        ("add.u32 %y, %a;", "malformed instruction"),
        ("bra NOWHERE;", "unknown label 'NOWHERE'"),
        ("call nobody, ();", "unknown function nobody"),
        ("call %at, ();", "an indirect call"),
        ("cp.async.bulk.shared.global [%at], [%at], 16;", "unsupported instruction"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1}, {%d1}, {%d1}, {%d1};", "unsupported instruction"),
        ("add.u32 %y, %a, 99999999999999999999999;", "unknown register or name"),
        ("ld.global.v8.b32 {%r1,%r2,%r3,%r4,%r5,%r6,%r7,%r8}, [%at];", "unsupported instruction"),
    ],
)
def test_what_cannot_run_is_refused_by_name_and_line(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message) as caught:
        Program(kernel(["u32"], "u32", body))
    assert "of the PTX" in str(caught.value)


def test_the_source_line_of_an_unsupported_instruction_is_named() -> None:
    text = plain_kernel("", with_lines("mov.u32 %r1, 0;\nfrobnicate.u32 %r1;"), '.file 1 "kernel.py"')
    with pytest.raises(PtxError, match=r"frobnicate.u32 %r1 \[kernel.py:2\]"):
        Program(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the PTX has: none"),
        (HEADER, "the PTX has: none"),
        (ADD + ADD.replace(" k(", " other("), "name one kernel; the PTX has: k, other"),
        (ADD[:-20], "no end of"),
        (HEADER.replace("64", "32") + ADD, "64-bit PTX only"),
        (plain_kernel("", ".reg .b32 %x<999999999>;"), "more than"),
        (plain_kernel("", ".shared .b8 tile[999999];"), "999999 bytes of shared memory"),
        (plain_kernel("", ".local .b8 mine[999999];"), "999999 bytes of local memory"),
        (plain_kernel("", "call f, ();", ".func f() { call f, (); ret; }"), "recursive"),
    ],
)
def test_a_bad_module_is_refused(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        Program(text)


def test_a_kernel_is_found_by_its_name() -> None:
    both = [ADD, ADD.replace(" k(", " other(").replace("add.u32", "sub.u32")]
    assert Program(both, "other").opcodes >= {"sub.u32"}
    with pytest.raises(PtxError, match="no kernel 'third'; the PTX has: k, other"):
        Program(both, "third")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": [words()]}, "takes 3 parameters, and 1 arguments gave 1"),
        ({"args": [words(), words(), words(), 1]}, "takes 3 parameters, and 4 arguments gave 4"),
        ({"args": [words(), words(), "text"]}, "a str does not fit the parameter out"),
        ({"args": [words(), words(), 1.5]}, "a float does not fit the parameter out"),
        ({"args": [words(), words(), 1 << 64]}, "18446744073709551616 does not fit"),
        ({"args": [words(), words(), np.array([None])]}, "array of Python objects"),
        ({"grid": 0}, "a grid of"),
        ({"grid": (1, 1, 1, 1)}, "one to three integers"),
        ({"grid": 1.0}, "one to three integers"),
        ({"block": 2048}, "a block of"),
        ({"block": (64, 64)}, "a block of 4096 threads"),
        ({"shared_nbytes": -1}, "bytes of shared memory"),
        ({"shared_nbytes": 1 << 20}, "bytes of shared memory"),
        ({"abi": "c"}, "abi must be"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(options: dict, message: str) -> None:
    launch = {"grid": 1, "block": 64, "args": [words(), words(), words()]} | options
    grid, block, args = (launch.pop(name) for name in ("grid", "block", "args"))
    with pytest.raises(LaunchError, match=message):
        Program(ADD).launch(grid, block, args, **launch)


def test_checks_are_validated() -> None:
    with pytest.raises(LaunchError, match="at least 1"):
        Checks(batch_threads=0)
    with pytest.raises(LaunchError, match="positions"):
        Checks(uninitialised_arguments=(-1,))


def test_maxntid_bounds_the_block() -> None:
    text = ADD.replace(")\n{", ")\n.maxntid 32, 1, 1\n{")
    with pytest.raises(LaunchError, match="a block of 64 threads; k takes 32"):
        Program(text).launch(1, 64, [words(), words(), words()])


def test_scalars_reach_parameters_of_their_type() -> None:
    body = "ld.param.f32 %f1, [a]; ld.param.u64 %rd1, [b]; ld.param.u32 %r1, [c]; ld.param.u16 %r2, [d];"
    body += (
        " ld.param.u64 %rd2, [y]; st.global.f32 [%rd2], %f1; st.global.u64 [%rd2+8], %rd1; st.global.u32 [%rd2+4], %r1;"
    )
    body += " st.global.u32 [%rd2+16], %r2;"
    text = plain_kernel(".param .f32 a, .param .u64 b, .param .b32 c, .param .u16 d, .param .u64 y", body)
    y = np.zeros(5, np.uint32)
    Program(text).launch(1, 1, [1.5, -2, np.float32(2.5), np.int16(-1), y])
    assert y.tolist() == [0x3FC00000, 0x40200000, 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFF]


def test_the_array_structure_of_numba_is_passed() -> None:
    names = ["meminfo", "parent", "items", "itemsize", "data", "shape0", "shape1", "stride0", "stride1"]
    body = "ld.param.u64 %rd9, [out]; " + "".join(
        f"ld.param.u64 %rd1, [{name}]; st.global.u64 [%rd9+{8 * i}], %rd1; " for i, name in enumerate(names)
    )
    body = "ld.param.u64 %rd9, [out4]; " + body.split("; ", 1)[1]
    outs = [f"out{i}" for i in range(7)]
    text = plain_kernel(", ".join(f".param .u64 {name}" for name in names + outs), body)
    for array in (np.zeros((3, 5), np.float32), np.zeros((3, 5), np.float32, order="F")):
        out = np.zeros(9, np.uint64)
        Program(text).launch(1, 1, [array, out], abi="numba")
        assert out[2:4].tolist() == [15, 4]
        assert out[5:].tolist() == [3, 5, *array.strides]


def test_a_report_counts_instructions_bytes_and_sectors() -> None:
    report = Program(ADD).launch(2, 40, [words(), words(), words()])

    assert report.opcodes["add.u32"] == 80
    assert report.opcodes["mad.wide.u32"] == 240
    assert report.thread_instructions == sum(report.opcodes.values())
    assert report.basic_blocks == 1
    assert report.global_read_nbytes == 2 * 80 * 4
    assert report.global_written_nbytes == 80 * 4
    assert report.global_read_sectors == 2 * 2 * 5  # of each input: 4 sectors of one warp and 1 of the other, 2 blocks
    assert report.global_written_sectors == 2 * 5
    assert str(report) == "no problems"


def test_scattered_accesses_touch_a_sector_each() -> None:
    body = (
        "mul.lo.u32 %r1, %tid, 37; and.b32 %r1, %r1, 31; ld.param.u64 %rd1, [in_a]; mad.wide.u32 %rd1, %r1, 32, %rd1;"
    )
    body += " ld.global.u32 %y, [%rd1];"
    report = Program(kernel(["u32"], "u32", body)).launch(1, 32, [words(256), words(256)])
    assert report.global_read_sectors == 4 + 32


def test_opcodes_are_named_without_hints() -> None:
    body = "ld.volatile.global.L1::no_allocate.L2::128B.v2.u32 {%r1, %r2}, [%rd1];\nbra.uni END;\nEND:\n"
    body += "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {}, {}, {}, {};\nld.global.nc.f32 %f1, [%rd1];"
    assert opcodes_of(parse_only(body)) == {
        "ld.global.v2.u32", "bra", "mma.sync.m16n8k8.row.col.f32.f16.f16.f32", "ld.global.f32", "ret",
    }  # fmt: skip


def test_the_tested_opcodes_come_from_the_tests() -> None:
    assert {
        "fma.rn.f32",
        "ld.global.v4.f32",
        "shfl.sync.bfly.b32",
        "bar.sync",
        "cp.async.cg.shared.global",
    } <= TESTED_OPCODES
    assert "frobnicate.u32" not in TESTED_OPCODES


def run_hostile(text: str) -> None:
    """Translate and run a text: EmulatorError is the only way to fail."""
    try:
        program = Program(text)
        checks = Checks(max_basic_blocks=200, raise_on_problem=False)
        program.launch(1, 64, [words(1024)] * len(program.parameters), checks=checks)
    except EmulatorError:
        pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(TEXTS), st.integers(0, 4000), st.integers(0, 40), st.text("%{}[];:,.abr0123 \n$_-", max_size=8))
def test_mutated_texts_raise_nothing_but_emulator_errors(text: str, at: int, cut: int, put: str) -> None:
    at %= len(text)
    run_hostile(text[:at] + put + text[at + cut :])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEXTS), st.data())
def test_swapped_words_raise_nothing_but_emulator_errors(text: str, data: st.DataObject) -> None:
    parts = text.split(" ")
    for _ in range(3):
        i, j = (data.draw(st.integers(0, len(parts) - 1)) for _ in range(2))
        parts[i], parts[j] = parts[j], parts[i]
    run_hostile(" ".join(parts))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_garbage_raises_emulator_errors(text: str) -> None:
    with pytest.raises(EmulatorError):
        Program(text)


@pytest.mark.parametrize("keep", range(0, 100, 9))
def test_truncated_texts_raise_emulator_errors(keep: int) -> None:
    with pytest.raises(EmulatorError):
        Program(ADD[: len(ADD) * keep // 100])
