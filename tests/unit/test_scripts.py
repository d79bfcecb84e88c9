"""The measuring scripts: their options, the numbers that they derive, and the files that they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tinyllm.backends.cpu import CpuBackend

ROOT = Path(__file__).parents[2]
NAMES = (
    *("beam_blocks", "bench_history", "chunked_prefill", "cost_growth"),
    *("flash_attention", "prefix_caching", "streaming_llm"),
)

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a script as a script does: its folder stands first on the path."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module


def run_process(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# ---- options


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_measured_and_how_to_run_it(
    name: str, load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        load(name).main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python scripts/{name}.py" in text
    assert f"docs/{name}" in text


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        *((name, ["--threads", "0", "--text", "x"], "--threads") for name in NAMES),
        ("beam_blocks", ["--beams", "4", "-1"], "-1"),
        ("beam_blocks", ["--beams", "0"], "--beams"),
        ("beam_blocks", ["--what"], "--what"),
        ("bench_history", ["--from", "no/such.json"], "no/such.json"),
        ("bench_history", ["--tolerance", "1"], "--tolerance"),
        ("chunked_prefill", ["--prompt-tokens", "8e3"], "'8e3'"),
        ("chunked_prefill", ["--running", "512"], "--running"),
        ("chunked_prefill", ["--prompt", "10"], "--prompt"),  # no abbreviations
        ("cost_growth", ["--contexts", "0"], "--contexts"),
        ("cost_growth", ["--batch-sizes", "1", "x"], "--batch-sizes"),
        ("flash_attention", ["--lengths", "0"], "--lengths"),
        ("flash_attention", ["--lengths", "512", "--naive-up-to", "256"], "--naive-up-to"),
        ("prefix_caching", ["--requests", "1"], "--requests"),
        ("streaming_llm", [], "--text"),
        ("streaming_llm", ["--text", "x", "--sinks", "1024"], "--sinks"),
        ("streaming_llm", ["--text", "x", "--tokens", "1024"], "--tokens"),
        ("streaming_llm", ["--text", "x", "--bin", "20000"], "--bin"),
        ("streaming_llm", ["--text", "no/such/file"], "no/such/file"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    name: str, options: list[str], named: str, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if name == "flash_attention" else ["--model", "no/such/model"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *model, *options])
    with pytest.raises(load("measurement").MistakeError) as mistake:
        load(name).main()
    assert named in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("options", [["--requests", "many"], ["--model", "no/such/model"]])
def test_a_mistake_is_one_line_and_exit_status_2(options: list[str], tmp_path: Path) -> None:
    done = run_process("prefix_caching", "-o", str(tmp_path / "out"), *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("prefix_caching.py: error: ")
    assert options[1] in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_a_mistake(load: Load, tmp_path: Path) -> None:
    m = load("measurement")
    (tmp_path / "file").write_text("")
    for stem in (str(tmp_path / "file" / "out"), "", "/"):
        with pytest.raises(m.MistakeError):
            m.prepare_output(stem, plots=False)
    assert m.prepare_output(str(tmp_path / "new" / "v1.2"), plots=False) == tmp_path / "new" / "v1.2"
    assert list((tmp_path / "new").iterdir()) == []


def test_text_that_is_not_utf8_is_a_mistake(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"ab\xff")
    with pytest.raises(load("measurement").MistakeError, match="not UTF-8: byte 2"):
        load("streaming_llm").read_text(path)


# ---- results


def test_criteria(load: Load) -> None:
    make = load("measurement").Criterion
    assert [make("x", value, "under", 3).met for value in (2.9, 3, 3.1)] == [True, False, False]
    assert [make("x", value, "at most", 3).met for value in (2.9, 3, 3.1)] == [True, True, False]
    assert [make("x", value, "at least", 3).met for value in (2.9, 3, 3.1)] == [False, True, True]
    assert not make("x", float("nan"), "under", 3).met
    assert make("x", 1.0, "under", 3.0).facts() == {"what": "x", "value": 1.0, "under": 3.0, "met": True}


def test_json_is_whole_and_reads_back(load: Load, tmp_path: Path) -> None:
    m = load("measurement")
    facts = {"a": 1, "b": {"x": [1, 2], "y": {"z": None}}, "c": {"d": 'e"'}, "empty": {}}
    path = tmp_path / "facts.json"
    m.write_json(path, facts)
    assert json.loads(path.read_text()) == facts
    assert [line.split(":")[0].strip() for line in path.read_text().splitlines()] == [
        "{", '"a"', '"b"', '"x"', '"y"', "},", '"c"', '"empty"', "}",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="JSON"):
        m.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == facts
    assert list(tmp_path.iterdir()) == [path]


def test_facts_name_no_place_on_the_machine(load: Load, tmp_path: Path) -> None:
    m = load("measurement")
    model = tmp_path / "model.gguf"
    model.write_bytes(b"one")
    first = m.model_facts(str(model))
    assert first["name"] == "model.gguf"
    model.write_bytes(b"two")
    assert m.model_facts(str(model))["sha256"] != first["sha256"]
    assert m.machine_facts(1)["threads"] == 1
    assert not any("/" in str(value) for value in m.machine_facts(None).values())


def test_gaps_of_an_admission(load: Load) -> None:
    admission = load("chunked_prefill").Admission([[-3.0, -1.0, 0.0, 2.0, 6.0, 6.5], [0.0, 2.0, 6.0]], 6.0)
    assert admission.lengths(-float("inf"), 0.0) == [2, 1]
    assert admission.lengths(0.0, 6.0) == [2, 4, 2, 4]
    assert admission.facts() == {
        "first_token_s": 6.0,
        "median_before_s": 1.5,
        "median_during_s": 3.0,
        "longest_during_s": 4.0,
        "longest_over_median": 4 / 3,
    }


def test_unshared_blocks(load: Load) -> None:
    unshared = load("beam_blocks").unshared_blocks
    assert [unshared(4, tokens, 16) for tokens in (1, 16, 17, 575)] == [4, 4, 8, 144]


def test_positions_lie_beyond_the_cache(load: Load) -> None:
    positions = load("streaming_llm").sampled_positions(2000, 1024, 64)
    assert positions[0] == 1088
    assert (np.diff(positions) == 64).all()
    assert 2000 - 64 <= positions[-1] < 2000


def test_bins(load: Load) -> None:
    script = load("streaming_llm")
    logprobs = -np.log(np.array([4.0, 2.0, 8.0, 3.0, 3.0]))  # of the tokens 1 to 5
    assert script.bin_perplexities(logprobs, 2) == pytest.approx([4, 4, 3])
    assert script.bin_perplexities(logprobs[:-1], 2) == pytest.approx([4, 4])
    reading = script.Reading(logprobs, [], 0.0)
    positions = np.array([3, 4, 5])  # the first lies in bin 1, the others in bin 2
    assert reading.at(positions) == pytest.approx(-np.log([8, 3, 3]))
    others = reading.at(positions) + np.log([2, 3, 12])
    assert script.bin_ratios(positions, reading.at(positions), others, 2, 3) == [
        None,
        pytest.approx(2),
        pytest.approx(6),
    ]


def test_ratio_of_perplexities_and_its_interval(load: Load) -> None:
    ratio_interval = load("streaming_llm").ratio_interval
    rng = np.random.default_rng(1)
    others = rng.normal(-3, 1, 400)
    assert ratio_interval(others - np.log(1.5), others) == pytest.approx((1.5, 1.5, 1.5))
    noise = rng.normal(0, 0.3, 400)
    ratio, low, high = ratio_interval(others + noise, others)
    assert ratio == pytest.approx(np.exp(-noise.mean()))
    error = noise.std() / 20
    assert np.log([low, high]) == pytest.approx([np.log(ratio) - 1.96 * error, np.log(ratio) + 1.96 * error], abs=3e-3)


def test_growth_of_what_is_held(load: Load) -> None:
    growth = load("streaming_llm").growth
    assert growth([(10, 5), (20, 9), (30, 9), (40, 9)]) == 1
    assert growth([(10, 5), (20, 9), (30, 12), (40, 18)]) == 2


def test_saved_positions_count_for_the_same_inputs_only(load: Load, tmp_path: Path) -> None:
    script, path = load("streaming_llm"), tmp_path / "out.json"
    inputs = {"text_sha256": "ab", "tokens": 10}
    assert script.saved_logprobs(path, inputs) == {}
    facts = {"inputs": inputs, "recomputed": {"positions": [3, 5], "logprobs": [-1.5, -2.0]}}
    path.write_text(json.dumps(facts))
    assert script.saved_logprobs(path, inputs) == {3: -1.5, 5: -2.0}
    assert script.saved_logprobs(path, inputs | {"tokens": 11}) == {}
    for damaged in ("", "[]", json.dumps({"inputs": inputs}), json.dumps(facts | {"recomputed": {"positions": 1}})):
        path.write_text(damaged)
        assert script.saved_logprobs(path, inputs) == {}


def test_naive_attention_is_that_of_the_backend(load: Load) -> None:
    script = load("flash_attention")
    inputs = script.random_inputs(70)
    found, _ = script.run_tiles(CpuBackend(1), inputs)
    naive, _ = script.run_naive(inputs)
    assert script.largest_difference(found, naive) < 5e-6
    broken = (*naive[:3], naive[3] * np.float32(1.001))
    assert 5e-4 < script.largest_difference(found, broken) < 2e-3


def test_memory_of_dense_attention_is_what_the_formula_says(load: Load) -> None:
    script = load("flash_attention")
    costs, difference = script.measure(200, 2, 1, with_naive=True)
    assert difference < 5e-6
    formula, matrices = script.tiles_nbytes(200, 2), script.naive_nbytes(200)
    for part in ("forward", "both"):
        counted, expected = getattr(costs["tiles"].nbytes, part), getattr(formula, part)
        assert expected <= counted < expected + 20_000  # Python's own
        assert getattr(costs["naive"].nbytes, part) > getattr(matrices, part)
    page = script.document({200: costs}, difference, {"threads": 2, "cpu": "a", "numpy": "b"}, "name", "command")
    assert "(name.svg)" in page
    assert "| 200 |" in page


def test_pictures(load: Load, tmp_path: Path) -> None:
    save = load("measurement").save_figure
    chunked = load("chunked_prefill")
    admission = chunked.Admission([[-0.1, 0.0, 1.0, 1.1]], 1.0)
    save(chunked.draw({"one": admission, "other": admission}, 100), tmp_path / "chunked.png")
    script = load("streaming_llm")
    reading = script.Reading(np.zeros(3), [(2, 1), (4, 2)], 0.0)
    figure = script.draw(
        {"sinks": [2.0, 3.0], "recomputed": [None, 3.0]},
        {"sinks": reading},
        {"sinks": "a", "recomputed": "b"},
        bin_tokens=2,
        cache_tokens=2,
        context=8192,
        block_size=16,
    )
    save(figure, tmp_path / "streaming.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("chunked.png", "streaming.png"))
