"""Memory, warp and block instructions, each with what it must give for all threads together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.instruction_cases import THREADS, bf16_bits, integers
from tests.emulator.ptx_text import DTYPES, WIDTHS, kernel, plain_kernel

Array = NDArray[Any]


@dataclass(frozen=True)
class WarpCase:
    """A kernel over 64 threads of one block. args: host arrays, the last is the result. expected: its contents."""

    name: str
    ptx: str
    args: tuple[Array, ...]
    expected: Array


def over_warps(values: Array, function: Callable[[list[int], int], int]) -> list[int]:
    """function(values of the warp, lane) for every thread."""
    rows = values.reshape(-1, 32).tolist()
    return [function(row, lane) for row in rows for lane in range(32)]


def exchange(name: str, body: str, expected: Callable[[list[int], int], int], values: Array | None = None) -> WarpCase:
    """One u32 in, one out, by lanes of a warp."""
    values = integers("u32", 12) if values is None else values
    want = np.array([x & 0xFFFFFFFF for x in over_warps(values, expected)], np.uint32)
    return WarpCase(name, kernel(["u32"], "u32", body), (values, np.zeros(THREADS, np.uint32)), want)


FULL = "0xffffffff"


def shuffles() -> Iterator[WarpCase]:
    for width in (32, 16, 8, 2):
        segment = (32 - width) << 8
        for mode, clamp, source in (
            ("idx", 31, lambda lane, w: lane // w * w + 5 % w),
            ("up", 0, lambda lane, w: lane - 3 if lane - 3 >= lane // w * w else lane),
            ("down", 31, lambda lane, w: lane + 3 if lane + 3 < lane // w * w + w else lane),
            ("bfly", 31, lambda lane, w: lane ^ 3 if (lane ^ 3) < lane // w * w + w else lane),
        ):
            moves = "5" if mode == "idx" else "3"
            yield exchange(
                f"shfl.sync.{mode} width {width}",
                f"shfl.sync.{mode}.b32 %y, %a, {moves}, {segment | clamp}, {FULL};",
                lambda row, lane, f=source, w=width: row[f(lane, w)],
            )
    yield exchange(
        "shfl.sync.up predicate",
        f"shfl.sync.up.b32 %r1|%p1, %a, 3, 0, {FULL};\nselp.u32 %y, 1, 0, %p1;",
        lambda row, lane: int(lane >= 3),
    )
    halves = """mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 16; mov.u32 %y, %a;
        @!%p1 bra HIGH;
        shfl.sync.bfly.b32 %y, %a, 1, 31, 0x0000ffff;
        bra DONE;
        HIGH: shfl.sync.bfly.b32 %y, %a, 2, 31, 0xffff0000;
        DONE:"""
    yield exchange("shfl.sync of half warps", halves, lambda row, lane: row[lane ^ (1 if lane < 16 else 2)])


def votes() -> Iterator[WarpCase]:
    few = integers("u32", 3) % 3
    test = "setp.eq.u32 %p1, %a, 1;\n"

    def ballot(row: list[int]) -> int:
        return sum(1 << lane for lane, value in enumerate(row) if value == 1)

    yield exchange("vote.sync.ballot", f"{test}vote.sync.ballot.b32 %y, %p1, {FULL};", lambda row, _: ballot(row), few)
    yield exchange(
        "vote.sync.ballot of a negated predicate",
        f"{test}vote.sync.ballot.b32 %y, !%p1, {FULL};",
        lambda row, _: ~ballot(row),
        few,
    )
    ones = np.repeat(np.array([1, 2], np.uint32), 32)
    for mode, function in (
        ("any", lambda row: any(x == 1 for x in row)),
        ("all", lambda row: all(x == 1 for x in row)),
        ("uni", lambda row: len({x == 1 for x in row}) == 1),
    ):
        for label, values in (("mixed", few), ("uniform", ones)):
            yield exchange(
                f"vote.sync.{mode}, {label}",
                f"{test}vote.sync.{mode}.pred %p2, %p1, {FULL};\nselp.u32 %y, 1, 0, %p2;",
                lambda row, _, f=function: int(f(row)),
                values,
            )
    body = "setp.eq.u32 %p1, %a, 1;\nmov.u32 %y, 0;\n@!%p1 bra DONE;\nactivemask.b32 %y;\nDONE:"
    yield exchange("activemask", body, lambda row, lane: ballot(row) if row[lane] == 1 else 0, few)
    for operation, combine in (("add", sum), ("min", min), ("max", max)):
        yield exchange(
            f"redux.sync.{operation}.u32",
            f"redux.sync.{operation}.u32 %y, %a, {FULL};",
            lambda row, _, f=combine: f(row),
        )

        def signed(row: list[int], _: int, f: Any = combine) -> int:
            return f([x - (1 << 32) if x >> 31 else x for x in row])

        yield exchange(f"redux.sync.{operation}.s32", f"redux.sync.{operation}.s32 %y, %a, {FULL};", signed)
    for operation, word in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        yield exchange(
            f"redux.sync.{operation}.b32",
            f"redux.sync.{operation}.b32 %y, %a, {FULL};",
            lambda row, _, f=word: int(f.reduce(np.array(row, np.uint32))),
        )

    def same(row: list[int], lane: int) -> int:
        return sum(1 << other for other, value in enumerate(row) if value == row[lane])

    yield exchange("match.any.sync.b32", f"match.any.sync.b32 %y, %a, {FULL};", same, few)
    wide = f"cvt.u64.u32 %rd1, %a;\nshl.b64 %rd1, %rd1, 32;\nmatch.any.sync.b64 %y, %rd1, {FULL};"
    yield exchange("match.any.sync.b64", wide, same, few)
    yield exchange(
        "match.all.sync.b32",
        f"match.all.sync.b32 %r1|%p1, %a, {FULL};\nselp.u32 %r2, 7, 0, %p1;\nxor.b32 %y, %r1, %r2;",
        lambda row, _: 0xFFFFFFFF ^ 7 if len(set(row)) == 1 else 0,
        np.concatenate([np.full(32, 9, np.uint32), few[:32]]),
    )
    yield exchange(
        "elect.sync",
        f"elect.sync %r1|%p1, {FULL};\nselp.u32 %y, 1, 0, %p1;\nadd.u32 %y, %y, %r1;",
        lambda row, lane: int(lane == 0),
    )


def barriers() -> Iterator[WarpCase]:
    few = integers("u32", 3) % 3
    counts = {"popc": int((few == 1).sum()), "and": 0, "or": 1}
    for operation, want in counts.items():
        target = "%y" if operation == "popc" else "%p2"
        kind = "u32" if operation == "popc" else "pred"
        finish = "" if operation == "popc" else "\nselp.u32 %y, 1, 0, %p2;"
        for prefix in ("bar.red", "barrier.red"):
            body = f"setp.eq.u32 %p1, %a, 1;\n{prefix}.{operation}.{kind} {target}, 0, %p1;{finish}"
            expected = np.full(THREADS, want, np.uint32)
            yield WarpCase(
                f"{prefix}.{operation}", kernel(["u32"], "u32", body), (few, np.zeros(THREADS, np.uint32)), expected
            )
    for barrier in ("bar.sync 0", "barrier.sync 0", "bar.sync 3, 64", "barrier.sync.aligned 1"):
        body = f""".shared .b32 tile[64];
            mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 4, %r1; st.shared.b32 [%r2], %a;
            {barrier};
            xor.b32 %r3, %tid, 63; mad.lo.u32 %r2, %r3, 4, %r1; ld.shared.b32 %y, [%r2];"""
        values = integers("u32", 2)
        yield WarpCase(
            barrier, kernel(["u32"], "u32", body), (values, np.zeros(THREADS, np.uint32)), values[np.arange(64) ^ 63]
        )
    body = """.shared .b32 tile[64];
        mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 4, %r1; st.shared.b32 [%r2], %a;
        bar.warp.sync 0xffffffff;
        xor.b32 %r3, %tid, 31; mad.lo.u32 %r2, %r3, 4, %r1; ld.shared.b32 %y, [%r2];"""
    yield exchange("bar.warp.sync", body, lambda row, lane: row[lane ^ 31])


def accesses() -> Iterator[WarpCase]:
    """Loads and stores of all widths, vectors and spaces: the result is the input's bytes."""
    data = np.random.default_rng(4).integers(0, 256, THREADS * 16, dtype=np.uint8)
    start = "ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [dst]; mov.u32 %tid, %tid.x;\n"
    one = ["b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"]
    two = ["b8", "u8", "b16", "u16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]
    four = ["b8", "u8", "b16", "u16", "b32", "u32", "s32", "f32"]
    forms = [(n, kind, WIDTHS[kind] // 8) for n, kinds in ((1, one), (2, two), (4, four)) for kind in kinds]
    for count, kind, nbytes in forms:
        width = count * nbytes
        letter = "f" if kind == "f32" else "d" if kind == "f64" else {1: "h", 2: "h", 4: "r", 8: "rd"}[nbytes]
        names = [f"%{letter}{4 + i}" for i in range(count)]
        value = "{" + ", ".join(names) + "}" if count > 1 else names[0]
        vector = f".v{count}" if count > 1 else ""
        move = f"mad.wide.u32 %rd1, %tid, {width}, %rd1; mad.wide.u32 %rd2, %tid, {width}, %rd2;\n"
        paths = {
            "global": f"ld.global{vector}.{kind} {value}, [%rd1]; st.global{vector}.{kind} [%rd2], {value};",
            "hints": f"ld.global.nc.L1::no_allocate.L2::128B{vector}.{kind} {value}, [%rd1];"
            f" st.global.L1::no_allocate{vector}.{kind} [%rd2], {value};",
            "generic": f"ld{vector}.{kind} {value}, [%rd1]; st{vector}.{kind} [%rd2], {value};",
            "shared": f".shared .align 16 .b8 tile[1024];\nmov.u32 %r1, tile; mad.lo.u32 %r2, %tid, {width}, %r1;\n"
            f"ld.global{vector}.{kind} {value}, [%rd1]; st.shared{vector}.{kind} [%r2], {value};"
            f" ld.shared{vector}.{kind} {value}, [%r2]; st.global{vector}.{kind} [%rd2], {value};",
            "local": f".local .align 16 .b8 mine[32];\nmov.u64 %rd3, mine;\n"
            f"ld.global{vector}.{kind} {value}, [%rd1]; st.local{vector}.{kind} [%rd3+16], {value};"
            f" ld.local{vector}.{kind} {value}, [%rd3+16]; st.global{vector}.{kind} [%rd2], {value};",
        }
        for path, body in paths.items():
            used = data[: THREADS * width]
            ptx = plain_kernel(".param .u64 src, .param .u64 dst", start + move + body)
            yield WarpCase(f"{path} {vector[1:]}{kind}", ptx, (used.copy(), np.zeros_like(used)), used)
    for kind, dtype in (("s8", "i1"), ("u8", "u1"), ("s16", "i2"), ("u16", "u2")):
        nbytes = int(dtype[1])
        body = start + f"mad.wide.u32 %rd1, %tid, {nbytes}, %rd1; mad.wide.u32 %rd2, %tid, 4, %rd2;\n"
        body += f"ld.global.{kind} %r1, [%rd1]; st.global.b32 [%rd2], %r1;"
        values = data[: THREADS * nbytes].view(dtype)
        yield WarpCase(
            f"ld.global.{kind} extends",
            plain_kernel(".param .u64 src, .param .u64 dst", body),
            (values, np.zeros(THREADS, np.uint32)),
            values.astype(np.int64).astype(np.uint32),
        )
    body = (
        start
        + """.shared .align 8 .b8 tile[512]; .local .align 8 .b8 mine[8];
        mov.u64 %rd3, tile; cvta.shared.u64 %rd3, %rd3; mad.wide.u32 %rd3, %tid, 4, %rd3;
        mov.u64 %rd4, mine; cvta.local.u64 %rd4, %rd4; cvta.to.global.u64 %rd1, %rd1; cvta.global.u64 %rd2, %rd2;
        mad.wide.u32 %rd1, %tid, 4, %rd1; mad.wide.u32 %rd2, %tid, 4, %rd2;
        ld.global.u32 %r1, [%rd1]; st.u32 [%rd3], %r1; ld.u32 %r2, [%rd3]; st.u32 [%rd4], %r2; ld.u32 %r3, [%rd4];
        cvta.to.shared.u64 %rd5, %rd3; ld.shared.u32 %r4, [%rd5];
        isspacep.shared %p1, %rd3; isspacep.local %p2, %rd4; isspacep.global %p3, %rd2;
        and.pred %p1, %p1, %p2; and.pred %p1, %p1, %p3;
        and.b32 %r3, %r3, %r4; selp.u32 %r3, %r3, 0, %p1; st.u32 [%rd2], %r3;"""
    )
    words = integers("u32", 8)
    ptx = plain_kernel(".param .u64 src, .param .u64 dst", body)
    yield WarpCase("cvta isspacep", ptx, (words, np.zeros(THREADS, np.uint32)), words)
    body = """.shared .b32 tile[64]; mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 4, %r1; sub.u32 %r2, %r2, 4096;
        st.shared.u32 [%r2+4096], %a; ld.shared.u32 %y, [%r2+4096];"""
    ptx = kernel(["u32"], "u32", body)
    yield WarpCase("32-bit addresses wrap around", ptx, (words, np.zeros(THREADS, np.uint32)), words)
    constants = ".const .align 4 .b32 table[4] = {10, 0x14, 30, 40};\n.global .align 4 .b32 more[2] = {1000, 2000};\n"
    body = """mov.u32 %r1, %tid; and.b32 %r1, %r1, 3; mov.u64 %rd1, table; mad.wide.u32 %rd1, %r1, 4, %rd1;
        ld.const.u32 %r2, [%rd1]; ld.global.u32 %r3, [more+4]; add.u32 %y, %r2, %r3;"""
    ptx = kernel(["u32"], "u32", body, constants)
    expected = np.tile(np.array([10, 20, 30, 40], np.uint32), 16) + 2000
    yield WarpCase("ld.const and .global variables", ptx, (words, np.zeros(THREADS, np.uint32)), expected)


def parameters() -> Iterator[WarpCase]:
    """Scalars of every type, and vectors of parameters, as the launch packed them."""
    kinds = ["b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"]
    for kind in kinds:
        letter = {"f32": "f", "f64": "d"}.get(kind, {2: "h", 4: "r", 8: "rd"}[WIDTHS[kind] // 8])
        dtype = f"i{WIDTHS[kind] // 8}" if kind[0] == "b" else DTYPES[kind]
        value = np.dtype(dtype).type({"f": -3.5, "u": 51}.get(kind[0], -7))
        body = f"ld.param.u64 %rd1, [dst]; ld.param.{kind} %{letter}5, [x]; st.global.{kind} [%rd1], %{letter}5;"
        expected = np.array([value])
        ptx = plain_kernel(f".param .{kind} x, .param .u64 dst", body)
        yield WarpCase(f"ld.param.{kind}", ptx, (value, np.zeros_like(expected)), expected)


def copies() -> Iterator[WarpCase]:
    """cp.async through shared memory; sizes, zero fill, groups."""
    start = """.shared .align 16 .b8 tile[2048];
        ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [dst]; mov.u32 %tid, %tid.x;
        mad.wide.u32 %rd1, %tid, {n}, %rd1; mad.wide.u32 %rd2, %tid, {n}, %rd2; mov.u32 %r1, tile;
        mad.lo.u32 %r2, %tid, {n}, %r1;\n"""
    data = np.random.default_rng(6).integers(0, 256, THREADS * 16, dtype=np.uint8)
    for cache, nbytes in (("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)):
        out = "".join(
            f"ld.shared.u32 %r5, [%r2+{4 * i}]; st.global.u32 [%rd2+{4 * i}], %r5;\n" for i in range(nbytes // 4)
        )
        values = data[: THREADS * nbytes]
        forms = {
            "": ("", values),
            "src-size 0": (", 0", np.zeros_like(values)),
            "L2::128B": ("", values),
        }
        for form, (size, expected) in forms.items():
            opcode = f"cp.async.{cache}.shared.global{'.' + form if form.startswith('L2') else ''}"
            body = f"{opcode} [%r2], [%rd1], {nbytes}{size};\ncp.async.commit_group;\ncp.async.wait_group 0;\n"
            ptx = plain_kernel(".param .u64 src, .param .u64 dst", start.replace("{n}", str(nbytes)) + body + out)
            yield WarpCase(f"cp.async.{cache} {nbytes} {form}", ptx, (values.copy(), np.zeros_like(values)), expected)
        body = f"and.b32 %r6, %tid, {nbytes - 1};\ncp.async.{cache}.shared.global [%r2], [%rd1], {nbytes}, %r6;\n"
        body += "cp.async.wait_all;\n"
        rows = values.reshape(THREADS, nbytes)
        keep = np.arange(nbytes) < (np.arange(THREADS) & (nbytes - 1))[:, None]
        ptx = plain_kernel(".param .u64 src, .param .u64 dst", start.replace("{n}", str(nbytes)) + body + out)
        yield WarpCase(
            f"cp.async.{cache} {nbytes} with src-size", ptx, (values.copy(), np.zeros_like(values)),
            np.where(keep, rows, 0).astype(np.uint8).reshape(-1),
        )  # fmt: skip
        body = f"setp.gt.u32 %p1, %tid, 9;\ncp.async.{cache}.shared.global [%r2], [%rd1], {nbytes}, %p1;\n"
        body += "cp.async.wait_all;\n"
        ptx = plain_kernel(".param .u64 src, .param .u64 dst", start.replace("{n}", str(nbytes)) + body + out)
        yield WarpCase(
            f"cp.async.{cache} {nbytes} with ignore-src", ptx, (values.copy(), np.zeros_like(values)),
            np.where(np.arange(THREADS)[:, None] > 9, 0, rows).astype(np.uint8).reshape(-1),
        )  # fmt: skip


def atomics() -> Iterator[WarpCase]:
    """Every thread on element tid % 4: the old values in some order of turns, and the final state."""
    values = integers("u32", 21)
    start = np.array([5, 1 << 31, 7, 0xFFFFFFFF], np.uint32)

    def run(kind: str, operation: str) -> Array:
        table = start.astype(np.int64) if kind == "u32" else start.view(np.int32).astype(np.int64)
        words = values.astype(np.int64) if kind == "u32" else values.view(np.int32).astype(np.int64)
        for thread in range(THREADS):
            a, b = int(table[thread % 4]), int(words[thread])
            table[thread % 4] = {
                "add": lambda a, b: (a + b) & 0xFFFFFFFF, "min": min, "max": max, "exch": lambda a, b: b,
                "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
                "inc": lambda a, b: 0 if a >= b else a + 1, "dec": lambda a, b: b if a == 0 or a > b else a - 1,
            }[operation](a, b)  # fmt: skip
        return (table & 0xFFFFFFFF).astype(np.uint32)

    forms = [
        ("u32", "add"),
        ("s32", "min"),
        ("u32", "min"),
        ("s32", "max"),
        ("u32", "max"),
        ("u32", "inc"),
        ("u32", "dec"),
    ]
    forms += [("b32", name) for name in ("and", "or", "xor", "exch")]
    begin = "ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [dst]; mov.u32 %tid, %tid.x; and.b32 %r1, %tid, 3;\n"
    begin += "mad.wide.u32 %rd1, %tid, 4, %rd1; mad.wide.u32 %rd2, %r1, 4, %rd2; ld.global.u32 %r2, [%rd1];\n"
    for kind, operation in forms:
        expected = run("s32" if kind == "s32" else "u32", operation)
        for base in ("atom", "red"):
            if base == "red" and operation == "exch":
                continue
            result = "%r3, " if base == "atom" else ""
            opcode = f"{base}.global.{operation}.{kind}"
            ptx = plain_kernel(".param .u64 src, .param .u64 dst", f"{begin}{opcode} {result}[%rd2], %r2;")
            yield WarpCase(opcode, ptx, (values, start.copy()), expected)
            opcode = f"{base}.shared.{operation}.{kind}"
            body = f"""{begin}.shared .b32 cells[4]; mov.u32 %r4, cells; mad.lo.u32 %r5, %r1, 4, %r4;
                setp.lt.u32 %p1, %tid, 4; @%p1 ld.global.u32 %r6, [%rd2]; @%p1 st.shared.u32 [%r5], %r6; bar.sync 0;
                {opcode} {result}[%r5], %r2; bar.sync 0;
                @%p1 ld.shared.u32 %r6, [%r5]; @%p1 st.global.u32 [%rd2], %r6;"""
            ptx = plain_kernel(".param .u64 src, .param .u64 dst", body)
            yield WarpCase(opcode, ptx, (values, start.copy()), expected)
    body = begin + "mov.u32 %r4, 5; atom.global.cas.b32 %r3, [%rd2], %r4, %r2;"
    ptx = plain_kernel(".param .u64 src, .param .u64 dst", body)
    first = start.copy()
    first[0] = values[0]
    if values[0] == 5:
        first[0] = values[4]
    yield WarpCase("atom.global.cas.b32", ptx, (values, start.copy()), first)
    ticket = "ld.param.u64 %rd9, [in_b]; atom.global.add.u32 %y, [%rd9], 2;"
    ptx = kernel(["u32", "u32"], "u32", ticket)
    yield WarpCase(
        "atom.global.add.u32 returns", ptx, (values, np.zeros(THREADS, np.uint32), np.zeros(THREADS, np.uint32)),
        2 * np.arange(THREADS, dtype=np.uint32),
    )  # fmt: skip
    shared = """.shared .align 8 .b8 cell[8];
        setp.eq.u32 %p1, %tid, 0; mov.u64 %rd1, 0; @%p1 st.shared.u64 [cell], %rd1;
        bar.sync 0; {op} bar.sync 0; {load}"""
    sums = {
        "f32": ("cvt.rn.f32.u32 %f1, %tid; atom.shared.add.f32 %f2, [cell], %f1;", "ld.shared.u32 %y, [cell];",
                np.float32(2016).view("u4")),
        "u64": ("cvt.u64.u32 %rd2, %tid; atom.shared.add.u64 %rd3, [cell], %rd2;", "ld.shared.u32 %y, [cell];", 2016),
        "f64": ("cvt.rn.f64.u32 %d1, %tid; red.shared.add.f64 [cell], %d1;", "ld.shared.u32 %y, [cell+4];",
                np.float64(2016).view("u8") >> np.uint64(32)),
        "noftz.f16x2": ("mov.u32 %r2, 0x3c004000; red.shared.add.noftz.f16x2 [cell], %r2;",
                        "ld.shared.u32 %y, [cell];",
                        int(np.float16(64).view("u2")) << 16 | int(np.float16(128).view("u2"))),
        "noftz.bf16x2": ("mov.u32 %r2, 0x3f804000; red.shared.add.noftz.bf16x2 [cell], %r2;",
                         "ld.shared.u32 %y, [cell];",
                         bf16_bits(64) << 16 | bf16_bits(128)),
        "noftz.f16": ("mov.b16 %h2, 0x3c00; red.shared.add.noftz.f16 [cell], %h2;", "ld.shared.u16 %y, [cell];",
                      int(np.float16(64).view("u2"))),
    }  # fmt: skip
    for name, (operation, load, want) in sums.items():
        ptx = kernel(["u32"], "u32", shared.replace("{op}", operation).replace("{load}", load))
        expected = np.full(THREADS, int(want), np.uint32)
        yield WarpCase(f"shared atomic add {name}", ptx, (values, np.zeros(THREADS, np.uint32)), expected)


def control() -> Iterator[WarpCase]:
    """Branches, jump tables, calls, predicated exits and special registers."""
    values = integers("u32", 30) % 4
    table = """ts: .branchtargets L0, L1, L2, L3;
        brx.idx %a, ts;
        L0: mov.u32 %y, 100; bra.uni END;
        L1: mov.u32 %y, 101; bra.uni END;
        L2: mov.u32 %y, 102; bra.uni END;
        L3: mov.u32 %y, 103;
        END:"""
    yield exchange("brx.idx", table, lambda row, lane: 100 + row[lane], values)
    loop = "mov.u32 %y, 0;\nmov.u32 %r1, 0;\nTOP: setp.ge.u32 %p1, %r1, %a;\n@%p1 bra OUT;\n"
    loop += "add.u32 %y, %y, %r1;\nadd.u32 %r1, %r1, 1;\nbra TOP;\nOUT:"
    yield exchange("loops of different lengths", loop, lambda row, lane: sum(range(row[lane])), values)
    function = """.func (.param .b32 result) square(.param .b32 x)
        { .reg .b32 %v; ld.param.b32 %v, [x]; mul.lo.u32 %v, %v, %v; st.param.b32 [result], %v; ret; }
        .func (.param .b32 result) fourth(.param .b32 x)
        { .reg .b32 %v; .reg .pred %small; ld.param.b32 %v, [x]; setp.lt.u32 %small, %v, 2;
          st.param.b32 [result], %v; @%small ret;
          { .param .b32 a; .param .b32 r; st.param.b32 [a], %v; call.uni (r), square, (a); ld.param.b32 %v, [r]; }
          { .param .b32 a; .param .b32 r; st.param.b32 [a], %v; call.uni (r), square, (a); ld.param.b32 %v, [r]; }
          st.param.b32 [result], %v; ret; }
        """
    body = """{ .param .b32 a; .param .b32 r; st.param.b32 [a], %a;
        call.uni (r), fourth, (a);
        ld.param.b32 %y, [r]; }"""
    ptx = kernel(["u32"], "u32", body, function)
    yield WarpCase("call", ptx, (values, np.zeros(THREADS, np.uint32)), values**4)
    body = "setp.gt.u32 %p1, %a, 1;\nmov.u32 %y, 1;\n@%p1 exit;\nmov.u32 %y, 2;"
    expected = np.where(values > 1, 0, 2).astype(np.uint32)
    yield WarpCase("exit", kernel(["u32"], "u32", body), (values, np.zeros(THREADS, np.uint32)), expected)
    body = "setp.gt.u32 %p1, %a, 1;\nmov.u32 %y, 1;\n@%p1 add.u32 %y, %y, 5;\n@!%p1 ld.param.u32 %y, [in_a];\n"
    body += "@!%p1 mov.u32 %y, 9;"
    yield exchange("predicates", body, lambda row, lane: 6 if row[lane] > 1 else 9, values)
    masks = {"eq": lambda n: 1 << n, "lt": lambda n: (1 << n) - 1, "le": lambda n: (2 << n) - 1,
             "ge": lambda n: 0x100000000 - (1 << n), "gt": lambda n: 0x100000000 - (2 << n)}  # fmt: skip
    for name, mask in masks.items():
        yield exchange(f"%lanemask_{name}", f"mov.u32 %y, %lanemask_{name};", lambda row, lane, f=mask: f(lane))
    registers = "mov.u32 %y, %laneid;\nmov.u32 %r1, %warpid;\nmad.lo.u32 %y, %r1, 100, %y;\nmov.u32 %r2, %ntid.x;\n"
    registers += "mad.lo.u32 %y, %r2, 1000, %y;\nmov.u32 %r3, %nctaid.x;\nmad.lo.u32 %y, %r3, 100000, %y;"
    expected = np.array([164000 + t // 32 * 100 + t % 32 for t in range(THREADS)], np.uint32)
    yield WarpCase(
        "special registers", kernel(["u32"], "u32", registers), (values, np.zeros(THREADS, np.uint32)), expected
    )
    body = "membar.gl;\nfence.acq_rel.gpu;\nnanosleep.u32 20;\nprefetch.global.L2 [%at];\nmov.u32 %y, %a;"
    yield exchange("fences and hints do nothing", body, lambda row, lane: row[lane])


CASES: list[WarpCase] = [
    *shuffles(), *votes(), *barriers(), *accesses(), *parameters(), *copies(), *atomics(), *control()
]  # fmt: skip
