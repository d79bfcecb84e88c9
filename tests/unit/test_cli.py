"""The command line as a whole: exit statuses, one line for each mistake, and what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.fake_llm import FakeLLM
from tinyllm.cli import console, main, options
from tinyllm.cli.stats import StreamStats, rate
from tinyllm.errors import ModelNotFoundError
from tinyllm.llm import LLM
from weights import WeightsError

ROOT = Path(__file__).parents[2]
COMMANDS = ("generate", "chat", "score", "plan", "info", "bench", "pull", "replay", "timeline")


def run_process(*args: str | bytes, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "tinyllm", *args], capture_output=True, cwd=ROOT, **kwargs)


def assert_one_line(stderr: str, *parts: str) -> None:
    assert stderr.startswith("tinyllm: error: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize("argv", [["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help_shows_an_example_and_exits_with_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "example" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tinyllm ")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "no command"),
        (["fly"], "fly"),
        (["generate", "--max-tokens", "1.5", "x"], "--max-tokens"),
        (["generate", "--max-tokens", "0", "x"], "--max-tokens"),
        (["generate", "--max-tokens=-1", "x"], "--max-tokens"),
        (["generate", "--temperature", "nan", "x"], "--temperature"),
        (["generate", "--temperature", "inf", "x"], "--temperature"),
        (["generate", "--temperature", "-1", "x"], "--temperature"),
        (["generate", "--temperature", "-inf", "x"], "--temperature"),
        (["generate", "--top-p", "0", "x"], "--top-p"),
        (["generate", "--top-p", "nan", "x"], "--top-p"),
        (["generate", "--top-k", "-5", "x"], "--top-k"),
        (["generate", "--min-p", "2", "x"], "--min-p"),
        (["generate", "--repetition-penalty", "0", "x"], "--repetition-penalty"),
        (["generate", "--seed", str(1 << 64), "x"], "--seed"),
        (["generate", "--n", "0", "x"], "--n"),
        (["generate", "--n", "1000000000", "x"], "--n"),
        (["generate", "--stop", "", "x"], "stop string"),
        (["generate", "--stop", "\udcff", "x"], "--stop"),
        (["generate", "--tempe", "1", "x"], "--tempe"),
        (["generate", "\udcff"], "UTF-8"),
        (["generate", "--input", "a.jsonl", "x"], "--input"),
        (["generate", "--input", "no/such.jsonl"], "no/such.jsonl"),
        (["generate", "-", "-"], "stdin"),
        (["score", "--file", "no/such.txt"], "no/such.txt"),
        (["score", "--file", "a.txt", "text"], "--file"),
        (["score", "\ud800"], "UTF-8"),
        (["bench", "--batch-sizes", "1,,2"], "--batch-sizes"),
        (["bench", "--batch-sizes", "0"], "--batch-sizes"),
        (["bench", "--repeats", "0"], "--repeats"),
        (["bench", "--output-length", "1"], "--output-length"),
        (["plan", "--plot", "picture.bmp"], "--plot"),
        (["plan", "--kv-dtype", "f8"], "--kv-dtype"),
        (["plan", "--activations", "int4"], "--activations must be one of f32, int8"),
        (
            ["plan", "--model", "tales-4m", "--kv-dtype", "fp8", "--device", "cpu"],
            "--kv-dtype fp8 is for GPUs; the device is cpu",
        ),
        (["plan", "--activations", "int8", "--device", "reference"], "--activations int8 is for the CPU"),
        (["plan", "--block-size", "0"], "--block-size"),
        (["plan", "--num-blocks", "-3"], "--num-blocks"),
        (["plan", "--threads", "0"], "--threads"),
        (["plan", "--device", "toaster"], "toaster"),
        (["chat", "--system", "\udc80"], "--system"),
        (["chat", "--top-p", "-1"], "--top-p"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, named)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelNotFoundError("no model named\nx"), 2),
        (WeightsError("m.gguf: truncated"), 2),
        (MemoryError(), 2),
    ],
)
def test_expected_errors_end_in_one_line(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "load_llm", _raising(error))
    assert main(["generate", "x"]) == status
    assert_one_line(capsys.readouterr().err)


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(options, "load_llm", _raising(KeyboardInterrupt()))
    assert main(["generate", "x"]) == 130
    assert capsys.readouterr().err == "tinyllm: interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "load_llm", _raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["generate", "x"])


def _raising(error: BaseException) -> Callable[[object], None]:
    def load_llm(args: object) -> None:
        raise error

    return load_llm


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tinyllm.cli import main; main(['generate', '--help'])\n"
        "heavy = {'numpy', 'numba', 'rich', 'tokenizers', 'jinja2', 'tinyllm.llm'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_process_exits_with_2_and_no_traceback() -> None:
    done = run_process("generate", "--top-p", "nan", "x")
    assert done.returncode == 2
    assert_one_line(done.stderr.decode(), "--top-p")


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes on posix only")
def test_an_argument_of_stray_bytes_is_one_line() -> None:
    done = run_process("generate", b"caf\xe9")
    assert done.returncode == 2
    assert_one_line(done.stderr.decode(), "UTF-8", "U+DCE9")


def test_stdin_of_stray_bytes_is_one_line() -> None:
    done = run_process("generate", input=b"abc\xff")
    assert done.returncode == 2
    assert_one_line(done.stderr.decode(), "standard input", "0xff")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "tinyllm", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
    assert done.returncode == 2
    assert_one_line(done.stderr.decode(), "standard output")


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tinyllm", "--version"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


# ---- console


def test_printable_escapes_what_could_steer_a_terminal() -> None:
    assert console.printable("a\x1b]52;c;eA==\x07\tb\n") == "a\\x1b]52;c;eA==\\x07\tb\n"
    assert console.printable("\x9b31m \u202e \ud800") == "\\x9b31m \\u202e \\ud800"
    assert console.printable("caf\u00e9 \u65e5\u672c \U0001f600") == "caf\u00e9 \u65e5\u672c \U0001f600"


def test_one_line_is_one_bounded_line() -> None:
    assert console.one_line("a\r\nb") == "a\\r\\nb"
    short = console.one_line("x" * 10_000_000, 100)
    assert len(short) <= 100
    assert "..." in short


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (1 << 51, "2048.0 TiB")]
)
def test_format_bytes(count: int, text: str) -> None:
    assert console.format_bytes(count) == text


def test_the_first_token_counts_as_prefill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([10.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    stats = StreamStats()
    for tokens in (1, 2, 2):
        stats.add(tokens)
    stats.report(cast(LLM, FakeLLM()), 8)
    line = capsys.readouterr().err.splitlines()[0]
    assert line == (
        "tinyllm: prompt 8 tokens in 2.00 s (4.0 tokens/s), generated 5 tokens in 4.00 s (decode 2.0 tokens/s), "
        "first token after 2.00 s"
    )


def test_rate_of_nothing_is_a_dash() -> None:
    assert rate(10, 4.0) == "2.5 tokens/s"
    assert rate(0, 1.0) == rate(5, 0.0) == "-"
