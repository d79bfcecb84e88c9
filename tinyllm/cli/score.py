"""`tinyllm score`: how likely a model finds a text."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console, options
from tinyllm.cli.console import UsageError
from tinyllm.cli.prompts import read_stdin, read_text_file, stdin_is_piped

if TYPE_CHECKING:
    from tinyllm.outputs import ScoreOutput

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm score "Once upon a time there was a king."
  tinyllm score --model smollm2-135m-instruct "The capital of France is Paris."
  tinyllm score --file chapter.txt --json

Prints one line a token: its natural log-probability given the tokens before it ("-" for the first, which nothing
precedes), its id and its text; then the totals. Perplexity is exp of minus the mean log-probability.

--json prints one object: token_ids, token_texts, logprobs (null first, then one number a token), total_logprob and
perplexity (null where it is beyond a float).
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="perplexity and log-probabilities of a text",
        description="Scores a text: its perplexity, and each token's log-probability.",
        epilog=_EPILOG,
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help='text to score; "-" or nothing reads stdin')
    parser.add_argument("--file", "-f", metavar="FILE", help="score a UTF-8 file, less one trailing newline")
    options.add_model_option(parser)
    options.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    text = _text(args)
    result = options.load_llm(args).score(text)
    if args.json:
        console.write(json.dumps(_as_json(result)) + "\n")
    else:
        console.write(_as_lines(result))
    return 0


def _text(args: argparse.Namespace) -> str:
    if args.file is not None:
        if args.text is not None:
            raise UsageError("give the text either as an argument or with --file, not both")
        return read_text_file(args.file)
    if args.text in (None, "-"):
        if args.text is None and not stdin_is_piped():
            raise UsageError('no text given: try tinyllm score "Once upon a time"')
        return read_stdin()
    return options.checked_text(args.text, "the text")


def _as_json(result: ScoreOutput) -> dict[str, Any]:
    logprobs = [None, *(_finite(float(x)) for x in result.logprobs)]
    return {
        "token_ids": [int(i) for i in result.token_ids],
        "token_texts": result.token_texts,
        "logprobs": logprobs,
        "total_logprob": _finite(math.fsum(result.logprobs.tolist())),
        "perplexity": _finite(result.perplexity),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _as_lines(result: ScoreOutput) -> str:
    texts = result.token_texts or [""] * len(result.token_ids)
    logprobs = ["-", *(f"{x:.4f}" for x in result.logprobs)]
    lines = [
        f"{logprob:>9}  {token:>7}  {text!r}"
        for logprob, token, text in zip(logprobs, result.token_ids, texts, strict=True)
    ]
    total = math.fsum(result.logprobs.tolist())
    lines.append(f"{len(result.token_ids)} tokens, log-probability {total:.4f}, perplexity {result.perplexity:.4f}")
    return "\n".join(lines) + "\n"
