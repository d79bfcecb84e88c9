"""What the measuring scripts share: options, facts of machine and model, a meter on the engine, result files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tinyllm.backends.base import Batch, F32Array
from tinyllm.cli.facts import cpu_name, machine_facts, model_facts
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.errors import TinyLLMError
from tinyllm.hub import LARGER_MODEL
from tinyllm.llm import LLM
from tinyllm.outputs import RequestOutput

__all__ = [
    "Criterion",
    "MeteredRunner",
    "MistakeError",
    "Parser",
    "Step",
    "cpu_name",
    "load",
    "machine_facts",
    "model_facts",
    "notice",
    "ordinary_token_ids",
    "positive_int",
    "prepare_output",
    "report_criteria",
    "run_script",
    "run_to_end",
    "save_figure",
    "write_json",
]


# ---- the command line


class MistakeError(Exception):
    """What the user got wrong, in one line."""


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, with the options that every script has."""

    def __init__(self, description: str, output: str, *, model: bool = True) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if model:
            self.add_argument(
                "--model",
                default=LARGER_MODEL,
                help="a registered name, a GGUF file or a folder (default: %(default)s)",
            )
        self.add_argument("--threads", type=positive_int, help="CPU threads (default: all that may be used)")
        self.add_argument("-o", "--output", default=output, help="what to write, without suffix (default: %(default)s)")

    def error(self, message: str) -> NoReturn:
        raise MistakeError(f"{message} (see --help)")


def positive_int(text: str) -> int:
    """An option's value of 1 or more."""
    with suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script and ends the process: 0, 2 after a mistake, 130 when interrupted."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (MistakeError, TinyLLMError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare_output(stem: str, *, plots: bool) -> Path:
    """The path to put suffixes on; finds out now, not after an hour, that nothing could be written there."""
    if plots and importlib.util.find_spec("matplotlib") is None:
        raise MistakeError("drawing needs the extra: pip install 'tinyllm[plot]'")
    path = Path(stem)
    if not path.name:
        raise MistakeError(f"--output {stem!r} names no file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise MistakeError(f"cannot write to {path.parent}: {error.strerror or error}") from None
    return path


# ---- the engine


def load(args: argparse.Namespace, **engine_options: Any) -> LLM:
    """The model of --model, on --threads."""
    return LLM(args.model, on_event=notice, num_threads=args.threads, **engine_options)


@dataclass(frozen=True)
class Step:
    """One step: the tokens that go through the model, and the KV blocks held meanwhile."""

    num_tokens: int
    num_held_blocks: int


class MeteredRunner:
    """Takes the place of an engine's runner and notes each step as it runs, when it holds the most blocks."""

    def __init__(self, engine: LLMEngine) -> None:
        self.steps: list[Step] = []
        self._runner = engine.runner
        self._block_manager = engine.block_manager
        engine.runner = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, batch: Batch, copies: Sequence[tuple[int, int]]) -> F32Array:
        held = self._block_manager.num_blocks - self._block_manager.num_free_blocks
        self.steps.append(Step(len(batch.token_ids), held))
        return self._runner.forward(batch, copies)

    def take(self) -> list[Step]:
        """The steps since the last call."""
        steps, self.steps = self.steps, []
        return steps


def run_to_end(engine: LLMEngine, on_finish: Callable[[RequestOutput], None] | None = None) -> dict[str, RequestOutput]:
    """Steps until nothing is left to do; the finished requests by id."""
    outputs: dict[str, RequestOutput] = {}
    while engine.requests:
        for output in engine.step().finished:
            outputs[output.request_id] = output
            if on_finish is not None:
                on_finish(output)
    return outputs


def ordinary_token_ids(llm: LLM, count: int, seed: int) -> list[int]:
    """Random token ids, none of them special; the same for the same model, count and seed."""
    special = set() if llm.tokenizer is None else set(llm.tokenizer.special_token_ids)
    ordinary = np.array([token for token in range(llm.config.vocab_size) if token not in special])
    return np.random.default_rng([seed, count]).choice(ordinary, count).tolist()


# ---- results


@dataclass(frozen=True)
class Criterion:
    """A bound that a measured number should keep: "under", "at most" or "at least"."""

    what: str
    value: float
    relation: str
    bound: float

    @property
    def met(self) -> bool:
        if self.relation == "at least":
            return self.value >= self.bound
        return self.value < self.bound or (self.relation == "at most" and self.value == self.bound)

    def facts(self) -> dict[str, Any]:
        return {"what": self.what, "value": round(self.value, 6), self.relation: self.bound, "met": self.met}


def report_criteria(criteria: Sequence[Criterion]) -> None:
    for one in criteria:
        print(f"{one.what}: {one.value:.4g}, wanted {one.relation} {one.bound:g}: {'met' if one.met else 'NOT MET'}")


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes facts whole or not at all, a line for each entry of the first two levels."""

    def line(key: str, value: Any, indent: str) -> str:
        return f"{indent}{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"

    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping | list) for inner in value.values()):
            inner = ",\n".join(line(name, entry, "  ") for name, entry in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(line(key, value, " "))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
    os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
    os.replace(file.name, path)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG or SVG on white, so that black text is legible on a dark page too."""
    metadata = {"Date": None} if path.suffix == ".svg" else None  # the same picture, the same file
    figure.savefig(path, dpi=144, facecolor="white", metadata=metadata)
