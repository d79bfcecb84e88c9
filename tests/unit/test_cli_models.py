"""The commands over real, tiny model files: info, pull, bench, score and generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli import assert_one_line
from tinyllm import bundled, hub, llm
from tinyllm.bundled import FILES, bundled_folder
from tinyllm.cli import main
from tinyllm.errors import ModelNotFoundError

MODELS = Path(__file__).parents[1] / "fixtures" / "models"
ON_REFERENCE = ["--device", "reference", "--num-blocks", "64"]


def run_json(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> Any:
    assert main([*argv, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def jsonl(tmp_path: Path, *lines: object) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# ---- info


@pytest.mark.parametrize("name", ["llama", "llama.gguf", "gpt2", "gemma3.gguf"])
def test_info_says_what_the_file_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "info", "--model", str(MODELS / name), "--tensors")
    assert facts["model"]["architecture"] == name.split(".")[0]
    assert facts["kind"] == ("gguf" if name.endswith(".gguf") else "huggingface")
    assert len(facts["tensors"]) == facts["num_tensors"] > 5
    assert sum(entry["num_tensors"] for entry in facts["formats"].values()) == facts["num_tensors"]
    assert sum(t["nbytes"] for t in facts["tensors"]) == facts["nbytes"]
    assert sum(entry["nbytes"] for entry in facts["formats"].values()) == facts["nbytes"]


def test_info_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(MODELS / "llama.gguf"), "--tensors"]) == 0
    out = capsys.readouterr().out
    facts = run_json(capsys, "info", "--model", str(MODELS / "llama.gguf"))
    assert f"context        {facts['model']['max_position']:,} tokens\n" in out
    assert f"parameters     {facts['num_parameters']:,}\n" in out
    assert "%, " in out
    assert "token_embd.weight" in out


def test_info_of_an_unknown_architecture_still_shows_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["Mamba\x1b[2J"], model_type="mamba")
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["info", "--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert "parameters" in out
    assert "\x1b" not in out + err
    assert_one_line(err, "mamba")


def test_a_truncated_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes((MODELS / "llama.gguf").read_bytes()[:-100])
    for command in ("info", "plan", "generate", "score", "bench", "chat"):
        text = ["x"] if command in ("generate", "score") else []
        assert main([command, "--model", str(path), *text]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert_one_line(err, "short.gguf")


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "no such model"]) == 2
    assert_one_line(capsys.readouterr().err, "no such model")


# ---- pull


def test_pull_lists_the_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    assert main(["pull", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(hub.MODELS)
    assert lines[0].startswith("tales-4m ") and lines[0].endswith(f"[comes with tinyllm: {bundled_folder()}]")
    assert all(line.endswith("[not downloaded]") for line in lines[1:])


def test_pull_says_where_the_bundled_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "tales-4m"]) == 0
    assert capsys.readouterr() == (f"{bundled_folder()}\n", "")


@pytest.mark.parametrize("argv", [["pull"], ["pull", "--list", "x"], ["pull", "no-such-model"]])
def test_a_wrong_pull_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert_one_line(capsys.readouterr().err)


# ---- without --model


@pytest.mark.parametrize(
    ("argv", "model"),
    [
        (["generate", "x"], "tales-4m"),
        (["score", "x"], "tales-4m"),
        (["bench"], "tales-4m"),
        (["info"], "tales-4m"),
        (["plan"], "tales-4m"),
        (["chat"], "smollm2-135m-instruct"),
    ],
)
def test_a_line_says_which_model_is_used(
    argv: list[str], model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def absent(name: str) -> None:
        asked.append(name)
        raise ModelNotFoundError("absent")

    monkeypatch.setattr(llm, "resolve", absent)
    assert main(argv) == 2
    notice, error = capsys.readouterr().err.splitlines()
    assert asked == [model]
    assert notice.startswith(f"tinyllm: no --model given: using {model}")
    assert error == "tinyllm: error: absent"


def test_the_notice_has_the_command_and_the_size_of_the_larger_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    larger = hub.MODELS[hub.LARGER_MODEL]
    assert isinstance(larger, hub.RegisteredModel)
    size = f"{larger.wheel_nbytes / 1e6:.0f} MB"
    assert capsys.readouterr().err == (
        "tinyllm: no --model given: using tales-4m, a small story model; "
        f"for a larger one: --model {larger.name} ({size}, downloaded once)\n"
    )


@pytest.mark.parametrize("missing", FILES)
def test_an_installation_without_the_bundled_model(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundled_folder(), tmp_path / "bundled")
    (tmp_path / "bundled" / missing).unlink()
    monkeypatch.setattr(bundled, "bundled_folder", lambda: tmp_path / "bundled")
    for argv in (["info", "--model", "tales-4m"], ["pull", "tales-4m"]):
        assert main(argv) == 2
        assert_one_line(capsys.readouterr().err, "tales-4m, which comes with tinyllm, is missing", missing)
    assert main(["pull", "--list"]) == 0
    assert "[missing from this installation]" in capsys.readouterr().out.splitlines()[0]


def test_a_damaged_bundled_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / name
        shutil.copytree(bundled_folder(), folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        monkeypatch.setattr(bundled, "bundled_folder", lambda folder=folder: folder)
        assert main(["generate", "--model", "tales-4m", "--device", "reference", "x"]) == 2
        assert_one_line(capsys.readouterr().err, name)


# ---- with a model that has no tokenizer


def test_generate_from_ids_on_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path, {"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [-1]}, {"prompt": "text"}, {}, {
        "prompt_token_ids": [5], "max_tokens": 2, "temperature": 0,
    })  # fmt: skip
    argv = ["generate", "--model", str(MODELS / "llama"), *ON_REFERENCE, "--input", path, "--json", "--max-tokens", "4"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [len(result["token_ids"]) for result in results] == [4, 0, 0, 0, 2]
    assert [result["finish_reason"] for result in results] == ["length", "error", "error", "error", "length"]
    errors = [line for line in err.splitlines() if line.startswith("tinyllm: error: ")]
    assert sorted(line.split(":")[3] for line in errors) == ["2", "3", "4"]
    # the same request alone gives the same tokens
    alone = jsonl(tmp_path, {"prompt_token_ids": [1, 2, 3]})
    assert main([*argv[:-5], "--input", alone, "--json", "--max-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == results[0]["token_ids"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["generate", "text"], "no tokenizer"),
        (["score", "text"], "no tokenizer"),
        (["generate", "--max-model-len", "999999", "x"], "--max-model-len"),
        (["bench", "--prompt-length", "999999"], "context"),
        (["bench", "--batch-sizes", "999", "--prompt-length", "4", "--output-length", "4"], "--max-num-seqs"),
        (["bench", "--batch-sizes", "200", "--prompt-length", "16", "--output-length", "4"], "KV blocks"),
    ],
)
def test_what_the_model_cannot_do_is_one_line(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--model", str(MODELS / "llama"), *ON_REFERENCE]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, named)


def test_bench_measures(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--model", str(MODELS / "llama"), *ON_REFERENCE, "--prompt-length", "5", "--output-length", "3"]
    report = run_json(capsys, *argv, "--batch-sizes", "1,2", "--repeats", "1")
    assert [result["batch_size"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        first, total = result["first_token_seconds"], result["all_tokens_seconds"]
        assert result["prefill_tokens_per_second"] == pytest.approx(5 * result["batch_size"] / first)
        decode_seconds = max(total - first, 1e-9)
        assert result["decode_tokens_per_second"] == pytest.approx(2 * result["batch_size"] / decode_seconds)
        assert result["total_tokens_per_second"] == pytest.approx(8 * result["batch_size"] / total)
    assert main([*argv, "--batch-sizes", "1", "--repeats", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
