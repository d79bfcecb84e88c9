"""Matrices for the linear tests, and numpy models of what their kernels compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.linear import linear, linear_scratch_nbytes
from cuda_kernels.linear_forms import FORMS
from cuda_kernels.matrix import Matrix, pack_matrix
from tests.kernels.kernel_cases import oracle_values, random_tensor, rounded

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass
class Case:
    """A packed matrix, and its values as the gguf package decodes them."""

    runtime: EmulatedRuntime
    matrix: Matrix
    values: F32
    blocks: NDArray[np.uint8]

    @staticmethod
    def random(runtime: EmulatedRuntime, rng: np.random.Generator, form: str, rows: int, columns: int) -> Case:
        quantised = FORMS[form].quantised
        tensor = random_tensor(rng, form if quantised else form.upper(), (rows, columns))
        values = np.ascontiguousarray(oracle_values(tensor))
        blocks = tensor.data.reshape(rows, -1)
        source = blocks if quantised else values
        return Case(runtime, pack_matrix(runtime, form, source, rows, columns), values, blocks)

    def run(self, x: F32, bias: F32 | None = None) -> F32:
        rt = self.runtime
        out = rt.empty((len(x), self.matrix.rows), np.float32)
        scratch = rt.empty(linear_scratch_nbytes(*x.shape), np.uint8)
        linear(rt, rt.from_host(x), self.matrix, None if bias is None else rt.from_host(bias), out, scratch)
        result: F32 = rt.download(out)
        return result

    def model(self, x: F32) -> tuple[F64, F64]:
        """(what the kernels make of x without any rounding of sums, the bound of that rounding), both (T, out).

        A sum over K goes through K / 16 rounded accumulations or fewer on tensor cores (K in plain float32), twice the
        slices,
        and a few more, each off by at most half a unit of the sum of magnitudes. That is, of products of x with the
        largest
        magnitude of a block's stored parts: where a minimum is added, value and minimum may cancel.
        """
        form = FORMS[self.matrix.form]
        weights, inputs = self.values.astype(np.float64), x.astype(np.float64)
        if form.name == "bf16":
            inputs = rounded(x, "bf16").astype(np.float64)
        elif form.name != "f32":
            inputs = f16_of_rows(x)
        if form.name == "Q6_K":
            weights = self._q6_k_weights()
        magnitudes = np.abs(weights)
        if form.minima:
            largest = magnitudes.reshape(len(weights), -1, 32).max(-1, keepdims=True)
            magnitudes = np.repeat(4 * largest, 32, axis=-1).reshape(weights.shape)
        columns = self.matrix.columns
        steps = columns if form.name == "f32" else columns / 16 + columns / 32 * (form.scaling == "block")
        rounding = (steps + 2 * columns / 256 + 8) * 2.0**-24
        return inputs @ weights.T, rounding * (np.abs(inputs) @ magnitudes.T)

    def _q6_k_weights(self) -> F64:
        """d * float16(scale * (q - 32))"""
        blocks = self.blocks.reshape(self.matrix.rows, -1, 210)
        d = blocks[:, :, 208:].copy().view(np.float16).astype(np.float64)
        integers = np.rint(self.values.reshape(self.matrix.rows, -1, 256) / d)
        return (d * integers.astype(np.float16).astype(np.float64)).reshape(self.values.shape)


def f16_of_rows(x: F32) -> F64:
    """Each row rounded to float16 after scaling by the power of two that brings its largest magnitude into [512,
    1024)."""
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 512.0)))
    scale = np.exp2(9 - exponent)
    return (x.astype(np.float64) * scale).astype(np.float32).astype(np.float16).astype(np.float64) / scale
