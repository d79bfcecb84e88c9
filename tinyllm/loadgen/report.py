"""A run's measurements for people."""

from __future__ import annotations

from typing import Any

__all__ = ["format_report"]

_ROWS = (
    ("ttft_seconds", "time to first token", 1e3),
    ("itl_seconds", "time between tokens", 1e3),
    ("tpot_seconds", "time per output token", 1e3),
    ("e2el_seconds", "end to end", 1e3),
    ("longest_gap_seconds", "longest gap of a stream", 1e3),
    ("longest_to_median_gap", "  times its median gap", 1.0),
    ("late_seconds", "sent late", 1e3),
)
_COLUMNS = ("mean", "p50", "p95", "p99", "min", "max")
_COUNTED = {
    "usage": "as the server counts them",
    "chunks": "one for each chunk, as the server does not count them",
    "both": "as the server counts them, or one for each chunk",
}


def format_report(report: dict[str, Any]) -> str:
    """The table, from what Measurements.as_json() and ClientCost.as_json() give together."""
    lines = [_requests(report), *_tokens(report), *_goodput(report), *_errors(report["errors"]), ""]
    lines.append(f"{'milliseconds':<24}" + "".join(f"{column:>10}" for column in _COLUMNS))
    for name, title, scale in _ROWS:
        summary = report[name]
        cells = ["-"] * len(_COLUMNS) if summary is None else [f"{scale * summary[column]:.2f}" for column in _COLUMNS]
        lines.append(f"{title:<24}" + "".join(f"{cell:>10}" for cell in cells))
    cost = report["client"]["cpu_microseconds_per_chunk"]
    if cost is not None:
        lines += ["", f"the load generator took {cost:.0f} us of CPU a chunk"]
    return "\n".join(lines) + "\n"


def _requests(report: dict[str, Any]) -> str:
    requests = report["requests"]
    text = f"{requests['completed']} requests completed, {requests['failed']} failed"
    if requests["interrupted"]:
        text += f", {requests['interrupted']} interrupted"
    if requests["refusals"]:
        text += f", {requests['refusals']} answers 429"
    return f"{text} in {report['duration_seconds']:.2f} s: {_number(report['requests_per_second'])} requests/s"


def _tokens(report: dict[str, Any]) -> list[str]:
    lines = []
    if report["output_tokens"]:
        lines.append(
            f"{report['output_tokens']} output tokens in {report['chunks']} chunks "
            f"({_COUNTED[report['output_tokens_counted_by']]}): {_number(report['output_tokens_per_second'])} tokens/s"
        )
    if report["prompt_tokens"]:
        lines.append(
            f"{report['prompt_tokens']} prompt tokens, {report['cached_prompt_tokens']} of them cached: "
            f"{_number(report['prompt_tokens_per_second'])} tokens/s"
        )
    return lines


def _goodput(report: dict[str, Any]) -> list[str]:
    goodput = report["goodput"]
    if goodput["requests"] is None:
        return []
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["limits_ms"].items())
    share = "-" if goodput["share"] is None else f"{100 * goodput['share']:.1f}%"
    return [f"goodput ({limits}): {_number(goodput['requests_per_second'])} requests/s, {share} of requests"]


def _errors(errors: dict[str, Any]) -> list[str]:
    return [
        f"failed: {error['count']} x {kind}" + (f" (the first: {_short(error['first'])})" if error["first"] else "")
        for kind, error in errors.items()
    ]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
