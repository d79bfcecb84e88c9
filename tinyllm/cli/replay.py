"""`tinyllm replay`: run a recording again, and see that every step is the same; or stop before one to look at it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console
from tinyllm.cli.console import UsageError

if TYPE_CHECKING:
    from tinyllm.recording.replay import Replay, ReplayDifferenceError

__all__ = ["add_parser"]

EXIT_DIFFERENT = 1

_EPILOG = """\
examples:
  tinyllm generate --record run.jsonl "Once upon a time"
  tinyllm replay run.jsonl
  tinyllm replay run.jsonl --stop-at 7

Loads the model that the recording names, runs the same requests at the same steps, and compares each step's schedule,
block tables, copies, evictions and tokens, and a digest of all the logits that it used. The exit status is 0 if all of
it is the same, and 1 after a line that names the first step and thing that differ. The number of threads may be
another: the bits do not depend on it.

--stop-at shows what the engine holds before that step runs: the queue, each running sequence with its tokens and
blocks, "3(x2)" being block 3, held by two.

Requests with logits processors, and sessions, cannot be replayed: what they compute from is not in the recording.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="run a recording again, bit for bit",
        description="Runs a recording (generate --record) again, and compares every step.",
        epilog=_EPILOG,
    )
    parser.add_argument("recording", metavar="FILE", help="a recording")
    parser.add_argument("--model", "-m", metavar="MODEL", help="the model, where it is now (default: as recorded)")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="stop before this step and show the engine's state")
    parser.add_argument("--threads", type=int, metavar="N", dest="num_threads", help="CPU threads (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.stop_at is not None and args.stop_at < 1:
        raise UsageError(f"--stop-at must be at least 1, not {args.stop_at}: steps count from 1")
    from tinyllm.cli.options import naming_options
    from tinyllm.recording.replay import ReplayDifferenceError
    from tinyllm.replay import open_replay

    with naming_options():
        replay = open_replay(args.recording, args.model, num_threads=args.num_threads, on_event=console.notice)
    if args.stop_at is not None and args.stop_at > replay.num_steps:
        raise UsageError(f"--stop-at {args.stop_at}: the recording has {replay.num_steps} steps that can be replayed")
    try:
        while replay.next_step is not None and replay.next_step.number != args.stop_at:
            replay.step()
    except ReplayDifferenceError as difference:
        return _different(difference, args)
    if args.stop_at is not None:
        _write_state(replay, args)
    else:
        _write_summary(replay, args)
    return 0


def _different(difference: ReplayDifferenceError, args: argparse.Namespace) -> int:
    if args.json:
        found = {
            "step": difference.step,
            "what": difference.what,
            "recorded": difference.recorded,
            "replayed": difference.replayed,
        }
        _write_json({"same": False, "difference": found})
    else:
        console.notice(f"the replay differs: {difference}")
    return EXIT_DIFFERENT


def _write_state(replay: Replay, args: argparse.Namespace) -> None:
    from tinyllm.recording.state import engine_state, state_lines

    state = engine_state(replay.engine, replay.next_step)
    if args.json:
        _write_json(state)
    else:
        console.write("".join(f"{console.printable(line)}\n" for line in state_lines(state)))


def _write_summary(replay: Replay, args: argparse.Namespace) -> None:
    notes = []
    if replay.interrupted:
        notes.append("a step after these was interrupted, and what followed it cannot be replayed")
    if replay.recording.torn:
        notes.append("the recording's last line breaks off and was left out")
    if args.json:
        counts = {"steps": replay.num_steps, "requests": replay.num_requests, "tokens": replay.num_tokens}
        _write_json({"same": True, **counts, "notes": notes})
        return
    console.write(
        f"replayed {_count(replay.num_steps, 'step')}, {_count(replay.num_requests, 'request')}, "
        f"{_count(replay.num_tokens, 'token')}: every schedule and every logit the same\n"
    )
    for note in notes:
        console.notice(note)


def _write_json(value: dict[str, Any]) -> None:
    console.write(json.dumps(value) + "\n")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
