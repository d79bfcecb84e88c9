"""`tinyllm generate`: text on stdout as it is made, statistics on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console, options
from tinyllm.cli.progress import PromptProgress
from tinyllm.cli.prompts import PromptItem, read_items
from tinyllm.cli.stats import BatchStats, StreamStats
from tinyllm.errors import TinyLLMError

if TYPE_CHECKING:
    from tinyllm.llm import LLM
    from tinyllm.outputs import RequestOutput

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm generate "Once upon a time"
  tinyllm generate --model smollm2-135m-instruct --temperature 0 --max-tokens 20 "The capital of France is"
  echo "Once upon a time" | tinyllm generate --n 2
  tinyllm generate --beams 4 "The old king had three sons, and"
  tinyllm generate --sinks 4 --window 1020 --max-tokens 100000 --ignore-eos "Once upon a time"
  tinyllm generate --model smollm2-135m-instruct --json-schema person.json "A person, in JSON:"
  tinyllm generate --regex "(yes|no), [a-z ]+" "Is the sea blue?"
  tinyllm generate --input prompts.jsonl --json > answers.jsonl

Without --model, tales-4m writes: a small model that comes with tinyllm and knows nothing but tales. The name
smollm2-135m-instruct brings a larger one, once (93 MB).

Without a prompt, or for "-", the prompt is all of stdin less one trailing newline. A prompt that starts with a
dash goes after "--". Several prompts run as one batch; each one's text follows a line "==> prompt 1/3: ... <==".

The lines of --input are objects: {"prompt": "..."} or {"prompt_token_ids": [...]}, and optionally sampling
parameters for that line by their Python names, such as "max_tokens", "temperature", "stop", "logit_bias", or
"structured_output": {"kind": "json_schema", "text": "..."}. A bad line is named on stderr, the others still run, and
the exit status is 2.

--json prints one object a prompt, in their order: index, prompt, prompt_token_ids, text, token_ids, finish_reason
("stop", "length" or "error"), stop_reason; with --n above 1, those are the first sample's, and "outputs" lists all
n of them. --beams and --best-of add the "score" by which they were chosen. A prompt that could not be served has
finish_reason "error" and the message in "error".

Sampling is reproducible: the same options and --seed (0 by default) give the same text.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continues one or more prompts.",
        epilog=_EPILOG,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='text to continue; "-" reads stdin')
    parser.add_argument("--input", "-i", metavar="FILE", help='prompts from a JSONL file ("-": stdin)')
    options.add_model_option(parser)
    options.add_sampling_options(parser, max_tokens=200, temperature=0.7, top_p=0.9)
    options.add_search_options(parser)
    options.add_structured_options(parser)
    options.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument(
        "--record", metavar="FILE", help="write every step to FILE (JSONL), for `tinyllm replay` and `tinyllm timeline`"
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="no statistics and no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    items = read_items(args, options.sampling_params(args))
    for item in items:
        _report(item)
    if all(item.error for item in items):
        return 2
    llm = options.load_llm(args)
    items = [_checked(llm, item) for item in items]
    streamed = len(items) == 1 and not args.json
    status = _run_stream(llm, items[0], args) if streamed else _run_batch(llm, items, args)
    return 2 if args.record is not None and llm.recorder is not None and llm.recorder.error else status


def _report(item: PromptItem) -> None:
    if item.error:
        console.error(item.error)


def _checked(llm: LLM, item: PromptItem) -> PromptItem:
    """The item with its prompt as token ids; marked, and reported, if the model cannot serve it."""
    if item.error:
        return item
    try:
        token_ids = llm.encode(item.prompt, windowed=item.params.window is not None)
        token_ids = llm.engine.check_request(token_ids, item.params)
    except TinyLLMError as error:
        item = item.failed(str(error))
        _report(item)
        return item
    return dataclasses.replace(item, token_ids=token_ids)


def _run_stream(llm: LLM, item: PromptItem, args: argparse.Namespace) -> int:
    """One prompt: its text is written as it is made. Samples after the first wait for the ones before them."""
    if item.error:
        return 2
    stats = StreamStats()
    writer = _OrderedWriter(item.params.n)
    for chunk in llm.stream(item.token_ids, item.params):
        stats.add(len(chunk.token_ids))
        writer.add(chunk.index, chunk.text, finished=chunk.finish_reason is not None)
    if not args.quiet:
        stats.report(llm, len(item.token_ids), since_start=True, at_end=item.params.ranked)
    return 0


class _OrderedWriter:
    """Writes interleaved samples in the order of their index, each as early as that order allows."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._pending = [""] * n
        self._finished = [False] * n
        self._current = 0
        self._ends_with_newline = True
        self._head()

    def add(self, index: int, text: str, *, finished: bool) -> None:
        self._pending[index] += text
        self._finished[index] = self._finished[index] or finished
        while self._current < self._n:
            self._flush(self._current)
            if not self._finished[self._current]:
                return
            if not self._ends_with_newline:
                console.write("\n")
            self._current += 1
            if self._current < self._n:
                self._ends_with_newline = True
                self._head()

    def _flush(self, index: int) -> None:
        text, self._pending[index] = self._pending[index], ""
        if text:
            console.write(text)
            self._ends_with_newline = text.endswith("\n")

    def _head(self) -> None:
        if self._n > 1:
            console.write(f"==> sample {self._current + 1}/{self._n} <==\n")


def _run_batch(llm: LLM, items: list[PromptItem], args: argparse.Namespace) -> int:
    """Several prompts, or JSON: all in one batch; results are written in the order of the prompts."""
    good = [i for i, item in enumerate(items) if not item.error]
    outputs: dict[int, RequestOutput] = {}
    stats = BatchStats()
    written = 0

    def write_ready() -> None:
        nonlocal written
        while written < len(items) and (items[written].error or written in outputs):
            _write_result(items, written, outputs.pop(written, None), args)
            written += 1

    with PromptProgress(total=len(good), shown=len(items) > 1 and not args.quiet) as progress:

        def on_finish(position: int, output: RequestOutput) -> None:
            index = good[position]
            stats.add(output)
            if output.error:
                items[index] = items[index].failed(output.error)
            outputs[index] = output
            with progress.paused():
                _report(items[index])
                write_ready()
            progress.advance(sum(len(o.token_ids) for o in output.outputs))

        write_ready()
        if good:
            llm.generate([items[i].token_ids for i in good], [items[i].params for i in good], on_finish=on_finish)
    if good and not args.quiet:
        stats.report(llm)
    return 2 if any(item.error for item in items) else 0


def _write_result(items: list[PromptItem], index: int, output: RequestOutput | None, args: argparse.Namespace) -> None:
    item = items[index]
    if args.json:
        console.write(json.dumps(_as_json(index, item, output)) + "\n")
        return
    if output is None or item.error:  # the line on stderr said why
        return
    name = console.one_line(item.prompt if isinstance(item.prompt, str) else f"{len(item.prompt)} token ids", 60)
    for sample in output.outputs:
        which = f", sample {sample.index + 1}/{len(output.outputs)}" if len(output.outputs) > 1 else ""
        console.write(f"==> prompt {index + 1}/{len(items)}{which}: {name} <==\n{sample.text}\n\n")


def _as_json(index: int, item: PromptItem, output: RequestOutput | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "index": index,
        "prompt": item.prompt if isinstance(item.prompt, str) else None,
        "prompt_token_ids": item.token_ids,
    }
    if output is None or item.error:
        return {**result, "text": "", "token_ids": [], "finish_reason": "error", "error": item.error}
    samples = [
        {
            "text": sample.text,
            "token_ids": sample.token_ids,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            **({} if sample.score is None else {"score": sample.score}),
        }
        for sample in output.outputs
    ]
    result.update(samples[0])
    if len(samples) > 1:
        result["outputs"] = samples
    return result
