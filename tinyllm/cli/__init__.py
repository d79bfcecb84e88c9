"""The command line: one small module per command, and the one place where errors become lines.

Nothing here imports numpy, rich or the engine before a command runs, so that `--help` stays quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tinyllm.cli import bench, chat, console, generate, info, plan, pull, replay, score, serve, timeline
from tinyllm.cli.console import UsageError

__all__ = ["main"]

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are exceptions, so that they end like every other mistake."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            console.write(f"tinyllm {version('tinyllm')}\n")
        except PackageNotFoundError:
            console.write("tinyllm (not installed)\n")
        parser.exit()


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="tinyllm",
        description="A self-contained GPT decoder runtime: the same request gives the same bits.",
        epilog='example:\n  tinyllm generate "Once upon a time"\n\n`tinyllm COMMAND --help` says more of each.',
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for module in (generate, chat, serve, score, plan, info, bench, pull, replay, timeline):
        module.add_parser(commands)
    return parser


def _is_users_mistake(error: Exception) -> bool:
    # Imported only now: `weights` brings numpy, which --help and a mistyped option should not wait for.
    from tinyllm.errors import TinyLLMError

    if isinstance(error, TinyLLMError):
        return True
    from weights.errors import WeightsError

    return isinstance(error, WeightsError)


def _run(argv: Sequence[str] | None) -> int:
    args, extra = _build_parser().parse_known_args(argv)
    if extra and hasattr(args, "prompts") and not any(text.startswith("-") for text in extra):
        args.prompts += extra  # argparse takes only the first run of prompts that options interrupt
    elif extra:
        raise UsageError(f"unrecognized arguments: {' '.join(extra)} (see: tinyllm --help)")
    if not hasattr(args, "run"):
        raise UsageError("no command given (see: tinyllm --help)")
    status: int = args.run(args)
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 after a user's mistake, 130 when interrupted.

    Every TinyLLMError and WeightsError ends in one line on stderr. Anything else is a bug and keeps its traceback.
    """
    try:
        return _run(argv)
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        if console.is_terminal(sys.stderr):
            print(file=sys.stderr)  # leave the line that the text was on
        console.notice("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `tinyllm generate ... | head`: the reader has enough
        console.discard_stdout()
        return EXIT_BROKEN_PIPE
    except MemoryError as error:
        console.error(f"not enough memory: {error}" if str(error) else "not enough memory")
        return EXIT_MISTAKE
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        console.error(str(error))
        return EXIT_MISTAKE
