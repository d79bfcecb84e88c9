"""What became of all requests."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from soak.bodies import Ask
from soak.wire import Answer

__all__ = ["Tally"]

_REFUSALS = {400, 401, 404, 405, 408, 413, 429, 431, 503}


@dataclass
class Tally:
    """Counts, and every fault that was found.

    Attributes:
        answered: whole answers, by path.
        refused: refusals in the error shape, by status.
        left: requests whose clients left before the end, by how they did it.
        faults: what must not happen, a line each.
        num_compared: answers that were compared with those of the same request alone.
    """

    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_compared: int = 0
    alone: dict[Ask, Any] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return self.answered.total() + self.refused.total() + self.left.total() + len(self.faults)

    def note(self, ask: Ask, answer: Answer) -> bool:
        """Notes an answer; whether it was one, and no refusal."""
        if answer.status != 200:
            self.note_refusal(answer, ask.path)
            return False
        try:
            found = content_of(ask, answer)
        except (ValueError, LookupError, TypeError) as error:
            self.faults.append(f"{ask.path}: an answer that is not whole: {error!r}: {answer.body[-200:]!r}")
            return False
        self.answered[f"{ask.path}{' as a stream' if ask.streams else ''}"] += 1
        if ask in self.alone:
            self.num_compared += 1
            if found != self.alone[ask]:
                self.faults.append(f"{ask.path}: other bits than alone: {ask.body}")
        return True

    def note_refusal(self, answer: Answer, what: str) -> None:
        """A refusal must have one of the statuses, and the one shape."""
        try:
            error = answer.json()["error"]
            well_formed = set(error) == {"message", "type", "param", "code"} and answer.status in _REFUSALS
            if answer.status in (429, 503):
                well_formed = well_formed and int(answer.headers["retry-after"]) >= 1
        except (ValueError, LookupError, TypeError):
            well_formed = False
        if well_formed:
            self.refused[answer.status] += 1
        else:
            self.faults.append(f"{what}: status {answer.status}: {answer.body[:200]!r}")


def content_of(ask: Ask, answer: Answer) -> Any:
    """What an answer says, without ids and times; of a stream the same as of a whole. Raises if it is not all there."""
    if not ask.streams:
        body = answer.json()
        if ask.path == "/tokenize":
            return body["tokens"]
        if ask.path == "/v1/embeddings":
            return [one["embedding"] for one in body["data"]]
        usage = body["usage"]
        if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"]:
            raise ValueError(f"usage does not add up: {usage}")
        return [_choice(one) for one in body["choices"]]
    *events, last = answer.events
    if last != "[DONE]":
        raise ValueError(f"the stream ends with {last[:200]}")
    choices: dict[int, list[Any]] = {}
    usage = None
    for event in map(json.loads, events):
        usage = event.get("usage") or usage
        for one in event["choices"]:
            text, numbers, reason = _choice(one)
            known = choices.setdefault(one["index"], ["", [], None])
            known[0] += text
            known[1] += numbers
            known[2] = reason or known[2]
    if "stream_options" in ask.body and usage is None:
        raise ValueError("the stream says nothing of its usage")
    if any(reason is None for _, _, reason in choices.values()):
        raise ValueError("a choice of the stream has no end")
    return [tuple(choices[index]) for index in sorted(choices)]


def _choice(one: dict[str, Any]) -> tuple[str, list[Any], str | None]:
    """Text, log-probabilities, and why it ended."""
    message = one.get("message") or one.get("delta") or {}
    text = one["text"] if "text" in one else message.get("content") or ""
    logprobs = one.get("logprobs")
    if logprobs is None:
        return text, [], one["finish_reason"]
    if "content" in logprobs:
        return text, logprobs["content"], one["finish_reason"]
    numbers = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
    return text, numbers, one["finish_reason"]
