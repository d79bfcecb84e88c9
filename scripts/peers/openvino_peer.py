"""OpenVINO GenAI: its engine of continuous batches, over the model that it makes of a GGUF file."""

from __future__ import annotations

import os
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from peers.interface import Room

__all__ = ["OpenVINOPeer", "first_token", "load", "prepare"]

_BLOCK = 32  # of the CPU's paged attention


class OpenVINOPeer:
    def __init__(self, model: str, threads: int, room: Room) -> None:
        self.openvino: Any = import_module("openvino")
        self.genai: Any = import_module("openvino_genai")
        self.versions = {name: version(name) for name in ("openvino", "openvino-genai")}
        self.model = model
        self.properties = {"INFERENCE_NUM_THREADS": threads}
        scheduling = self.genai.SchedulerConfig()
        scheduling.enable_prefix_caching = False
        scheduling.max_num_batched_tokens = room.tokens
        scheduling.num_kv_blocks = -(-room.tokens // _BLOCK) + room.sequences
        self.pipeline = self.genai.ContinuousBatchingPipeline(model, scheduling, "CPU", self.properties)
        self.request: Any = None

    def prefill(self, token_ids: list[int]) -> float:
        times = self._run([token_ids], 1)
        return times[-1] - times[0]

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        times = self._run(prompts, steps + 1)  # the prompts end in the same step, and so do all tokens after them
        return times[-1] - times[-1 - steps]

    def best_tokens(self, token_ids: list[int]) -> list[int]:
        """By the model alone: the pipeline keeps the logits of a prompt's last token only."""
        if self.request is None:
            core = self.openvino.Core()
            compiled = core.compile_model(str(Path(self.model) / "openvino_model.xml"), "CPU", self.properties)
            self.request = compiled.create_infer_request()
        self.request.reset_state()
        inputs = np.array([token_ids], np.int64)
        self.request.infer(
            {
                "input_ids": inputs,
                "attention_mask": np.ones_like(inputs),
                "position_ids": np.arange(len(token_ids))[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        best: list[int] = self.request.get_tensor("logits").data[0].argmax(axis=1).tolist()
        return best

    def _run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        """Continues the prompts greedily; the time at the beginning, and after each step."""
        config = self.genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        inputs = [self.openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        times = [time.perf_counter()]
        handles = [self.pipeline.add_request(index, tensor, config) for index, tensor in enumerate(inputs)]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            times.append(time.perf_counter())
        for handle in handles:
            found = len(handle.read_all()[0].generated_ids)
            if found != num_tokens:
                raise RuntimeError(f"{found} tokens came where {num_tokens} were asked for")
        return times


def load(model: str, threads: int, room: Room) -> OpenVINOPeer:
    return OpenVINOPeer(model, threads, room)


def first_token(model: str, threads: int, text: str) -> str:
    genai: Any = import_module("openvino_genai")
    pipeline = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)
    config = genai.GenerationConfig()
    config.max_new_tokens = 1
    config.do_sample = config.apply_chat_template = False
    pieces: list[str] = []
    pipeline.generate(text, config, pieces.append)
    return "".join(pieces)


def prepare(source: str, target: str) -> None:
    """The folder that OpenVINO GenAI writes beside a GGUF file that it reads."""
    genai: Any = import_module("openvino_genai")
    folder = Path(target)
    folder.mkdir()
    link = folder / "model.gguf"
    os.symlink(Path(source).resolve(), link)
    genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    link.unlink()
