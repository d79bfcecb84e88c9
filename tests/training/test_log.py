"""The log of a run, which a resumed run goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.log import Log, plot, read
from training.trainer import StepResult


def take(path: Path, first: int, last: int, validate: int = 20) -> list[str]:
    """The lines to print of the steps first + 1 to last, each of 4 tokens and of a loss that is its number."""
    log, printed = Log(path, first), []
    for step in range(first + 1, last + 1):
        printed.append(log.step(step, 4 * step, StepResult(float(step), 0.5, 0.01), (2, 3), 0.5))
        if step % validate == 0:
            printed.append(log.validation(step, 4 * step, 1.0, 0.9))
    log.close()
    return [line for line in printed if line]


def lines(path: Path) -> list[tuple[int, str]]:
    return [(entry["step"], "validation" if "validation" in entry else "loss") for entry in read(path)]


def test_a_line_for_every_tenth_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    printed = take(path, 0, 25)
    assert lines(path) == [(10, "loss"), (20, "loss"), (20, "validation")]
    assert [line.split()[:2] for line in printed] == [["step", "10"], ["step", "20"], ["step", "20"]]
    entry = read(path)[1]
    assert (entry["loss"], entry["tokens"], entry["lr"], entry["tokens_per_second"]) == (15.5, 80, 0.01, 8)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stopped", [0, 7, 9, 10, 11, 20, 30, 39])
@pytest.mark.parametrize("lost", [0, 1, 5])
def test_a_resumed_run_doubles_and_loses_no_line(stopped: int, lost: int, tmp_path: Path) -> None:
    """Also where the log is ahead of the checkpoint."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "log.jsonl"
    take(whole, 0, 45)
    take(path, 0, stopped + lost)
    take(path, stopped, 45)
    assert lines(path) == lines(whole)


@pytest.mark.parametrize("cut", range(1, 120, 13))
def test_a_last_line_that_was_cut_short_is_dropped(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    take(path, 0, 20, validate=10)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    whole = [(10, "loss"), (10, "validation"), (20, "loss"), (20, "validation")]
    assert lines(path) == whole[: content[:-cut].count(b"}")]
    take(path, 15, 20, validate=10)
    assert lines(path) == whole
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_run_from_the_beginning_has_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    take(path, 0, 30)
    take(path, 0, 10)
    assert lines(path) == [(10, "loss")]


def test_the_picture(tmp_path: Path) -> None:
    for last in (5, 45):  # of no line, and of some
        take(tmp_path / "log.jsonl", 0, last)
        plot(tmp_path / "log.jsonl", tmp_path / "loss.svg")
        assert "</svg>" in (tmp_path / "loss.svg").read_text()
