"""Checks and timings of linear layers and embeddings in every storage format, against float64 and cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.roofline import TileWork
from gpu_checks.suite import Check, Context, Outcome, Prepared, Timing, bf16_bits, bf16_values, differing, larger
from weights.quants import FORMATS, dequantize

__all__ = ["checks", "timings"]

DENSE = ("f32", "f16", "bf16")
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
ROUNDOFF = {"f32": 2.0**-24, "bf16": 2.0**-8}  # else float16's, 2 ** -11
F16_FIELDS = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # else at 0


def random_matrix(context: Context, form: str, rows: int, columns: int) -> NDArray[Any]:
    """What pack_matrix takes: float32 values, or the bytes of random blocks with scales of ordinary size."""
    if form in DENSE:
        return context.normal(rows, columns, deviation=0.5)
    fmt = FORMATS[form]
    row_nbytes = fmt.nbytes(columns)
    blocks = context.rng.integers(0, 256, (min(rows * row_nbytes // fmt.block_nbytes, 1 << 16), fmt.block_nbytes))
    stored = blocks.astype(np.uint8)
    for at in F16_FIELDS.get(form, (0,)):
        scales = context.rng.uniform(-0.02, 0.02, len(stored)).astype("<f2")
        stored[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return np.resize(stored.reshape(-1), (rows, row_nbytes))


def exact_matrix(form: str, source: NDArray[Any], columns: int) -> NDArray[np.float64]:
    """The values that a matrix stands for, (rows, columns)."""
    if form == "f16":
        source = source.astype(np.float16)
    elif form == "bf16":
        source = bf16_values(bf16_bits(source))
    elif form in QUANTISED:
        source = dequantize(source.reshape(-1), form, (len(source), columns))
    return source.astype(np.float64)


def _check_linear(form: str) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        from cuda_kernels.linear import linear, linear_scratch_nbytes
        from cuda_kernels.matrix import pack_matrix

        shapes: Sequence[tuple[int, int, int]] = ((3, 33, 256),)
        if not context.small:
            shapes = ((1, 576, 768), (8, 100, 256), (17, 65, 1536), (130, 257, 2048))
        error, roundoff = 0.0, ROUNDOFF.get(form, 2.0**-11)
        for T, rows, columns in shapes:
            source = random_matrix(context, form, rows, columns)
            matrix = pack_matrix(context.rt, form, source, rows, columns)
            x, bias, out = context.normal(T, columns), context.normal(rows), context.poisoned(T, rows)
            scratch = context.rt.empty(linear_scratch_nbytes(T, columns), np.uint8)
            linear(context.rt, context.put(x), matrix, context.put(bias), out, scratch)
            values = exact_matrix(form, source, columns)
            magnitude = np.abs(x.astype(np.float64)) @ np.abs(values).T + np.abs(bias)
            # An f16 form of a quantised weight is rounded once or twice, and so is the input.
            bound = (4 * roundoff if form != "f32" else 0.0) + columns * 2.0**-24
            difference = np.abs(context.rt.download(out) - (x @ values.T + bias))
            error = larger(error, float((difference / (bound * magnitude)).max()))
        return Outcome(error, 1.0)

    return run


def _check_same_bits(form: str) -> Callable[[Context], Outcome]:
    """A row's result does not depend on how many rows there are."""

    def run(context: Context) -> Outcome:
        from cuda_kernels.linear import linear, linear_scratch_nbytes
        from cuda_kernels.matrix import pack_matrix

        T, rows, columns = (17, 16, 256) if context.small else (1000, 576, 1536)
        matrix = pack_matrix(context.rt, form, random_matrix(context, form, rows, columns), rows, columns)
        x = context.put(context.normal(T, columns))
        scratch = context.rt.empty(linear_scratch_nbytes(T, columns), np.uint8)
        all_rows = context.poisoned(T, rows)
        linear(context.rt, x, matrix, None, all_rows, scratch)
        expected = context.rt.download(all_rows)
        differences = 0.0
        for count in (1, 8) if context.small else (1, 2, 8, 9, 16, 17, 63, 64, 65, 129, 500):
            start = min(3, T - count)
            out = context.poisoned(count, rows)
            linear(context.rt, x[start : start + count], matrix, None, out, scratch)
            differences += differing(context.rt.download(out), expected[start : start + count]).error
        return Outcome(differences, 0.0)

    return run


def _check_embedding(form: str) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        from cuda_kernels.embedding import embedding
        from cuda_kernels.matrix import pack_matrix

        rows, columns = 37, 512
        source = random_matrix(context, form, rows, columns)
        matrix = pack_matrix(context.rt, form, source, rows, columns)
        ids = context.rng.integers(0, rows, 9).astype(np.int32)
        out = context.poisoned(9, columns)
        embedding(context.rt, context.put(ids), matrix, out)
        return differing(context.rt.download(out), exact_matrix(form, source, columns).astype(np.float32)[ids])

    return run


def checks() -> list[Check]:
    forms = DENSE + QUANTISED
    return [
        *(Check("linear", f"{form} against float64", _check_linear(form)) for form in forms),
        *(Check("linear", f"{form}: T = 1 and T = 1000, same bits", _check_same_bits(form)) for form in forms),
        *(Check("embedding", f"{form}: exact rows", _check_embedding(form)) for form in forms),
    ]


# ---- timings


def _cublas(dtype: str, T: int, rows: int, columns: int, rotations: int) -> Callable[[], Sequence[Callable[[], Any]]]:
    def make() -> Sequence[Callable[[], Any]]:
        import torch

        kind = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[dtype]
        x = torch.randn(T, columns, device="cuda").to(kind)
        matrices = [torch.randn(rows, columns, device="cuda").to(kind) for _ in range(rotations)]
        out = torch.empty(T, rows, device="cuda", dtype=kind)
        return [lambda w=w: torch.matmul(x, w.T, out=out) for w in matrices]

    return make


def _copies(context: Context, form: str, rows: int, columns: int, count: int) -> list[Any]:
    """So many matrices alike: packed once, copied on the device."""
    from cuda_kernels.matrix import pack_matrix

    rt = context.rt
    first = pack_matrix(rt, form, random_matrix(context, form, rows, columns), rows, columns)
    rt.synchronize()

    def copy(array: Any) -> Any:
        result = rt.empty(array.shape, array.dtype)
        result[...] = array
        return result

    arrays = {f.name: value for f in fields(first) if hasattr(value := getattr(first, f.name), "dtype")}
    others = [replace(first, **{name: copy(array) for name, array in arrays.items()}) for _ in range(count - 1)]
    if hasattr(rt.xp, "cuda"):
        rt.xp.cuda.Device().synchronize()
    return [first, *others]


def _time(form: str, T: int, rows: int, columns: int) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        from cuda_kernels.linear import linear, linear_scratch_nbytes
        from cuda_kernels.matrix import matrix_nbytes

        rt = context.rt
        weight_nbytes = matrix_nbytes(form, rows, columns)
        rotations = min(context.rotations(weight_nbytes), 8)
        matrices = context.keep(form, lambda: _copies(context, form, rows, columns, rotations))
        x, out = context.put(context.normal(T, columns)), rt.empty((T, rows), np.float32)
        scratch = rt.empty(linear_scratch_nbytes(T, columns), np.uint8)
        rival = form if form in DENSE else "f16"
        return Prepared(
            [lambda m=m: linear(rt, x, m, None, out, scratch) for m in matrices],
            TileWork(2.0 * T * rows * columns, weight_nbytes + 4 * T * (rows + columns), tensor=form != "f32"),
            {f"cuBLAS {rival}": _cublas(rival, T, rows, columns, rotations)},
        )

    return prepare


def timings() -> list[Timing]:
    rows, columns = 14336, 4096
    tokens = {"bf16": (1, 8, 16, 64, 512, 2048), "f16": (1, 2048), "Q4_0": (1, 8, 64, 2048), "Q8_0": (1, 2048)}
    tokens |= {"Q4_K": (1, 2048), "Q6_K": (1, 2048), "Q4_1": (1,), "Q5_K": (1,), "f32": (1, 512)}
    quick = {("bf16", 1), ("bf16", 2048), ("Q4_0", 1), ("Q4_K", 1)}
    return [
        Timing("linear", f"{form} {columns} -> {rows} T={T}", _time(form, T, rows, columns), (form, T) in quick)
        for form, counts in tokens.items()
        for T in counts
    ]
