"""Server-sent events: however the bytes are split, the events are those of the specification."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tinyllm.loadgen import sse
from tinyllm.loadgen.sse import ServerSentEvent, SSEError, SSEParser


def events_of(text: bytes) -> list[ServerSentEvent]:
    """The specification, over all of a stream at once."""
    lines = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    events, kind, data = [], b"", b""
    for line in lines:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                events.append(ServerSentEvent(kind or b"message", data.removesuffix(b"\n")))
            kind, data = b"", b""
        elif name == b"data":
            data += value + b"\n"
        elif name == b"event":
            kind = value
    return events


PIECES = st.sampled_from(
    [
        *(b"data: ", b"data:", b"data", b"event: error", b"event:", b"id: 3", b"retry: 10", b": keep-alive", b":"),
        *(b"\n", b"\n", b"\n\n", b"\r\n", b"\r\n\r\n", b"\r", b"\r\r", b" ", b"x", b'{"a": 1}', b"[DONE]"),
        *(b"\xef\xbb\xbf", "é".encode(), b"\x00"),
    ]
)


@given(st.lists(PIECES, max_size=40).map(b"".join), st.lists(st.integers(0, 200), max_size=12))
def test_any_split_gives_the_same_events(text: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    parser, found, begin = SSEParser(), [], 0
    for end in ends:
        found += parser.feed(text[begin:end])
        begin = end
    assert found == events_of(text)
    parser = SSEParser()
    assert [one for byte in text for one in parser.feed(bytes([byte]))] == found


def test_what_servers_send() -> None:
    text = b': ping\n\ndata: {"a":\ndata:  1}\n\nevent: error\ndata: x\n\ndata\n\ndata: [DONE]\n\ndata: unfinished\n'
    assert SSEParser().feed(text) == [
        (b"message", b'{"a":\n 1}'),
        (b"error", b"x"),
        (b"message", b""),
        (b"message", b"[DONE]"),
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_lines_of_one_event_stay_together(end: bytes) -> None:
    text = end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    for cut in range(len(text)):
        parser = SSEParser()
        assert [*parser.feed(text[:cut]), *parser.feed(b""), *parser.feed(text[cut:])] == [
            (b"message", b"a\nb"),
            (b"message", b"c"),
        ]


def test_an_event_comes_with_its_last_byte_and_not_later() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: a\r\n\r") == [(b"message", b"a")]
    assert parser.feed(b"\ndata: b\r\r") == [(b"message", b"b")]


def test_events_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_NBYTES", 1000)
    for line in (b"data: " + b"x" * 60 + b"\n", b"x" * 60):
        parser, kept = SSEParser(), len(line)
        while kept <= 1000:
            assert parser.feed(line) == []
            kept += len(line)
        with pytest.raises(SSEError):
            parser.feed(line * 2)
    parser = SSEParser()
    for _ in range(100):  # it is the single event that is bounded, not the stream, nor its comments
        assert len(parser.feed(b": ping\ndata: " + b"x" * 60 + b"\n\n")) == 1
        parser.feed(b": ping\n")
