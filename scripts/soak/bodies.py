"""What the clients ask: requests whose answers are known, long ones to leave, and bodies that are wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from soak.wire import post, request

__all__ = ["Ask", "asks", "large", "malformed"]

_TEXT = "once there was a little dog who lived by the sea and wanted to find his red ball again"
_WORDS = _TEXT.split()


@dataclass(frozen=True, eq=False)
class Ask:
    """A request that gives the same answer each time."""

    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def whole(self) -> Ask:
        """The same, not as a stream."""
        return Ask(self.path, {k: v for k, v in self.body.items() if k not in ("stream", "stream_options")})

    def to_bytes(self) -> bytes:
        return post(self.path, self.body)


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(low, high)))


def asks(rng: random.Random, count: int) -> list[Ask]:
    """A mix of all that can be asked. Each is greedy or has a seed: its bits are its own, whatever else runs."""
    return [_ask(rng, index) for index in range(count)]


def _ask(rng: random.Random, index: int) -> Ask:
    kind = ("chat", "chat_stream", "text", "text_stream", "n", "beams", "embed", "tokens", "many", "window")[index % 10]
    sampling = rng.choice([{"temperature": 0}, {"temperature": 0.9, "seed": index, "top_p": 0.95}])
    fields: dict[str, Any] = {"max_tokens": rng.randint(4, 80), **sampling}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    if kind.startswith("chat"):
        messages = [{"role": "user", "content": _words(rng, 2, 40)}]
        body = {"messages": messages, **fields, "logprobs": True, "top_logprobs": rng.randint(0, 5)}
        return Ask("/v1/chat/completions", body | (stream if kind == "chat_stream" else {}))
    if kind == "embed":
        return Ask("/v1/embeddings", {"input": [_words(rng, 1, 60) for _ in range(rng.randint(1, 4))]})
    if kind == "tokens":
        return Ask("/tokenize", {"prompt": _words(rng, 1, 200)})
    body = {"prompt": _words(rng, 1, 120), **fields, "logprobs": rng.randint(0, 5)}
    if kind == "text_stream":
        body |= stream
    elif kind == "n":
        body |= {"n": rng.randint(2, 4), "temperature": 1, "seed": index, **rng.choice([stream, {}])}
    elif kind == "beams":
        body |= {"beams": rng.randint(2, 4), "max_tokens": rng.randint(4, 30)}
        del body["logprobs"]
    elif kind == "many":
        body |= {"prompt": [_words(rng, 1, 20) for _ in range(3)], "cache_salt": str(index)}
    elif kind == "window":
        body |= {"window": 32, "sinks": 4, "ignore_eos": True}
    return Ask("/v1/completions", body)


def large(rng: random.Random) -> Ask:
    """A stream of more bytes than the sockets between hold."""
    body = {"prompt": _words(rng, 1, 20), "max_tokens": 200, "n": 4, "ignore_eos": True, "logprobs": 20, "stream": True}
    return Ask("/v1/completions", {**body, "seed": rng.randrange(100)})


def malformed(rng: random.Random) -> bytes:
    """Bytes that deserve a refusal."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"])
    bodies = [
        b"",
        b"{",
        b"[" * 5000,
        b'{"prompt": [' + b"null," * 5000 + b"0]}",
        b'{"prompt": "\\ud800", "messages": 1, "input": {}}',
        b'{"prompt": "a", "max_tokens": 1e400}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "no_such_field": 1}',
        b'{"prompt": "a", "temperature": -1, "n": 1000000}',
        b'{"prompt": "a", "logit_bias": {"99999999": 1}}',
        bytes(rng.randrange(256) for _ in range(200)),
    ]
    whole = [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 400_000 + b"\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        request("GET", "/no/such/path"),
        request("DELETE", "/v1/models"),
    ]
    return rng.choice([*(request("POST", path, body) for body in bodies), *whole])
