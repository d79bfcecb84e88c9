"""Global memory that attention moves: kernels that keep the scores in memory, and tiles that keep them on the chip.

    python scripts/attention_traffic.py --lengths 128 256 512 1024 2048

Counts the bytes that causal self-attention of one head reads and writes, as figure 2 of FlashAttention
(arXiv:2205.14135) does, by running the compiled kernels on the emulator, which counts what every thread asks for:

    naive        cuda_kernels/naive_attention.py: S = Q K^T, softmax(S), P V, all float32
    tiled f32    cuda_kernels/paged_attention_f32.py, prefill form, float32 cache
    tiled bf16   cuda_kernels/paged_attention_mma.py, prefill form, bfloat16 cache (queries and output are float32)

and puts the counts beside the formulas of the kernels' own loops: for the two float32 forms they agree to the byte. The
results of the three are compared with each other. Needs no GPU. Writes OUTPUT.json, OUTPUT.png and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measurement import notice, positive_int, prepare_output, run_script, save_figure, write_json
from numpy.typing import NDArray

from cuda_kernels.attention_f32_tiles import THREADS, TileShape
from cuda_kernels.attention_inputs import AttentionInputs
from cuda_kernels.compile import Compiler
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.emulator import Checks
from cuda_kernels.naive_attention import naive_attention, naive_attention_nbytes, scores_shape
from cuda_kernels.paged_attention_f32 import paged_attention_f32
from cuda_kernels.paged_attention_mma import paged_attention_mma
from cuda_kernels.paged_cache import PagedLayer
from tinyllm.cache import cache_root

BLOCK_SIZE = 16
COLOURS = {"naive": "#D55E00", "tiled f32": "#0072B2", "tiled bf16": "#009E73"}
MIB = 2.0**20

F32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one run.

    Attributes:
        counted: what the emulator counted, reads and writes.
        scores: of S and P, by the formula.
        operands: of Q, K, V, the output and its log-sum-exp, by the formula.
        indices: of block tables and sequence bounds: what else is counted.
    """

    counted: int
    scores: int
    operands: int

    @property
    def indices(self) -> int:
        return self.counted - self.scores - self.operands

    def facts(self) -> dict[str, int]:
        return {**asdict(self), "indices": self.indices}


def tiled_operand_nbytes(num_tokens: int, head_dim: int, rows: int, cache_itemsize: int) -> int:
    """Q once, K and V once for each tile of rows that sees them, the output and lse once: one head, causal."""
    keys = sum(min(first + rows, num_tokens) for first in range(0, num_tokens, rows))
    return num_tokens * (2 * head_dim + 1) * 4 + 2 * keys * head_dim * cache_itemsize


def tiled_f32_index_nbytes(num_tokens: int, rows: int) -> int:
    """What paged_attention_f32 reads of bounds (3 numbers a thread) and block tables (8 threads for each key)."""
    firsts = range(0, num_tokens, rows)
    return sum(3 * 4 * THREADS + 8 * 4 * min(first + rows, num_tokens) for first in firsts)


def counted_nbytes(rt: EmulatedRuntime) -> int:
    return sum(total.global_read_nbytes + total.global_written_nbytes for total in rt.totals.values())


def run_naive(rt: EmulatedRuntime, q: F32Array, k: F32Array, v: F32Array) -> tuple[F32Array, Traffic]:
    """q, k, v (1, T, D) -> out (T, D)"""
    _, T, D = q.shape
    scores, out = rt.empty(scores_shape(1, T), np.float32), rt.empty((1, T, D), np.float32)
    rt.totals.clear()
    naive_attention(rt, *map(rt.from_host, (q, k, v)), scores, out, scale=D**-0.5)
    return rt.download(out)[0], Traffic(counted_nbytes(rt), *naive_attention_nbytes(1, T, D))


def run_tiled(rt: EmulatedRuntime, dtype: str, q: F32Array, k: F32Array, v: F32Array) -> tuple[F32Array, Traffic]:
    """The same through the paged cache, blocks shuffled. bf16: k and v are what bfloat16 holds exactly."""
    _, T, D = q.shape
    num_blocks = -(-T // BLOCK_SIZE)
    table = np.random.default_rng(T).permutation(num_blocks).astype(np.int32)

    def cached(x: F32Array) -> Any:
        stored = x[0] if dtype == "f32" else (x[0].view(np.uint32) >> 16).astype(np.uint16)
        blocks = np.zeros((num_blocks, 1, BLOCK_SIZE, D), stored.dtype)
        at = np.arange(T)
        blocks[table[at // BLOCK_SIZE], 0, at % BLOCK_SIZE] = stored
        return rt.from_host(blocks)

    inputs = AttentionInputs(
        q=rt.from_host(np.ascontiguousarray(q.transpose(1, 0, 2))),
        layer=PagedLayer(dtype, cached(k), cached(v)),
        cu_seqlens_q=rt.from_host(np.array([0, T], np.int32)),
        seq_lens=rt.from_host(np.array([T], np.int32)),
        block_tables=rt.from_host(table[None]),
        scale=D**-0.5,
        out=rt.empty((T, 1, D), np.float32),
        lse=rt.empty((T, 1), np.float32),
        max_query_len=T,
        max_seq_len=T,
        scratch=rt.empty(4, np.float32),
    )
    rt.totals.clear()
    if dtype == "f32":
        paged_attention_f32(rt, inputs, query_limit=0)
        rows, itemsize = TileShape(D, decode=False).rows, 4
    else:
        paged_attention_mma(rt, inputs, query_limit=0)
        rows, itemsize = 64, 2
    return rt.download(inputs.out)[:, 0], Traffic(counted_nbytes(rt), 0, tiled_operand_nbytes(T, D, rows, itemsize))


def measure(rt: EmulatedRuntime, num_tokens: int, head_dim: int) -> tuple[dict[str, Traffic], float]:
    """Traffic by name, and the largest difference between two of the results."""
    rng = np.random.default_rng(num_tokens)
    q, k, v = (rng.standard_normal((1, num_tokens, head_dim)).astype(np.float32) for _ in range(3))
    k, v = ((x.view(np.uint32) & 0xFFFF0000).view(np.float32) for x in (k, v))  # exact in bfloat16 too
    results = {
        "naive": run_naive(rt, q, k, v),
        "tiled f32": run_tiled(rt, "f32", q, k, v),
        "tiled bf16": run_tiled(rt, "bf16", q, k, v),
    }
    outs = [out for out, _ in results.values()]
    difference = max(float(np.abs(out - outs[0]).max()) for out in outs)
    return {name: traffic for name, (_, traffic) in results.items()}, difference


def draw(runs: dict[int, dict[str, Traffic]], head_dim: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    lengths = list(runs)
    for name, colour in COLOURS.items():
        counted = [run[name].counted / MIB for run in runs.values()]
        curves.plot(lengths, counted, "o-", color=colour, linewidth=1.5, markersize=5, label=name)
    scores = [run["naive"].scores / MIB for run in runs.values()]
    curves.plot(lengths, scores, ":", color=COLOURS["naive"], linewidth=1.2, label="naive: S and P alone, formula")
    curves.set_xscale("log", base=2)
    curves.set_yscale("log")
    curves.set_xticks(lengths, [f"{n:,}" for n in lengths])
    curves.yaxis.set_major_formatter("{x:g}")
    curves.set_xlabel("sequence length T (tokens)")
    curves.set_ylabel("global memory read and written (MiB)")
    curves.grid(which="both", linewidth=0.3, color="#bbbbbb")
    curves.legend(frameon=False, fontsize=9)
    longest = runs[lengths[-1]]
    below = np.zeros(len(COLOURS))
    parts = (("operands", "Q, K, V, O", "#56B4E9"), ("scores", "S and P", "#D55E00"), ("indices", "indices", "#999999"))
    for part, label, colour in parts:
        heights = np.array([getattr(longest[name], part) / MIB for name in COLOURS])
        bars.bar(list(COLOURS), heights, bottom=below, color=colour, width=0.6, label=label)
        below += heights
    for x, total in enumerate(below):
        bars.annotate(f"{total:.1f}", (x, total), ha="center", va="bottom", fontsize=9)
    bars.set_title(f"T = {lengths[-1]:,}", fontsize=10)
    bars.set_ylabel("MiB")
    bars.set_ylim(0, 1.08 * below.max())
    bars.legend(frameon=False, fontsize=9)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Causal attention, one head of {head_dim}: bytes that the kernels ask of global memory", fontsize=11
    )
    return figure


def document(runs: dict[int, dict[str, Traffic]], differences: dict[int, float], head_dim: int, name: str) -> str:
    """The page, in Markdown."""
    table = [
        "| T | naive | of it S and P | tiled f32 | tiled bf16 | naive / f32 | naive / bf16 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, run in runs.items():
        naive, f32, bf16 = (run[form] for form in COLOURS)
        sizes = (naive.counted, naive.scores, f32.counted, bf16.counted)
        cells = [f"{size / MIB:.2f} MiB" for size in sizes]
        cells += [f"{naive.counted / tiled.counted:.2f}" for tiled in (f32, bf16)]
        table.append(f"| {length:,} | {' | '.join(cells)} |")
    longest = max(runs)
    f32_factor, bf16_factor = (
        runs[longest]["naive"].counted / runs[longest][form].counted for form in ("tiled f32", "tiled bf16")
    )
    paragraphs = [
        f"Causal self-attention of one head of {head_dim}: bytes that the kernels' threads ask of global memory, "
        "counted by the emulator that runs their compiled PTX. It is the count of figure 2 of FlashAttention "
        "(arXiv:2205.14135), for these kernels and before any cache: what a GPU moves between its memory and its "
        "chip is less as far as the L2 cache holds what is read again.",
        f"At {longest:,} tokens the tiled kernels ask for {f32_factor:.1f} (float32 cache) and {bf16_factor:.1f} "
        "(bfloat16 cache) times fewer bytes than the naive ones.",
        "By the kernels' loops, for T tokens (a multiple of 64; the code has the exact form), head size D, tiles of 64 "
        "rows and n = T / 64:",
        "- naive: S written and read, P written and read, in tiles up to the diagonal: 4 x 4 x 64^2 x n (n + 1) / 2 "
        "bytes; Q and K again for each tile of S, V again for each 64 rows: 3 x 4 x 64 D x n (n + 1) / 2; O: 4 T D.",
        "- tiled: K and V again for each 64 rows: 2 x itemsize x 64 D x n (n + 1) / 2; Q and O once, 8 T D, and the "
        "log-sum-exp. No S and no P. Block tables and bounds come on top, in the float32 form 32 bytes for each key "
        "and tile.",
        "For the two float32 forms the exact formulas equal the counts to the byte, which a test holds them to. Both "
        "sides load Q, K and V for tiles of 64 rows; what the tiled kernels save is S and P, and Q again for each "
        "tile. Where G query heads share a KV head, the tiled kernels load its keys and values once for all of them: "
        "K and V are divided by G.",
        f"The results agree to {max(differences.values()):.1e} (the bfloat16 form rounds Q and P to 8 bits).",
        f"Made by `python scripts/attention_traffic.py`; the numbers are in [{name}.json]({name}.json).",
    ]
    text = [
        textwrap.fill(one, 118, subsequent_indent="  " if one[0] == "-" else "", break_on_hyphens=False)
        for one in paragraphs
    ]
    picture = f"![bytes over sequence length]({name}.png)"
    page = "\n\n".join(["# Memory traffic of attention", text[0], picture, "\n".join(table), *text[1:]])
    return page.replace("\n\n- tiled", "\n- tiled") + "\n"  # one list


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [128, 256, 512, 1024, 2048]
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=lengths, metavar="T", help="of the sequence")
    parser.add_argument("--head-dim", type=positive_int, default=64, choices=(32, 64, 128), help="(64)")
    parser.add_argument("-o", "--output", default="docs/attention_traffic", help="without suffix (%(default)s)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    output = prepare_output(args.output, plots=True)
    runs, differences = {}, {}
    for length in sorted(set(args.lengths)):
        notice(f"{length} tokens ...")
        rt = EmulatedRuntime(Compiler(Path(cache_root()) / "cuda"), checks=Checks(races=False, uninitialised=False))
        runs[length], differences[length] = measure(rt, length, args.head_dim)
    print(f"{'tokens':>8}" + "".join(f"{name:>16}" for name in COLOURS))
    for length, run in runs.items():
        print(f"{length:8,}" + "".join(f"{run[name].counted / MIB:12.2f} MiB" for name in COLOURS))
    write_json(
        output.with_name(f"{output.name}.json"),
        {
            "what": "bytes of global memory that causal attention of one head reads and writes, as counted",
            "head_dim": args.head_dim,
            "traffic": {
                str(length): {name: traffic.facts() for name, traffic in run.items()} for length, run in runs.items()
            },
            "largest_difference_of_results": max(differences.values()),
        },
    )
    save_figure(draw(runs, args.head_dim), output.with_name(f"{output.name}.png"))
    output.with_name(f"{output.name}.md").write_text(document(runs, differences, args.head_dim, output.name))


if __name__ == "__main__":
    run_script(main)
