"""Checks and timings of sampling on the device, against float64 and PyTorch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.roofline import TileWork
from gpu_checks.suite import Check, Context, Outcome, Prepared, Timing, differing

__all__ = ["checks", "timings"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MARGIN = 1e-3  # of scores, in nats: a choice within it is as good as the best


def _noise(key: int, count: int) -> NDArray[np.float64]:
    """Gumbel noise of token ids 0 to count - 1: SplitMix64 of key + (id + 1) * golden, 52 bits."""
    x = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    uniform = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


def _kept(row: NDArray[np.float32], options: Any, slack: float) -> NDArray[np.intp]:
    """The tokens that the filters leave; slack widens (above 0) or narrows the nucleus and min_p."""
    scaled = row.astype(np.float64) / options.temperature
    order = np.argsort(-scaled, kind="stable")
    if options.top_k:
        order = order[: options.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    if options.top_p < 1:
        reached = np.cumsum(weights) >= options.top_p * weights.sum() + slack * weights.sum()
        order = order[: int(reached.argmax()) + 1] if reached.any() else order
    return order[np.exp(scaled[order] - scaled[order[0]]) >= options.min_p * (1 - slack)]


def _draw(context: Context, logits: NDArray[np.float32], rows: Sequence[Any]) -> NDArray[np.int32]:
    from cuda_kernels.sampling import sample_tokens
    from cuda_kernels.sampling_rows import pack_rows

    out = context.rt.empty(len(rows), np.int32)
    context.rt.fill(out, 0xFF)
    sample_tokens(context.rt, context.put(logits), context.put(pack_rows(rows)), out)
    return context.rt.download(out)


def _check_greedy(context: Context) -> Outcome:
    from cuda_kernels.sampling_rows import SamplingRow

    wrong = 0
    for V in (1, 33, 1000) if context.small else (1, 2, 31, 33, 1000, 49152, 128256, 262144):
        logits = np.round(context.normal(3, V), 1)  # with ties
        found = _draw(context, logits, [SamplingRow(row, temperature=0.0) for row in range(3)])
        wrong += int((found != logits.argmax(1)).sum())
    return Outcome(wrong, 0.0)


def _check_filtered(context: Context) -> Outcome:
    from cuda_kernels.sampling_rows import SamplingRow

    wrong = 0
    for V in (257,) if context.small else (2, 257, 5003, 49152):
        count = 4 if context.small else 64
        logits = context.normal(count, V, deviation=3)
        rows = [
            SamplingRow(
                row,
                key=int(context.rng.integers(0, 1 << 63)),
                temperature=float(context.rng.uniform(0.3, 1.5)),
                top_k=int(context.rng.integers(0, min(V, 60))),
                top_p=float(context.rng.choice([1.0, 0.9, 0.5])),
                min_p=float(context.rng.choice([0.0, 0.05])),
            )
            for row in range(count)
        ]
        for token, row, options in zip(_draw(context, logits, rows), logits, rows, strict=True):
            score = row.astype(np.float64) / options.temperature + _noise(options.key, V)
            loose, tight = _kept(row, options, 1e-5), _kept(row, options, -1e-5)
            wrong += int(token not in loose or score[token] < score[tight].max() - MARGIN)
    return Outcome(wrong, 0.0)


def _check_alone(context: Context) -> Outcome:
    """A draw depends on its own row alone."""
    from cuda_kernels.sampling_rows import SamplingRow

    count, V = (4, 257) if context.small else (50, 49152)
    logits = context.normal(count, V)
    rows = [SamplingRow(row, key=row * 7919 + 1, top_p=0.9) for row in range(count)]
    together = _draw(context, logits, rows)
    alone = np.concatenate(
        [_draw(context, logits[i : i + 1], [SamplingRow(0, key=i * 7919 + 1, top_p=0.9)]) for i in range(count)]
    )
    return differing(together, alone)


def checks() -> list[Check]:
    return [
        Check("sampling", "greedy, ties to the lowest id", _check_greedy),
        Check("sampling", "top_k, top_p, min_p and Gumbel noise", _check_filtered),
        Check("sampling", "a row alone and among others, same bits", _check_alone),
    ]


# ---- timings


def _time(rows: int, V: int, greedy: bool) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        from cuda_kernels.sampling import sample_tokens
        from cuda_kernels.sampling_rows import SamplingRow, pack_rows

        options = {"temperature": 0.0} if greedy else {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
        draws = context.put(pack_rows([SamplingRow(row, key=row + 1, **options) for row in range(rows)]))
        nbytes = 4 * rows * V
        arrays = [context.put(context.normal(rows, V, deviation=2)) for _ in range(context.rotations(nbytes))]
        out = context.rt.empty(rows, np.int32)

        def torch_draw() -> Sequence[Callable[[], Any]]:
            import torch

            logits = [torch.randn(rows, V, device="cuda") * 2 for _ in arrays]
            if greedy:
                return [lambda x=x: x.argmax(-1) for x in logits]

            def draw(x: Any) -> Any:
                values, ids = torch.topk(x / 0.8, 50)
                weights = torch.softmax(values, -1)
                weights = torch.where(weights.cumsum(-1) - weights < 0.9, weights, 0.0)
                noise = torch.empty_like(weights).exponential_()
                return ids.gather(-1, (weights / noise).argmax(-1, keepdim=True))

            return [lambda x=x: draw(x) for x in logits]

        return Prepared(
            [lambda x=x: sample_tokens(context.rt, x, draws, out) for x in arrays],
            TileWork(0.0, nbytes, tensor=False),
            {"torch": torch_draw},
        )

    return prepare


def timings() -> list[Timing]:
    return [
        Timing("sampling", f"{'greedy' if greedy else 'top_k 50, top_p 0.9'} R={rows} V=128256", run, quick)
        for rows, greedy, quick in ((1, True, False), (32, True, True), (1, False, False), (32, False, True))
        for run in (_time(rows, 128256, greedy),)
    ]
