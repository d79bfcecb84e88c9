"""`tinyllm timeline`: a recording as a page to look at."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from tinyllm.cli import console
from tinyllm.cli.console import UsageError
from tinyllm.errors import reason

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm generate --record run.jsonl --n 4 "Once upon a time"
  tinyllm timeline run.jsonl -o run.html

The page needs nothing but itself: open it in any browser. It shows the steps over time, whose tokens ran in each of
them, and which blocks of the KV cache each request held: shared, copied, cached, given up. The arrow keys step through.
Of a long recording, --steps draws a part. No model is needed, and no prompt or text is in the page.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "timeline",
        help="draw a recording as a page",
        description="Draws a recording (generate --record) as a self-contained HTML page.",
        epilog=_EPILOG,
    )
    parser.add_argument("recording", metavar="FILE", help="a recording")
    parser.add_argument("--output", "-o", metavar="FILE", required=True, help="the page to write")
    parser.add_argument("--steps", metavar="FIRST-LAST", help="draw these steps only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    first, last = _steps(args.steps)
    from tinyllm.recording.timeline import render_timeline

    if _is_same_file(args.recording, args.output):
        raise UsageError("--output is the recording itself")
    page = render_timeline(args.recording, first=first, last=last)
    try:
        with open(args.output, "w", encoding="ascii", newline="\n") as file:
            file.write(page.html)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {args.output}: {reason(error)}") from error
    size = console.format_bytes(len(page.html))
    counts = f"{_count(page.num_steps, 'step')}, {_count(page.num_requests, 'request')}"
    console.write(f"{args.output}: {counts}, {size}\n")
    if page.torn:
        console.notice("the recording's last line breaks off and was left out")
    return 0


def _steps(text: str | None) -> tuple[int, int | None]:
    """The first step to draw and the last, or None for all to the end."""
    if text is None:
        return 1, None
    match = re.fullmatch(r"(\d{1,15})-(\d{1,15})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--steps must be like 100-200, not {text!r}")
    return int(match[1]), int(match[2])


def _is_same_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # one of them does not exist
        return False


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
