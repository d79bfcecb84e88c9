"""Fragment layouts of mma and ldmatrix, register by register, from the formulas of the PTX ISA manual.

"Matrix Fragments for mma.m16n8k*": groupID = laneid >> 2, threadID_in_group = laneid % 4. Each formula below gives the
(row, column) of element i of a fragment, as the manual states it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_kernels.emulator import Program
from tests.emulator.instruction_cases import bf16_bits, bf16_value
from tests.emulator.ptx_text import plain_kernel

Place = Callable[[int, int, int], tuple[int, int]]  # groupID, threadID_in_group, element -> row, column
Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """k, bits of an element, elements of a lane in A and B, and where they lie."""

    opcode: str
    k: int
    bits: int
    a_count: int
    b_count: int
    a: Place
    b: Place


def c_place(group: int, thread: int, i: int) -> tuple[int, int]:
    """m16n8: row = groupID for c0, c1 and groupID + 8 for c2, c3; col = threadID_in_group * 2 + (i & 1)."""
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def a_k16(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_k16(group: int, thread: int, i: int) -> tuple[int, int]:
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def a_k8(group: int, thread: int, i: int) -> tuple[int, int]:
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def b_k8(group: int, thread: int, i: int) -> tuple[int, int]:
    return thread * 2 + i, group


def a_tf32_k8(group: int, thread: int, i: int) -> tuple[int, int]:
    return (group if i in (0, 2) else group + 8), (thread if i in (0, 1) else thread + 4)


def b_tf32_k8(group: int, thread: int, i: int) -> tuple[int, int]:
    return (thread if i == 0 else thread + 4), group


def a_tf32_k4(group: int, thread: int, i: int) -> tuple[int, int]:
    return (group if i == 0 else group + 8), thread


def b_tf32_k4(group: int, thread: int, i: int) -> tuple[int, int]:
    return thread, group


def a_s8_k32(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_s8_k32(group: int, thread: int, i: int) -> tuple[int, int]:
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def a_s8_k16(group: int, thread: int, i: int) -> tuple[int, int]:
    return (group if i < 4 else group + 8), thread * 4 + (i & 3)


def b_s8_k16(group: int, thread: int, i: int) -> tuple[int, int]:
    return thread * 4 + i, group


SHAPES = [
    Shape("m16n8k16.row.col.f32.f16.f16.f32", 16, 16, 8, 4, a_k16, b_k16),
    Shape("m16n8k16.row.col.f32.bf16.bf16.f32", 16, 16, 8, 4, a_k16, b_k16),
    Shape("m16n8k16.row.col.f16.f16.f16.f16", 16, 16, 8, 4, a_k16, b_k16),
    Shape("m16n8k8.row.col.f32.f16.f16.f32", 8, 16, 4, 2, a_k8, b_k8),
    Shape("m16n8k8.row.col.f32.bf16.bf16.f32", 8, 16, 4, 2, a_k8, b_k8),
    Shape("m16n8k8.row.col.f32.tf32.tf32.f32", 8, 32, 4, 2, a_tf32_k8, b_tf32_k8),
    Shape("m16n8k4.row.col.f32.tf32.tf32.f32", 4, 32, 2, 1, a_tf32_k4, b_tf32_k4),
    Shape("m16n8k32.row.col.s32.s8.s8.s32", 32, 8, 16, 8, a_s8_k32, b_s8_k32),
    Shape("m16n8k32.row.col.s32.u8.s8.s32", 32, 8, 16, 8, a_s8_k32, b_s8_k32),
    Shape("m16n8k32.row.col.s32.s8.u8.s32", 32, 8, 16, 8, a_s8_k32, b_s8_k32),
    Shape("m16n8k16.row.col.s32.s8.s8.s32", 16, 8, 8, 4, a_s8_k16, b_s8_k16),
    Shape("m16n8k16.row.col.s32.u8.u8.s32", 16, 8, 8, 4, a_s8_k16, b_s8_k16),
]


def mma_text(shape: Shape) -> str:
    """Registers of A, B, C from in[register][lane], D to out[register][lane]."""
    a, b = (count * shape.bits // 32 for count in (shape.a_count, shape.b_count))
    c = 2 if ".f16.f16.f16.f16" in shape.opcode else 4
    floats = ".row.col.f32" in shape.opcode
    body = "ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [dst]; mov.u32 %tid, %tid.x;\n"
    body += "mad.wide.u32 %rd1, %tid, 4, %rd1; mad.wide.u32 %rd2, %tid, 4, %rd2;\n"
    names = [f"%r{i}" for i in range(a + b)] + [f"%{'f' if floats else 'r'}{16 + i}" for i in range(c)]
    body += "".join(
        f"ld.global.{'f32' if n[1] == 'f' else 'b32'} {n}, [%rd1+{128 * i}];\n" for i, n in enumerate(names)
    )
    fragments = [", ".join(part) for part in (names[a + b :], names[:a], names[a : a + b], names[a + b :])]
    body += f"mma.sync.aligned.{shape.opcode} {', '.join(f'{{{fragment}}}' for fragment in fragments)};\n"
    return plain_kernel(
        ".param .u64 src, .param .u64 dst",
        body
        + "".join(
            f"st.global.{'f32' if floats else 'b32'} [%rd2+{128 * i}], {n};\n" for i, n in enumerate(names[a + b :])
        ),
    )


def pack(elements: list[int], bits: int) -> list[int]:
    """Elements to registers, the first in the lowest bits."""
    per = 32 // bits
    return [
        sum((element & ((1 << bits) - 1)) << bits * i for i, element in enumerate(elements[start : start + per]))
        for start in range(0, len(elements), per)
    ]


def encode(value: float, kind: str) -> int:
    if kind == "f16":
        return int.from_bytes(struct.pack("<e", value), "little")
    if kind == "bf16":
        return bf16_bits(value)
    if kind in ("tf32", "f32"):
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value)


MMA_TEXTS = {shape.opcode: mma_text(shape) for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.opcode for shape in SHAPES])
def test_mma_fragments_lie_where_the_manual_says(shape: Shape) -> None:
    random = np.random.default_rng(3)
    kind_d, kind_a, kind_b, _ = shape.opcode.split(".")[3:]
    low = {"u8": 0}.get(kind_a, -9), {"u8": 0}.get(kind_b, -9)
    high = 250 if "u8" in (kind_a, kind_b) else 10
    a = random.integers(low[0], high if kind_a == "u8" else 10, (16, shape.k))
    b = random.integers(low[1], high if kind_b == "u8" else 10, (shape.k, 8))
    c = random.integers(-50, 50, (16, 8))
    registers = []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        row = pack([encode(int(a[shape.a(group, thread, i)]), kind_a) for i in range(shape.a_count)], shape.bits)
        row += pack([encode(int(b[shape.b(group, thread, i)]), kind_b) for i in range(shape.b_count)], shape.bits)
        row += pack(
            [encode(int(c[c_place(group, thread, i)]), kind_d) for i in range(4)], 16 if kind_d == "f16" else 32
        )
        registers.append(row)
    source = np.array(registers, np.uint32).T.copy()  # [register, lane]
    result = np.zeros((2 if kind_d == "f16" else 4, 32), np.uint32)

    Program(MMA_TEXTS[shape.opcode]).launch(1, 32, [source, result])

    expected = a @ b + c
    for lane in range(32):
        places = [c_place(lane >> 2, lane % 4, i) for i in range(4)]
        want = pack([encode(int(expected[place]), kind_d) for place in places], 16 if kind_d == "f16" else 32)
        assert result[:, lane].tolist() == want


def test_mma_keeps_infinities_and_nan_in_their_row_and_column() -> None:
    source = np.zeros((10, 32), np.uint32)
    one = encode(1.0, "f16") * 0x10001
    source[:6] = one
    source[0, 5 * 4] = encode(float("inf"), "f16")  # row 5, column 0
    result = np.zeros((4, 32), np.float32)

    Program(MMA_TEXTS["m16n8k16.row.col.f32.f16.f16.f32"]).launch(1, 32, [source, result])

    rows = np.stack([result[:2, lane] for lane in range(32)]).reshape(8, 8)
    assert np.isinf(rows[5]).all()
    assert (rows[[0, 1, 2, 3, 4, 6, 7]] == 16).all()
    assert (result[2:] == 16).all()


def test_mma_gives_an_element_the_same_bits_in_every_row() -> None:
    random = np.random.default_rng(0)
    row = [bf16_bits(float(x)) for x in random.standard_normal(16) * 10.0 ** random.integers(-8, 8, 16)]
    column = [bf16_bits(float(x)) for x in random.standard_normal(16)]
    registers = []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        values = pack([row[a_k16(group, thread, i)[1]] for i in range(8)], 16)
        values += pack([column[b_k16(group, thread, i)[0]] for i in range(4)], 16)
        registers.append(values + [encode(0.3, "f32")] * 4)
    source, result = np.array(registers, np.uint32).T.copy(), np.zeros((4, 32), np.float32)

    Program(MMA_TEXTS["m16n8k16.row.col.f32.bf16.bf16.f32"]).launch(1, 32, [source, result])

    assert len(np.unique(result.view(np.uint32))) == 1
    exact = sum(bf16_value(x) * bf16_value(y) for x, y in zip(row, column, strict=True))
    assert result[0, 0] == pytest.approx(exact + float(np.float32(0.3)), rel=2.0**-23)


def ldmatrix_text(count: int, transposed: bool) -> str:
    trans = ".trans" if transposed else ""
    names = ", ".join(f"%r{i}" for i in range(count))
    return plain_kernel(
        ".param .u64 src, .param .u64 dst",
        f"""
        .shared .align 16 .b8 tile[1024];
        ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [dst]; mov.u32 %tid, %tid.x;
        mad.wide.u32 %rd3, %tid, 32, %rd1; mul.lo.u32 %r8, %tid, 32; mov.u32 %r9, tile; add.u32 %r10, %r8, %r9;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd3]; st.shared.v4.b32 [%r10], {{%r4, %r5, %r6, %r7}};
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd3+16]; st.shared.v4.b32 [%r10+16], {{%r4, %r5, %r6, %r7}};
        bar.sync 0;
        mul.lo.u32 %r11, %tid, 16; xor.b32 %r11, %r11, 16; add.u32 %r11, %r11, %r9;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r11+512];
        mad.wide.u32 %rd2, %tid, 4, %rd2;
        """
        + "".join(f"st.global.b32 [%rd2+{128 * i}], %r{i};\n" for i in range(count)),
    )


LDMATRIX_TEXTS = {(count, trans): ldmatrix_text(count, trans) for count in (1, 2, 4) for trans in (False, True)}


@pytest.mark.parametrize(("count", "transposed"), LDMATRIX_TEXTS)
def test_ldmatrix_hands_out_rows_as_the_manual_says(count: int, transposed: bool) -> None:
    memory = np.random.default_rng(1).integers(0, 1 << 16, 512, dtype=np.uint16)
    result = np.zeros((count, 32), np.uint32)

    Program(LDMATRIX_TEXTS[count, transposed]).launch(1, 32, [memory, result])

    for register in range(count):
        # Lanes 8 * register ... + 7 give the addresses of the rows; the body swaps each pair of them.
        rows = [memory[256 + 8 * (address ^ 1) :][:8] for address in range(8 * register, 8 * register + 8)]
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            pair = (
                [rows[column][row], rows[column + 1][row]] if transposed else [rows[row][column], rows[row][column + 1]]
            )
            assert result[register, lane] == int(pair[0]) | int(pair[1]) << 16
