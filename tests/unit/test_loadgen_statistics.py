"""From the chunks of streams to the figures of a report; all times are given, none is measured."""

from __future__ import annotations

import json
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.unit.fake_openai import DONE, chunk, event, usage
from tinyllm.loadgen.completion import BodyReader, CompletionReader, error_message
from tinyllm.loadgen.errors import HTTPError, LoadError
from tinyllm.loadgen.measurements import Measurements
from tinyllm.loadgen.record import INTERRUPTED, RequestRecord
from tinyllm.loadgen.report import format_report
from tinyllm.loadgen.statistics import Goodput, summarize


def record(times: list[float], **fields: Any) -> RequestRecord:
    """Sent after 1 s; it ends with the last of its chunks."""
    base: dict[str, Any] = {"index": 0, "sent": 1.0, "late": 0.0, "end": times[-1] if times else None}
    return RequestRecord(**(base | fields), times=array("d", times))


def read(*parts: tuple[float, bytes]) -> CompletionReader:
    reader = CompletionReader()
    reader.on_head(200, {"content-type": "text/event-stream; charset=utf-8"})
    for now, data in parts:
        reader.on_body(data, now)
    return reader


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_percentiles(values: list[float]) -> None:
    summary = summarize(values)
    assert summary is not None
    ordered = sorted(values)
    for p, found in ((50, summary.p50), (95, summary.p95), (99, summary.p99)):
        place = p / 100 * (len(values) - 1)  # the definition, by hand
        low = int(place)
        high = min(low + 1, len(values) - 1)
        assert found == pytest.approx(ordered[low] + (place - low) * (ordered[high] - ordered[low]), abs=1e-6)
    assert summary.p95 == float(np.percentile(values, 95))
    assert (summary.count, summary.min, summary.max) == (len(values), min(values), max(values))
    assert summary.mean == pytest.approx(sum(values) / len(values))


def test_nothing_has_no_summary() -> None:
    assert summarize([]) is None
    assert summarize(array("d")) is None


def test_times_of_a_stream() -> None:
    reader = read(
        (1.0, event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})),
        (2.0, chunk("a", chat=True)[:9]),
        (2.5, chunk("a", chat=True)[9:]),
        (3.0, b": ping\n\n"),
        (4.0, chunk("", chat=True)),  # a token without a text of its own
        (4.5, chunk("b", chat=True) + chunk("c", chat=True)),
        (5.0, chunk("", "stop", chat=True)),
        (6.0, usage(11, 5, cached=8) + DONE + chunk("after the end", chat=True)),
    )
    assert reader.times.tolist() == [2.5, 4.0, 4.5, 4.5]
    assert (reader.end, reader.complete) == (6.0, True)
    assert (reader.prompt_tokens, reader.cached_tokens, reader.output_tokens) == (11, 8, 5)


def test_what_is_output_and_what_is_not() -> None:
    output = [
        {"text": "a"},
        {"text": ""},
        {"text": "a", "finish_reason": "stop"},
        {"delta": {"content": "a", "role": "assistant"}},
        {"delta": {"reasoning_content": "hm"}},
        {"delta": {"content": None, "tool_calls": [{}]}},
    ]
    none = [{"text": "", "finish_reason": "stop"}, {"delta": {}}, {"delta": {"role": "assistant"}}, {"text": None}, {}]
    none += [{"delta": {"content": ""}, "finish_reason": "length"}, {"delta": None}]
    for choice in output:
        assert len(read((1.0, event({"choices": [choice]}))).times) == 1, choice
    for choice in none:
        assert len(read((1.0, event({"choices": [choice]}))).times) == 0, choice


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"data: {\n\n", "protocol"),
        (b"data: \xff\n\n", "protocol"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "protocol"),
        (event([]), "protocol"),
        (event({"choices": 3}), "protocol"),
        (event({"choices": [3]}), "protocol"),
        (event({"usage": 3}), "protocol"),
        (b"data: " + b"x" * (2 << 20), "protocol"),
        (event({"error": {"message": "out of memory", "code": 500}}), "error event"),
        (b"event: error\ndata: {}\n\n", "error event"),
    ],
)
def test_events_that_end_a_stream(data: bytes, kind: str) -> None:
    with pytest.raises(HTTPError) as caught:
        read((1.0, data))
    assert caught.value.kind == kind
    assert str(caught.value)


def test_a_stream_is_complete_with_done_or_a_reason() -> None:
    assert not read((1.0, chunk("a"))).complete
    assert read((1.0, chunk("a")), (2.0, chunk("", "stop"))).complete
    assert read((1.0, chunk("a")), (2.0, DONE)).complete


def test_counts_that_are_none_are_left_out() -> None:
    reader = read((1.0, event({"usage": {"prompt_tokens": "7", "completion_tokens": True}})), (2.0, usage(3, 4)))
    assert (reader.prompt_tokens, reader.output_tokens) == (3, 4)
    assert read((1.0, event({"usage": {"completion_tokens": -1}}))).output_tokens is None


def test_a_whole_body_is_bounded() -> None:
    reader = BodyReader()
    for _ in range(8):
        reader.on_body(b"x" * (1 << 20), 0.0)
    with pytest.raises(HTTPError, match="larger"):
        reader.on_body(b"x", 0.0)


def test_messages_of_errors() -> None:
    assert error_message(b'{"error": {"message": "no"}}') == "no"
    assert error_message(b'{"error": "no"}') == "no"
    assert error_message(b'{"detail": "no"}') == "no"
    assert error_message(b"<html>") == "<html>"
    assert error_message(b"") == ""
    assert error_message(b"[" * 100_000) == "[" * 200


def test_figures_of_one_request() -> None:
    one = record([1.5, 1.6, 1.9, 2.0], end=2.1, reported_tokens=7)
    assert one.ttft == pytest.approx(0.5)
    assert one.e2el == pytest.approx(1.1)
    assert one.tpot == pytest.approx(0.6 / 6)
    assert one.gaps() == pytest.approx([0.1, 0.3, 0.1])
    assert record([1.5, 2.5], end=2.5).tpot == pytest.approx(1.0)  # chunks, where the server counts nothing
    assert record([1.5], end=1.6).tpot is None
    failed = record([1.5, 1.6], error="disconnected")
    assert (failed.e2el, failed.tpot) == (None, None)
    assert record([]).ttft is None
    json.dumps(one.as_json())


def test_measurements() -> None:
    measured = Measurements(Goodput.parse("ttft:600,gap:250"))
    measured.begin, measured.end = 0.0, 4.0
    measured.add(record([1.5, 1.6, 1.7, 1.8], reported_tokens=4, prompt_tokens=10, cached_tokens=6))
    measured.add(record([1.5, 1.6, 1.9, 2.0], reported_tokens=4, prompt_tokens=10))  # a gap of 300 ms
    measured.add(record([2.0, 2.1], reported_tokens=2, refusals=2))  # its first token after 1 s
    measured.add(record([1.5, 9.0], error="disconnected", message="gone"))
    measured.add(record([], error="HTTP 429", message="full", refusals=1))
    measured.add(record([], error="HTTP 429", message="still full", refusals=1))
    measured.add(record([1.25, 1.5], error=INTERRUPTED))
    report = measured.as_json()
    assert report["requests"] == {"completed": 3, "failed": 3, "interrupted": 1, "refusals": 4}
    assert report["errors"] == {
        "disconnected": {"count": 1, "first": "gone"},
        "HTTP 429": {"count": 2, "first": "full"},
    }
    assert report["requests_per_second"] == 0.75
    assert (report["output_tokens"], report["chunks"]) == (12, 12)
    assert report["output_tokens_per_second"] == 3.0
    assert report["output_tokens_counted_by"] == "both"  # the interrupted one had no usage yet
    assert (report["prompt_tokens"], report["cached_prompt_tokens"]) == (20, 6)
    assert report["goodput"] == {
        "limits_ms": {"ttft": 600.0, "gap": 250.0},
        "requests": 1,
        "share": pytest.approx(1 / 6),
        "requests_per_second": 0.25,
    }
    assert report["ttft_seconds"]["count"] == 4
    assert report["ttft_seconds"]["min"] == pytest.approx(0.25)  # of the interrupted one
    assert report["ttft_seconds"]["max"] == pytest.approx(1.0)
    assert report["itl_seconds"]["count"] == 8
    assert report["itl_seconds"]["max"] == pytest.approx(0.3)  # not that of the failed one
    assert report["e2el_seconds"]["count"] == 3
    assert report["longest_gap_seconds"]["count"] == 4
    assert report["longest_to_median_gap"]["max"] == pytest.approx(3.0)
    assert report["late_seconds"]["count"] == 7
    text = format_report(report | {"client": {"cpu_microseconds_per_chunk": 12.3}})
    assert "3 requests completed, 3 failed, 1 interrupted, 4 answers 429 in 4.00 s: 0.75 requests/s" in text
    assert "goodput (ttft 600 ms, gap 250 ms): 0.25 requests/s, 16.7% of requests" in text
    assert "failed: 2 x HTTP 429 (the first: full)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("time to first token")]
    assert row.split()[-2:] == ["250.00", "1000.00"]


def test_a_report_of_nothing() -> None:
    report = Measurements(Goodput.parse("")).as_json()
    json.dumps(report, allow_nan=False)
    text = format_report(report | {"client": {"cpu_microseconds_per_chunk": None}})
    assert "0 requests completed, 0 failed in 0.00 s: - requests/s" in text
    assert report["goodput"]["requests"] is None
    assert report["output_tokens_counted_by"] == "nothing"


def test_chunks_are_counted_where_the_server_does_not() -> None:
    measured = Measurements(Goodput.parse(""))
    measured.add(record([1.5, 1.6, 1.7]))
    assert (measured.output_tokens, measured.counted_by) == (3, "chunks")
    measured = Measurements(Goodput.parse(""))
    measured.add(record([1.5, 1.6, 1.7], reported_tokens=9))
    assert (measured.output_tokens, measured.counted_by) == (9, "usage")


def test_gaps_of_nothing_have_no_ratio() -> None:
    measured = Measurements(Goodput.parse(""))
    measured.add(record([1.5, 1.5, 1.5]))  # all in one packet
    report = measured.as_json()
    assert report["longest_gap_seconds"]["max"] == 0.0
    assert report["longest_to_median_gap"] is None


def test_kinds_of_errors_are_bounded() -> None:
    measured = Measurements(Goodput.parse(""))
    for status in range(500):
        measured.add(record([], error=f"HTTP {status}"))
    assert len(measured.errors) <= 101
    assert measured.errors.total() == 500


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        *(("", True), ("ttft:500", True), ("ttft:499", False), ("tpot:250", True), ("tpot:249.9", False)),
        *(("e2el:1250", True), ("e2el:1249", False), ("gap:500", True), ("gap:499", False)),
        *(("ttft:500, tpot:250 ,e2el:1250", True), ("ttft:500,tpot:1", False), ("ttft:1,tpot:1000", False)),
    ],
)
def test_goodput(limits: str, good: bool) -> None:
    goodput = Goodput.parse(limits)
    assert goodput.is_met(record([1.5, 2.0, 2.25, 2.25])) is good
    assert not goodput.is_met(record([1.5], error="timeout"))


def test_goodput_of_little() -> None:
    assert Goodput.parse("tpot:1,gap:1").is_met(record([1.5]))
    assert not Goodput.parse("ttft:1000000").is_met(record([], end=1.1))


@pytest.mark.parametrize(
    "text", ["ttft", "ttft:", "ttft:-1", "itl:5", "ttft:1,ttft:2", "ttft:nan", ",", "ttft:1;tpot:2"]
)
def test_limits_that_cannot_be(text: str) -> None:
    with pytest.raises(LoadError, match="--goodput"):
        Goodput.parse(text)
