"""What is measured: a row for each figure, and how one peer's is taken once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from peers.contest import Contestant, Machine
from peers.interface import Room

__all__ = ["ROOM", "Row", "Tokens", "agreement", "best_tokens", "timed_rows"]

ROOM = Room(tokens=2560, sequences=16)
PROMPT = "The capital of France is"
CHUNK = 512  # tokens of text that are read at once to compare best tokens
_MEMORY_PROMPT, _MEMORY_STEPS = 512, 48

Tokens = Callable[[int, int], list[int]]  # (count, seed) -> random token ids


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        unit: of its figures: "tokens/s", "s", "MB" or "%".
        measure: one peer's figure, given the number of the repeat.
        once: no repeats, for a figure that is no time.
    """

    name: str
    unit: str
    measure: Callable[[Contestant, int], float]
    once: bool = False

    @property
    def more_is_better(self) -> bool:
        return self.unit in ("tokens/s", "%")


def timed_rows(machine: Machine, tokens: Tokens, *, small: bool = False) -> list[Row]:
    """All rows but the agreement. `small`: lengths for a look at whether everything works."""
    prefills, contexts = ((32,), ((32, 4),)) if small else ((128, 512, 2048), ((32, 64), (1024, 32)))
    return [
        *(_prefill(tokens, count) for count in prefills),
        *(_decode(tokens, 1, context, steps) for context, steps in contexts),
        *(_decode(tokens, sequences, 32, 4 if small else 32) for sequences in (4, 16)),
        Row("process start to first token", "s", lambda peer, _: start_seconds(machine, peer)),
        Row(
            f"peak memory, {_MEMORY_PROMPT} + {_MEMORY_STEPS} tokens",
            "MB",
            lambda peer, repeat: peak_megabytes(machine, peer, tokens(_MEMORY_PROMPT, repeat)),
            once=True,
        ),
    ]


def _prefill(tokens: Tokens, count: int) -> Row:
    def measure(peer: Contestant, repeat: int) -> float:
        return count / float(peer.process.ask("prefill", token_ids=tokens(count, repeat)))

    return Row(f"prefill {count}", "tokens/s", measure)


def _decode(tokens: Tokens, sequences: int, context: int, steps: int) -> Row:
    def measure(peer: Contestant, repeat: int) -> float:
        ids = tokens(sequences * context, repeat)
        prompts = [ids[begin : begin + context] for begin in range(0, len(ids), context)]
        return sequences * steps / float(peer.process.ask("decode", prompts=prompts, steps=steps))

    name = f"decode, context {context}" if sequences == 1 else f"{sequences} sequences, total"
    return Row(name, "tokens/s", measure)


def start_seconds(machine: Machine, peer: Contestant) -> float:
    """From the start of a new process until it has the text of the first token."""
    arguments = {"model": peer.model, "threads": machine.threads, "text": PROMPT, **peer.entry.options}
    begin = time.perf_counter()
    with machine.worker(peer.entry, "first_token", json.dumps(arguments)) as worker:
        worker.answer(0)
        return time.perf_counter() - begin


def peak_megabytes(machine: Machine, peer: Contestant, token_ids: list[int]) -> float:
    """Of a new process that has room for one sequence, and serves it."""
    room = Room(tokens=len(token_ids) + _MEMORY_STEPS + 16, sequences=1)
    with machine.start(peer.entry, room).process as worker:
        worker.ask("decode", prompts=[token_ids], steps=_MEMORY_STEPS)
        return float(worker.ask("peak_nbytes")) / 1e6


def best_tokens(peer: Contestant, text: Sequence[int]) -> list[int]:
    """The likeliest next token at each position of a text, read in pieces."""
    best: list[int] = []
    for begin in range(0, len(text), CHUNK):
        best += peer.process.ask("best_tokens", token_ids=list(text[begin : begin + CHUNK]))
    return best


def agreement(text: Sequence[int], reference: Sequence[int]) -> Row:
    """At how many positions of a text a peer's best token is the reference's."""

    def measure(peer: Contestant, _: int) -> float:
        return 100 * float(np.mean(np.array(best_tokens(peer, text)) == np.array(reference)))

    return Row("best token as in float32", "%", measure, once=True)
