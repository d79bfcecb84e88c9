"""How fast other programs run the same model on this machine's CPU, and how well.

    python scripts/bench_peers.py
    python scripts/bench_peers.py --python transformers=other/bin/python --python onnxruntime=other/bin/python

Each program runs in a process of its own, with whatever Python has it; nothing is installed, and one that is not there
is left out, with a line that says how to get it. All of them stay loaded, and take turns: each measures once, then each
a second time, and so on. Whoever has no turn is stopped, thread pools and all. Every row's first turn does not count;
memory and best tokens, which are no times, are taken once.

    prefill N        from N random tokens, new ones each time, to the first greedy token
    decode           greedy tokens after one such prompt, whose time is left out
    N sequences      the same for N prompts at once
    process start    from the start of a process to the text of the first token
    peak memory      of a process that serves one prompt, and has room for no more
    best token       how often it is that of float32 arithmetic over the file's weights, on a text read in pieces of 512

Writes OUTPUT.json and OUTPUT.md, and keeps the forms of the model that programs read in the cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from measurement import (
    MistakeError,
    Parser,
    machine_facts,
    model_facts,
    notice,
    positive_int,
    prepare_output,
    run_script,
    write_json,
)
from peers.contest import Contestant, Machine, alternate, start_all
from peers.forms import Forms
from peers.interface import UnavailableError
from peers.process import PeerDiedError, PeerFailedError
from peers.registry import EXACT, PEERS, PROGRAMS, REFERENCE, Entry
from peers.report import Result, cell, document, plain, table
from peers.rows import CHUNK, ROOM, Row, Tokens, agreement, best_tokens, timed_rows

from tinyllm.cache import cache_root
from tinyllm.hub import resolve
from tinyllm.llm import load_tokenizer, open_model
from tinyllm.models.registry import model_config
from weights.gguf import MAGIC

ROOT = Path(__file__).parents[1]


def program_python(text: str) -> tuple[str, str]:
    """PROGRAM=PATH"""
    program, _, path = text.partition("=")
    if program not in PROGRAMS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not PROGRAM=PATH with one of {', '.join(PROGRAMS)}")
    return program, path


def random_tokens(vocab_size: int, special: Collection[int]) -> Tokens:
    """Ordinary token ids, the same for the same count and repeat."""
    ordinary = np.setdiff1d(np.arange(vocab_size), sorted(special))

    def tokens(count: int, repeat: int) -> list[int]:
        drawn: list[int] = np.random.default_rng([repeat + 1, count]).choice(ordinary, count).tolist()
        return drawn

    return tokens


def float32_best(contestants: Sequence[Contestant], machine: Machine, text: Sequence[int]) -> tuple[str, list[int]]:
    """The reference's name and its best tokens: transformers', or tinyllm's own where it is not there, or none."""
    try:
        reference = machine.start(REFERENCE, ROOM)
        with reference.process:
            return reference.name, best_tokens(reference, text)
    except (UnavailableError, PeerFailedError) as error:
        notice(f"{REFERENCE.name}: {error}; {EXACT} takes its place")
    try:
        return next(((peer.name, best_tokens(peer, text)) for peer in contestants if peer.name == EXACT), ("", []))
    except PeerFailedError as error:
        notice(f"{EXACT}: {error}")
        return "", []


class Contest:
    """The rows so far, and who was left out."""

    def __init__(self, contestants: list[Contestant], repeats: int) -> None:
        self.contestants = contestants
        self.repeats = repeats
        self.results: list[Result] = []
        self.failures: dict[str, str] = {}

    def run(self, row: Row) -> None:
        """Adds a row. Whoever dies is in no later one."""

        def lose(peer: Contestant, error: Exception) -> None:
            self.failures[peer.name] = f"{row.name}: {error}"
            notice(f"{peer.name}: {self.failures[peer.name]}")
            if isinstance(error, PeerDiedError):
                self.contestants = [other for other in self.contestants if other is not peer]

        figures = alternate(self.contestants, 1 if row.once else self.repeats, row.measure, lose, warm=not row.once)
        result = Result(row.name, row.unit, row.more_is_better, figures)
        self.results.append(result)
        notice(
            f"{row.name}, {row.unit}: {', '.join(f'{name} {cell(m, row.unit)}' for name, m in result.medians.items())}"
        )


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MistakeError(f"--text cannot be read: {error}") from None


def parse(parser: Parser) -> argparse.Namespace:
    names = [entry.name for entry in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="whom to measure (default: all)")
    parser.add_argument(
        "--python",
        type=program_python,
        action="append",
        default=[],
        metavar="PROGRAM=PATH",
        help=f"the Python that has a program, one of {', '.join(PROGRAMS)} (default: this one)",
    )
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="figures a row and peer (5)")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", help="what to compare best tokens on (README)")
    parser.add_argument(
        "--positions", type=positive_int, default=4096, metavar="N", help="how many of its tokens (4096)"
    )
    parser.add_argument("--timeout", type=positive_int, default=900, metavar="S", help="seconds for an answer (900)")
    parser.add_argument("--small", action="store_true", help="short prompts, to see whether everything works")
    return parser.parse_args()


def main() -> None:
    args = parse(Parser(__doc__, "docs/peers"))
    text = read_text(args.text)
    output = prepare_output(args.output, plots=False)
    path = resolve(args.model)
    if not path.is_file() or path.read_bytes()[:4] != MAGIC:
        raise MistakeError(f"--model {args.model}: all programs start from a GGUF file")
    checkpoint = open_model(path)
    config = model_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise MistakeError(f"--model {args.model}: it has no tokenizer")
    text_ids = tokenizer.encode(text)[: args.positions]
    if len(text_ids) < args.positions:
        raise MistakeError(f"--text has {len(text_ids)} tokens, not the {args.positions} of --positions")

    model, facts = model_facts(args.model), machine_facts(args.threads)
    pythons = dict.fromkeys(PROGRAMS, sys.executable) | dict(args.python)
    forms = Forms(path, cache_root() / "peers" / model["sha256"][:12])
    machine = Machine(pythons, forms, facts["threads"], args.timeout)
    skipped: dict[str, str] = {}

    def skip(entry: Entry, why: str) -> None:
        skipped[entry.name] = f"{why} (to get it: {entry.get})"
        notice(f"{entry.name} is left out: {skipped[entry.name]}")

    entries = [entry for entry in PEERS if entry.name in args.peers]
    with ExitStack() as stack:
        contestants = start_all(entries, machine, ROOM, skip, stack)
        if not contestants:
            raise MistakeError("none of the programs is here")
        contest = Contest(contestants, args.repeats)
        for row in timed_rows(machine, random_tokens(config.vocab_size, tokenizer.special_token_ids), small=args.small):
            contest.run(row)
        reference, best = float32_best(contest.contestants, machine, text_ids)
        if best:
            contest.run(agreement(text_ids, best))

    versions = {contestant.name: contestant.versions for contestant in contestants}
    everything: dict[str, Any] = {
        "what": "programs that run the same model on this machine's CPU",
        "machine": facts,
        "model": model,
        "threads": facts["threads"],
        "repeats": args.repeats,
        "room": {"tokens": ROOM.tokens, "sequences": ROOM.sequences},
        "text": {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "positions": len(text_ids),
            "chunk": CHUNK,
            "reference": reference,
        },
        "peers": {
            entry.name: {"computes_with": entry.arithmetic, "versions": versions[entry.name]}
            for entry in entries
            if entry.name in versions
        },
        "skipped": skipped | contest.failures,
        "rows": {result.name: result.facts() for result in contest.results},
    }
    print(plain(table(contest.results, list(versions))))
    write_json(output.with_name(f"{output.name}.json"), everything)
    page = document(
        contest.results,
        entries,
        versions,
        skipped | contest.failures,
        {**everything, "command": "python scripts/bench_peers.py"},
    )
    output.with_name(f"{output.name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
