"""Memory and time of dense attention and its gradients on a CPU, in tiles and with all scores in memory.

    python scripts/flash_attention.py

Causal self-attention of one sequence, 4 query heads over 2 key heads of size 64, float32:

    tiles   the CPU backend's flash_attention and flash_attention_backward
    naive   numpy, its products by BLAS: a matrix of scores for each head, made into probabilities in place and kept
            for the gradients, which make a second one

The two take turns; times are medians. Memory is the peak of what numpy allocates meanwhile, scratch and results
included, inputs not, as tracemalloc counts it. The results of the two are compared with each other.

Writes OUTPUT.json, OUTPUT.svg and OUTPUT.md.
"""

from __future__ import annotations

import os
import statistics
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from measurement import Parser, machine_facts, notice, positive_int, prepare_output, run_script, save_figure, write_json

from tinyllm.backends.base import F32Array
from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels.flash_attention import TILE, scratch_nbytes, transposed_nbytes

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
SCALE = HEAD_DIM**-0.5
COLOURS = {"naive": "#D55E00", "tiles": "#0072B2"}
MIB = 2.0**20

Arrays = tuple[F32Array, ...]


class Inputs(NamedTuple):
    """dout and q (1, T, H, D), k and v (1, T, KH, D)"""

    dout: F32Array
    q: F32Array
    k: F32Array
    v: F32Array


# ---- the two


def naive_forward(q: F32Array, k: F32Array, v: F32Array) -> tuple[F32Array, F32Array]:
    """q (1, T, H, D), k and v (1, T, KH, D) -> out (KH, G, T, D), probs (KH, G, T, T)"""
    q, k, v = by_head(q), by_head(k), by_head(v)
    probs = (q * np.float32(SCALE)) @ k.swapaxes(2, 3)
    positions = np.arange(q.shape[2])
    np.copyto(probs, -np.inf, where=positions > positions[:, None])
    probs -= probs.max(-1, keepdims=True)
    np.exp(probs, out=probs)
    probs /= probs.sum(-1, keepdims=True)
    return probs @ v, probs


def naive_backward(dout: F32Array, q: F32Array, k: F32Array, v: F32Array, out: F32Array, probs: F32Array) -> Arrays:
    """dq (KH, G, T, D), dk and dv (KH, T, D)"""
    dout, q, k, v = by_head(dout), by_head(q), by_head(k), by_head(v)
    dv = (probs.swapaxes(2, 3) @ dout).sum(1)
    dscores = dout @ v.swapaxes(2, 3)
    dscores -= (dout * out).sum(-1, keepdims=True)
    dscores *= probs
    dscores *= np.float32(SCALE)
    return dscores @ k, (dscores.swapaxes(2, 3) @ q).sum(1), dv


def by_head(x: F32Array) -> F32Array:
    """(1, T, heads, D) -> (KH, heads / KH, T, D), a view"""
    _, T, heads, D = x.shape
    return x.reshape(T, KV_HEADS, heads // KV_HEADS, D).transpose(1, 2, 0, 3)


def run_naive(inputs: Inputs) -> tuple[Arrays, float]:
    """out, dq, dk, dv, and when the forward pass was done."""
    out, probs = naive_forward(*inputs[1:])
    done = time.perf_counter()
    return (out, *naive_backward(*inputs, out, probs)), done


def run_tiles(backend: CpuBackend, inputs: Inputs) -> tuple[Arrays, float]:
    out, lse = backend.flash_attention(*inputs[1:], scale=SCALE)
    done = time.perf_counter()
    return (out, *backend.flash_attention_backward(*inputs, out, lse, scale=SCALE)), done


def random_inputs(length: int) -> Inputs:
    rng = np.random.default_rng(length)
    sizes = (HEADS, HEADS, KV_HEADS, KV_HEADS)
    return Inputs(*(rng.standard_normal((1, length, heads, HEAD_DIM), np.float32) for heads in sizes))


# ---- what is measured


@dataclass(frozen=True)
class Cost:
    """Of the forward pass, and of forward and backward together."""

    forward: float
    both: float

    def facts(self) -> list[float]:
        return [self.forward, self.both]


@dataclass(frozen=True)
class Measured:
    nbytes: Cost
    seconds: Cost


def tiles_nbytes(length: int, num_threads: int) -> Cost:
    """By the formula: results, transposed tiles, and each worker's scratch."""
    of_queries, of_keys = (4 * length * heads * HEAD_DIM for heads in (HEADS, KV_HEADS))
    of_rows = 4 * length * HEADS  # lse, delta
    transposed = KV_HEADS * -(-length // TILE) * transposed_nbytes(HEAD_DIM)
    workers = num_threads * scratch_nbytes(HEAD_DIM)
    forward = of_queries + of_rows + transposed + workers
    return Cost(forward, forward + of_queries + 2 * of_keys + of_rows + transposed)


def naive_nbytes(length: int) -> Cost:
    """By the formula, the matrices alone: one of probabilities for each head and the mask; two for each head."""
    return Cost((4 * HEADS + 1) * length**2, 8 * HEADS * length**2)


def peak_nbytes(work: Callable[[], Any]) -> int:
    """The most that numpy held during `work`, above what it held before."""
    tracemalloc.start()
    kept = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


def measure(length: int, num_threads: int, repeats: int, with_naive: bool) -> tuple[dict[str, Measured], float]:
    """Costs by name, and the largest difference of two results over the largest element."""
    inputs = random_inputs(length)
    backend = CpuBackend(num_threads)
    runs: dict[str, Callable[[], tuple[Arrays, float]]] = {"tiles": lambda: run_tiles(backend, inputs)}
    forward: dict[str, Callable[[], Any]] = {
        "tiles": lambda: CpuBackend(num_threads).flash_attention(*inputs[1:], scale=SCALE)
    }
    both: dict[str, Callable[[], Any]] = {"tiles": lambda: run_tiles(CpuBackend(num_threads), inputs)}
    if with_naive:
        runs["naive"] = both["naive"] = lambda: run_naive(inputs)
        forward["naive"] = lambda: naive_forward(*inputs[1:])
    results = {name: run()[0] for name, run in runs.items()}  # also compiles, and touches the scratch
    difference = largest_difference(results["tiles"], results["naive"]) if with_naive else 0.0
    del results
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            _, done = run()
            seconds[name].append((done - begin, time.perf_counter() - begin))
    costs = {}
    for name, times in seconds.items():
        medians = Cost(*(statistics.median(column) for column in zip(*times, strict=True)))
        costs[name] = Measured(Cost(peak_nbytes(forward[name]), peak_nbytes(both[name])), medians)
    return costs, difference


def largest_difference(tiles: Arrays, naive: Arrays) -> float:
    out, dq, dk, dv = naive
    same_axes = (out, dq, dk[:, None], dv[:, None])
    return max(
        float(np.abs(by_head(ours) - theirs).max() / np.abs(theirs).max())
        for ours, theirs in zip(tiles, same_axes, strict=True)
    )


# ---- what is written


def draw(runs: dict[int, dict[str, Measured]]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "flash_attention"  # the same names in every file
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for axes, quantity, unit in ((memory, "nbytes", MIB), (seconds, "seconds", 1e-3)):
        for name, colour in COLOURS.items():
            lengths = [length for length, run in runs.items() if name in run]
            for part, style in (("both", "o-"), ("forward", "o:")):
                values = [getattr(getattr(runs[length][name], quantity), part) / unit for length in lengths]
                label = f"{name}, forward{' and backward' if part == 'both' else ''}"
                axes.plot(lengths, values, style, color=colour, linewidth=1.5, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(runs), [f"{n:,}" for n in runs])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("sequence length T (tokens)")
        axes.grid(which="both", linewidth=0.3, color="#bbbbbb")
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_ylabel("peak of memory, results included (MiB)")
    seconds.set_ylabel("time (ms)")
    figure.legend(*memory.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def table(runs: dict[int, dict[str, Measured]], num_threads: int) -> str:
    """In Markdown."""

    def pair(cost: Cost, unit: float) -> str:
        return " / ".join(f"{value / unit:,.1f}" for value in cost.facts())

    lines = [
        "| T | tiles: memory | by the formula | naive: memory | its matrices | tiles: time | naive: time |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, run in runs.items():
        tiles, naive = run["tiles"], run.get("naive")
        cells = [pair(tiles.nbytes, MIB), pair(tiles_nbytes(length, num_threads), MIB)]
        cells.append(pair(naive.nbytes, MIB) if naive else "not run")
        cells.append(pair(naive_nbytes(length), MIB))
        cells.append(pair(tiles.seconds, 1e-3))
        cells.append(pair(naive.seconds, 1e-3) if naive else "not run")
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


PAGE = """\
# Attention in tiles, forward and backward, on a CPU

`Backend.flash_attention` and `flash_attention_backward` are dense attention and its gradients: causal or not, query
heads in groups over key heads, any two lengths. Their memory grows with the length, not with its square.

## What is stored, and what is computed again

With S = scale * Q K^T and P = softmax(S) the output is O = P V. S and P have T x T elements for each head. Neither is
ever whole: a tile of 64 queries walks over tiles of 64 keys, and only one tile of S at a time exists, in its worker's
scratch of some tens of KB. Each row carries the largest score so far, m, and the sum l of exp(S - m); where m grows, l
and the row of O are multiplied by exp(old m - new m) (arXiv:1805.02867, arXiv:2205.14135).

                keys  0     64    128   192
    queries   0      [\\    ]                         a worker holds: a tile of S, 64 x 64; a tile of O, 64 x D;
             64      [#### ][\\    ]                                  m and l of each row
            128      [#### ][#### ][\\    ]
            192      [#### ][#### ][#### ][\\    ]      \\ cut by the mask    # whole    blank: never visited

Two arrays remain for the backward pass: O, and lse = m + log l for each row and head. From them each tile's
probabilities are computed again, in one step and without a softmax: P = exp(S - lse). With delta = rowsum(dO * O),
which is rowsum(P * dP) without P,

    dP = dO V^T        dS = scale * P * (dP - delta)        dV = P^T dO        dQ = dS K        dK = dS^T Q

Two kernels do it. For dQ a tile of queries walks over its keys; for dK and dV a tile of keys walks over the queries
that see it, of all heads that share it. S and dP are computed in both: seven products of matrices where five would
do, so that no two tasks add to the same gradient.

## Why the number of threads changes no bit

A task is one tile of one head. It alone writes its rows of O, dQ, or dK and dV, from sums that it adds in ascending
order of tiles; which worker runs it, and when, is in no sum. There are no atomic additions and no reduction over
workers. Products keep one order too: each element is a chain of fused multiply-adds over k, whether its row is
computed together with others or alone. A masked probability is an exact zero, so a row's bits depend on what it sees
and on nothing else: not on the batch, nor on later tokens. `tests/kernels/test_flash_attention.py` holds all of it,
bit for bit, and the gradients against finite differences in float64.

## Measured

{setting}

![memory and time over sequence length]({name}.svg)

Forward alone / forward and backward; memory in MiB, time in ms:

{table}

{conclusions}

Made by `{command}`; the numbers are in [{name}.json]({name}.json).
"""


def filled(text: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False)


def document(
    runs: dict[int, dict[str, Measured]], difference: float, facts: dict[str, Any], name: str, command: str
) -> str:
    """The page, in Markdown."""
    threads = facts["threads"]
    setting = (
        f"Causal self-attention of one sequence, {HEADS} query heads over {KV_HEADS} key heads of {HEAD_DIM}, float32, "
        f"on {threads} thread{'s' if threads > 1 else ''} of: {facts['cpu']}. Beside it numpy {facts['numpy']} with as "
        "many BLAS threads, and all scores in memory: probabilities in place of the scores, kept for the gradients, "
        "which make a second matrix of that size. Memory is the peak of what numpy allocates, scratch and results "
        "included and inputs not; times are medians, the two taking turns."
    )
    common = max(length for length, run in runs.items() if "naive" in run)
    tiles, naive = runs[common]["tiles"], runs[common]["naive"]
    memory = naive.nbytes.both / tiles.nbytes.both
    speed = Cost(naive.seconds.forward / tiles.seconds.forward, naive.seconds.both / tiles.seconds.both)
    conclusions = (
        f"At {common:,} tokens tiles take 1/{memory:.0f} of the memory of forward and backward, and the time is "
        f"{compared(speed.forward)} forward and {compared(speed.both)} for both. Tiles past the diagonal are left out, "
        "half of all for a long sequence; the naive products are whole. The results agree to "
        f"{difference:.1e} of the largest element. The formula: O, lse, delta, dQ, dK and dV; keys and values "
        "transposed in tiles; for each worker two tiles of scores and two accumulators."
    )
    parts = {"setting": filled(setting), "conclusions": filled(conclusions), "table": table(runs, threads)}
    return PAGE.format(name=name, command=command, **parts)


def compared(ratio: float) -> str:
    return f"{ratio:.1f} times shorter" if ratio >= 1 else f"{1 / ratio:.1f} times longer"


def limit_blas(num_threads: int) -> None:
    """Starts the script again, where need be, with as many BLAS threads: numpy reads that when it is imported."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    wanted = dict.fromkeys(names, str(num_threads))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    parser = Parser(__doc__, "docs/flash_attention", model=False)
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=lengths, metavar="T", help="of the sequence")
    parser.add_argument(
        "--naive-up-to", type=positive_int, default=4096, metavar="T", help="the longest that is run naively (4096)"
    )
    parser.add_argument("--repeats", type=positive_int, default=9, metavar="N", help="timed runs of each (9)")
    args = parser.parse_args()
    if min(args.lengths) > args.naive_up_to:
        parser.error("--naive-up-to is below all lengths")
    output = prepare_output(args.output, plots=True)
    facts = machine_facts(args.threads)
    limit_blas(facts["threads"])
    runs, differences = {}, []
    print(f"{'tokens':>8}{'':8}{'forward':>21}{'forward and backward':>28}")
    for length in sorted(set(args.lengths)):
        notice(f"{length} tokens ...")
        runs[length], difference = measure(length, facts["threads"], args.repeats, length <= args.naive_up_to)
        differences.append(difference)
        for name, cost in runs[length].items():
            parts = zip(cost.nbytes.facts(), cost.seconds.facts(), strict=True)
            print(f"{length:8,}{name:>8}" + "   ".join(f"{n / MIB:9.1f} MiB {1e3 * s:9.1f} ms" for n, s in parts))
    print(f"the results agree to {max(differences):.1e} of the largest element")
    write_json(
        output.with_name(f"{output.name}.json"),
        {
            "what": "peak memory (bytes) and time (s) of causal attention: [forward, forward and backward]",
            "machine": facts,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "repeats": args.repeats,
            "runs": {
                str(length): {
                    name: {"nbytes": cost.nbytes.facts(), "seconds": [round(s, 6) for s in cost.seconds.facts()]}
                    for name, cost in run.items()
                }
                for length, run in runs.items()
            },
            "nbytes_by_formula": {str(length): tiles_nbytes(length, facts["threads"]).facts() for length in runs},
            "largest_difference_of_results": max(differences),
        },
    )
    save_figure(draw(runs), output.with_name(f"{output.name}.svg"))
    page = document(runs, max(differences), facts, output.name, "python scripts/flash_attention.py")
    output.with_name(f"{output.name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
