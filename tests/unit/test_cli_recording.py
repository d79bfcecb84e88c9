"""`generate --record`, `replay` and `timeline` on the command line, over a small checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_llm import FakeLLM
from tinyllm.cli import main, options
from tinyllm.recording.reader import Recording

MODEL = Path(__file__).parents[1] / "fixtures" / "models" / "llama"
PROMPTS: list[dict[str, Any]] = [
    {"prompt_token_ids": [1, 2, 3, 4, 5] * 7, "max_tokens": 9},
    {"prompt_token_ids": [1, 2, 3, 4, 5] * 7, "max_tokens": 7, "n": 2},
    {"prompt_token_ids": [9], "max_tokens": 5, "temperature": 0},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def recording(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "run.jsonl"
    assert main(generate(prompts, path)) == 0
    capsys.readouterr()
    return path


def generate(prompts: Path, record: Path | str) -> list[str]:
    engine = ["--num-blocks", "20", "--max-batch-tokens", "32", "--device", "reference", "--quiet", "--json"]
    return ["generate", "--model", str(MODEL), "--input", str(prompts), "--record", str(record), *engine]


def one_line(err: str) -> str:
    assert err.count("\n") == 1
    return err


def test_a_recorded_run_replays(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = sum(1 for line in recording.read_text().splitlines() if '"step"' in line)
    assert main(["replay", str(recording)]) == 0
    out, err = capsys.readouterr()
    assert out == f"replayed {steps} steps, 3 requests, 28 tokens: every schedule and every logit the same\n"
    assert err == ""
    assert main(["replay", str(recording), "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "same": True,
        "steps": steps,
        "requests": 3,
        "tokens": 28,
        "notes": [],
    }


def test_recording_changes_no_output(
    tmp_path: Path, prompts: Path, recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_record = generate(prompts, tmp_path / "other.jsonl")
    assert main(with_record) == 0
    recorded = capsys.readouterr().out
    at = with_record.index("--record")
    assert main(with_record[:at] + with_record[at + 2 :]) == 0
    assert capsys.readouterr().out == recorded


def test_a_difference_is_one_line_and_status_1(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in recording.read_text().splitlines()]
    step = next(line for line in lines if line.get("step") == 4)
    recorded, step["digest"] = step["digest"], "0" * 16
    recording.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(recording)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    expected = f"the replay differs: step 4: the logits: recorded {'0' * 16}, replayed {recorded}\n"
    assert one_line(err) == f"tinyllm: {expected}"
    assert main(["replay", str(recording), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False
    assert found["difference"] == {
        "step": 4,
        "what": "the logits",
        "recorded": "0" * 16,
        "replayed": recorded,
    }


def test_stop_at_shows_what_the_engine_holds(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(recording), "--stop-at", "1"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert first[:2] == ["after 0 steps, before step 1", "queue: 3:"]
    assert "running: 0" in first
    assert "blocks of 16 tokens: 20 free of 20 (0 of those cached), 0 held (0 of those shared)" in first
    assert first[-2:] == ["step 1 will run:", "  request 1, sequence 0: tokens 0 to 31"]
    assert main(["replay", str(recording), "--stop-at", "5"]) == 0
    text = capsys.readouterr().out
    assert "before step 5" in text
    assert "(x" in text
    assert "generated: " in text
    assert main(["replay", str(recording), "--stop-at", "5", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["steps"] == 4
    assert state["next"]["step"] == 5
    assert len(state["running"]) == 4


def test_a_torn_recording_says_so(recording: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recording.write_bytes(recording.read_bytes()[:-20])
    assert main(["replay", str(recording)]) == 0
    out, err = capsys.readouterr()
    assert "every logit the same" in out
    assert "last line breaks off" in one_line(err)
    assert main(["timeline", str(recording), "-o", str(tmp_path / "x.html")]) == 0
    assert "last line breaks off" in one_line(capsys.readouterr().err)


def test_the_timeline_is_written(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "run.html"
    assert main(["timeline", str(recording), "-o", str(page)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{page}: ")
    assert "steps, 3 requests" in out
    assert err == ""
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main(["timeline", str(recording), "-o", str(page), "--steps", "2-3"]) == 0
    assert "2 steps" in capsys.readouterr().out


def test_the_recording_is_never_written_over_by_its_page(recording: Path, tmp_path: Path) -> None:
    before = recording.read_bytes()
    link = tmp_path / "link.html"
    link.symlink_to(recording)
    for output in (recording, link, recording.parent / "." / recording.name):
        assert main(["timeline", str(recording), "-o", str(output)]) == 2
    assert recording.read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["replay", "no/such.jsonl"], "no/such.jsonl"),
        (["replay", "FOREIGN"], "is not a recording"),
        (["replay", "RUN", "--stop-at", "0"], "--stop-at"),
        (["replay", "RUN", "--stop-at", "1000"], "--stop-at 1000: the recording has"),
        (["replay", "RUN", "--threads", "0"], "--threads"),
        (["replay", "RUN", "--model", "no/such/model"], "no/such/model"),
        (["replay", "RUN", "--model", str(MODEL.with_name("qwen2"))], "another model, device or version"),
        (["replay"], "FILE"),
        (["timeline", "RUN"], "--output"),
        (["timeline", "no/such.jsonl", "-o", "OUT"], "no/such.jsonl"),
        (["timeline", "FOREIGN", "-o", "OUT"], "is not a recording"),
        (["timeline", "RUN", "-o", "no/such/folder/x.html"], "cannot write no/such/folder/x.html"),
        (["timeline", "RUN", "-o", "OUT", "--steps", "3"], "--steps must be like 100-200"),
        (["timeline", "RUN", "-o", "OUT", "--steps", "3-2"], "--steps must be like 100-200"),
        (["timeline", "RUN", "-o", "OUT", "--steps", "1000-2000"], "has only"),
        (["generate", "--model", str(MODEL), "--record", "FOREIGN", "x"], "is not a recording"),
        (["generate", "--model", str(MODEL), "--record", "no/such/folder/r.jsonl", "x"], "no/such/folder/r.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], named: str, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("a novel\n")
    names = {"RUN": str(recording), "FOREIGN": str(foreign), "OUT": str(tmp_path / "out.html")}
    assert main([names.get(word, word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tinyllm: error: ")
    assert named in one_line(err)
    assert foreign.read_text() == "a novel\n"
    assert not (tmp_path / "out.html").exists()


class BrokenRecorder:
    error = "the recording run.jsonl is incomplete: No space left on device"


def test_a_recording_that_broke_off_makes_the_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is there all the same; the line about it came when it happened."""
    fake = FakeLLM()
    fake.recorder = BrokenRecorder()  # type: ignore[attr-defined]
    monkeypatch.setattr(options, "load_llm", lambda args: fake)
    assert main(["generate", "once", "--record", "run.jsonl"]) == 2
    assert capsys.readouterr().out == "ONCE\n"
    assert main(["generate", "once"]) == 0


def test_the_model_is_recorded_as_it_was_named(recording: Path) -> None:
    header = Recording(recording).header
    assert header.model == str(MODEL)
    assert header.engine["num_blocks"] == header.kv["num_blocks"] == 20
    assert header.engine["device"] == "reference"
