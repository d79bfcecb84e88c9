"""Random access sequences: a race is reported exactly where two unordered accesses exist, by brute force over pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings, strategies as st

from cuda_kernels.emulator import Checks, Program
from tests.emulator.ptx_text import plain_kernel

THREADS, CELLS = 64, 16


@dataclass(frozen=True)
class Access:
    """Threads with (tid & mask) == match access cell (tid * stride + offset) % 16, of `width` bytes, of one memory."""

    action: str
    mask: int
    match: int
    stride: int
    offset: int
    width: int

    def by(self, thread: int) -> range | None:
        """The bytes that a thread accesses, None where it does not take part."""
        if thread & self.mask != self.match & self.mask:
            return None
        start = 4 * ((thread * self.stride + self.offset) % CELLS)
        return range(start, start + self.width)

    def ptx(self, space: str, base: str) -> str:
        opcode = {"read": "ld", "write": "st", "atomic": "red"}[self.action]
        operand = f"[{base}x]"
        tail = {
            "read": f"{opcode}.{space}.b{8 * self.width} %r9, {operand};",
            "write": f"{opcode}.{space}.b{8 * self.width} {operand}, %tid;",
            "atomic": f"{opcode}.{space}.add.u32 {operand}, 1;",
        }[self.action]
        address = "mad.wide.u32 %rdx, %r2, 4, %rd1;" if space == "global" else "mad.lo.u32 %rx, %r2, 4, %r1;"
        return f"""and.b32 %r2, %tid, {self.mask}; setp.eq.u32 %p1, %r2, {self.match & self.mask};
            mad.lo.u32 %r2, %tid, {self.stride}, {self.offset}; and.b32 %r2, %r2, {CELLS - 1}; {address}
            @%p1 {tail}\n"""


ACCESSES = st.builds(
    Access,
    st.sampled_from(["read", "read", "write", "atomic"]),
    st.sampled_from([0, 1, 15, 31, 32, 48, 62, 63]),
    st.sampled_from([0, 1, 31, 32, 33, 63]),
    st.sampled_from([0, 1, 2]),
    st.integers(0, 3),
    st.sampled_from([4, 4, 2]),
).map(lambda a: a if a.action != "atomic" else Access(a.action, a.mask, a.match, a.stride, a.offset, 4))
STEPS = st.lists(st.one_of(ACCESSES, ACCESSES, st.sampled_from(["bar.sync 0;\n", "bar.warp.sync -1;\n"])), max_size=7)


def races(steps: list[Access | str], blocks: int) -> bool:
    """Whether two accesses to one byte, not both reads nor both atomic, are by threads that nothing orders."""
    seen: list[list[tuple[int, int, str, int, int]]] = [[] for _ in range(4 * CELLS)]
    barriers = warp_barriers = 0
    for step in steps:
        if isinstance(step, str):
            barriers += step.startswith("bar.sync")
            warp_barriers += step.startswith("bar.warp")
            continue
        now = []
        for block in range(blocks):
            for thread in range(THREADS):
                now += [(byte, (block, thread, step.action, barriers, warp_barriers)) for byte in step.by(thread) or ()]
        for byte, access in now:
            seen[byte].append(access)
    for accesses in seen:
        for i, first in enumerate(accesses):
            for second in accesses[:i]:
                if first[:2] == second[:2] or {first[2], second[2]} in ({"read"}, {"atomic"}):
                    continue
                same_warp = first[0] == second[0] and first[1] // 32 == second[1] // 32
                if first[0] != second[0] or (first[3] == second[3] and not (same_warp and first[4] != second[4])):
                    return True
    return False


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_shared_races_are_reported_exactly_where_they_exist(steps: list[Access | str]) -> None:
    body = ".shared .align 8 .b8 tile[64]; .reg .b32 %rx; mov.u32 %tid, %tid.x; mov.u32 %r1, tile;\n"
    body += "".join(step if isinstance(step, str) else step.ptx("shared", "%r") for step in steps)
    checks = Checks(uninitialised=False, raise_on_problem=False)

    report = Program(plain_kernel("", body)).launch(3, THREADS, [], checks=checks)

    assert {problem.kind for problem in report.problems} == ({"shared-race"} if races(steps, 1) else set())


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 2), st.sampled_from([64, 4096]))
def test_global_races_are_reported_exactly_where_they_exist(
    steps: list[Access | str], blocks: int, batch_threads: int
) -> None:
    body = ".reg .b64 %rdx; mov.u32 %tid, %tid.x; ld.param.u64 %rd1, [data];\n"
    body += "".join(step if isinstance(step, str) else step.ptx("global", "%rd") for step in steps)
    checks = Checks(global_races=True, raise_on_problem=False, batch_threads=batch_threads)
    data = np.zeros(CELLS, np.uint32)

    report = Program(plain_kernel(".param .u64 data", body)).launch(blocks, THREADS, [data], checks=checks)

    assert {problem.kind for problem in report.problems} == ({"global-race"} if races(steps, blocks) else set())
