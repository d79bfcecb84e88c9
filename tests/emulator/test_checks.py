"""Every kind of problem: a seeded bug, reported at its line alone, and a correct twin without a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cuda_kernels.emulator import Checks, DeviceMemory, EmulatorError, Program, Report
from tests.emulator.ptx_text import plain_kernel, with_lines

FILE = '.file 1 "kernel.py"\n'
QUIET = {"raise_on_problem": False}
START = (
    ".shared .align 16 .b8 tile[512]; .local .align 16 .b8 mine[16]; ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y];"
)
START += " mov.u32 %tid, %tid.x; mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 4, %r1; mad.wide.u32 %rd3, %tid, 4, %rd1;"
START += " mad.wide.u32 %rd4, %tid, 4, %rd2; xor.b32 %r3, %tid, 127; mad.lo.u32 %r4, %r3, 4, %r1; mov.u64 %rd5, mine;\n"
LOAD = "ld.global.u32 %r5, [%rd3]\n"


@dataclass(frozen=True)
class Bug:
    """bug: statements, one a line, of which the one that ends in `// bug` is at fault. twin: the same, done right."""

    kind: str
    name: str
    bug: str
    twin: str
    count: int | None = None
    grid: int = 1
    block: int = 128
    checks: tuple[tuple[str, Any], ...] = ()


def statements(text: str) -> str:
    """A body with line numbers: a statement a line, without its semicolon."""
    lines = []
    for line in text.strip().splitlines():
        bare = line.split("//")[0].strip()
        lines.append(bare if not bare or bare.endswith(":") else f"{bare};{'  // bug' if '// bug' in line else ''}")
    return with_lines("\n".join(lines))


def ptx_of(body: str) -> str:
    return plain_kernel(".param .u64 x, .param .u64 y", START + statements(body), FILE)


def launch(bug: Bug, body: str) -> Report:
    x = np.arange(256, dtype=np.uint32)
    y = np.zeros(256, np.uint32)
    return Program(ptx_of(body)).launch(bug.grid, bug.block, [x, y], checks=Checks(**QUIET, **dict(bug.checks)))


SEE_GLOBAL = (("global_races", True),)
BUGS = [
    Bug("out-of-bounds", "a read past the end of an array",
        "ld.global.u32 %r5, [%rd3+516]  // bug", "ld.global.u32 %r5, [%rd3+512]", 1),
    Bug("out-of-bounds", "a read before an array",
        "ld.global.u32 %r5, [%rd3+-4]  // bug", "ld.global.u32 %r5, [%rd3+4]", 1),
    Bug("out-of-bounds", "a vector whose second half lies outside",
        "mad.wide.u32 %rd3, %tid, 8, %rd1\nld.global.v2.u32 {%r5, %r6}, [%rd3+8]  // bug",
        "mad.wide.u32 %rd3, %tid, 8, %rd1\nld.global.v2.u32 {%r5, %r6}, [%rd3]", 1),
    Bug("out-of-bounds", "a write to freed or foreign memory",
        "mov.u64 %rd3, 4096\nst.global.u32 [%rd3], %r3  // bug", "st.global.u32 [%rd4], %r3", 128),
    Bug("out-of-bounds", "a read past the end of shared memory",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r2+4]  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r2]", 1),
    Bug("out-of-bounds", "a write before shared memory",
        "st.shared.u32 [%r2+-4], %tid  // bug", "st.shared.u32 [%r2], %tid", 1),
    Bug("out-of-bounds", "a write past the end of local memory",
        "st.local.u32 [%rd5+16], %tid  // bug", "st.local.u32 [%rd5+12], %tid", 128),
    Bug("out-of-bounds", "a generic read past the end of shared memory",
        "cvta.shared.u64 %rd6, %rd5\nld.u32 %r5, [%rd6+512]  // bug",
        "mov.u64 %rd6, tile\ncvta.shared.u64 %rd6, %rd6\nmad.wide.u32 %rd6, %tid, 4, %rd6\nst.u32 [%rd6], %tid\n"
        "ld.u32 %r5, [%rd6]", 128),
    Bug("out-of-bounds", "an atomic past the end",
        "red.global.add.u32 [%rd4+516], 1  // bug", "red.global.add.u32 [%rd4+512], 1", 1),
    Bug("out-of-bounds", "a cp.async that reads past the end",
        "cp.async.ca.shared.global [%r2], [%rd3+516], 4  // bug\ncp.async.wait_all",
        "setp.lt.u32 %p1, %tid, 127\nselp.u32 %r6, 4, 0, %p1\n"
        "cp.async.ca.shared.global [%r2], [%rd3+516], 4, %r6\ncp.async.wait_all", 1),
    Bug("misaligned", "a 16-byte load at 4 bytes",
        "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd3]  // bug",
        "mad.wide.u32 %rd3, %tid, 8, %rd1\nand.b64 %rd3, %rd3, -16\nld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd3]", 96),
    Bug("misaligned", "a shared store at an odd byte",
        "st.shared.u16 [%r2+1], 0  // bug", "st.shared.u16 [%r2+2], 0", 128),
    Bug("uninitialised-read", "shared memory that only some threads wrote",
        "setp.lt.u32 %p1, %tid, 100\n@%p1 st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r4]  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r4]", 28),
    Bug("uninitialised-read", "the last byte of a word of shared memory",
        "st.shared.u16 [%r2], 0\nst.shared.u8 [%r2+2], 0\nld.shared.u32 %r5, [%r2]  // bug",
        "st.shared.u16 [%r2], 0\nst.shared.u8 [%r2+2], 0\nst.shared.u8 [%r2+3], 0\nld.shared.u32 %r5, [%r2]", 128),
    Bug("uninitialised-read", "the last byte of a word of local memory",
        "st.local.u16 [%rd5], 0\nst.local.u8 [%rd5+2], 0\nld.local.u32 %r5, [%rd5]  // bug",
        "st.local.u32 [%rd5], 0\nld.local.u32 %r5, [%rd5]", 128),
    Bug("uninitialised-read", "an argument that is an empty array",
        "ld.global.u32 %r5, [%rd4]  // bug", "st.global.u32 [%rd4], 0\nld.global.u32 %r5, [%rd4]", 128,
        checks=(("uninitialised_arguments", (1,)),)),
    Bug("uninitialised-read", "an atomic on memory that nobody wrote",
        "red.shared.add.u32 [tile], 1  // bug",
        "setp.eq.u32 %p1, %tid, 0\n@%p1 st.shared.u32 [tile], 0\nbar.sync 0\nred.shared.add.u32 [tile], 1", 128),
    Bug("shared-race", "read after write, without a barrier",
        "st.shared.u32 [%r2], %tid\nld.shared.u32 %r5, [%r4]  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r4]", 128),
    Bug("shared-race", "write after read, without a barrier",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r4]\nst.shared.u32 [%r2], %r5  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r4]\nbar.sync 0\nst.shared.u32 [%r2], %r5", 128),
    Bug("shared-race", "two threads write one place in one instruction",
        "shr.u32 %r6, %tid, 1\nmad.lo.u32 %r6, %r6, 4, %r1\nst.shared.u32 [%r6], %tid  // bug",
        "st.shared.u32 [%r2], %tid", 64),
    Bug("shared-race", "two instructions write one place",
        "st.shared.u32 [%r2], %tid\nst.shared.u32 [%r4], %tid  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nst.shared.u32 [%r4], %tid", 128),
    Bug("shared-race", "lanes of one warp that rely on running together",
        "xor.b32 %r6, %r2, 4\nst.shared.u32 [%r2], %tid\nld.shared.u32 %r5, [%r6]  // bug",
        "xor.b32 %r6, %r2, 4\nst.shared.u32 [%r2], %tid\nbar.warp.sync -1\nld.shared.u32 %r5, [%r6]", 128),
    Bug("shared-race", "a warp barrier does not order other warps",
        "st.shared.u32 [%r2], %tid\nbar.warp.sync -1\nld.shared.u32 %r5, [%r4]  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r4]", 128),
    Bug("shared-race", "a reader of another warp before a warp barrier",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [tile]\nbar.warp.sync -1\n"
        "setp.eq.u32 %p1, %tid, 0\n@%p1 st.shared.u32 [tile], %r5  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nsetp.lt.u32 %p1, %tid, 32\n@%p1 ld.shared.u32 %r5, [tile]\n"
        "bar.warp.sync -1\nsetp.eq.u32 %p1, %tid, 0\n@%p1 st.shared.u32 [tile], %r5", 1),
    Bug("shared-race", "several warps read what the last of them overwrites",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [tile]\nsetp.eq.u32 %p1, %tid, 127\n"
        "@%p1 st.shared.u32 [tile], %r5  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [tile]\nbar.sync 0\nsetp.eq.u32 %p1, %tid, 127\n"
        "@%p1 st.shared.u32 [tile], %r5", 1),
    Bug("shared-race", "a warp reads what the last of its lanes overwrites",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [tile]\nsetp.eq.u32 %p1, %tid, 31\n"
        "@%p1 st.shared.u32 [tile], %r5  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [tile]\nbar.warp.sync -1\n"
        "setp.eq.u32 %p1, %tid, 31\n@%p1 st.shared.u32 [tile], %r5", 1, 1, 32),
    Bug("shared-race", "two lanes read one after another, and the second overwrites",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nsetp.eq.u32 %p1, %tid, 3\nsetp.eq.u32 %p2, %tid, 70\n"
        "@%p1 ld.shared.u32 %r5, [tile]\n@%p2 ld.shared.u32 %r5, [tile]\n@%p2 st.shared.u32 [tile], %r5  // bug",
        "st.shared.u32 [%r2], %tid\nbar.sync 0\nsetp.eq.u32 %p1, %tid, 3\nsetp.eq.u32 %p2, %tid, 70\n"
        "@%p1 ld.shared.u32 %r5, [tile]\nbar.sync 0\n@%p2 ld.shared.u32 %r5, [tile]\n"
        "@%p2 st.shared.u32 [tile], %r5", 1),
    Bug("shared-race", "an atomic and a plain read",
        "setp.eq.u32 %p1, %tid, 0\n@%p1 st.shared.u32 [tile], 0\nbar.sync 0\nred.shared.add.u32 [tile], 1\n"
        "ld.shared.u32 %r5, [tile]  // bug",
        "setp.eq.u32 %p1, %tid, 0\n@%p1 st.shared.u32 [tile], 0\nbar.sync 0\nred.shared.add.u32 [tile], 1\nbar.sync 0\n"
        "ld.shared.u32 %r5, [tile]", 128),
    Bug("shared-race", "the bytes of a word by different threads, read too early",
        "add.u32 %r6, %r1, %tid\nst.shared.u8 [%r6], %tid\nand.b32 %r6, %r6, -4\nld.shared.u32 %r5, [%r6]  // bug",
        "add.u32 %r6, %r1, %tid\nst.shared.u8 [%r6], %tid\nbar.sync 0\nand.b32 %r6, %r6, -4\nld.shared.u32 %r5, [%r6]"),
    Bug("global-race", "blocks write one place",
        "st.global.u32 [%rd4], %tid  // bug",
        "mov.u32 %r6, %ctaid.x\nmad.wide.u32 %rd4, %r6, 512, %rd4\nst.global.u32 [%rd4], %tid",
        128, 2, 128, SEE_GLOBAL),
    Bug("global-race", "a block reads what another writes",
        "mov.u32 %r6, %ctaid.x\nmad.wide.u32 %rd6, %r6, 512, %rd4\nst.global.u32 [%rd6], %tid\n"
        "ld.global.u32 %r7, [%rd4]  // bug",
        "mov.u32 %r6, %ctaid.x\nmad.wide.u32 %rd6, %r6, 512, %rd4\nst.global.u32 [%rd6], %tid\n"
        "ld.global.u32 %r7, [%rd6]",
        128, 2, 128, SEE_GLOBAL),
    Bug("global-race", "a block overwrites what others read",
        "ld.global.u32 %r5, [%rd3]\nmov.u32 %r6, %ctaid.x\nsetp.eq.u32 %p1, %r6, 1\n"
        "@%p1 st.global.u32 [%rd3], 0  // bug",
        "ld.global.u32 %r5, [%rd3]\nmov.u32 %r6, %ctaid.x\nsetp.eq.u32 %p1, %r6, 1\n@%p1 st.global.u32 [%rd4], 0",
        128, 2, 128, SEE_GLOBAL),
    Bug("global-race", "threads of one block without a barrier",
        "xor.b32 %r6, %tid, 64\nmad.wide.u32 %rd6, %r6, 4, %rd2\nst.global.u32 [%rd4], %tid\n"
        "ld.global.u32 %r5, [%rd6]  // bug",
        "xor.b32 %r6, %tid, 64\nmad.wide.u32 %rd6, %r6, 4, %rd2\nst.global.u32 [%rd4], %tid\nbar.sync 0\n"
        "ld.global.u32 %r5, [%rd6]", 128, 1, 128, SEE_GLOBAL),
    Bug("global-race", "an atomic and a plain read by another block",
        "red.global.add.u32 [%rd2], 1\nld.global.u32 %r5, [%rd2]  // bug",
        "red.global.add.u32 [%rd2], 1\nred.global.add.u32 [%rd2], 1", None, 2, 128, SEE_GLOBAL),
    Bug("divergent-barrier", "two barriers in two branches",
        "setp.lt.u32 %p1, %tid, 50\n@%p1 bra ELSE\nbar.sync 0  // bug\nbra END\nELSE:\nbar.sync 0\n"
        "END:\nmov.u32 %r5, 0",
        "setp.lt.u32 %p1, %tid, 50\n@%p1 bra ELSE\nmov.u32 %r6, 0\nbra END\nELSE:\nmov.u32 %r6, 1\nEND:\nbar.sync 0"),
    Bug("barrier-after-exit", "threads that have returned",
        "setp.gt.u32 %p1, %tid, 120\n@%p1 ret\nbar.sync 0  // bug",
        "setp.gt.u32 %p1, %tid, 120\nbar.sync 0\n@%p1 ret", 7, checks=(("strict_exit", True),)),
    Bug("shuffle-from-absent-lane", "lanes that have returned",
        "and.b32 %r6, %tid, 31\nsetp.gt.u32 %p1, %r6, 15\n@%p1 ret\nshfl.sync.bfly.b32 %r5, %tid, 16, 31, -1  // bug",
        "and.b32 %r6, %tid, 31\nsetp.gt.u32 %p1, %r6, 15\n@%p1 ret\nshfl.sync.bfly.b32 %r5, %tid, 8, 31, 0xffff", 64),
    Bug("mask", "a lane outside of its own member mask",
        "shfl.sync.idx.b32 %r5, %tid, 0, 31, 0xffff  // bug", "shfl.sync.idx.b32 %r5, %tid, 0, 31, -1", 64),
    Bug("mask", "an mma by part of a warp",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3}, "
        "{%f1, %f2, %f3, %f4}  // bug", "mov.u32 %r5, 0", 16, 1, 16),
    Bug("unwaited-cp-async", "a read before the wait",
        "cp.async.ca.shared.global [%r2], [%rd3], 4\nld.shared.u32 %r5, [%r2]  // bug\ncp.async.wait_all",
        "cp.async.ca.shared.global [%r2], [%rd3], 4\ncp.async.wait_all\nld.shared.u32 %r5, [%r2]", 128),
    Bug("unwaited-cp-async", "a wait that leaves the group open",
        "cp.async.ca.shared.global [%r2], [%rd3], 4\ncp.async.commit_group\ncp.async.wait_group 1\n"
        "ld.shared.u32 %r5, [%r2]  // bug\ncp.async.wait_group 0",
        "cp.async.ca.shared.global [%r2], [%rd3], 4\ncp.async.commit_group\ncp.async.commit_group\n"
        "cp.async.wait_group 1\nld.shared.u32 %r5, [%r2]", 128),
    Bug("unwaited-cp-async", "no wait at all",
        "cp.async.ca.shared.global [%r2], [%rd3], 4  // bug",
        "cp.async.ca.shared.global [%r2], [%rd3], 4\ncp.async.wait_all", 128),
    Bug("shared-race", "a cp.async of another thread, without a barrier after the wait",
        "cp.async.ca.shared.global [%r2], [%rd3], 4\ncp.async.wait_all\nld.shared.u32 %r5, [%r4]  // bug",
        "cp.async.ca.shared.global [%r2], [%rd3], 4\ncp.async.wait_all\nbar.sync 0\nld.shared.u32 %r5, [%r4]", 128),
    Bug("deadlock", "a named barrier that waits for too many",
        "bar.sync 1, 160  // bug", "bar.sync 1, 128", 128),
    Bug("endless-loop", "a loop without end",
        "TOP:\nadd.u32 %r5, %r5, 1  // bug\nbra TOP",
        "mov.u32 %r5, 0\nTOP:\nadd.u32 %r5, %r5, 1\nsetp.lt.u32 %p1, %r5, 9\n@%p1 bra TOP",
        checks=(("max_basic_blocks", 50),)),
    Bug("trap", "a failed assertion",
        "setp.gt.u32 %p1, %tid, 125\n@%p1 trap  // bug", "setp.gt.u32 %p1, %tid, 127\n@%p1 trap", 2),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.kind}: {bug.name}" for bug in BUGS])
def test_a_seeded_bug_is_reported_at_its_line_alone(bug: Bug) -> None:
    line = next(n for n, text in enumerate(bug.bug.strip().splitlines(), 1) if "// bug" in text)

    report = launch(bug, bug.bug)

    # What a cp.async has not brought yet has not been written either.
    kinds = {problem.kind for problem in report.problems}
    assert kinds - {"uninitialised-read"} == {bug.kind} if bug.kind == "unwaited-cp-async" else kinds == {bug.kind}
    for problem in report.problems:
        assert (problem.file, problem.line) == ("kernel.py", line)
        assert problem.instruction.startswith(bug.bug.strip().splitlines()[line - 1].split("//")[0].strip()[:12])
    if bug.count is not None:
        assert max(problem.count for problem in report.problems) == bug.count


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.kind}: {bug.name}" for bug in BUGS])
def test_the_correct_twin_has_no_report(bug: Bug) -> None:
    assert launch(bug, bug.twin).problems == ()


def test_problems_raise_an_error_that_holds_the_report() -> None:
    program = Program(ptx_of(BUGS[0].bug))

    with pytest.raises(EmulatorError, match=r"out-of-bounds.*byte 1024 of an array of 1024 bytes") as caught:
        program.launch(1, 128, [np.zeros(256, np.uint32), np.zeros(256, np.uint32)])

    assert caught.value.report is not None
    assert caught.value.report.problems[0].thread == "block (0, 0, 0) thread (127, 0, 0)"


def test_races_are_not_looked_for_when_switched_off() -> None:
    bug = next(bug for bug in BUGS if bug.kind == "shared-race")
    assert launch(Bug(bug.kind, "", "", "", checks=(("races", False),)), bug.bug).problems == ()


def test_uninitialised_reads_are_not_looked_for_when_switched_off() -> None:
    bug = next(bug for bug in BUGS if bug.kind == "uninitialised-read")
    assert launch(Bug(bug.kind, "", "", "", checks=(("uninitialised", False),)), bug.bug).problems == ()


def test_a_stray_write_changes_no_array() -> None:
    body = "mad.wide.u32 %rd4, %tid, 256, %rd2\nst.global.u32 [%rd4], %r3"
    x, y = np.zeros(256, np.uint32), np.zeros(256, np.uint32)

    report = Program(ptx_of(body)).launch(1, 128, [x, y], checks=Checks(**QUIET))

    assert {problem.kind for problem in report.problems} == {"out-of-bounds"}
    assert (x == 0).all()
    assert np.flatnonzero(y).tolist() == [0, 64, 128, 192]


def test_batches_of_blocks_are_apart() -> None:
    body = "st.shared.u32 [%r2], %tid\nbar.sync 0\nld.shared.u32 %r5, [%r4]\nst.global.u32 [%rd4], %r5"
    for batch_threads in (1, 128, 300, 4096):
        y = np.zeros(256, np.uint32)
        checks = Checks(batch_threads=batch_threads)
        Program(ptx_of(body)).launch(9, 128, [np.zeros(256, np.uint32), y], checks=checks)
        np.testing.assert_array_equal(y[:128], np.arange(127, -1, -1))


def test_global_races_of_a_launch_do_not_reach_into_the_next() -> None:
    memory = DeviceMemory(1 << 16)
    x, y = memory.empty(256, np.uint32), memory.empty(256, np.uint32)
    memory.mark_written(x)
    program = Program(ptx_of("st.global.u32 [%rd4], %tid\nld.global.u32 %r5, [%rd4]"))
    other = Program(ptx_of("ld.global.u32 %r5, [%rd2]\nbar.sync 0\nst.global.u32 [%rd4], %tid"))

    for _ in range(3):
        for each in (program, other):
            each.launch(1, 128, [x, y], memory=memory, checks=Checks(global_races=True))
