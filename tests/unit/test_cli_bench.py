"""`tinyllm bench`: decoding at contexts, and the facts that results are compared by."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.backends import cpu_limits
from tinyllm.backends.cpu import CpuBackend
from tinyllm.cli import bench, facts, main, throughput
from tinyllm.llm import LLM

LLAMA = str(Path(__file__).parents[1] / "fixtures" / "models" / "llama")
SHORT = ["--prompt-length", "5", "--output-length", "4", "--batch-sizes", "1", "--repeats", "2", "--num-blocks", "64"]


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["bench", "--model", LLAMA, *SHORT, *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_report_says_what_was_measured_where_and_when(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_limits, "MAX_BUFFER_NBYTES", 1 << 22)
    report = run_json(capsys, "--device", "cpu", "--threads", "1", "--contexts", "7,20")
    assert report["model"] == facts.model_facts(LLAMA)
    assert report["model"]["name"] == "llama"
    assert report["backend"] == "cpu"
    machine = report["machine"]
    assert (machine["threads"], machine["tinyllm"]) == (1, tinyllm.__version__)
    assert {"cpu", "numba", "numpy"} <= machine.keys()
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    assert report["others_cpu_share"] is None or 0 <= report["others_cpu_share"] <= 1
    assert report["memory_read_bytes_per_second"] > 0
    (batch,) = report["results"]
    assert len(batch["first_token_seconds_runs"]) == len(batch["all_tokens_seconds_runs"]) == 2
    assert [one["context"] for one in report["contexts"]] == [7, 20]
    for one in report["contexts"]:
        assert one["decode_tokens_per_second"] == pytest.approx(1 / one["step_seconds"])
        assert len(one["step_seconds_runs"]) == 2
        seconds = one["step_nbytes"] / report["memory_read_bytes_per_second"]
        assert one["share_of_memory_limit"] == pytest.approx(seconds / one["step_seconds"])
    first, second = (one["step_nbytes"] for one in report["contexts"])
    assert first > report["step_weights_nbytes"]
    assert second > first


def test_the_memory_of_other_devices_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--device", "reference", "--contexts", "7")
    assert report["memory_read_bytes_per_second"] is None
    assert report["contexts"][0]["share_of_memory_limit"] is None
    assert run_json(capsys, "--device", "reference")["contexts"] == []


def test_contexts_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", LLAMA, *SHORT, "--device", "reference", "--contexts", "7,20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["batch", "1", "context", "7", "20"]


@pytest.mark.parametrize(("contexts", "named"), [("0", "--contexts"), ("1,x", "--contexts"), ("999999", "context")])
def test_contexts_that_cannot_be(contexts: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", LLAMA, *SHORT, "--device", "reference", "--contexts", contexts]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err.splitlines()[-1]


def test_decode_times_steps_and_leaves_nothing_behind() -> None:
    engine = LLM(LLAMA, device="reference", num_blocks=64, max_batch_tokens=16).engine
    prompts = [list(range(1, 12)), list(range(2, 22)), [5, 6, 7]]
    run = throughput.decode(engine, prompts, 5)
    assert len(run.seconds) == 5
    # Prefill takes more than one step here, and who is done with it goes on meanwhile; the token made last is seen too.
    assert all(context >= len(prompt) + 1 + 2 for context, prompt in zip(run.contexts, prompts, strict=True))
    assert throughput.decode(engine, prompts[:1], 4).contexts == [11 + 1 + 2]
    assert not engine.has_unfinished_requests()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_memory(threads: int) -> None:
    meter = cpu_limits.ReadMeter(CpuBackend(threads), 3_000_000)
    assert meter.nbytes == 3 << 20
    assert meter.measure(2) > 0


def test_the_buffer_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_limits, "_CACHES", tmp_path)
    assert cpu_limits.buffer_nbytes() == 1 << 30  # not known
    for index, size in enumerate(("48K", "2048K", "32M", "what")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cpu_limits.buffer_nbytes() == 128 << 20
    (tmp_path / "index2" / "size").write_text("307200K\n")
    assert cpu_limits.buffer_nbytes() == 1 << 30


def test_the_share_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 40.0, 10.0), (120.0, 45.0, 20.0)])  # in all, idle, own
    monkeypatch.setattr(facts, "_cpu_seconds", lambda: next(readings))
    assert facts.OthersMeter().share() == pytest.approx(5 / 20)
    monkeypatch.setattr(facts, "_cpu_seconds", lambda: None)
    assert facts.OthersMeter().share() is None


def test_numbers_of_an_option() -> None:
    assert bench._integers("--contexts", "1,20", 20) == [1, 20]
    for wrong in ("", "1,,2", "1.5", "0", "21"):
        with pytest.raises(bench.UsageError, match="--contexts"):
            bench._integers("--contexts", wrong, 20)
