"""transformers on PyTorch; in float32 it is also what the others are compared with."""

from __future__ import annotations

import time
from importlib import import_module
from importlib.metadata import version
from typing import Any

from peers.interface import Room

__all__ = ["TransformersPeer", "first_token", "load"]


class TransformersPeer:
    def __init__(self, model: str, threads: int, dtype: str) -> None:
        self.torch: Any = import_module("torch")
        self.versions = {name: version(name) for name in ("transformers", "torch")}
        self.model = open_model(model, threads, dtype)

    def prefill(self, token_ids: list[int]) -> float:
        begin = time.perf_counter()
        self._step(self.torch.tensor([token_ids]), None)
        return time.perf_counter() - begin

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        tokens, cache = self._step(self.torch.tensor(prompts), None)
        begin = time.perf_counter()
        for _ in range(steps):
            tokens, cache = self._step(tokens, cache)
        return time.perf_counter() - begin

    def best_tokens(self, token_ids: list[int]) -> list[int]:
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([token_ids]), use_cache=False).logits
        best: list[int] = logits[0].argmax(dim=-1).tolist()
        return best

    def _step(self, tokens: Any, cache: Any) -> tuple[Any, Any]:
        """(N, T) tokens -> the next ones (N, 1), and the cache with these in it."""
        with self.torch.inference_mode():
            output = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values


def load(model: str, threads: int, room: Room, *, dtype: str) -> TransformersPeer:
    """The cache grows as it is needed."""
    return TransformersPeer(model, threads, dtype)


def open_model(model: str, threads: int, dtype: str) -> Any:
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    torch.set_num_threads(threads)
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()


def first_token(model: str, threads: int, text: str, *, dtype: str) -> str:
    opened = open_model(model, threads, dtype)
    transformers: Any = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(text, return_tensors="pt")
    output = opened.generate(**inputs, max_new_tokens=1, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
