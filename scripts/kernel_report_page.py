"""The kernel report as one self-contained HTML page: plots as inline SVG, then a table of all kernels."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cuda_kernels.roofline import ARCHITECTURES, TileWork

__all__ = ["kinds_of", "main_architecture", "render_page"]

Fact = Mapping[str, Any]

MAIN = "sm_90a"  # the architecture that plots of one show
KINDS = {
    "tensor core": ("HMMA", "IMMA"),
    "float": ("FFMA", "FADD", "FMUL", "FMNMX", "FMNMX3", "FSEL", "FSETP", "HFMA2", "HADD2", "HMUL2"),
    "special function": ("MUFU",),
    "conversion": ("F2FP", "F2F", "I2F", "F2I", "I2FP", "PRMT"),
    "shared memory": ("LDSM", "LDS", "STS"),
    "global memory": ("LDG", "STG", "LDGSTS", "LD", "ST", "RED", "ATOMG"),
    "warp and barrier": ("SHFL", "BAR", "WARPSYNC", "VOTE", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR"),
}  # what is left is integer arithmetic and control
COLOURS = ("#7b3294", "#2166ac", "#67a9cf", "#a6dba0", "#e08214", "#b2182b", "#878787", "#d9d9d9")

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 12px; } th, td { padding: 2px 8px; text-align: right; }
th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #888; } td:first-child { text-align: left; }
tr:nth-child(even) { background: #f5f5f5; } .bad { color: #b2182b; font-weight: bold; }
svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
"""


def render_page(facts: Sequence[Fact]) -> str:
    """HTML of the report's facts. Raises ImportError without matplotlib."""
    architectures = list(dict.fromkeys(fact["architecture"] for fact in facts))
    main = main_architecture(architectures)
    of_main = [fact for fact in facts if fact["architecture"] == main]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Kernel report</title>",
        f"<style>{STYLE}</style><h1>Kernel report</h1>",
        f"<p>{len(of_main)} kernels on {len(architectures)} architectures, from machine code alone: no GPU has run"
        " anything here. Occupancy is the share of a multiprocessor's warps that fit at once, by registers, shared"
        " memory and threads.</p>",
        "<h2>Registers and occupancy</h2>",
        *(_svg(_draw_heat(rows, family, architectures)) for family, rows in _by(facts, "family").items()),
        f"<h2>What the main loops are made of ({main})</h2>",
        _svg(_draw_mix(of_main)),
        f"<h2>Roofline ({main}: {html.escape(ARCHITECTURES[main].device)}, data sheet)</h2>",
        "<p>A point is a kernel's tile: operations over the bytes it moves between global memory and the"
        " multiprocessor, with nothing in a cache. Its height is the most that this intensity allows.</p>",
        _svg(_draw_roofline(of_main, main)),
        "<h2>All kernels</h2>",
        _table(facts, architectures),
        "</html>",
    ]
    return "\n".join(parts)


def main_architecture(architectures: Sequence[str]) -> str:
    """The one that stands for all where only one is shown."""
    return MAIN if MAIN in architectures else architectures[0]


def _by(facts: Iterable[Fact], key: str) -> dict[str, list[Fact]]:
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact[key], []).append(fact)
    return groups


# ---- plots


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kernel report"}):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _draw_heat(facts: Sequence[Fact], family: str, architectures: Sequence[str]) -> Any:
    """Kernels down, architectures across: registers on the left, occupancy on the right."""
    names = list(_by(facts, "kernel"))
    at = {(fact["kernel"], fact["architecture"]): fact for fact in facts}
    figure, axes = _figure(11, 1.0 + 0.21 * len(names), 2)
    for axis, key, title, most, colours in (
        (axes[0], "registers", "registers of a thread", 255, "YlOrRd"),
        (axes[1], "occupancy", "occupancy, %", 1, "YlGn"),
    ):
        values = [[at[name, architecture][key] for architecture in architectures] for name in names]
        axis.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=most)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                text = f"{value:.0%}"[:-1] if key == "occupancy" else str(value)
                dark = value > 0.7 * most
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axis.set_xticks(range(len(architectures)), architectures, fontsize=8)
        axis.set_yticks(range(len(names)), names if key == "registers" else [], fontsize=7)
        axis.xaxis.tick_top()
        axis.set_title(f"{family}: {title}" if key == "registers" else title, fontsize=9)
    figure.subplots_adjust(wspace=0.05)
    return figure


def kinds_of(opcodes: Mapping[str, int]) -> dict[str, int]:
    """Instructions by kind; names of memory accesses end in their width."""
    counts = dict.fromkeys([*KINDS, "integer and control"], 0)
    for name, count in opcodes.items():
        base = name.partition(".")[0]
        counts[next((kind for kind, names in KINDS.items() if base in names), "integer and control")] += count
    return counts


def _draw_mix(facts: Sequence[Fact]) -> Any:
    """Stacked bars, the longest loops first; the number at the end is the loop's length."""
    rows = sorted((fact for fact in facts if fact["main_loop"]), key=lambda f: sum(f["main_loop"].values()))[-60:]
    figure, (axis,) = _figure(11, 1.5 + 0.19 * len(rows))
    left = [0.0] * len(rows)
    counted = [kinds_of(fact["main_loop"]) for fact in rows]
    for kind, colour in zip([*KINDS, "integer and control"], COLOURS, strict=True):
        shares = [100 * counts[kind] / sum(counts.values()) for counts in counted]
        axis.barh(range(len(rows)), shares, left=left, color=colour, label=kind, height=0.8)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for row, counts in enumerate(counted):
        axis.text(101, row, str(sum(counts.values())), va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [fact["kernel"] for fact in rows], fontsize=7)
    axis.set_xlabel("% of the main loop's instructions")
    axis.set_xlim(0, 108)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.03 - 1.5 / (8 + len(rows))), ncols=4, fontsize=8, frameon=False
    )
    return figure


def _draw_roofline(facts: Sequence[Fact], architecture: str) -> Any:
    ceilings = ARCHITECTURES[architecture].ceilings
    figure, (axis,) = _figure(10, 5.5)
    low, high = 0.05, 1000.0
    for peak, style, name in (
        (ceilings.tensor_flops, "-", "tensor cores, f16"),
        (ceilings.f32_flops, "--", "float32 units"),
    ):
        ridge = peak / ceilings.bandwidth
        axis.plot([low, ridge, high], [low * ceilings.bandwidth, peak, peak], f"k{style}", linewidth=1)
        axis.text(high, peak * 1.08, name, ha="right", fontsize=8)
    for index, (family, rows) in enumerate(_by((f for f in facts if "tile" in f), "family").items()):
        works = [TileWork(f["tile"]["flop"], f["tile"]["nbytes"], f["tile"]["tensor"]) for f in rows]
        points = sorted({(work.intensity, ceilings.attainable_flops(work)) for work in works})
        axis.scatter(*zip(*points, strict=True), s=30, color=COLOURS[index % 7], label=family, zorder=3)
    axis.set(
        xscale="log", yscale="log", xlabel="operations per byte of a tile", ylabel="attainable operations per second"
    )
    axis.set_xlim(low, high)
    axis.grid(True, which="both", color="#eeeeee")
    axis.legend(fontsize=8)
    return figure


# ---- the table


def _table(facts: Sequence[Fact], architectures: Sequence[str]) -> str:
    """A row for each kernel: what differs by architecture, then the main architecture's instructions."""
    main = main_architecture(architectures)
    opcodes = ["HMMA", "FFMA", "LDSM", "LDGSTS.128", "LDG.128"]
    head = ["kernel", "threads", "KB shared", *architectures, "main loop", *opcodes]
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"]
    for name, rows in _by(facts, "kernel").items():
        at = {fact["architecture"]: fact for fact in rows}
        loop = at[main]["main_loop"]
        cells = [html.escape(name), str(at[main]["threads"]), f"{at[main]['shared_nbytes'] / 1024:.1f}"]
        cells += [_cell(at[architecture]) for architecture in architectures]
        cells.append(str(sum(loop.values())) if loop else "")
        cells += [str(loop.get(opcode, "")) for opcode in opcodes]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    note = "<p>By architecture: registers / occupancy. Anything that must not be stands in red.</p>"
    return f"{note}<div class=scroll><table>{''.join(lines)}</table></div>"


def _cell(fact: Fact) -> str:
    wrong = [
        f"{fact[key]} {name}"
        for key, name in (
            ("spill_nbytes", "spilled"),
            ("stack_nbytes", "stack"),
            ("local_instructions", "local"),
            ("f64_instructions", "f64"),
        )
        if fact[key]
    ]
    bad = f" <span class=bad>{', '.join(wrong)}</span>" if wrong else ""
    return f"{fact['registers']} / {fact['occupancy']:.0%}{bad}"
