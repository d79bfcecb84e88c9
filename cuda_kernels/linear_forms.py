"""How the weights of a linear layer lie in device memory, for each storage form.

A matrix (out, in) is cut into tiles of 16 rows x 64 columns, the A operands of four `mma.m16n8k16`, with rows and
columns padded by zeros. In a tile every lane owns 32 weights, in the order in which the tensor core wants them: with
g = lane // 4 and t = lane % 4, pair i (0 to 3) of k-tile kt is

    row g + 8 (i % 2), columns 16 kt + 8 (i // 2) + 2 t and the next          (PTX ISA, fragments of mma.m16n8k16)

so that a warp's 16-byte loads are whole and need no shuffle. `weights` holds, per tile, words / 4 runs of 32 lanes x 4
words:

    16-bit forms   16 words a lane: run kt is k-tile kt, word i is pair i
    Q8_0            8 words: run h holds k-tiles 2h and 2h + 1, two words each. Word j has pairs 2j (bytes 0, 2) and
                    2j + 1 (bytes 1, 3), each value stored as q + 128
    4 to 6 bits     4 words: word kt is k-tile kt. Nibble i of its low half is the first value of pair i, of its high
                    half the second: the low four bits of each value

`headers` holds, for each 16 rows x 256 columns (a slice: eight blocks of 32 or one block of 256), a record of words:

    scales  16 rows x 4 words. Q8_0 to Q5_1: float16 d of eight blocks. Q4_K, Q5_K: the file's d, dmin and 12 bytes of
            scales and minima. Q6_K: sixteen scales, as scale + 128
    high    fifth bits: 32 lanes x 4 words, one for each tile; bit 16 e + 8 (kt // 2) + 4 (i % 2) + 2 (kt % 2) + i // 2
            belongs to value e of pair i of k-tile kt. Sixth and fifth bits (Q6_K): 2 x 32 lanes x 4 words, two for each
            tile; bits 16 e + 8 (kt % 2) + 4 (i % 2) + 2 (i // 2) and the next of word kt // 2
    extra   Q4_1, Q5_1: 32 lanes x 2 words, m of blocks 2t and 2t + 1 of rows g and g + 8 (an A operand over blocks);
            Q6_K: 8 words, d of rows g and g + 8

This is what the file holds, rearranged: nothing is dequantised, and a matrix of whole tiles and slices takes exactly
the file's bytes. f32 is laid out for plain arithmetic: groups of 32 rows, [group][column / 4][row][4 columns].

Block formats: ggml's (github.com/ggml-org/ggml, ggml-common.h). Layouts in fragment order: Frantar et al., "MARLIN:
Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cuda_kernels.launch import require
from cuda_kernels.views import ceil_div

__all__ = [
    "F32_ROWS",
    "FORMS",
    "SCALE_WORDS",
    "SLICE",
    "TILE_COLUMNS",
    "TILE_ROWS",
    "Form",
    "form_named",
    "tiles_of",
]

TILE_ROWS, TILE_COLUMNS = 16, 64
SLICE = 256  # columns that are summed in one chain; the sums of slices are added in ascending order
F32_ROWS = 32  # rows of a group of the f32 form
SCALE_WORDS = 4 * TILE_ROWS


@dataclass(frozen=True)
class Form:
    """One storage form.

    Attributes:
        bits: of a weight: 32, 16, 8, 6, 5 or 4.
        scaling: "none"; "block": a float16 d for 32 columns; "super": blocks of 256 with integer scales inside.
        zero: what is subtracted from the stored integer.
        minima: whether a minimum is added to (block) or subtracted from (super) each value.
        block_size, block_nbytes: columns and bytes of a block in a GGUF file.
    """

    name: str
    bits: int
    scaling: Literal["none", "block", "super"] = "none"
    zero: int = 0
    minima: bool = False
    block_size: int = 1
    block_nbytes: int = 4

    @property
    def quantised(self) -> bool:
        return self.scaling != "none"

    @property
    def words(self) -> int:
        """Words of a lane in a tile of `weights`."""
        return {16: 16, 8: 8}.get(self.bits, 4)

    @property
    def high_words(self) -> int:
        """Words of the upper bits in a header."""
        return {5: 128, 6: 256}.get(self.bits, 0)

    @property
    def extra_words(self) -> int:
        if self.scaling == "block" and self.minima:
            return 64
        return 8 if self.bits == 6 else 0

    @property
    def header_words(self) -> int:
        """Words of a slice of 16 rows in `headers`; a multiple of 4."""
        return SCALE_WORDS + self.high_words + self.extra_words if self.quantised else 0

    @property
    def block_sums(self) -> bool:
        """Whether products need the sum of x over each block of 32 columns."""
        return self.minima


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("f32", 32),
        Form("f16", 16, block_nbytes=2),
        Form("bf16", 16, block_nbytes=2),
        Form("Q8_0", 8, "block", 0, False, 32, 34),
        Form("Q4_0", 4, "block", 8, False, 32, 18),
        Form("Q4_1", 4, "block", 0, True, 32, 20),
        Form("Q5_0", 5, "block", 16, False, 32, 22),
        Form("Q5_1", 5, "block", 0, True, 32, 24),
        Form("Q4_K", 4, "super", 0, True, 256, 144),
        Form("Q5_K", 5, "super", 0, True, 256, 176),
        Form("Q6_K", 6, "super", 32, False, 256, 210),
    )
}


def form_named(name: str) -> Form:
    """Raises KernelArgumentError."""
    require(name in FORMS, f"unknown storage form {name!r}: it is one of {', '.join(FORMS)}")
    return FORMS[name]


def tiles_of(rows: int, columns: int) -> tuple[int, int, int]:
    """(tiles of 16 rows, tiles of 64 columns, slices of 256 columns) of a matrix."""
    return ceil_div(rows, TILE_ROWS), ceil_div(columns, TILE_COLUMNS), ceil_div(columns, SLICE)
