"""A server that runs while a script needs it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["served"]


@contextmanager
def served(arguments: Sequence[str]) -> Iterator[str]:
    """The URL of `tinyllm serve` with these arguments, at a free port. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-m", "tinyllm", "serve", "--port", "0", *arguments]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        last = ""
        for line in child.stderr:
            last = line.strip() or last
            if found := re.search(r"is served at (http://\S+)", line):
                yield found[1]
                return
        raise RuntimeError(f"the server did not start: {last}")
    finally:
        child.terminate()
        child.wait()
