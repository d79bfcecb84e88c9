"""`tinyllm chat`: a conversation with history, in a terminal or over pipes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console, options
from tinyllm.cli.console import UsageError
from tinyllm.cli.stats import StreamStats
from tinyllm.errors import InvalidRequestError, TinyLLMError
from tinyllm.hub import LARGER_MODEL

if TYPE_CHECKING:
    from tinyllm.llm import LLM
    from tinyllm.sampling_params import SamplingParams

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm chat
  tinyllm chat --system "Answer in one sentence." --temperature 0
  printf 'What is a prime number?\\nName three.\\n' | tinyllm chat

Without --model, it is SmolLM2, which is downloaded once (93 MB). Each line is a message. Commands:
  /reset         forget the conversation
  /system TEXT   set the system message (nothing: remove it) and forget the conversation
  /help          list these
  /exit          leave, as Ctrl-D does
Ctrl-C stops an answer; what was said of it stays in the history. When the conversation no longer fits in the
context, its oldest messages are dropped, and a line says so.
"""
_HELP = "commands: /reset, /system TEXT, /help, /exit; Ctrl-C stops an answer, Ctrl-D leaves"

Message = dict[str, str]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation with an instruction-tuned model; its history is kept.",
        epilog=_EPILOG,
    )
    options.add_model_option(parser, default=LARGER_MODEL)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    options.add_sampling_options(parser, max_tokens=512)
    options.add_structured_options(parser)
    options.add_engine_options(parser)
    parser.add_argument("--stats", action="store_true", help="statistics on stderr after each answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    params = options.sampling_params(args)
    system = options.checked_text(args.system, "--system") if args.system else None
    session = _Session(options.load_llm(args), params, system, stats=args.stats)
    interactive = console.is_terminal(sys.stdin)
    for line in _typed_lines() if interactive else _piped_lines():
        if line.strip() == "/exit":
            break
        session.handle(line)
    return 2 if session.failed and not interactive else 0


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  (editing and history for input())
    console.notice(_HELP)
    while True:
        try:
            yield input("> ")
        except EOFError:
            console.write("\n")
            return
        except KeyboardInterrupt:  # drops the line being typed
            console.write("\n")


def _piped_lines() -> Iterator[str]:
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"line {number} of standard input is not valid UTF-8: {error.reason}") from None


class _Session:
    """The conversation so far, and what changes it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, stats: bool) -> None:
        self.failed = False
        self._llm = llm
        self._params = params
        self._system = system
        self._history: list[Message] = []
        self._stats = stats

    def handle(self, line: str) -> None:
        """Answers a message or obeys a command. A mistake is one line on stderr, and the session goes on."""
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/reset":
                self._restart(self._system)
            elif command == "/system":
                self._restart(options.checked_text(rest.strip(), "the system message") or None)
            elif command == "/help":
                console.notice(_HELP)
            elif command.startswith("/"):
                raise UsageError(f"unknown command {command!r}; {_HELP}")
            elif command:
                self._answer(options.checked_text(line, "the message"))
        except TinyLLMError as error:
            self.failed = True
            console.error(str(error))

    def _restart(self, system: str | None) -> None:
        self._system = system
        self._history = []
        console.notice("the conversation starts anew")

    def _answer(self, text: str) -> None:
        """Streams the answer to stdout. The history grows only if there was one."""
        history, token_ids = self._fit([*self._history, {"role": "user", "content": text}])
        stats = StreamStats()
        answer = ""
        with _Interruption() as interruption:
            for chunk in self._llm.stream(token_ids, self._params):
                stats.add(len(chunk.token_ids))
                answer += chunk.text
                console.write(chunk.text)
                if interruption.requested:
                    break  # leaving the iterator aborts the request
        if not answer.endswith("\n"):
            console.write("\n")
        if interruption.requested:
            console.notice("stopped")
        if answer:
            self._history = [*history, {"role": "assistant", "content": answer}]
        if self._stats:
            stats.report(self._llm, len(token_ids))

    def _fit(self, history: list[Message]) -> tuple[list[Message], list[int]]:
        """The history, without its oldest messages if there would be no room for an answer, and its token ids.

        Raises InvalidRequestError when even the last message alone is too long.
        """
        limit = self._llm.memory.max_sequence_len
        room = min(self._params.max_tokens, limit // 4)
        dropped = 0
        while True:
            token_ids = self._encode(history[dropped:])
            if len(token_ids) + room <= limit:
                break
            if dropped + 2 >= len(history):
                raise InvalidRequestError(
                    f"the message makes a prompt of {len(token_ids)} tokens; with {room} kept for an answer, "
                    f"{limit - room} fit"
                )
            dropped += 2  # a question and its answer
        if dropped:
            console.notice(f"the context of {limit} tokens is full: the oldest {dropped} messages were dropped")
        return history[dropped:], token_ids

    def _encode(self, history: list[Message]) -> list[int]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return self._llm.encode_chat([*system, *history])


class _Interruption:
    """While entered, the first Ctrl-C only sets `requested`, so that no step of the engine is cut in two.

    The second one interrupts at once, as it would otherwise.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _Interruption:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
