"""The process of one peer: `python -m peers.worker MODULE` answers requests, a JSON text a line each.

    {"id": 7, "do": "prefill", "with": {"token_ids": [...]}}       on stdin
    {"id": 7, "value": 0.25}                                       on stdout, or
    {"id": 7, "absent": "..."}                                     the program, or something that it needs, is not here
    {"id": 7, "failed": "..."}                                     it is here, and this went wrong

Whatever the program itself prints goes to stderr. The first-token form, `python -m peers.worker MODULE first_token
ARGUMENTS`, does one thing alone: it answers {"id": 0, "value": TEXT} as soon as there is text, and ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from peers.interface import Peer, Room, UnavailableError

__all__ = ["peak_nbytes", "serve"]

_PR_SET_PDEATHSIG = 1


class Worker:
    """Answers for one module; `load` comes before whatever needs the loaded model."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.peer: Peer | None = None

    def answer(self, do: str, arguments: dict[str, Any]) -> Any:
        if do == "load":
            room = Room(**arguments.pop("room"))
            self.peer = self.module.load(room=room, **arguments)
            return dict(self.peer.versions)
        if do == "peak_nbytes":
            return peak_nbytes()
        if do in ("prepare", "first_token"):
            return getattr(self.module, do)(**arguments)
        return getattr(self.peer, do)(**arguments)


def serve(module: ModuleType, requests: Iterable[str], replies: TextIO) -> None:
    """Answers until the requests end."""
    worker = Worker(module)
    for line in requests:
        request = json.loads(line)
        reply: dict[str, Any] = {"id": request["id"]}
        try:
            reply["value"] = worker.answer(request["do"], request["with"])
        except (ImportError, UnavailableError) as error:
            reply["absent"] = one_line(error)
        except Exception as error:
            reply["failed"] = f"{type(error).__name__}: {one_line(error)}"
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def peak_nbytes() -> int:
    """The most memory that this process has had resident.

    Linux counts it for the program itself (VmHWM); getrusage's figure begins with that of the process it was forked
    from.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def private_stdout() -> TextIO:
    """The stdout that replies go to; everything else that is printed, by C code too, goes to stderr from now on."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def end_with_parent() -> None:
    """A worker is stopped while others measure, so it could not notice that nobody asks any more."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    replies = private_stdout()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends this process
    module = import_module(sys.argv[1])
    requests = sys.stdin
    if len(sys.argv) > 2:
        request = {"id": 0, "do": sys.argv[2], "with": json.loads(sys.argv[3])}
        serve(module, [json.dumps(request)], replies)
        os._exit(0)  # whatever its end would take
    serve(module, requests, replies)


if __name__ == "__main__":
    main()
