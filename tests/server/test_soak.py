"""scripts/serve_soak.py: a short run of it, and that it would say what it is to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as a script is."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("serve_soak")


def run(*options: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "serve_soak.py", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_thirty_clients_find_nothing(tmp_path: Path) -> None:
    run("--clients", "30", "--requests", "250", "--seconds", "30", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faults"] == []
    assert found["exit_status"] == 0
    assert found["requests"] >= 250
    assert found["compared_with_the_same_request_alone"] > 80
    assert found["left"]["killed"] >= 4
    assert "429" in found["refused"] and len(found["refused"]) > 1  # and some of what was malformed


def test_mistakes_are_one_line() -> None:
    for options in (["--base-url", "ftp://a"], ["--model", "no/such/model"]):
        done = run(*options, status=2)
        assert options[1] in done.stderr
        assert "Traceback" not in done.stderr


# ---- what it would find

WHOLE = {
    "choices": [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
ERROR = {"error": {"message": "no", "type": "a", "param": None, "code": None}}


def events(*texts: str) -> bytes:
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def chunk(text: str, reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": None, **more})


USAGE = json.dumps({"choices": [], "usage": {"total_tokens": 3}})
STREAMS = {
    events(chunk("a"), chunk("b", "length"), USAGE, "[DONE]"): True,
    events(chunk("a"), chunk("c", "length"), USAGE, "[DONE]"): False,  # another text
    events(chunk("a"), chunk("b", "stop"), USAGE, "[DONE]"): False,  # another end
    events(chunk("a"), chunk("b", "length"), USAGE): False,  # cut off
    events(chunk("a"), chunk("b", "length"), "[DONE]"): False,  # no usage
    events(chunk("a"), chunk("b"), USAGE, "[DONE]"): False,  # no end of a choice
    events(chunk("a"), json.dumps(ERROR)): False,
}


@pytest.mark.parametrize(("body", "right"), STREAMS.items())
def test_a_stream_that_is_cut_off_or_different_is_a_fault(soak: ModuleType, body: bytes, right: bool) -> None:
    bodies, wire, tallies = (import_module(f"soak.{name}") for name in ("bodies", "wire", "tally"))
    ask = bodies.Ask("/v1/completions", {"stream": True, "stream_options": {"include_usage": True}})
    tally = tallies.Tally()
    tally.alone[ask] = tallies.content_of(ask.whole, wire.Answer(200, {}, json.dumps(WHOLE).encode()))
    tally.note(ask, wire.Answer(200, {}, body))
    assert (not tally.faults) == right, tally.faults


@pytest.mark.parametrize(
    ("status", "headers", "body", "right"),
    [
        (400, {}, ERROR, True),
        (429, {"retry-after": "1"}, ERROR, True),
        (429, {}, ERROR, False),
        (429, {"retry-after": "0"}, ERROR, False),
        (503, {"retry-after": "soon"}, ERROR, False),
        (500, {}, ERROR, False),
        (400, {}, {"detail": "no"}, False),
        (400, {}, [], False),
        (400, {}, {"error": {**ERROR["error"], "more": 1}}, False),
    ],
)
def test_a_refusal_in_another_shape_is_a_fault(
    soak: ModuleType, status: int, headers: dict[str, str], body: Any, right: bool
) -> None:
    wire, tallies = (import_module(f"soak.{name}") for name in ("wire", "tally"))
    tally = tallies.Tally()
    tally.note_refusal(wire.Answer(status, headers, json.dumps(body).encode()), "a test")
    assert (not tally.faults) == right


def test_growth_is_from_the_second_minute_to_the_last(soak: ModuleType) -> None:
    grows = [(float(at), 100.0 + at / 10) for at in range(601)]
    assert soak.growth(grows) == (pytest.approx(109, abs=0.1), pytest.approx(157, abs=0.1))
    settles = [(float(at), 50.0 if at < 60 else 200.0) for at in range(601)]
    assert soak.growth(settles) == (200, 200)


def test_gauges_are_read_and_missed(soak: ModuleType) -> None:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    text = "".join(f'# HELP tinyllm:{name} x\ntinyllm:{name}{{model_name="a"}} 0.5\n' for name in names)
    assert set(soak.gauges(text).values()) == {0.5}
    with pytest.raises(import_module("measurement").MistakeError):
        soak.gauges("")
