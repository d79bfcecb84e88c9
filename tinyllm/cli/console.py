"""What the command line says, and where: results go to stdout, everything else to stderr.

Model files and models are not trusted: what they say reaches a terminal without its control characters.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from tinyllm.errors import TinyLLMError

__all__ = [
    "UsageError",
    "discard_stdout",
    "error",
    "format_bytes",
    "is_terminal",
    "notice",
    "one_line",
    "printable",
    "write",
]

_MAX_MESSAGE = 600  # characters; a message may quote a user's value of any length


class UsageError(TinyLLMError):
    """A mistake in how the command line was used."""


def _is_control(char: str) -> bool:
    code = ord(char)
    bidi = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069  # reorders what stands around it
    return code < 32 or 127 <= code < 160 or 0xD800 <= code < 0xE000 or code in (0x2028, 0x2029) or bidi


def _escape(text: str, keep: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _is_control(c) else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """The text with control characters escaped; newlines and tabs stay."""
    return _escape(text, keep="\n\t")


def one_line(text: str, limit: int = _MAX_MESSAGE) -> str:
    """The text on one line, control characters escaped, its middle left out beyond `limit` characters."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]}...{text[-limit // 4 :]}"
    return _escape(text, keep="")


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def notice(message: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        with suppress(OSError):  # no one reads it, and there is nowhere else to say so
            print(f"tinyllm: {one_line(message)}", file=sys.stderr, flush=True)


def error(message: str) -> None:
    """One line on stderr that names a mistake."""
    notice(f"error: {message}")


def write(text: str, *, styled: bool = False) -> None:
    """Writes to stdout at once; `styled` text keeps its terminal codes.

    Raises UsageError when that fails, but BrokenPipeError when no one reads on.
    """
    stream = sys.stdout
    if stream is None:  # started with stdout closed
        return
    if is_terminal(stream) and not styled:
        text = printable(text)
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # a terminal or locale that lacks the character
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as cause:
        discard_stdout()
        raise UsageError(f"cannot write to standard output: {cause.strerror}") from cause


def discard_stdout() -> None:
    """Sends what stdout still holds nowhere, so that the interpreter's last flush cannot fail."""
    with suppress(OSError, ValueError, AttributeError):  # no file behind it
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, sys.stdout.fileno())
        os.close(target)
