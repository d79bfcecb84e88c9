"""ONNX Runtime GenAI with weights of 4 bits, by its own model builder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np

from peers.interface import Room, UnavailableError

__all__ = ["OnnxRuntimePeer", "first_token", "load", "prepare"]


class OnnxRuntimePeer:
    def __init__(self, model: str, threads: int) -> None:
        self.genai: Any = import_module("onnxruntime_genai")
        self.versions = {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")}
        self.model = open_model(model, threads)

    def prefill(self, token_ids: list[int]) -> float:
        generator = self._generator(1, len(token_ids) + 1)
        begin = time.perf_counter()
        generator.append_tokens(np.array([token_ids], np.int32))
        generator.generate_next_token()  # of the logits that are there already
        return time.perf_counter() - begin

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        generator = self._generator(len(prompts), len(prompts[0]) + 1 + steps)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        begin = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return time.perf_counter() - begin

    def best_tokens(self, token_ids: list[int]) -> list[int]:
        generator = self._generator(1, len(token_ids) + 1)
        generator.append_tokens(np.array([token_ids], np.int32))
        best: list[int] = np.argmax(generator.get_output("logits")[0], axis=-1).tolist()
        return best

    def _generator(self, sequences: int, length: int) -> Any:
        """No token ends a sequence before `length`."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, batch_size=sequences, min_length=length, max_length=length)
        return self.genai.Generator(self.model, params)


def load(model: str, threads: int, room: Room) -> OnnxRuntimePeer:
    """A generator makes room for itself."""
    return OnnxRuntimePeer(model, threads)


def open_model(model: str, threads: int) -> Any:
    genai: Any = import_module("onnxruntime_genai")
    config = genai.Config(model)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return genai.Model(config)


def first_token(model: str, threads: int, text: str) -> str:
    genai: Any = import_module("onnxruntime_genai")
    opened = open_model(model, threads)
    tokenizer = genai.Tokenizer(opened)
    token_ids = tokenizer.encode(text)
    params = genai.GeneratorParams(opened)
    params.set_search_options(do_sample=False, max_length=len(token_ids) + 1)
    generator = genai.Generator(opened, params)
    generator.append_tokens(token_ids)
    generator.generate_next_token()
    return str(tokenizer.decode(generator.get_next_tokens()))


def prepare(source: str, target: str) -> None:
    """From a Hugging Face folder, as close to Q4_1 with a Q8_0 head as the builder comes.

    Blocks of 32 weights with a zero point each; for CPUs it then asks for activations of 8 bits.
    """
    builder = "onnxruntime_genai.models.builder"
    for needed in (builder.partition(".")[0], "onnx_ir", "torch", "transformers"):
        import_module(needed)
    options = ["is_symmetric=false", "block_size=32", "algo_config=rtn", "matmul_mixed_precision=last_matmul:int8"]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", builder, "-i", source, "-o", target, "-p", "int4", "-e", "cpu", "-c", cache]
        done = subprocess.run([*command, "--extra_options", *options], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise UnavailableError(f"{builder} ended with status {done.returncode}")
