"""The options that several commands share, and what they become: engine options and SamplingParams."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console
from tinyllm.cli.console import UsageError
from tinyllm.errors import ConfigError, InvalidRequestError
from tinyllm.hub import DEFAULT_MODEL, LARGER_MODEL

if TYPE_CHECKING:
    from tinyllm.llm import LLM
    from tinyllm.sampling_params import SamplingParams
    from tinyllm.structured_output import StructuredOutput

__all__ = [
    "add_engine_options",
    "add_model_option",
    "add_sampling_options",
    "add_search_options",
    "add_structured_options",
    "checked_text",
    "engine_options",
    "load_llm",
    "model_name",
    "naming_options",
    "sampling_params",
]

_HINTS = {  # default model -> what else there is
    DEFAULT_MODEL: f", a small story model; for a larger one: --model {LARGER_MODEL} (93 MB, downloaded once)"
}

_ENGINE_OPTIONS = {  # field of EngineConfig -> option
    "device": "--device",
    "max_batch_tokens": "--max-batch-tokens",
    "max_num_seqs": "--max-num-seqs",
    "max_stall": "--max-stall",
    "block_size": "--block-size",
    "num_blocks": "--num-blocks",
    "kv_dtype": "--kv-dtype",
    "max_model_len": "--max-model-len",
    "num_threads": "--threads",
    "compute_dtype": "--compute-dtype",
    "activations": "--activations",
    "cuda_graphs": "--no-cuda-graphs",
    "fast_matmul": "--fast-matmul",
}

_SAMPLING_OPTIONS = {  # field of SamplingParams -> option
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "seed": "--seed",
    "stop": "--stop",
    "n": "--n",
    "best_of": "--best-of",
    "beams": "--beams",
    "length_penalty": "--length-penalty",
    "early_stopping": "--early-stopping",
    "window": "--window",
    "sinks": "--sinks",
    "ignore_eos": "--ignore-eos",
}


def add_model_option(parser: argparse.ArgumentParser, default: str = DEFAULT_MODEL) -> None:
    parser.add_argument(
        "--model",
        "-m",
        metavar="MODEL",
        help="a name that `tinyllm pull --list` shows, a .gguf file, a Hugging Face folder, or a hub id org/name "
        f"(default: {default})",
    )
    parser.set_defaults(default_model=default)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--device", metavar="NAME", help="auto, cuda, cpu, cuda-emulated or reference (default: auto)")
    group.add_argument(
        "--max-batch-tokens",
        type=int,
        metavar="N",
        help="token budget of one step; longer prompts are prefilled in chunks (default: 512)",
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that may run at once (default: 256)")
    group.add_argument(
        "--max-stall",
        type=float,
        metavar="X",
        help="while others decode, prefill in chunks that make a step at most about X times longer "
        "(default: only --max-batch-tokens counts)",
    )
    group.add_argument("--block-size", type=int, metavar="N", help="tokens per block of the KV cache (default: 16)")
    group.add_argument(
        "--num-blocks", type=int, metavar="N", help="blocks of the KV cache (default: from the model and free memory)"
    )
    group.add_argument(
        "--kv-dtype", metavar="TYPE", help="auto, f32, f16, bf16, int8 or fp8 keys and values (default: auto)"
    )
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt plus output (default: the model's own limit)"
    )
    group.add_argument("--threads", type=int, metavar="N", dest="num_threads", help="CPU threads (default: all)")
    group.add_argument(
        "--compute-dtype",
        metavar="TYPE",
        help="auto, f32, f16 or bf16 products on the GPU (default: auto, by the weights)",
    )
    group.add_argument(
        "--activations",
        metavar="TYPE",
        help="f32, or int8: faster and less exact products with quantised weights on the CPU (default: f32)",
    )
    group.add_argument(
        "--no-cuda-graphs",
        action="store_false",
        default=None,
        dest="cuda_graphs",
        help="launch decode steps kernel by kernel",
    )
    group.add_argument(
        "--fast-matmul",
        action="store_true",
        default=None,
        help="cuBLAS for linear layers on the GPU: the bits then depend on the batch",
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float = 0.8, top_p: float = 0.95
) -> None:
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        default=max_tokens,
        help=f"tokens to generate at most (default: {max_tokens})",
    )
    add(
        "--temperature",
        type=float,
        metavar="X",
        default=temperature,
        help=f"0 always takes the likeliest token (default: {temperature})",
    )
    add(
        "--top-p",
        type=float,
        metavar="X",
        default=top_p,
        help=f"sample within this probability mass (default: {top_p})",
    )
    add("--top-k", type=int, metavar="N", default=40, help="sample among the N likeliest tokens (default: 40; 0: all)")
    add(
        "--min-p",
        type=float,
        metavar="X",
        default=0.0,
        help="leave out tokens less likely than X times the likeliest (default: 0)",
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        default=1.0,
        help="above 1 makes tokens that occurred less likely (default: 1)",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="of the random numbers; the same seed gives the same text (default: 0)",
    )
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        default=None,
        help="end before this text would appear (in bash, $'\\n' is a newline); may be given several times",
    )
    add("--ignore-eos", action="store_true", help="go on past the end-of-text token")
    add(
        "--window",
        type=int,
        metavar="N",
        help="StreamingLLM: see only the last N tokens and the sinks; text may grow without end in constant memory",
    )
    add(
        "--sinks",
        type=int,
        metavar="N",
        default=4,
        help="with --window, the first N tokens of the prompt, which are always seen (default: 4)",
    )


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """How many continuations a prompt has, and how the best are found."""
    group = parser.add_argument_group("several continuations")
    add = group.add_argument
    add("--n", type=int, default=1, metavar="N", help="continuations for each prompt (default: 1)")
    add("--best-of", type=int, metavar="N", help="sample N, and give the --n with the highest log-probability a token")
    add(
        "--beams",
        type=int,
        metavar="N",
        help="beam search with N beams instead of sampling; gives the --n best (temperature and the like play no part)",
    )
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        default=1.0,
        help="beam search divides a sum of log-probabilities by (tokens generated) ** X (default: 1)",
    )
    add(
        "--early-stopping",
        type=_early_stopping,
        metavar="WHEN",
        default=False,
        help="beam search ends: true, with N finished; false, when the best beam could not win now; never, when it "
        "could not win at any length (default: false)",
    )


def add_structured_options(parser: argparse.ArgumentParser) -> None:
    """What the text must look like."""
    group = parser.add_argument_group("structured output (pip install 'tinyllm[structured]')")
    add = group.add_mutually_exclusive_group().add_argument
    add("--json-schema", metavar="FILE", help="the text is JSON of the schema in FILE")
    add("--regex", metavar="REGEX", help="the text matches REGEX as a whole")
    add("--grammar", metavar="FILE", help="the text is of the grammar in FILE, in llguidance's form of Lark")


def _early_stopping(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


@contextmanager
def naming_options() -> Iterator[None]:
    """Turns a field's name at the head of an error's message into the option that set it."""
    try:
        yield
    except (ConfigError, InvalidRequestError) as error:
        name, space, rest = str(error).partition(" ")
        option = {**_SAMPLING_OPTIONS, **_ENGINE_OPTIONS}.get(name)
        if option is None:
            raise
        raise UsageError(option + space + rest) from error


def checked_text(text: str, what: str) -> str:
    """The text itself. Raises UsageError where it is not valid Unicode, as an argument of stray bytes is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = ord(text[error.start])
        raise UsageError(f"{what} is not valid UTF-8: U+{bad:04X} at character {error.start}") from None
    return text


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's options that were given, as keywords for LLM and EngineConfig."""
    given = {name: getattr(args, name, None) for name in _ENGINE_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Raises UsageError naming the option whose value is wrong."""
    from tinyllm.sampling_params import SamplingParams

    values = {name: getattr(args, name) for name in _SAMPLING_OPTIONS if hasattr(args, name)}
    values["stop"] = tuple(checked_text(text, "--stop") for text in args.stop or ())
    with naming_options():
        return SamplingParams(**values, structured_output=_structured_output(args))


def _structured_output(args: argparse.Namespace) -> StructuredOutput | None:
    from tinyllm.cli.prompts import read_text_file
    from tinyllm.structured_output import StructuredOutput

    for kind in ("json_schema", "regex", "grammar"):
        given = getattr(args, kind, None)
        if given is None:
            continue
        option = "--" + kind.replace("_", "-")
        text, where = (given, option) if kind == "regex" else (read_text_file(given), f"{option} {given}")
        try:
            return StructuredOutput(kind, text)
        except InvalidRequestError as error:
            raise UsageError(f"{where}: {error}") from error
    return None


def model_name(args: argparse.Namespace) -> str:
    """The model named on the command line, or the default one, with a line that says so."""
    if args.model is not None:
        return str(args.model)
    console.notice(f"no --model given: using {args.default_model}{_HINTS.get(args.default_model, '')}")
    return str(args.default_model)


def load_llm(args: argparse.Namespace) -> LLM:
    """Loads the model that the options describe."""
    gc.disable()  # what loading makes stays: looking through it again and again is a tenth of the time to a first token
    try:
        from tinyllm.llm import LLM

        with naming_options():
            return LLM(
                model_name(args), on_event=console.notice, record=getattr(args, "record", None), **engine_options(args)
            )
    finally:
        gc.enable()
