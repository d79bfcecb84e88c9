"""What the scripts that make golden outputs share: greedy continuations and logits by transformers, and their files.

golden.json: {"prompts": [{"text": ..., "token_ids": [...], "greedy_token_ids": [64 ids]}, ...]}

golden.npz, N = 20 prompts, T the positions of all prompts and their continuations, one prompt after another:

    lengths (N,) int32         positions of each prompt: its tokens + 64
    columns (48,) int32        the vocabulary entries whose logits are kept, ascending
    margins (N, 64) float32    the greedy token's logit less the second best one, at each step
    ranges (T,) float32        largest less smallest logit over the whole vocabulary
    low, step (N,) float64     logits[t, c] = low[n] + step[n] * codes[t, c], to within step / 2
    codes (T, 48) uint16

Position lengths[n] - 65 of a prompt, its last token's, is the one that predicts the first greedy token. `step` is
under 2e-5 of the logits' range.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["FIXTURES", "NUM_GREEDY", "write_golden"]

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
NUM_GREEDY = 64
NUM_COLUMNS = 48


def continue_greedily(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """NUM_GREEDY ids, past any end-of-sequence token, and the logits (len(prompt) + NUM_GREEDY, V) of one pass."""
    with torch.no_grad():
        ids = torch.tensor([prompt])
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_GREEDY,
            min_new_tokens=NUM_GREEDY,
            eos_token_id=None,
            pad_token_id=0,
        )
        logits = model(ids, use_cache=False).logits[0].numpy()
    greedy = ids[0, len(prompt) :].tolist()
    assert len(greedy) == NUM_GREEDY
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == greedy
    return greedy, logits


def write_golden(model: Any, prompts: Sequence[tuple[str, list[int]]], folder: Path) -> None:
    """Continues each prompt, text and token ids, and writes golden.json and golden.npz."""
    torch.set_num_threads(1)  # the same sums anywhere
    columns = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, NUM_COLUMNS, replace=False))
    entries, margins, ranges, lows, steps, codes = [], [], [], [], [], []
    for text, prompt in prompts:
        greedy, logits = continue_greedily(model, prompt)
        top = np.sort(logits[len(prompt) - 1 : -1], axis=1)
        sample = logits[:, columns].astype(np.float64)
        step = np.ptp(sample) / 65535
        entries.append({"text": text, "token_ids": prompt, "greedy_token_ids": greedy})
        margins.append(top[:, -1] - top[:, -2])
        ranges.append(np.ptp(logits, axis=1))
        lows.append(sample.min())
        steps.append(step)
        codes.append(np.rint((sample - sample.min()) / step).astype(np.uint16))
        print(
            f"{len(prompt):4} tokens, least margin {margins[-1].min():.4f}, range {np.ptp(logits):.1f}, step {step:.1e}"
        )

    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in entries)
    (folder / "golden.json").write_text(f'{{"prompts": [\n{lines}\n]}}\n')
    np.savez_compressed(
        folder / "golden.npz",
        lengths=np.array([len(r) for r in ranges], np.int32),
        columns=columns.astype(np.int32),
        margins=np.stack(margins).astype(np.float32),
        ranges=np.concatenate(ranges).astype(np.float32),
        low=np.array(lows),
        step=np.array(steps),
        codes=np.concatenate(codes),
    )
    print(f"{sum(f.stat().st_size for f in folder.iterdir()) / 1024:.0f} KiB")
