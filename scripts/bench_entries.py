"""The entries of scripts/bench_history.py: reports of `tinyllm bench --json`, what they say, and which are alike."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measurement import MistakeError

from tinyllm.config import EngineConfig

__all__ = [
    "DEFAULTS", "Change", "Entry", "Metric", "append", "changes", "check_entry", "comparable", "configuration",
    "grouped", "memory_share", "metrics", "options_of", "parse", "read_history",
]  # fmt: skip

Entry = dict[str, Any]

SETTINGS = ("prompt_length", "output_length")
DEFAULTS = {name: value for name, value in asdict(EngineConfig()).items() if name != "num_threads"}  # see `machine`


@dataclass(frozen=True)
class Metric:
    """Tokens per second: the median, and the slowest and the fastest run."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """A metric now and before."""

    name: str
    now: Metric
    before: Metric

    @property
    def ratio(self) -> float:
        return self.now.median / self.before.median

    def slower(self, tolerance: float) -> bool:
        return self.ratio < 1 - tolerance and self.now.high < self.before.median


# ---- what an entry says


def metrics(entry: Entry) -> dict[str, Metric]:
    """By name. Raises KeyError, TypeError, ValueError or ZeroDivisionError where the entry is damaged."""
    found = {}
    prompt, output = entry["prompt_length"], entry["output_length"]
    for result in entry["results"]:
        batch, first = result["batch_size"], result["first_token_seconds_runs"]
        pairs = zip(first, result["all_tokens_seconds_runs"], strict=True)
        decode = [max(total - one, 1e-9) for one, total in pairs]
        name = f"batch {batch}"
        found[f"prefill, {name}"] = _metric(batch * prompt, first)
        found[f"decode, {name}"] = _metric(batch * (output - 1), decode)
    for result in entry["contexts"]:
        found[f"decode, context {result['context']}"] = _metric(1, result["step_seconds_runs"], result["step_seconds"])
    return found


def _metric(tokens: int, seconds: Sequence[float], median: float | None = None) -> Metric:
    return Metric(tokens / (median or statistics.median(seconds)), tokens / max(seconds), tokens / min(seconds))


def configuration(entry: Entry) -> tuple[str, int, str, str]:
    """What two entries must have in common to be compared, but for the settings."""
    return entry["machine"]["cpu"], entry["machine"]["threads"], entry["model"]["sha256"], entry["backend"]


def options_of(entry: Entry) -> dict[str, Any]:
    """The engine's options; one that was not there yet had what is now the default."""
    return {name: entry["engine"].get(name, default) for name, default in DEFAULTS.items()}


def comparable(one: Entry, other: Entry) -> bool:
    """Whether both were measured alike."""
    same = configuration(one) == configuration(other) and options_of(one) == options_of(other)
    return same and all(one[name] == other[name] for name in SETTINGS)


def grouped(entries: Sequence[Entry]) -> list[list[int]]:
    """The indices of entries that can be compared with each other."""
    groups: list[list[int]] = []
    for index, entry in enumerate(entries):
        group = next((group for group in groups if comparable(entries[group[0]], entry)), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return groups


def changes(now: Entry, before: Entry) -> list[Change]:
    """Of what both have measured."""
    old = metrics(before)
    return [Change(name, metric, old[name]) for name, metric in metrics(now).items() if name in old]


def memory_share(entry: Entry, name: str) -> float | None:
    """Of a metric of a context."""
    for result in entry["contexts"]:
        if name == f"decode, context {result['context']}":
            share = result.get("share_of_memory_limit")
            return None if share is None else float(share)
    return None


# ---- the file


def check_entry(entry: object, where: str) -> Entry:
    """The entry itself. Raises MistakeError, which names where it stands, unless all is there that is used later."""
    try:
        if not isinstance(entry, dict):
            raise TypeError("it is not an object")
        comparable(entry, entry)
        float(entry.get("others_cpu_share") or 0), float(entry["memory_read_bytes_per_second"] or 1)
        if not metrics(entry):
            raise ValueError("nothing was measured")
        str(entry["date"]), str(entry["model"]["name"])
    except KeyError as error:
        raise MistakeError(f"{where}: damaged: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise MistakeError(f"{where}: damaged: {error}") from None
    return entry


def read_history(path: Path) -> list[Entry]:
    """All entries, oldest first. Raises MistakeError naming a line that is damaged."""
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path.name}, line {number}"
        if line.strip():
            entries.append(check_entry(parse(line, where), where))
    return entries


def parse(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError as error:  # of JSON and of UTF-8
        raise MistakeError(f"{where}: damaged: {error}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def append(path: Path, entry: Entry) -> None:
    """Adds a line in one write; the line before it may lack its end."""
    line = json.dumps(entry, allow_nan=False) + "\n"
    old = path.read_bytes() if path.exists() else b""
    with path.open("ab") as file:
        file.write((b"\n" if old and not old.endswith(b"\n") else b"") + line.encode())
