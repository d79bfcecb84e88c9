"""scripts/bench_history.py: entries, what is compared with what, and what counts as slower."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., int]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("bench_history")


def report(speed: float = 1.0, **changed: Any) -> dict[str, Any]:
    """As bench prints it, on a machine of some speed."""
    first, total, step = ([t / speed for t in times] for times in ([1.0, 1.1, 1.3], [2.0, 2.2, 2.5], [0.1, 0.11, 0.12]))
    batch = {"batch_size": 2, "first_token_seconds_runs": first, "all_tokens_seconds_runs": total}
    context = {"context": 32, "step_seconds": step[1], "step_seconds_runs": step, "share_of_memory_limit": 0.5}
    facts = {
        "date": "2026-01-02T03:04:05+00:00",
        "model": {"name": "m", "sha256": "ab"},
        "machine": {"cpu": "A CPU", "threads": 2},
        "backend": "cpu",
        "memory_read_bytes_per_second": 1e10,
        "others_cpu_share": 0.01,
        "prompt_length": 10,
        "output_length": 5,
        "repeats": 3,
        "engine": {"kv_dtype": "auto", "num_threads": None},
        "results": [batch],
        "contexts": [context],
    }
    return facts | changed


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    def run(entry: dict[str, Any], *options: str) -> int:
        """Feeds a report to the script; the exit status."""
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(entry)))
        monkeypatch.setattr(sys, "argv", ["x.py", "--from", "-", "-o", str(tmp_path / "history"), *options])
        with pytest.raises(SystemExit) as stop:
            script.run_script(script.main)
        return int(str(stop.value.code))

    return run


def test_metrics_are_medians_with_their_range(script: ModuleType) -> None:
    metrics = script.metrics(report())
    assert list(metrics) == ["prefill, batch 2", "decode, batch 2", "decode, context 32"]
    assert metrics["prefill, batch 2"] == script.Metric(20 / 1.1, 20 / 1.3, 20 / 1.0)
    decode = metrics["decode, batch 2"]  # (5 - 1) x 2 tokens in the difference of the two times
    assert (decode.median, decode.low, decode.high) == pytest.approx((8 / 1.1, 8 / 1.2, 8 / 1.0))
    assert metrics["decode, context 32"] == script.Metric(1 / 0.11, 1 / 0.12, 1 / 0.1)


def test_slower_is_beyond_the_tolerance_and_the_noise(script: ModuleType) -> None:
    before = script.Metric(100, 90, 110)
    for now, slower in (((96, 90, 98), False), ((94, 90, 99), True), ((94, 50, 101), False), ((120, 110, 130), False)):
        assert script.Change("x", script.Metric(*now), before).slower(0.05) is slower
    assert script.Change("x", script.Metric(94, 90, 99), before).ratio == 0.94


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": {"cpu": "Another", "threads": 2}},
        {"machine": {"cpu": "A CPU", "threads": 4}},
        {"model": {"name": "m", "sha256": "cd"}},
        {"backend": "reference"},
        {"prompt_length": 11},
        {"engine": {"kv_dtype": "f16"}},
    ],
)
def test_only_like_is_compared_with_like(changed: dict[str, Any], script: ModuleType) -> None:
    assert not script.comparable(report(), report(**changed))
    assert script.grouped([report(), report(**changed), report()]) == [[0, 2], [1]]


def test_an_option_that_was_not_there_yet_had_its_default(script: ModuleType) -> None:
    assert script.comparable(report(), report(engine={"kv_dtype": "auto", "num_threads": 2, "block_size": 16}))
    assert not script.comparable(report(), report(engine={"kv_dtype": "auto", "block_size": 32}))
    assert script.comparable(report(), report(engine={"forgotten": 1}))


def test_runs_are_kept_compared_and_drawn(
    run: Run, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "history.jsonl", tmp_path / "history.svg"
    assert run(report(), "--check") == 0
    assert "nothing to compare with" in capsys.readouterr().err
    assert not picture.exists()
    other = report(0.1, machine={"cpu": "Another", "threads": 2})
    assert run(other, "--check") == 0  # never compared with the first
    assert run(report(0.97), "--check") == 0  # within the tolerance
    assert "0.970" in capsys.readouterr().out
    assert run(report(0.5)) == 0
    assert run(report(0.5), "--check") == 0  # compared with the one before it
    assert run(report(0.2), "--check", "--no-append") == 1
    out, err = capsys.readouterr()
    assert out.count("SLOWER") == 6
    assert "slower by more than 5%: prefill, batch 2; decode, batch 2; decode, context 32\n" in err
    assert picture.read_text().startswith("<?xml")
    assert len(script.read_history(path)) == 5
    first = json.loads(path.read_text().splitlines()[0])
    assert {**first, "revision": None} == {**report(), "revision": None}


def test_a_busy_machine_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(report(others_cpu_share=0.4)) == 0
    assert "other processes took 40% of the cores' time" in capsys.readouterr().err
    assert run(report(others_cpu_share=None), "--no-append") == 0
    assert "the earlier entry: other processes took 40%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"date": ', "damaged"),
        ("[1]", "not an object"),
        ("{}", "missing"),
        (json.dumps(report(results=[{"batch_size": 2}])), "missing"),
        (json.dumps(report(results=[], contexts=[])), "nothing was measured"),
        (json.dumps(report(prompt_length="ten")), "damaged"),
        (json.dumps(report(contexts=[{"context": 1, "step_seconds": 0.1, "step_seconds_runs": [0]}])), "damaged"),
        (json.dumps(report(memory_read_bytes_per_second=float("nan"))), "NaN is not a number"),
        ("\udcff", "damaged"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_written(
    line: str, named: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "history.jsonl"
    content = f"{json.dumps(report())}\n{line}\n".encode(errors="surrogateescape")
    path.write_bytes(content)
    assert run(report()) == 2
    err = capsys.readouterr().err
    assert "history.jsonl, line 2: damaged" in err
    assert named in err
    assert err.count("\n") == 1
    assert path.read_bytes() == content


def test_a_damaged_report_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = report()
    del damaged["backend"]
    assert run(damaged) == 2
    assert "stdin: damaged: 'backend' is missing" in capsys.readouterr().err
    assert not (tmp_path / "history.jsonl").exists()


def test_a_last_line_without_its_end_stays_a_line(run: Run, script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(json.dumps(report()))
    assert run(report()) == 0
    assert len(script.read_history(tmp_path / "history.jsonl")) == 2


def test_the_benchmark_is_run_in_its_own_process(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(ROOT / "tests" / "fixtures" / "models" / "llama")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--model", model, "--repeats", "1", "--batch-sizes", "1", "--contexts", "8", "--threads", "1"]
    of_bench = ["--device", "reference", "--num-blocks", "16", "--prompt-length", "4", "--output-length", "3"]
    monkeypatch.setattr(sys, "argv", ["x.py", *options, "-o", str(tmp_path / "h"), "--", *of_bench])
    script.main()
    (entry,) = script.read_history(tmp_path / "h.jsonl")
    assert entry["backend"] == "reference"
    assert str(ROOT) not in (tmp_path / "h.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", ["x.py", *options, "-o", str(tmp_path / "h"), "--", "--device", "toaster"])
    with pytest.raises(script.MistakeError, match="status 2"):
        script.main()
    assert len(script.read_history(tmp_path / "h.jsonl")) == 1


def test_the_revision_is_a_commit_id_alone(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    revision = script.revision()
    assert revision is None or revision.removesuffix("+").isalnum()
    monkeypatch.setattr(script, "ROOT", tmp_path / "nowhere")
    assert script.revision() is None


def test_unlike_entries_are_told_apart_in_the_picture(script: ModuleType) -> None:
    other = deepcopy(report())
    other["engine"]["kv_dtype"] = "f16"
    assert script.group_label(report()) == "m, A CPU x 2"
    assert script.group_label(other) == "m, A CPU x 2, kv_dtype f16"
    assert script.memory_share(report(), "decode, context 32") == 0.5
    assert script.memory_share(report(), "decode, batch 2") is None
