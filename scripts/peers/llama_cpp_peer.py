"""llama.cpp through llama-cpp-python: the C API, so that neither sampling nor text costs anything."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np

from peers.interface import Room, UnavailableError

__all__ = ["LlamaCppPeer", "first_token", "load", "prepare"]


class LlamaCppPeer:
    """A context of unified keys and values. A batch asks for logits where they are used, and nowhere else."""

    def __init__(self, model: str, threads: int, room: Room) -> None:
        self.lib: Any = import_module("llama_cpp")
        self.versions = {"llama-cpp-python": version("llama_cpp_python")}
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(model.encode(), self.lib.llama_model_default_params())
        if self.model is None:
            raise UnavailableError(f"llama.cpp cannot load {model}")
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = room.tokens
        params.n_seq_max = room.sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, params)
        if self.context is None:
            raise UnavailableError("llama.cpp cannot make a context")
        self.memory = self.lib.llama_get_memory(self.context)
        self.batch = self.lib.llama_batch_init(room.tokens, 0, 1)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def prefill(self, token_ids: list[int]) -> float:
        self._clear()
        begin = time.perf_counter()
        self._prompts([token_ids])
        return time.perf_counter() - begin

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        self._clear()
        tokens = self._prompts(prompts)
        sequences, wanted = range(len(prompts)), [True] * len(prompts)
        begin = time.perf_counter()
        for step in range(steps):
            positions = [len(prompt) + step for prompt in prompts]
            tokens = self._forward(tokens, positions, sequences, wanted)
        return time.perf_counter() - begin

    def best_tokens(self, token_ids: list[int]) -> list[int]:
        self._clear()
        count = len(token_ids)
        return self._forward(token_ids, range(count), [0] * count, [True] * count)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)

    def _prompts(self, prompts: list[list[int]]) -> list[int]:
        """The first token after each prompt."""
        return self._forward(
            [token for prompt in prompts for token in prompt],
            [position for prompt in prompts for position in range(len(prompt))],
            [sequence for sequence, prompt in enumerate(prompts) for _ in prompt],
            [position == len(prompt) - 1 for prompt in prompts for position in range(len(prompt))],
        )

    def _forward(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> list[int]:
        """The likeliest token after each one that is wanted."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, want) in enumerate(zip(tokens, positions, sequences, wanted, strict=True)):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = want
        status = self.lib.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        return [self._best(i) for i, want in enumerate(wanted) if want]

    def _best(self, index: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def load(model: str, threads: int, room: Room) -> LlamaCppPeer:
    return LlamaCppPeer(model, threads, room)


def first_token(model: str, threads: int, text: str) -> str:
    llama_cpp: Any = import_module("llama_cpp")
    llm = llama_cpp.Llama(model, n_threads=threads, n_threads_batch=threads, verbose=False)
    chunk = next(iter(llm.create_completion(text, max_tokens=1, temperature=0.0, stream=True)))
    return str(chunk["choices"][0]["text"])


def prepare(source: str, target: str) -> None:
    """Q4_0 throughout, the format that llama.cpp's CPU kernels like best, made of another by its own quantiser."""
    lib: Any = import_module("llama_cpp")
    params = lib.llama_model_quantize_default_params()
    params.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = params.pure = True
    status = lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status != 0:
        raise UnavailableError(f"llama_model_quantize gave {status}")
