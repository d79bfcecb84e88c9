"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinyllm.outputs import Logprob

__all__ = ["chat_logprobs", "completion_logprobs"]

LOWEST = -9999.0  # JSON has no infinity

TokenBytes = Callable[[int], bytes]


def chat_logprobs(entries: Sequence[Mapping[int, Logprob]], num_top: int, token_bytes: TokenBytes) -> dict[str, Any]:
    """Of a chat's tokens, each with its `num_top` most likely rivals."""

    def token(token_id: int, one: Logprob) -> dict[str, Any]:
        exact = token_bytes(token_id)
        return {"token": exact.decode("utf-8", "replace"), "logprob": _finite(one.logprob), "bytes": list(exact)}

    content = []
    for entry in entries:
        rivals = [token(*pair) for pair in _most_likely(entry, num_top)]
        content.append({**token(*next(iter(entry.items()))), "top_logprobs": rivals})
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[Mapping[int, Logprob] | None], num_top: int, *, offset: int, first_token: str = ""
) -> dict[str, Any]:
    """Of a completion's tokens.

    Args:
        entries: one a token; the first of a prompt has None: nothing precedes it.
        offset: where in the whole text they begin, in characters.
        first_token: the text of the token that has None.
    """
    tokens: list[str] = []
    offsets: list[int] = []
    chosen: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for entry in entries:
        offsets.append(offset)
        if entry is None:
            tokens.append(first_token)
            chosen.append(None)
            top.append(None)
        else:
            first = next(iter(entry.values()))
            tokens.append(_text(first))
            chosen.append(_finite(first.logprob))
            top.append({_text(one): _finite(one.logprob) for _, one in _most_likely(entry, num_top)})
        offset += len(tokens[-1])
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}


def _most_likely(entry: Mapping[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely tokens of an entry, which may hold the chosen one besides."""
    return sorted((pair for pair in entry.items() if pair[1].rank <= count), key=lambda pair: pair[1].rank)[:count]


def _text(one: Logprob) -> str:
    return one.decoded_token or ""


def _finite(value: float) -> float:
    return max(value, LOWEST)
