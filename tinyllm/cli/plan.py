"""`tinyllm plan`: what a model and its cache will take, before anything is loaded."""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console, options
from tinyllm.cli.console import UsageError

if TYPE_CHECKING:
    from tinyllm.plan import MemoryPlan

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm plan --model smollm2-135m-instruct
  tinyllm plan --model model.gguf --kv-dtype f16 --num-blocks 4096
  tinyllm plan --plot memory.svg        (needs: pip install "tinyllm[plot]")

All sizes are exact. The KV cache is reserved at the start, and becomes resident as tokens are written to it.
"""
_GLYPHS = ("█", "▓", "▒", "░")
_STYLES = ("blue", "yellow", "green", "magenta")
_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")  # the same order, for the plot
_WIDTH = 72
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="memory of a model, before it is loaded",
        description="Says what weights, KV cache and workspace will take, and how many tokens fit, before loading.",
        epilog=_EPILOG,
    )
    options.add_model_option(parser)
    options.add_engine_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw the shares into a .png, .svg or .pdf file")
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes in bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        _check_plot(args.plot)
    title, plan = _make_plan(args)
    if args.json:
        console.write(json.dumps(_as_json(plan)) + "\n")
    else:
        _show(title, plan)
    if args.plot is not None:
        _plot(args.plot, title, plan)
        console.notice(f"wrote {args.plot}")
    return 0


def _make_plan(args: argparse.Namespace) -> tuple[str, MemoryPlan]:
    from tinyllm.backends import backend_for
    from tinyllm.config import EngineConfig
    from tinyllm.llm import open_model
    from tinyllm.models.registry import model_config
    from tinyllm.plan import plan_memory

    with options.naming_options():
        engine = EngineConfig.from_options(options.engine_options(args))
        backend = backend_for(engine, on_event=console.notice)
        with open_model(options.model_name(args)) as checkpoint:
            config = model_config(checkpoint)
            plan = plan_memory(checkpoint, config, engine, backend)
            title = f"{checkpoint.path.name}: {config.architecture}, {config.num_layers} layers, on {backend.name}"
    return console.one_line(title, 120), plan


def _as_json(plan: MemoryPlan) -> dict[str, Any]:
    sizes = {name: value for name, value in asdict(plan).items() if name != "kv_cache_spec"}
    return {
        **sizes,
        "total_nbytes": plan.total_nbytes,
        "num_blocks": plan.num_blocks,
        "block_size": plan.block_size,
        "num_tokens": plan.num_tokens,
        "kv_dtype": plan.kv_cache_spec.dtype,
        "fits": plan.fits,
    }


def _show(title: str, plan: MemoryPlan) -> None:
    """Writes a bar of the shares, the sizes under it, and what they mean in tokens."""
    from rich.console import Console
    from rich.text import Text

    total = plan.total_nbytes
    bar, table = Text(), Text()
    widths = _bar_widths(list(plan.shares().values()), _WIDTH)
    for (name, size), width, glyph, style in zip(plan.shares().items(), widths, _GLYPHS, _STYLES, strict=True):
        bar.append(glyph * width, style)
        table.append(f"  {glyph} ", style)
        table.append(f"{name:<10} {console.format_bytes(size):>11} {size:>17,} bytes {size / total:>7.1%}\n")
    table.append(f"    {'total':<10} {console.format_bytes(total):>11} {total:>17,} bytes")
    sequences = plan.num_tokens / plan.max_sequence_len
    fit = "fits" if plan.fits else "DOES NOT FIT"
    facts = (
        f"tokens that fit  {plan.num_tokens:,}, {plan.kv_nbytes_per_token:,} bytes each\n"
        f"KV blocks        {plan.num_blocks:,} of {plan.block_size} tokens, {plan.kv_cache_spec.dtype}\n"
        f"sequences        {sequences:.1f} of the longest, {plan.max_sequence_len:,} tokens\n"
        f"memory free now  {console.format_bytes(plan.available_nbytes)}: {fit}"
    )
    terminal = console.is_terminal(sys.stdout)
    buffer = io.StringIO()
    rich = Console(file=buffer, force_terminal=terminal, soft_wrap=True, highlight=False)
    for part in (Text(title, "bold"), Text(), bar, table, Text(), Text(facts)):
        rich.print(part)
    console.write(buffer.getvalue(), styled=True)


def _bar_widths(sizes: list[int], width: int) -> list[int]:
    """Splits `width` cells in proportion to the sizes; whatever is not zero keeps a cell, and no cell is lost."""
    total = sum(sizes)
    widths = [max(1, round(size * width / total)) if size else 0 for size in sizes]
    widths[widths.index(max(widths))] += width - sum(widths)
    return widths


def _check_plot(path: str) -> None:
    """Raises UsageError before any work is done if the picture could not be drawn."""
    from importlib.util import find_spec

    if Path(path).suffix.lower() not in _PLOT_SUFFIXES:
        raise UsageError(f"--plot takes a file that ends in {', '.join(_PLOT_SUFFIXES)}, not {path!r}")
    if find_spec("matplotlib") is None:
        raise UsageError('--plot needs matplotlib: pip install "tinyllm[plot]"')


def _plot(path: str, title: str, plan: MemoryPlan) -> None:
    """One stacked bar, each share labelled with its size. Raises UsageError if the file cannot be written."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    mib = 1 << 20
    left = 0.0
    for (name, size), color in zip(plan.shares().items(), _COLORS, strict=True):
        label = f"{name}: {console.format_bytes(size)} ({size / plan.total_nbytes:.1%})"
        axes.barh(0, size / mib, left=left, color=color, edgecolor="white", linewidth=1, label=label)
        left += size / mib
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(f"MiB of {console.format_bytes(plan.total_nbytes)}; {plan.num_tokens:,} tokens fit")
    axes.set_xlim(0, left)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
