"""The options of `tinyllm bench serve`, and what they become."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinyllm.cli.console import UsageError

if TYPE_CHECKING:
    from tinyllm.loadgen.workload import Workload

__all__ = ["EPILOG", "EXIT_ALL_FAILED", "add_options", "check", "workload"]

EXIT_ALL_FAILED = 1

_KEY = "TINYLLM_API_KEY"
_MAX_CONCURRENCY = 1 << 16

EPILOG = f"""\
examples:
  tinyllm bench serve --rate 2 --duration 60 --goodput ttft:500,tpot:50
  tinyllm bench serve --concurrency 16 --chat --prompt-lengths 32:256 --output-lengths lognormal:32:256
  tinyllm bench serve --concurrency 16 --num-requests 200 --prompt-lengths 32:128@15,8000 --output-lengths 128
  tinyllm bench serve --base-url https://host/v1 --model NAME --input prompts.jsonl --json --save requests.jsonl

--rate sends requests as a Poisson process, whatever the server does (inf: all at once). --concurrency keeps so many
under way: each client sends its next request when its last is answered. The same --seed gives the same requests at the
same times.

LENGTHS are N, LOW:HIGH (uniform) or lognormal:LOW:HIGH (95% of them between the two, none outside), or several of
these between commas, each with @WEIGHT where they are not equally likely. Prompts are random token ids; with --chat
they are texts of as many common words, nearly each of which is a token, and the chat template adds its own.
The lines of --input are {{"prompt": "..."}}, {{"prompt_token_ids": [...]}} or, with --chat, {{"messages": [...]}}, and
may have "max_tokens"; they are taken in turn.

What is measured, of requests that completed, counting from when a request was sent first (waits before --retry are in
it):
  time to first token     until the first chunk that brings output
  time between tokens     between one such chunk and the next: every gap of every stream
  time per output token   from the first chunk to the end, divided by the output tokens less one
  end to end              until the end of the stream
  longest gap             the longest time between tokens of a stream; and how many times the stream's median it is
  sent late               with --rate: how much later than planned a request was sent, for want of time here
Tokens are counted by the server's own usage figures where it gives them, else one for each chunk. The percentile p of
n values lies at position p / 100 x (n - 1) of the sorted values, counted from 0, on the line between its neighbours.
Goodput counts requests that completed within every limit of --goodput: ttft, tpot, e2el and gap (the longest), in
milliseconds; its share is of all requests that completed or failed. Ctrl-C shows what was measured so far: the first
tokens and gaps of interrupted streams count too. With every request failed the exit status is {EXIT_ALL_FAILED}.

--json adds the settings, the date, the machine, and how much of the cores' time other processes took meanwhile, the
server among them where it runs on the same machine. --save writes the numbers of each request as one line of JSON.
An https server's certificate is checked against the system's, or against the file that SSL_CERT_FILE names.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    url = "http://127.0.0.1:8000"
    add("--base-url", default=url, metavar="URL", help=f"with or without /v1 (default: {url})")
    add("--model", "-m", dest="served_model", metavar="NAME", help="default: the first that /v1/models lists")
    add("--api-key", metavar="KEY", help=f"default: what the environment variable {_KEY} says")
    _add_load(parser.add_argument_group("load").add_argument)
    _add_requests(parser.add_argument_group("requests").add_argument)
    add = parser.add_argument_group("results").add_argument
    add("--goodput", default="", metavar="LIMITS", help="milliseconds such as ttft:500,tpot:50,e2el:9000,gap:300")
    add("--save", metavar="FILE", help="write the numbers of each request there, a line of JSON each")
    add("--json", action="store_true", dest="as_json", help="print one JSON object")


def _add_load(add: Callable[..., Any]) -> None:
    add("--rate", type=float, metavar="R", help="requests a second, Poisson arrivals; inf: all at once")
    add("--concurrency", type=int, metavar="N", help="requests under way at any time (default: 4, without --rate)")
    add("--num-requests", type=int, metavar="N", help="default: 64, or each line of --input once")
    add("--duration", type=float, metavar="S", help="send no request after S seconds")
    add("--seed", type=int, default=0, metavar="N", help="of arrivals, lengths and prompts (default: 0)")
    add("--retry", type=int, default=0, metavar="N", help="send again up to N times after 429 (default: 0)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds that an answer may take (default: 600)")
    add("--warmup", type=int, default=1, metavar="N", help="short requests before, not measured (default: 1)")


def _add_requests(add: Callable[..., Any]) -> None:
    add("--prompt-lengths", metavar="LENGTHS", help="tokens, without the shared prefix (default: 32:512)")
    add("--output-lengths", default="16:128", metavar="LENGTHS", help="tokens (default: 16:128)")
    add("--shared-prefix", type=int, metavar="N", help="tokens that all prompts begin with (default: 0)")
    add("--token-ids", metavar="LOW:HIGH", help="ids in random prompts (default: 256:4000)")
    add("--input", metavar="FILE", help='prompts of your own, a line of JSON each; "-" is stdin')
    add("--chat", action="store_true", help="/v1/chat/completions and texts, not /v1/completions and token ids")
    add(
        *("--no-ignore-eos",),
        action="store_false",
        dest="ignore_eos",
        help="leave out the field ignore_eos, for servers that do not know it: outputs may then end early",
    )
    add("--temperature", type=float, default=0.0, metavar="X", help="default: 0")
    add("--extra-body", metavar="JSON", help="more fields of each request, such as '{\"top_k\": 40}'")


def check(args: argparse.Namespace) -> None:
    """Fills in what depends on other options. Raises UsageError."""
    if args.rate is not None and args.concurrency is not None:
        raise UsageError("give --rate or --concurrency, not both")
    if args.rate is None:
        args.concurrency = 4 if args.concurrency is None else args.concurrency
        if not 1 <= args.concurrency <= _MAX_CONCURRENCY:
            raise UsageError(f"--concurrency must be from 1 to {_MAX_CONCURRENCY}, not {args.concurrency}")
    for name in ("duration", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise UsageError(f"--{name} must be seconds above 0, not {value}")
    for name in ("retry", "warmup"):
        if not 0 <= getattr(args, name) <= 1000:
            raise UsageError(f"--{name} must be from 0 to 1000, not {getattr(args, name)}")
    for name in ("prompt_lengths", "shared_prefix", "token_ids"):
        if args.input is not None and getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for random prompts, not for --input")
    if not 0 <= args.temperature < 100:
        raise UsageError(f"--temperature must be from 0 to 100, not {args.temperature}")
    if args.api_key is None:
        args.api_key = os.environ.get(_KEY) or None
    if args.api_key is not None and not (args.api_key and args.api_key.isascii() and args.api_key.isprintable()):
        raise UsageError("an API key has printable ASCII characters only")
    args.extra_body = _extra_body(args.extra_body)


def workload(args: argparse.Namespace) -> Workload:
    """Raises LoadError and UsageError."""
    from tinyllm.loadgen.lengths import Lengths
    from tinyllm.loadgen.prompts import read_prompts
    from tinyllm.loadgen.workload import Workload

    prompts = () if args.input is None else read_prompts(args.input, chat=args.chat)
    if args.num_requests is None and (args.duration is None or args.rate == float("inf")):
        args.num_requests = len(prompts) or 64
    return Workload(
        num_requests=args.num_requests,
        rate=args.rate,
        prompt_lengths=Lengths.parse(args.prompt_lengths or "32:512", "--prompt-lengths"),
        output_lengths=Lengths.parse(args.output_lengths, "--output-lengths"),
        shared_prefix=args.shared_prefix or 0,
        token_ids=_token_ids(args.token_ids or "256:4000"),
        text=args.chat or bool(prompts),
        prompts=prompts,
        seed=args.seed,
    )


def _token_ids(text: str) -> tuple[int, int]:
    try:
        low, high = (int(number) for number in text.split(":"))
    except ValueError:
        raise UsageError(f"--token-ids takes two ids such as 256:4000, not {text!r}") from None
    return low, high


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--extra-body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError('--extra-body takes a JSON object such as {"top_k": 40}')
    return value
