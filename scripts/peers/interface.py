"""What a peer is asked: a loaded model that answers in seconds of its own clock, in a process of its own.

A peer's module, run by worker.py with whatever Python has that program, defines

    load(model, threads, room, **options) -> Peer
    first_token(model, threads, text, **options) -> str      what a user would write, up to the first token's text
    prepare(source, target) -> None                          where the program reads a form of its own

They import the program itself when they are called, so that its absence is an answer and not a crash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Peer", "Room", "UnavailableError"]


class UnavailableError(Exception):
    """Why this program cannot run the model here, in one line."""


@dataclass(frozen=True)
class Room:
    """What a peer keeps memory for.

    Attributes:
        tokens: keys and values, those of all sequences together.
        sequences: how many at once.
    """

    tokens: int
    sequences: int


class Peer(Protocol):
    """A loaded model. Nothing that one call computes may save work in the next.

    Attributes:
        versions: of the packages that do the work.
    """

    versions: Mapping[str, str]

    def prefill(self, token_ids: list[int]) -> float:
        """Seconds from a prompt to its first greedy token."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of `steps` more greedy tokens for each prompt, all of them at once, from their first tokens on.

        The prompts have the same length. No token ends a sequence.
        """
        ...

    def best_tokens(self, token_ids: list[int]) -> list[int]:
        """The likeliest next token at each position."""
        ...
