"""Golden outputs of a real model, made by scripts/golden_fixture.py, and how an LLM is held to them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm import LLM, SamplingParams

__all__ = ["TOLERANCE", "Golden"]

TOLERANCE = 1e-3  # of the logits' range


class Golden:
    """The files of one folder: prompts with their ids and greedy continuations, and samples of their logits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return _read(self._folder)[0]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return _read(self._folder)[1]

    @property
    def token_ids(self) -> list[list[int]]:
        """Of each prompt."""
        return [prompt["token_ids"] for prompt in self.prompts]

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of each prompt with its continuation."""
        return [prompt["token_ids"] + prompt["greedy_token_ids"] for prompt in self.prompts]

    def check_token_ids(self, llm: LLM) -> None:
        for prompt in self.prompts:
            assert llm.encode(prompt["text"]) == prompt["token_ids"]

    def check_logits(self, llm: LLM) -> None:
        """At every position."""
        arrays = self.arrays
        ends = np.cumsum(arrays["lengths"])
        for n, (ids, end) in enumerate(zip(self.texts, ends, strict=True)):
            rows = slice(end - arrays["lengths"][n], end)
            expected = arrays["low"][n] + arrays["step"][n] * arrays["codes"][rows]
            error = np.abs(llm.logits(ids)[:, arrays["columns"]] - expected).max(axis=1)
            assert (error < TOLERANCE * arrays["ranges"][rows]).all(), self.prompts[n]["text"][:40]

    def check_greedy_tokens(self, llm: LLM) -> None:
        """All prompts in one batch; where a tie within the tolerance goes the other way, the texts may part."""
        arrays = self.arrays
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        outputs = llm.generate(self.token_ids, params)
        ends = np.cumsum(arrays["lengths"])
        compared = 0
        for n, (prompt, output) in enumerate(zip(self.prompts, outputs, strict=True)):
            limits = TOLERANCE * arrays["ranges"][ends[n] - 65 : ends[n] - 1]
            pairs = zip(prompt["greedy_token_ids"], output.outputs[0].token_ids, strict=True)
            for step, (expected, found) in enumerate(pairs):
                if arrays["margins"][n, step] > limits[step]:
                    assert found == expected, f"{prompt['text'][:40]!r}, step {step}"
                    compared += 1
                elif found != expected:
                    break
        assert compared > 1000


@lru_cache
def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    prompts = json.loads((folder / "golden.json").read_text())["prompts"]
    with np.load(folder / "golden.npz") as arrays:
        return prompts, dict(arrays)
