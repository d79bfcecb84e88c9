"""Holds the main loop of the tensor-core prefill against the same algorithm in CUDA C++, compiled by nvcc.

    python scripts/cuda_twin/compare.py            head sizes 64, 80, 96 and 128, f16 and bf16, for sm_90a

Needs nvcc with a C++ compiler for it, and no GPU: pip install 'tinyllm[cuda]' brings nvcc.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_kernels.compile import Compiler, find_tool
from cuda_kernels.errors import CudaKernelError, KernelCompileError
from cuda_kernels.paged_attention_mma import attention_kernel
from cuda_kernels.sass import CodeStatistics, disassemble, measure, statistics
from tinyllm.cache import cache_root

SOURCE = Path(__file__).with_name("paged_prefill.cu")
HEAD_DIMS = (64, 80, 96, 128)


@dataclass(frozen=True)
class Comparison:
    """One head size and dtype."""

    dtype: str
    head_dim: int
    ours: CodeStatistics
    theirs: CodeStatistics

    @property
    def ratio(self) -> float:
        """Instructions of our main loop to those of nvcc's."""
        assert self.ours.main_loop is not None and self.theirs.main_loop is not None
        return self.ours.main_loop.num_instructions / self.theirs.main_loop.num_instructions


def compile_twin(dtype: str, head_dim: int, architecture: str) -> CodeStatistics:
    """What nvcc makes of the twin. Raises KernelCompileError, ToolMissingError."""
    nvcc = find_tool("nvcc")
    flags = ["-O3", "-std=c++17", "-fmad=false", f"-arch={architecture}", f"-DHEAD_DIM={head_dim}", "-Xptxas", "-v"]
    flags += ["-DBF16"] if dtype == "bf16" else []
    include = nvcc.parents[1] / "include"  # of the pip packages, where nvcc does not look by itself
    flags += [f"-I{include}"] if include.is_dir() else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "twin.cubin")
        command = [str(nvcc), "-cubin", *flags, str(SOURCE), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KernelCompileError(f"nvcc: {' '.join((done.stderr or done.stdout).split())[:400]}")
        return statistics("paged_prefill", done.stderr + done.stdout, disassemble(result.read_bytes()))


def compare(dtype: str, head_dim: int, architecture: str, compiler: Compiler) -> Comparison:
    """Both sides, compiled. Raises CudaKernelError."""
    kernel = attention_kernel(dtype, head_dim, partial=False, softcap=False, streams=False)
    ours = measure(compiler.ptx(kernel), kernel.name, architecture)
    return Comparison(dtype, head_dim, ours, compile_twin(dtype, head_dim, architecture))


def _print(comparisons: Sequence[Comparison]) -> None:
    print("dtype  D    main loop: numba  nvcc  ratio   HMMA  registers   where they differ most (numba - nvcc)")
    for one in comparisons:
        ours, theirs = one.ours.main_loop, one.theirs.main_loop
        assert ours is not None and theirs is not None
        names = set(ours.opcodes) | set(theirs.opcodes)
        gaps = {name: ours.opcodes.get(name, 0) - theirs.opcodes.get(name, 0) for name in names}
        most = sorted((name for name in gaps if gaps[name]), key=lambda name: -abs(gaps[name]))[:6]
        print(
            f"{one.dtype:5} {one.head_dim:3} {ours.num_instructions:16} {theirs.num_instructions:5} {one.ratio:7.3f}"
            f" {ours.opcodes.get('HMMA', 0):3}/{theirs.opcodes.get('HMMA', 0):3}"
            f" {one.ours.registers:5}/{one.theirs.registers:3}   {' '.join(f'{n} {gaps[n]:+}' for n in most)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_90a", help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=cache_root() / "cuda", help="compiled kernels (%(default)s)")
    options = parser.parse_args()
    compiler = Compiler(options.cache)
    _print([compare(dtype, d, options.architecture, compiler) for dtype in ("bf16", "f16") for d in HEAD_DIMS])


if __name__ == "__main__":
    try:
        main()
    except CudaKernelError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
