"""The run's log, a JSON object per line, and the picture of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from training.trainer import StepResult

__all__ = ["Log", "plot", "read"]

_EVERY = 10  # steps in one line


class Log:
    """Appends to a log; lines of steps after `step`, which a resumed run takes again, are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [entry for entry in read(path) if entry["step"] <= step] if path.exists() else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        partial.replace(path)
        self._file = path.open("a")
        self._losses: list[float] = []
        self._seconds = 0.0
        self._tokens = 0

    def _write(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def step(self, step: int, tokens: int, result: StepResult, shape: tuple[int, ...], seconds: float) -> str:
        """Notes a step; returns a line to print for every tenth, else nothing."""
        self._losses.append(result.loss)
        self._seconds += seconds
        self._tokens += shape[0] * (shape[1] - 1)
        if step % _EVERY:
            return ""
        loss, rate = sum(self._losses) / len(self._losses), self._tokens / self._seconds
        self._write(
            step=step, tokens=tokens, loss=round(loss, 5), gradient_norm=round(result.gradient_norm, 4),
            lr=result.lr, tokens_per_second=round(rate), time=round(time.time()),
        )  # fmt: skip
        self._losses, self._seconds, self._tokens = [], 0.0, 0
        return f"step {step}  {tokens / 1e6:.2f} M tokens  loss {loss:.4f}  lr {result.lr:.2e}  {rate:,.0f} tokens/s"

    def validation(self, step: int, tokens: int, loss: float, average_loss: float) -> str:
        self._write(step=step, tokens=tokens, validation=round(loss, 5), validation_average=round(average_loss, 5))
        return f"step {step}  {tokens / 1e6:.2f} M tokens  held out {loss:.4f}, averaged weights {average_loss:.4f}"

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The log's entries; a last line that was cut short is left out."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def plot(log: Path, out: Path) -> None:
    """Loss over tokens: training, held out, and of the averaged weights."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    entries = read(log)
    steps = [e for e in entries if "loss" in e]
    held_out = [e for e in entries if "validation" in e]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([e["tokens"] / 1e6 for e in steps], [e["loss"] for e in steps], lw=0.6, color="#b0b0b0", label="training")
    for key, label, colour in (("validation", "held out", "#1f77b4"), ("validation_average", "averaged", "#d62728")):
        axes.plot([e["tokens"] / 1e6 for e in held_out], [e[key] for e in held_out], color=colour, label=label)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    if steps:
        axes.set_ylim(top=min(6.0, max(e["loss"] for e in steps)))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
