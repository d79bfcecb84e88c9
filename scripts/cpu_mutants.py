"""Breaks the CPU's integer products, programs and attention tiles on purpose, and checks that their tests notice.

    python scripts/cpu_mutants.py [NAME ...]    all mutants, or those whose name contains one of the words

See mutants.py. A mutant of the matrix unit survives where the CPU has none.
"""

from __future__ import annotations

import sys

from mutants import Mutant, main

KERNELS = "tinyllm/backends/cpu_kernels/"
DIGITS, DOT = KERNELS + "digits.py", KERNELS + "integer_dot.py"
PRODUCTS, MATRIX_UNIT = KERNELS + "integer_linear.py", KERNELS + "integer_amx.py"
ON_AMX, SOFTMAX = KERNELS + "attention_amx.py", KERNELS + "online_softmax.py"
FORMATS, TILES, ATTENTION = KERNELS + "formats.py", KERNELS + "attention_tiles.py", KERNELS + "attention.py"
INT8, VECTORS, CACHE = (f"{KERNELS}{name}.py" for name in ("attention_int8", "int8_vectors", "kv_cache"))
LINEAR_OP, PROGRAM, BACKEND = (f"tinyllm/backends/{name}.py" for name in ("cpu_linear", "cpu_program", "cpu"))

INTEGERS = ("tests/kernels/test_integer_linear.py",)
LINEAR = ("tests/kernels/test_linear.py",)
PROGRAMS = ("tests/kernels/test_program.py",)
PAGED = ("tests/kernels/test_attention.py",)

MUTANTS = (
    Mutant("digits: the exponent is one too small", DIGITS, "b.add(top, _i32(0x20000))", "top", INTEGERS),
    Mutant("digits: infinities are converted", DIGITS, "_i32(0x7F800000)", "_i32(0x7F900000)", INTEGERS),
    Mutant(
        "digits: a low digit is not taken from the rest",
        DIGITS,
        "return upper, [b.sub(X, b.shl(high, shift))",
        "return upper, [b.sub(X, b.shl(X, shift))",
        INTEGERS,
    ),
    Mutant(
        "digits: first sums of the wrong sign", DIGITS, "b.sub(_i32(0), b.trunc", "b.add(_i32(0), b.trunc", INTEGERS
    ),
    Mutant(
        "digits: a row's blocks run into the next row",
        DIGITS,
        "record = out + tile * tile_stride + t * row_stride",
        "record = out + tile * tile_stride + t * step_stride",
        INTEGERS,
    ),
    Mutant("bytes: the eighth bit is left out with AVX2", DOT, "    if bits == 8:\n", "    if bits == 9:\n", INTEGERS),
    Mutant("bytes: activations are unsigned", DOT, "b.ashr(b.shl(x,", "b.lshr(b.shl(x,", INTEGERS),
    Mutant(
        "products: the second digit counts as the first",
        PRODUCTS,
        "[b.shl(total, const_vec(V32, 8)) for",
        "[total for",
        LINEAR,
    ),
    Mutant(
        "products: without the minimum",
        PRODUCTS,
        "    if minimum is not None:\n        acc",
        "    if False:\n        acc",
        LINEAR,
    ),
    Mutant(
        "products: sums begin at zero", PRODUCTS, "    if form.offset == 0:\n", "    if form.offset >= 0:\n", LINEAR
    ),
    Mutant(
        "products: a tile's last rows are left out",
        PRODUCTS,
        "n, at = min(MANY_TILE, last - row), out",
        "n, at = min(MANY_TILE - 1, last - row), out",
        LINEAR,
    ),
    Mutant(
        "products: a block of rows begins a tile late",
        PRODUCTS,
        "first, group = task // groups * block_rows, task % groups",
        "first, group = task // groups * (block_rows + 8), task % groups",
        INTEGERS,
    ),
    Mutant(
        "matrix unit: the second tile of a pair is the first",
        MATRIX_UNIT,
        "rows = [x, b.add(x, x_stride)]",
        "rows = [x, x]",
        LINEAR,
    ),
    Mutant(
        "matrix unit: sums do not begin at zero",
        MATRIX_UNIT,
        "store(results + 64 * t, zeros())",
        "store(sums, zeros())",
        LINEAR,
    ),
    Mutant("matrix unit: the tile is not cleared", MATRIX_UNIT, "                emit_tile_zero(b, C)\n", "", LINEAR),
    Mutant(
        "matrix unit: a row too few",
        MATRIX_UNIT,
        "n = min(TILE_ROWS, last - at)",
        "n = min(TILE_ROWS - 1, last - at)",
        LINEAR,
    ),
    Mutant(
        "matrix unit: codes times 16 for both digits",
        MATRIX_UNIT,
        "64, (0, 64), (4, 0))",
        "64, (0, 64), (4, 4))",
        LINEAR,
    ),
    Mutant(
        "matrix unit: the last chunk is as long as the others",
        MATRIX_UNIT,
        "n = min(chunk, steps - step)",
        "n = chunk",
        LINEAR,
    ),
    Mutant(
        "matrix unit: the next group's codes",
        MATRIX_UNIT,
        "part_codes = codes + g * codes_nbytes",
        "part_codes = codes + min(g + 1, n_groups - 1) * codes_nbytes",
        INTEGERS,
    ),
    Mutant("digits: the first of four overflows", DIGITS, "bias=8)", "bias=0)", INTEGERS),
    Mutant(
        "formats: a fifth bit of the neighbour",
        FORMATS,
        "_bits(b, bits, k, 15), spread",
        "_bits(b, bits, k ^ 4, 15), spread",
        LINEAR,
    ),
    Mutant("linear: digits of another offset are kept", LINEAR_OP, "holds != way.made:\n", "holds is None:\n", LINEAR),
    Mutant("linear: what is near the output is rounded", LINEAR_OP, " and not near_output", "", INTEGERS),
    Mutant(
        "programs: a step is recorded at once",
        PROGRAM,
        "        if known is not table:\n            step()\n",
        "        if False:\n            step()\n",
        PROGRAMS,
    ),
    Mutant("programs: whatever its buffers", PROGRAM, "if known is not table:", "if known is None:", PROGRAMS),
    Mutant("programs: kept when scratch moves", PROGRAM, "            self._seen.clear()\n", "", PROGRAMS),
    Mutant(
        "programs: recorded once though scratch moves",
        BACKEND,
        "if self._scratch_generation == generation:",
        "if True:",
        PROGRAMS,
    ),
    Mutant(
        "programs: recording goes on after an error",
        BACKEND,
        "            finally:\n                self._program = None",
        "            finally:\n                pass",
        PROGRAMS,
    ),
    Mutant(
        "programs: block tables stay as they were",
        PROGRAM,
        '        buffers["block_tables"][:, :columns] = batch.block_tables\n',
        "",
        PROGRAMS,
    ),
    Mutant(
        "attention: the second sixteen keys are the first",
        TILES,
        "tiles = [keys, more_keys]",
        "tiles = [keys, keys]",
        PAGED,
    ),
    Mutant(
        "attention: values of the first block alone",
        TILES,
        "number = b.sext(emit_load(b, b.add(table, b.mul(block, const(4))), I32), I64)",
        "number = b.sext(emit_load(b, table, I32), I64)",
        PAGED,
    ),
    Mutant(
        "attention: all rows see what one sees",
        ATTENTION,
        "shared_end = min(end, lowest_position + 1)",
        "shared_end = end",
        PAGED,
    ),
    Mutant(
        "attention: a row's last keys are left out",
        ATTENTION,
        "                        if shared_end < row_end:\n",
        "                        if shared_end > row_end:\n",
        PAGED,
    ),
    Mutant(
        "attention in int8: unseen values are multiplied",
        INT8,
        "probs = _keep(load(row + 4 * at) * scales, first - key, end - key)",
        "probs = load(row + 4 * at) * scales",
        PAGED,
    ),
    Mutant(
        "attention in int8: sums of keys begin at zero", INT8, "[b.add(x, first) for x, first", "[x for x, first", PAGED
    ),
    Mutant(
        "attention in int8: the digits of the row before",
        INT8,
        "_ROW * r + TILE_KEYS * digit, align=4",
        "_ROW * max(r - 1, 0) + TILE_KEYS * digit, align=4",
        PAGED,
    ),
    Mutant(
        "attention in int8: a value of the largest overflows its digits",
        KERNELS + "attention_digits.py",
        "_i32(254 + 21)",
        "_i32(254 + 23)",
        PAGED,
    ),
    Mutant(
        "int8: scales have all their bits",
        VECTORS,
        "b.and_(b.add(quotient, _i32(SCALE_DROPPED)), _i32(~SCALE_DROPPED))",
        "quotient",
        PAGED,
    ),
    Mutant(
        "int8: scales may overflow",
        VECTORS,
        'b.fcmp_ordered("<", rounded, _f32(LARGEST_SCALE))',
        "ir.Constant(ir.IntType(1), 1)",
        PAGED,
    ),
    Mutant(
        "int8: keys of a tile share a scale", CACHE, "16 * words + 4 * (offset % 16), scale", "16 * words, scale", PAGED
    ),
    Mutant(
        "attention on AMX: no row is computed apart",
        ON_AMX,
        "together = lowest_key(last_position, window, sinks) <= first and end <= position + 1",
        "together = True",
        PAGED,
    ),
    Mutant(
        "attention on AMX: values that no row sees stay",
        ON_AMX,
        "b.and_(emit_load(b, b.add(source, at), V32), kept)",
        "emit_load(b, b.add(source, at), V32)",
        PAGED,
    ),
    Mutant(
        "attention on AMX: infinity in an odd key counts as a number",
        ON_AMX,
        "(upper, 0x7F800000), (lower, 0x7F80)",
        "(lower, 0x7F80), (lower, 0x7F80)",
        PAGED,
    ),
    Mutant(
        "attention on AMX: rows that see nothing keep the probabilities before",
        ON_AMX,
        "store(all_scores + r * _SCORES + 64, zeros())",
        "pass",
        PAGED,
    ),
    Mutant(
        "attention on AMX: queries of a tile's second step in the first's place",
        ON_AMX,
        "AMX_ROWS * 2 * d, load(",
        "AMX_ROWS * 0 * d, load(",
        PAGED,
    ),
    Mutant(
        "softmax: the sum is not moved with the maximum",
        SOFTMAX,
        "store(state + 64, load(state + 64) * keep)",
        "pass",
        PAGED,
    ),
    Mutant(
        "softmax in bfloat16: capped scores are scaled again",
        ON_AMX,
        "scale if cap <= 0.0 else np.float32(1.0)",
        "scale",
        PAGED,
    ),
    Mutant(
        "pairs: an odd key lies where the even one does",
        CACHE,
        "_put_every_other(source + 4 * d, target + 4 * d, offset % 2)",
        "_put_every_other(source + 4 * d, target + 4 * d, 0)",
        PAGED,
    ),
    Mutant(
        "pairs: a key overwrites its neighbour",
        CACHE,
        "kept = b.bitcast(b.shl(const_vec(V32, 0xFFFF), shift), kind)",
        "kept = b.bitcast(const_vec(V32, -1), kind)",
        PAGED,
    ),
)

if __name__ == "__main__":
    sys.exit(main(mutants=MUTANTS))
