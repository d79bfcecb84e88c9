"""From figures to medians, ratios, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from peers.registry import EXACT, INT8, SAME_FILE, Entry

__all__ = ["Result", "cell", "document", "plain", "table"]

_OURS = (EXACT, INT8)


@dataclass(frozen=True)
class Result:
    """One row: the figures of each peer that has any, one a repeat."""

    name: str
    unit: str
    more_is_better: bool
    figures: Mapping[str, Sequence[float]]

    @property
    def medians(self) -> dict[str, float]:
        return {name: median(figures) for name, figures in self.figures.items() if figures}

    @property
    def best_other(self) -> str | None:
        """The best peer that is not tinyllm."""
        others = {name: value for name, value in self.medians.items() if name not in _OURS}
        if not others:
            return None
        return (max if self.more_is_better else min)(others, key=lambda name: others[name])

    def ratio(self, ours: str, theirs: str | None) -> float | None:
        """How many times as good `ours` is as `theirs`: above 1 where it is better, whatever the unit."""
        medians = self.medians
        if theirs is None or ours not in medians or theirs not in medians:
            return None
        a, b = medians[ours], medians[theirs]
        return a / b if self.more_is_better else b / a

    @property
    def ratios(self) -> dict[str, float | None]:
        return {
            "exact / llama.cpp": self.ratio(EXACT, SAME_FILE),
            "exact / best": self.ratio(EXACT, self.best_other),
            "int8 / best": self.ratio(INT8, self.best_other),
        }

    def facts(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "more_is_better": self.more_is_better,
            "medians": {name: round(value, 4) for name, value in self.medians.items()},
            "figures": {name: [round(value, 4) for value in values] for name, values in self.figures.items()},
            "best_other": self.best_other,
            "ratios": {name: None if ratio is None else round(ratio, 3) for name, ratio in self.ratios.items()},
        }


def cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":
        return f"{value:.1f}%"
    if unit == "s":
        return f"{value:.2f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(results: Sequence[Result], names: Sequence[str]) -> list[list[str]]:
    """Its lines, the first of them the heading: a column for each peer, and the ratios."""
    lines = [["", *names, *(Result("", "", True, {}).ratios), "best"]]
    for result in results:
        values = [cell(result.medians.get(name), result.unit) for name in names]
        ratios = ["-" if ratio is None else f"{ratio:.2f}" for ratio in result.ratios.values()]
        name = result.name if result.unit == "%" else f"{result.name}, {result.unit}"
        lines.append([name, *values, *ratios, result.best_other or "-"])
    return lines


def plain(lines: Sequence[Sequence[str]]) -> str:
    """The table for a terminal, columns aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    heading, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([heading, f"|{' --- |' + ' ---: |' * (len(lines[0]) - 1)}", *rest])


def document(
    results: Sequence[Result],
    entries: Sequence[Entry],
    versions: Mapping[str, Mapping[str, str]],
    skipped: Mapping[str, str],
    facts: Mapping[str, Any],
) -> str:
    """The page: the table, what each peer is, and what it was measured on."""
    machine, model = facts["machine"], facts["model"]
    ran = [entry for entry in entries if entry.name in versions]
    peers = [
        [
            entry.name,
            ", ".join(f"{package} {number}" for package, number in versions[entry.name].items()),
            entry.arithmetic,
        ]
        for entry in ran
    ]
    notes = [f"- {name}: {why}" for name, why in skipped.items()]
    return "\n".join(
        [
            "# The same model in other programs",
            "",
            f"{model['name']}, {machine['threads']} threads on {machine['cores']} cores of {machine['cpu']}; medians "
            f"of {facts['repeats']}, the programs in turn. `{facts['command']}` wrote this, and says what each row is.",
            "",
            markdown(table(results, [entry.name for entry in ran])),
            "",
            "Ratios say how many times as good tinyllm is, exact (the default) or with 8-bit activations, as llama.cpp "
            "over the same file and as the best of the other programs, which the last column names: above 1 it is "
            "better, in rows where less is better too.",
            "",
            markdown([["", "versions", "computes with"], *peers]).replace("---: |", "--- |"),
            *(["", "Not measured:", "", *notes] if notes else []),
            "",
        ]
    )
