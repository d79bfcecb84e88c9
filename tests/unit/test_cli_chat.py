"""`chat`: history, commands, interruption and a context that fills up."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest

from tests.unit.fake_llm import LIMIT, FakeLLM
from tinyllm.cli import main, options


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr(options, "load_llm", lambda args: fake)
    return fake


def chat(monkeypatch: pytest.MonkeyPatch, text: str | bytes, *argv: str) -> int:
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return main(["chat", "--max-tokens", "10", *argv])


def prompts(llm: FakeLLM) -> list[str]:
    return [prompt for prompt, _ in llm.seen]


def test_history_is_kept(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(monkeypatch, "one\n\ntwo\n") == 0
    assert prompts(llm) == ["u:one|", "u:one|a:U:ONE||u:two|"]
    assert capsys.readouterr().out == "U:ONE|\nU:ONE|A:U:\n"


def test_commands(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(monkeypatch, "a\n/reset\nb\n/system be brief\nc\n/system\nd\n/exit\ne\n", "--system", "s") == 0
    assert prompts(llm) == ["s:s|u:a|", "s:s|u:b|", "s:be brief|u:c|", "u:d|"]
    assert capsys.readouterr().err.count("starts anew") == 3


def test_a_mistake_does_not_end_the_session(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, f"/dance\n{'x' * LIMIT}\nb\n") == 2
    out, err = capsys.readouterr()
    assert out == "U:B|\n"
    unknown, too_long = err.splitlines()
    assert "'/dance'" in unknown
    assert f"{LIMIT + 3} tokens" in too_long
    assert prompts(llm) == ["u:b|"]  # the message that did not fit was forgotten


def test_the_oldest_messages_are_dropped_when_the_context_is_full(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # each exchange makes 40 + 3 characters of question and 10 + 3 of answer; 100 - 10 fit
    messages = ["a" * 40, "b" * 40, "c" * 40]
    assert chat(monkeypatch, "\n".join(messages), "--system", "s") == 0
    for message, prompt in zip(messages, prompts(llm), strict=True):
        assert prompt == f"s:s|u:{message}|"
    assert capsys.readouterr().err.count("oldest 2 messages were dropped") == 2


@pytest.mark.parametrize(("max_tokens", "longest"), [(10, 87), (30, 72), (50, 72)])
def test_room_is_kept_for_an_answer(
    max_tokens: int, longest: int, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the template adds 3 characters; max_tokens or a quarter of the 100 are kept, whichever is less
    assert chat(monkeypatch, "a" * longest + "\n", "--max-tokens", str(max_tokens)) == 0
    assert chat(monkeypatch, "a" * (longest + 1) + "\n", "--max-tokens", str(max_tokens)) == 2
    assert f"{longest + 4} tokens" in capsys.readouterr().err


def test_a_context_that_has_room_keeps_everything(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(monkeypatch, "a" * 30 + "\n" + "b" * 30 + "\n") == 0
    assert prompts(llm)[1].startswith("u:aaa")


def test_stray_bytes_are_one_line(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, b"a\n\xff\n") == 2
    assert "line 2" in capsys.readouterr().err


def test_an_interrupt_stops_the_answer_and_keeps_the_session(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM(on_slow=lambda: os.kill(os.getpid(), signal.SIGINT) if len(llm.seen) == 1 else None)
    monkeypatch.setattr(options, "load_llm", lambda args: llm)
    before = signal.getsignal(signal.SIGINT)
    assert chat(monkeypatch, "slow\nb\n") == 0
    out, err = capsys.readouterr()
    assert out == "U\nU:SLOW|A:U\n"
    assert "stopped" in err
    assert llm.aborted == 1
    assert prompts(llm)[1] == "u:slow|a:U|u:b|"  # what was said of it stays in the history
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(options, "load_llm", lambda args: FakeLLM(on_slow=interrupt_twice))
    assert chat(monkeypatch, "slow\n") == 130


def test_typed_lines(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(["a", KeyboardInterrupt(), "/nonsense", "b", EOFError()])

    def read(prompt: str) -> str:
        event = next(typed)
        if isinstance(event, BaseException):
            raise event
        return event

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--max-tokens", "4"]) == 0
    assert prompts(llm) == ["u:a|", "u:a|a:U:A||u:b|"]
    assert "Ctrl-D leaves" in capsys.readouterr().err


def test_statistics_on_request(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(monkeypatch, "a\n", "--stats")
    assert "prompt 4 tokens" in capsys.readouterr().err
