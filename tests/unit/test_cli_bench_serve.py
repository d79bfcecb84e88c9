"""`tinyllm bench serve`: options, results for people and for programs, mistakes, and Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tests.unit.fake_openai import Connection, FakeServer, Request, chunk, stream
from tinyllm.cli import main

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--prompt-lengths", "3:9", "--output-lengths", "2:5", "--num-requests", "12", "--seed", "3"]


def run_json(capsys: pytest.CaptureFixture[str], url: str, *argv: str) -> Any:
    assert main(["bench", "serve", "--base-url", url, *SHORT, *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that it ends in."""
    assert main(["bench", "serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("tinyllm: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_report_says_what_was_measured_where_and_when(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        report = run_json(capsys, server.url, "--concurrency", "3", "--goodput", "ttft:100000", "--shared-prefix", "4")
    warm_up, *requests = [request.body for request in server.completions]
    assert warm_up["prompt"] == [4000, 256]
    assert len(requests) == 12
    assert len({tuple(body["prompt"][:4]) for body in requests}) == 1
    assert all(7 <= len(body["prompt"]) <= 13 and 2 <= body["max_tokens"] <= 5 for body in requests)
    tokens = sum(body["max_tokens"] for body in requests)
    assert report["requests"] == {"completed": 12, "failed": 0, "interrupted": 0, "refusals": 0}
    assert (report["output_tokens"], report["chunks"], report["output_tokens_counted_by"]) == (tokens, tokens, "usage")
    assert report["prompt_tokens"] == sum(len(body["prompt"]) for body in requests)
    assert report["output_tokens_per_second"] == pytest.approx(tokens / report["duration_seconds"])
    assert report["goodput"]["share"] == 1.0
    assert report["ttft_seconds"]["count"] == 12
    assert report["itl_seconds"]["count"] == tokens - 12
    assert report["client"]["cpu_microseconds_per_chunk"] > 0
    assert (report["server"], report["model"], report["was_interrupted"]) == (server.url, "fake", False)
    assert report["machine"]["tinyllm"] == tinyllm.__version__
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    settings = report["settings"]
    assert (settings["concurrency"], settings["rate"], settings["num_requests"], settings["seed"]) == (3, None, 12, 3)
    assert (settings["prompt_lengths"], settings["output_lengths"]) == ("3:9", "2:5")
    assert settings["goodput"] == "ttft:100000"


def test_the_same_seed_sends_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        for argv in (["--rate", "inf"], ["--concurrency", "1"], ["--rate", "5000"]):
            run_json(capsys, server.url, *argv, "--warmup", "0")
    bodies = [sorted(json.dumps(r.body) for r in server.completions[i : i + 12]) for i in (0, 12, 24)]
    assert bodies[0] == bodies[1] == bodies[2]


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: Request, connection: Connection) -> None:
        if request.number == 4:
            await connection.json(500, {"error": {"message": "a \x1b[31m bug"}})
        else:
            await stream(request, connection)

    with FakeServer(script) as server:
        argv = ["bench", "serve", "--base-url", server.url, *SHORT, "--chat", "--model", "other"]
        assert main([*argv, "--goodput", "gap:100000"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("11 requests completed, 1 failed in ")
    assert "output tokens in" in lines[1] and "as the server counts them" in lines[1]
    assert any(line.startswith("goodput (gap 100000 ms): ") and line.endswith("91.7% of requests") for line in lines)
    assert any(line.startswith("failed: 1 x HTTP 500 (the first: a ") for line in lines)
    titles = ["time to first token", "time between tokens", "time per output token", "end to end", "longest gap"]
    assert [line[: len(title)] for title in titles for line in lines if line.startswith(title)] == titles
    assert f"requests go to {server.url}/v1/chat/completions, model other" in err
    assert {request.body["model"] for request in server.completions} == {"other"}


def test_numbers_of_each_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    with FakeServer() as server:
        report = run_json(capsys, server.url, "--save", str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(12))
    assert sum(line["output_tokens"] for line in lines) == report["output_tokens"]
    assert max(line["ttft_seconds"] for line in lines) == report["ttft_seconds"]["max"]
    assert sum(len(line["gap_seconds"]) for line in lines) == report["itl_seconds"]["count"]


def test_prompts_from_a_file_each_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "max_tokens": 2}\n{"prompt_token_ids": [5, 6]}\n')
    argv = ["bench", "serve", "--input", str(file), "--output-lengths", "7", "--json", "--no-ignore-eos"]
    with FakeServer() as server:
        assert main([*argv, "--base-url", server.url, "--extra-body", '{"top_k": 3}']) == 0
    bodies = [request.body for request in server.completions]
    assert [body["prompt"] for body in bodies[:1]] == ["Hello"]
    assert sorted(str(body["prompt"]) for body in bodies[1:]) == ["[5, 6]", "one"]
    assert sorted(body["max_tokens"] for body in bodies[1:]) == [2, 7]
    assert all("ignore_eos" not in body and body["top_k"] == 3 for body in bodies)
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["extra_body"] == {"top_k": 3}
    assert report["settings"]["prompt_lengths"] is None


def test_the_key_comes_from_the_environment_or_an_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServer(key="secret") as server:
        url = ["--base-url", server.url]
        monkeypatch.delenv("TINYLLM_API_KEY", raising=False)
        assert "401: --api-key is missing or wrong: no such key" in mistake(capsys, *url)
        assert "401" in mistake(capsys, *url, "--api-key", "wrong")
        monkeypatch.setenv("TINYLLM_API_KEY", "secret")
        report = run_json(capsys, server.url)
        assert "401" in mistake(capsys, *url, "--api-key", "wrong")
        monkeypatch.setenv("TINYLLM_API_KEY", "wrong")
        run_json(capsys, server.url, "--api-key", "secret")
    assert "secret" not in json.dumps(report)


def test_servers_that_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: Request, connection: Connection) -> None:
        await connection.json(400, {"error": {"message": "token id 4000 is not in the vocabulary"}})

    with FakeServer(script) as server:
        url = ["--base-url", server.url]
        assert "has no model 'none', but fake, other" in mistake(capsys, *url, "--model", "none")
        assert "answers 400: token id 4000 is not in the vocabulary" in mistake(capsys, *url)
    assert "connection refused" in mistake(capsys, *url)
    assert "no connection" in mistake(capsys, "--base-url", "http://no-such-host.invalid")


def test_when_every_request_fails(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: Request, connection: Connection) -> None:
        await connection.json(503, {"error": {"message": "draining"}})

    with FakeServer(script) as server:
        assert main(["bench", "serve", "--base-url", server.url, "--num-requests", "3", "--warmup", "0"]) == 1
    assert "0 requests completed, 3 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rate", "1", "--concurrency", "2"], "--rate or --concurrency"),
        (["--rate", "0"], "--rate"),
        (["--rate", "x"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--concurrency", "0"], "--concurrency"),
        (["--num-requests", "0"], "--num-requests"),
        (["--duration", "0"], "--duration"),
        (["--duration", "nan"], "--duration"),
        (["--timeout", "-1"], "--timeout"),
        (["--retry", "-1"], "--retry"),
        (["--warmup", "-1"], "--warmup"),
        (["--seed", "-1"], "--seed"),
        (["--temperature", "-1"], "--temperature"),
        (["--prompt-lengths", "9:3"], "--prompt-lengths"),
        (["--output-lengths", "x"], "--output-lengths"),
        (["--shared-prefix", "-1"], "--shared-prefix"),
        (["--token-ids", "5"], "--token-ids"),
        (["--token-ids", "9:5"], "--token-ids"),
        (["--goodput", "x:1"], "--goodput"),
        (["--extra-body", "{"], "--extra-body"),
        (["--extra-body", "[]"], "--extra-body"),
        (["--api-key", "a\nb"], "API key"),
        (["--base-url", "host"], "URL"),
        (["--input", "no/such/file"], "no/such/file"),
        (["--input", "x", "--shared-prefix", "3"], "--shared-prefix"),
        (["--save", "no/such/file"], "no/such/file"),
        (["--batch-sizes", "1"], "--batch-sizes"),
    ],
)
def test_options_that_cannot_be(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in mistake(capsys, *argv)


@pytest.mark.parametrize("argv", [["--json"], ["--repeats", "5"], ["--model", "x"], ["--device", "cpu"]])
def test_options_of_bench_before_serve_are_not_lost(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv, "serve"]) == 2
    assert "before `serve`" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:\n" in out and "percentile" in out
    assert main(["bench", "--help"]) == 0
    assert "serve" in capsys.readouterr().out


def test_ctrl_c_shows_what_was_measured_so_far() -> None:
    streaming = 0

    async def script(request: Request, connection: Connection) -> None:
        nonlocal streaming
        if request.number < 5:
            await stream(request, connection)
            return
        await connection.head()
        for _ in range(3):
            await connection.part(chunk(" a"))
            await asyncio.sleep(0.01)
        streaming += 1
        await asyncio.sleep(600)

    with FakeServer(script) as server:
        argv = [sys.executable, "-m", "tinyllm", "bench", "serve", "--base-url", server.url, *SHORT, "--json"]
        process = subprocess.Popen(
            [*argv, "--concurrency", "2", "--warmup", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        deadline = time.monotonic() + 120
        while streaming < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "interrupted" in err
    report = json.loads(out)
    assert report["was_interrupted"] is True
    assert report["requests"] == {"completed": 5, "failed": 0, "interrupted": 2, "refusals": 0}
    assert 5 <= report["ttft_seconds"]["count"] <= 7  # what had come when the signal did
    assert report["e2el_seconds"]["count"] == 5


def test_without_httptools(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httptools", None)
    monkeypatch.delitem(sys.modules, "tinyllm.loadgen.http_client", raising=False)
    monkeypatch.delattr("tinyllm.loadgen.http_client", raising=False)
    assert "pip install 'tinyllm[serve]'" in mistake(capsys)


def test_nothing_of_the_engine_is_loaded() -> None:
    code = (
        "import sys\n"
        "from tinyllm.cli import main\n"
        "main(['bench', 'serve', '--base-url', 'http://127.0.0.1:9'])\n"
        "heavy = {'numba', 'tokenizers', 'tinyllm.llm', 'fastapi', 'uvicorn', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "connection refused" in done.stderr
