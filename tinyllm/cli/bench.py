"""`tinyllm bench`: prefill, decode and batch throughput of a model on this machine."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console, options
from tinyllm.cli.console import UsageError
from tinyllm.cli.stats import peak_resident_nbytes

if TYPE_CHECKING:
    from tinyllm.llm import LLM

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm bench
  tinyllm bench --prompt-length 512 --output-length 64 --batch-sizes 1,4,16 --repeats 5 --json

For each batch size B, B prompts of random token ids (a fixed seed) run together: once to warm up, then --repeats
times for one output token each, and --repeats times for all of them. From the medians of these two times:
  prefill   B x prompt length / the first time, in tokens a second
  decode    B x (output length - 1) / the difference of the two
  total     B x (prompt length + output length) / the second time
"""


@dataclass(frozen=True)
class _Result:
    """Medians for one batch size: seconds of the whole batch, and tokens per second."""

    batch_size: int
    first_token_seconds: float
    all_tokens_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    total_tokens_per_second: float


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="throughput on this machine",
        description="Measures prefill, decode and batch throughput of a model.",
        epilog=_EPILOG,
    )
    options.add_model_option(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--prompt-length", type=int, default=128, metavar="N", help="tokens a prompt (default: 128)")
    group.add_argument("--output-length", type=int, default=64, metavar="N", help="tokens generated (default: 64)")
    group.add_argument("--batch-sizes", default="1,8", metavar="N,N,...", help="prompts run together (default: 1,8)")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs of each (default: 3)")
    options.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    batch_sizes = _batch_sizes(args)
    llm = options.load_llm(args)
    _check_capacity(llm, max(batch_sizes), args.prompt_length + args.output_length)
    results = []
    for size in batch_sizes:
        results.append(_measure(llm, size, args.prompt_length, args.output_length, args.repeats))
        if not args.json:
            console.write((_HEADER if len(results) == 1 else "") + _row(results[-1]))
    peak = peak_resident_nbytes()
    if args.json:
        settings = {name: getattr(args, name) for name in ("prompt_length", "output_length", "repeats")}
        report = {
            **settings,
            "engine": asdict(llm.engine_config),
            "peak_resident_nbytes": peak,
            "results": [asdict(result) for result in results],
        }
        console.write(json.dumps(report) + "\n")
    elif peak:
        console.notice(f"peak resident memory {console.format_bytes(peak)}")
    return 0


def _batch_sizes(args: argparse.Namespace) -> list[int]:
    """Checks the measurement's options. Raises UsageError."""
    for name, low in (("prompt_length", 1), ("output_length", 2), ("repeats", 1)):
        if getattr(args, name) < low:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
    try:
        sizes = [int(size) for size in args.batch_sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(1 <= size <= 1 << 16 for size in sizes):
        raise UsageError(f"--batch-sizes must be integers from 1 such as 1,4,16, not {args.batch_sizes!r}")
    return sizes


def _check_capacity(llm: LLM, batch_size: int, length: int) -> None:
    """Raises UsageError if the largest batch would not run as one."""
    if length > llm.memory.max_sequence_len:
        raise UsageError(f"prompt and output make {length} tokens; the context holds {llm.memory.max_sequence_len}")
    if batch_size > llm.engine_config.max_num_seqs:
        raise UsageError(f"--batch-sizes goes to {batch_size}, but --max-num-seqs is {llm.engine_config.max_num_seqs}")
    blocks = -(-length // llm.memory.block_size) * batch_size
    if blocks > llm.memory.num_blocks:
        raise UsageError(f"a batch of {batch_size} needs {blocks} KV blocks, and there are {llm.memory.num_blocks}")


def _measure(llm: LLM, batch_size: int, prompt_length: int, output_length: int, repeats: int) -> _Result:
    import numpy as np

    from tinyllm.sampling_params import SamplingParams

    random = np.random.default_rng(0)

    def seconds(max_tokens: int) -> float:
        """The time of one batch; each has new prompts, so that nothing is reused."""
        shape = (batch_size, prompt_length)
        prompts = random.integers(0, llm.config.vocab_size, shape, dtype=np.int32).tolist()
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - begin

    seconds(2)
    first = median([seconds(1) for _ in range(repeats)])
    total = median([seconds(output_length) for _ in range(repeats)])
    return _Result(
        batch_size=batch_size,
        first_token_seconds=first,
        all_tokens_seconds=total,
        prefill_tokens_per_second=batch_size * prompt_length / first,
        decode_tokens_per_second=batch_size * (output_length - 1) / max(total - first, 1e-9),
        total_tokens_per_second=batch_size * (prompt_length + output_length) / total,
    )


_HEADER = f"{'batch':>6} {'prefill tokens/s':>17} {'decode tokens/s':>16} {'total tokens/s':>15}\n"


def _row(result: _Result) -> str:
    return (
        f"{result.batch_size:>6} {result.prefill_tokens_per_second:>17.1f} "
        f"{result.decode_tokens_per_second:>16.1f} {result.total_tokens_per_second:>15.1f}\n"
    )
