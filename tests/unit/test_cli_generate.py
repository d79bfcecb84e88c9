"""`generate` and `score` over a model whose answers are known."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_llm import LIMIT, FakeLLM
from tinyllm.cli import main, options
from tinyllm.cli.generate import _OrderedWriter
from tinyllm.cli.progress import PromptProgress


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr(options, "load_llm", lambda args: fake)
    return fake


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_text_goes_to_stdout_and_statistics_to_stderr(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "once"]) == 0
    out, err = capsys.readouterr()
    assert out == "ONCE\n"
    assert "prompt 4 tokens" in err
    assert "generated 4 tokens" in err
    assert "first token after" in err
    assert "weights 3.0 MiB, KV cache 1.0 MiB for 100 tokens" in err


def test_options_reach_the_sampling_parameters(llm: FakeLLM) -> None:
    argv = "generate once --max-tokens 3 --temperature 0 --top-p .5 --top-k 7 --min-p .1 --seed 9 --n 2 --ignore-eos"
    assert main([*argv.split(), "--stop", "a", "--stop", "b", "--repetition-penalty", "1.1"]) == 0
    ((_, params),) = llm.seen
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (3, 0, 0.5, 7)
    assert (params.min_p, params.seed, params.n, params.ignore_eos) == (0.1, 9, 2, True)
    assert (params.stop, params.repetition_penalty) == (("a", "b"), 1.1)


def test_the_defaults_are_reproducible_sampling(llm: FakeLLM) -> None:
    assert main(["generate", "once"]) == 0
    ((_, params),) = llm.seen
    assert (params.temperature, params.seed, params.max_tokens, params.n) == (0.7, 0, 200, 1)


def test_quiet_says_nothing(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-q", "once"]) == 0
    assert capsys.readouterr().err == ""


def test_samples_come_in_order_though_they_interleave(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-q", "--n", "3", "abc"]) == 0
    out = capsys.readouterr().out
    assert out == "==> sample 1/3 <==\nABC\n==> sample 2/3 <==\n111\n==> sample 3/3 <==\n222\n"


def test_the_first_sample_streams_while_the_others_wait(capsys: pytest.CaptureFixture[str]) -> None:
    writer = _OrderedWriter(2)
    capsys.readouterr()
    writer.add(1, "later", finished=True)
    assert capsys.readouterr().out == ""
    writer.add(0, "now", finished=False)
    assert capsys.readouterr().out == "now"
    writer.add(0, "\n", finished=True)
    assert capsys.readouterr().out == "\n==> sample 2/2 <==\nlater\n"


def test_several_prompts_are_separated_and_in_order(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-q", "abc", "d\x1be"]) == 0
    out = capsys.readouterr().out
    assert out == "==> prompt 1/2: abc <==\nABC\n\n==> prompt 2/2: d\\x1be <==\nD\x1bE\n\n"


def test_options_may_stand_between_prompts(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--n", "1", "a", "-q", "b", "--seed", "3", "c"]) == 0
    assert capsys.readouterr().out.split("\n")[1::3] == ["A", "B", "C"]


def test_one_bad_prompt_leaves_the_others(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-q", "abc", "", "x" * LIMIT, "boom", "def"]) == 2
    out, err = capsys.readouterr()
    assert out == "==> prompt 1/5: abc <==\nABC\n\n==> prompt 5/5: def <==\nDEF\n\n"
    assert err.splitlines() == [
        "tinyllm: error: prompt 2: the prompt is empty",
        f"tinyllm: error: prompt 3: the prompt has {LIMIT} tokens; the model's context holds {LIMIT}",
        "tinyllm: error: prompt 4: a logits processor failed",
    ]


def test_json_has_one_object_a_prompt(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", "ab", "", "cd"]) == 2
    first, bad, last = objects(capsys.readouterr().out)
    assert first == {
        "index": 0,
        "prompt": "ab",
        "prompt_token_ids": [97, 98],
        "text": "AB",
        "token_ids": [65, 66],
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert (bad["index"], bad["text"], bad["token_ids"], bad["finish_reason"]) == (1, "", [], "error")
    assert bad["error"] == "prompt 2: the prompt is empty"
    assert (last["index"], last["text"]) == (2, "CD")


def test_json_of_several_samples_lists_them(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", "--n", "2", "ab"]) == 0
    (result,) = objects(capsys.readouterr().out)
    assert result["text"] == "AB"
    assert [sample["text"] for sample in result["outputs"]] == ["AB", "AB"]
    assert {"text", "token_ids", "finish_reason", "stop_reason"} == set(result["outputs"][0])


def test_jsonl_input(llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "abc", "max_tokens": 1}\nnonsense\n{"prompt_token_ids": [-1]}\n{"prompt_token_ids": [100, 101]}\n'
        '{"prompt_token_ids": [1.5]}\n{"prompt": "' + "x" * LIMIT + '"}\n{"prompt": ""}\n'
    )
    assert main(["generate", "--json", "-q", "--input", str(path)]) == 2
    out, err = capsys.readouterr()
    results = objects(out)
    assert [r["index"] for r in results] == list(range(7))
    assert [r["text"] for r in results] == ["A", "", "", "DE", "", "", ""]
    lines = err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [f"{path}:{n}" for n in (2, 3, 5, 6, 7)]
    assert all(line.startswith("tinyllm: error: ") for line in lines)


def test_nothing_is_loaded_when_every_prompt_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("nonsense\n")
    assert main(["generate", "--model", "no/such", "--input", str(path)]) == 2
    assert "p.jsonl:1: invalid JSON" in capsys.readouterr().err


def test_a_single_bad_line_names_its_place(llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt_token_ids": [2147483648]}\n')
    assert main(["generate", "--input", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tinyllm: error: {path}:1: a prompt token id")


def test_a_piped_prompt(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    assert main(["generate", "-q"]) == 0
    assert capsys.readouterr().out == "HELLO\n"


def test_a_terminal_on_stdin_is_not_waited_for(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal())
    assert main(["generate"]) == 2
    assert "no prompt given" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", "-q", "a\x1b[2Jb"]) == 0
    assert terminal.getvalue() == "A\\x1b[2JB\n"


def test_text_that_stdout_cannot_encode_is_replaced(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["generate", "-q", "aé"]) == 0
    assert raw.getvalue() == b"A?\n"


def test_the_progress_bar_counts_prompts(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["generate", "ab", "cd"]) == 0
    assert re.findall(r"(\d+)/2\b", terminal.getvalue())[-1] == "2"
    assert "4 tokens" in terminal.getvalue()


def test_no_bar_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with PromptProgress(3, shown=True) as progress, progress.paused():
        progress.advance(5)
    assert capsys.readouterr() == ("", "")


# ---- score


def test_score_lists_tokens_and_totals(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "a\nb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["-", "97", "'a'"]
    assert lines[1].split() == ["-0.5000", "10", r"'\n'"]
    assert lines[2].split() == ["-0.5000", "98", "'b'"]
    assert lines[3] == "3 tokens, log-probability -1.0000, perplexity 1.6487"


def test_score_as_json(llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab\n")
    assert main(["score", "--json", "--file", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["token_ids"] == [97, 98]
    assert result["token_texts"] == ["a", "b"]
    assert result["logprobs"] == [None, -0.5]
    assert result["total_logprob"] == -0.5
    assert result["perplexity"] == pytest.approx(1.64872, rel=1e-5)


def test_score_reads_stdin(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["score"], ["score", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"xy\n")))
        assert main(argv) == 0
        assert "2 tokens" in capsys.readouterr().out
