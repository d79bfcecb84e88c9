"""scripts/cost_growth.py and scripts/roofline.py: the limits, the points, and what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tinyllm.backends import cpu_limits
from tinyllm.backends.cpu import CpuBackend
from tinyllm.costs import multiply_adds, step_nbytes
from tinyllm.errors import ConfigError
from tinyllm.llm import LLM

ROOT = Path(__file__).parents[2]
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a script as a script does: its folder stands first on the path."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_measured(threads: int, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = load("roofline")
    monkeypatch.setattr(roofline, "STEPS", 256)
    meter = roofline.LimitMeter(CpuBackend(threads), 1 << 20, 2 << 20, passes=1)
    meter.measure()
    meter.measure()
    best, facts = meter.best(), meter.facts()
    for name in ("read", "reread", "fma"):
        values = [getattr(one, name) for one in meter.rounds]
        assert len(values) == 2 and min(values) > 0
        assert getattr(best, name) == max(values)
        assert facts[f"{name}_per_s"]["best"] == round(max(values))
        assert facts[f"{name}_per_s"]["least_of_rounds"] == round(min(values))
    assert (facts["read_nbytes"], facts["reread_nbytes"]) == (2 << 20, 1 << 20)


def test_the_roofline_is_the_longer_time(load: Load) -> None:
    limits = load("roofline").Limits(read=100.0, reread=200.0, fma=1000.0)
    assert limits.memory_seconds(50) == 0.5
    assert limits.compute_seconds(250) == 0.25
    assert limits.seconds(50, 250) == 0.5
    assert limits.seconds(50, 2500) == 2.5


def test_quartiles_and_what_a_token_takes(load: Load) -> None:
    script = load("cost_growth")
    cost = script.Cost(50, 250, [9, 11], [4.0, 1.0, 2.0, 3.0, 5.0])
    assert cost.quartiles() == (2.0, 3.0, 4.0)
    facts = cost.facts(load("roofline").Limits(100.0, 200.0, 1000.0))
    assert facts["step_s"] == [3.0, 2.0, 4.0]
    assert (facts["sequences"], facts["mean_context"], facts["token_s"]) == (2, 10, 1.5)
    assert facts["share_of_roofline"] == pytest.approx(0.5 / 3, abs=1e-4)
    assert script.Cost(seconds=[2.0]).quartiles() == (2.0, 2.0, 2.0)


def test_contexts_end_where_the_model_does(load: Load) -> None:
    script = load("cost_growth")
    llm = LLM("tales-4m", device="cpu", num_blocks=64)
    prompts = script.prompts_of(llm, [4, 1], [32, 900, 1024, 8192], 8)
    assert list(prompts) == [("batch", 1), ("batch", 4), ("context", 32), ("context", 900), ("context", 1014)]
    assert prompts["batch", 4][:1] == prompts["batch", 1]
    assert prompts["context", 900] == [prompts["context", 1014][0][:900]]
    assert len(script.prompts_of(llm, [1], [16], 8)["context", 16][0]) == 16


def run_main(load: Load, monkeypatch: pytest.MonkeyPatch, output: Path) -> Any:
    monkeypatch.setattr(cpu_limits, "MAX_BUFFER_NBYTES", 1 << 22)
    monkeypatch.setattr(load("roofline"), "STEPS", 256)
    options = ["--model", "tales-4m", "--batch-sizes", "1", "3", "--contexts", "20", "60", "--steps", "2"]
    monkeypatch.setattr(
        sys, "argv", ["cost_growth.py", *options, "--repeats", "2", "--threads", "1", "-o", str(output)]
    )
    load("cost_growth").main()
    assert output.with_suffix(".svg").read_text().startswith("<?xml")
    return json.loads(output.with_suffix(".json").read_text())


def test_points_are_measured_and_drawn(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("cost_growth")
    monkeypatch.setattr(script, "MODES", {"exact": {}, "int8": {"kv_dtype": "f16"}})  # a mode that there is
    facts = run_main(load, monkeypatch, tmp_path / "out")
    llm = LLM("tales-4m", device="cpu", num_blocks=8)
    for mode in ("exact", "int8"):
        assert list(facts[mode]) == ["batch 1", "batch 3", "context 20", "context 60"]
        for of_point in facts[mode].values():
            assert 0 < of_point["step_s"][1] <= of_point["step_s"][0] <= of_point["step_s"][2]
    point = facts["exact"]["context 60"]
    context = 60 + 1 + 1  # of three steps, the middle one
    assert point["mean_context"] == context
    assert point["nbytes"] == step_nbytes(llm, [context])
    assert point["multiply_adds"] == multiply_adds(llm.config, [context])
    assert point["nbytes"] > facts["int8"]["context 60"]["nbytes"]
    assert facts["exact"]["batch 3"]["sequences"] == 3


def test_a_mode_that_is_not_there_is_left_out(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("cost_growth")
    monkeypatch.setattr(script, "MODES", {"exact": {}, "int8": {"no_such_option": 1}, "other": {"kv_dtype": "f7"}})
    facts = run_main(load, monkeypatch, tmp_path / "out")
    assert {"int8", "other"}.isdisjoint(facts)
    err = capsys.readouterr().err
    assert "int8 is left out: the engine has no option no_such_option\n" in err
    assert "other is left out: kv_dtype" in err
    monkeypatch.setattr(script, "MODES", {"exact": {}})
    args = type("Args", (), {"model": "tales-4m", "threads": 1 << 20, "batch_sizes": [1], "contexts": [9], "steps": 1})
    with pytest.raises(ConfigError):
        script.load_modes(args)
