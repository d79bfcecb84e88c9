"""`tinyllm bench`: prefill, decode and batch throughput of a model on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from tinyllm.cli import bench_serve, console, options
from tinyllm.cli.console import UsageError
from tinyllm.cli.facts import OthersMeter, machine_facts, model_facts
from tinyllm.cli.stats import peak_resident_nbytes
from tinyllm.cli.throughput import BatchResult, ContextResult, measure_batch, measure_contexts

if TYPE_CHECKING:
    from tinyllm.llm import LLM

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm bench
  tinyllm bench --prompt-length 512 --output-length 64 --batch-sizes 1,4,16 --repeats 5 --json
  tinyllm bench --contexts 32,1024
  tinyllm bench serve --rate 2 --duration 60

For each batch size B, B prompts of random token ids (a fixed seed) run together: once to warm up, then --repeats
times for one output token each, and in turn with that --repeats times for all of them. From the medians of these two
times:
  prefill   B x prompt length / the first time, in tokens a second
  decode    B x (output length - 1) / the difference of the two
  total     B x (prompt length + output length) / the second time

For each context C of --contexts one sequence decodes after a prompt of C tokens, --repeats times, in turn with the
other contexts: output length - 1 steps each. The median of all these steps' times gives decode tokens a second.

--json adds what results of two machines or two versions are compared by: the model's name and digest, the machine,
the versions, the date, the time of every run (fields that end in _runs), how much of the cores' time other processes
took meanwhile (others_cpu_share, from 0 to 1, where the system says), the bytes that a decode step reads at least,
and on the CPU how fast memory can be read here: --contexts then also gives the share of that limit (above 1 where
caches hold a part of what is read).
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="throughput on this machine; `bench serve`: load on a server",
        description="Measures prefill, decode and batch throughput of a model.",
        epilog=_EPILOG,
    )
    options.add_model_option(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--prompt-length", type=int, default=128, metavar="N", help="tokens a prompt (default: 128)")
    group.add_argument("--output-length", type=int, default=64, metavar="N", help="tokens generated (default: 64)")
    group.add_argument("--batch-sizes", default="1,8", metavar="N,N,...", help="prompts run together (default: 1,8)")
    group.add_argument(
        "--contexts", default="", metavar="N,N,...", help="decode one sequence after prompts of N tokens"
    )
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs of each (default: 3)")
    options.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    parts = parser.add_subparsers(title="of a server", metavar="[serve]", parser_class=type(parser))
    bench_serve.add_parser(parts, parser)


def run(args: argparse.Namespace) -> int:
    _check_minima(args)
    batch_sizes = _integers("--batch-sizes", args.batch_sizes, 1 << 16)
    contexts = _integers("--contexts", args.contexts, 1 << 30) if args.contexts else []
    llm = options.load_llm(args)
    _check_capacity(llm, max(batch_sizes), args.prompt_length + args.output_length)
    others = OthersMeter()
    if contexts:
        _check_capacity(llm, 1, max(contexts) + args.output_length)
    results = []
    for size in batch_sizes:
        results.append(measure_batch(llm, size, args.prompt_length, args.output_length, args.repeats))
        if not args.json:
            console.write((_HEADER if len(results) == 1 else "") + _row(results[-1]))
    at_contexts = measure_contexts(llm, contexts, args.output_length - 1, args.repeats)
    if at_contexts and not args.json:
        console.write(_CONTEXT_HEADER + "".join(map(_context_row, at_contexts)))
    peak, busy = peak_resident_nbytes(), others.share()
    if args.json:
        measured = {
            "others_cpu_share": busy,
            "peak_resident_nbytes": peak,
            "results": [asdict(result) for result in results],
        }
        console.write(json.dumps(_facts(args, llm) | measured | _at_contexts(llm, at_contexts)) + "\n")
    elif peak:
        console.notice(f"peak resident memory {console.format_bytes(peak)}")
    return 0


def _facts(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    """What was measured, where and when."""
    from tinyllm.costs import step_weights_nbytes

    settings = {name: getattr(args, name) for name in ("prompt_length", "output_length", "repeats")}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model_facts(args.model or args.default_model),
        "machine": machine_facts(args.num_threads),
        "backend": llm.engine.runner.model.backend.name,
        "step_weights_nbytes": step_weights_nbytes(llm),
        **settings,
        "engine": asdict(llm.engine_config),
    }


def _at_contexts(llm: LLM, results: list[ContextResult]) -> dict[str, Any]:
    """With the limit of memory, measured here: after all else, for its buffer counts as resident memory."""
    bandwidth = _read_bandwidth(llm)
    facts = []
    for result in results:
        share = None if bandwidth is None else result.step_nbytes / bandwidth / result.step_seconds
        facts.append({**asdict(result), "share_of_memory_limit": share})
    return {"memory_read_bytes_per_second": bandwidth, "contexts": facts}


def _read_bandwidth(llm: LLM) -> float | None:
    """Of this machine's memory, in bytes a second; None on devices that read another memory, or none in earnest."""
    backend = llm.engine.runner.model.backend
    if backend.name != "cpu":
        return None
    from tinyllm.backends.cpu import CpuBackend
    from tinyllm.backends.cpu_limits import ReadMeter

    assert isinstance(backend, CpuBackend)
    return ReadMeter(backend).measure(_READ_PASSES)


def _check_minima(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    for name, low in (("prompt_length", 1), ("output_length", 2), ("repeats", 1)):
        if getattr(args, name) < low:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")


def _integers(option: str, text: str, high: int) -> list[int]:
    """The option's numbers. Raises UsageError."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number <= high for number in numbers):
        raise UsageError(f"{option} must be integers from 1 such as 1,4,16, not {text!r}")
    return numbers


def _check_capacity(llm: LLM, batch_size: int, length: int) -> None:
    """Raises UsageError if the largest batch would not run as one."""
    if length > llm.memory.max_sequence_len:
        raise UsageError(f"prompt and output make {length} tokens; the context holds {llm.memory.max_sequence_len}")
    if batch_size > llm.engine_config.max_num_seqs:
        raise UsageError(f"--batch-sizes goes to {batch_size}, but --max-num-seqs is {llm.engine_config.max_num_seqs}")
    blocks = -(-length // llm.memory.block_size) * batch_size
    if blocks > llm.memory.num_blocks:
        raise UsageError(f"a batch of {batch_size} needs {blocks} KV blocks, and there are {llm.memory.num_blocks}")


_READ_PASSES = 10
_HEADER = f"{'batch':>6} {'prefill tokens/s':>17} {'decode tokens/s':>16} {'total tokens/s':>15}\n"


def _row(result: BatchResult) -> str:
    return (
        f"{result.batch_size:>6} {result.prefill_tokens_per_second:>17.1f} "
        f"{result.decode_tokens_per_second:>16.1f} {result.total_tokens_per_second:>15.1f}\n"
    )


_CONTEXT_HEADER = f"{'context':>8} {'decode tokens/s':>16} {'ms a step':>10}\n"


def _context_row(result: ContextResult) -> str:
    return f"{result.context:>8} {result.decode_tokens_per_second:>16.1f} {1e3 * result.step_seconds:>10.2f}\n"
