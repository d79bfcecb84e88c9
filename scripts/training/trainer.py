"""The loop: gradients of a batch's shards on several threads, summed in order; clipping; AdamW.

    shard 0 .. shards - 1  (each on any thread)  ->  gradients 0 .. shards - 1  ->  sum in order  ->  clip, AdamW

A shard's gradients are computed by one thread from its own tokens, and every sum has one order: a step's bits depend
on the configuration alone. BLAS must run on one thread (see scripts/train_bundled.py), since its own division of a
product may follow the number of threads.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tinyllm.backends.base import F32Array, I32Array
from training.backend import TrainingBackend
from training.checkpoint import State
from training.config import TrainingConfig
from training.llama import Llama
from training.parameters import ModelShape, Parameters

__all__ = ["StepResult", "Trainer", "Workers"]


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the batch, nats per token
    gradient_norm: float  # before clipping
    lr: float


class Workers:
    """Threads that each hold the activations of one shard."""

    def __init__(self, shape: ModelShape, threads: int) -> None:
        self._shape, self._threads = shape, threads
        self._pool = ThreadPoolExecutor(threads)
        self._free: queue.SimpleQueue[Llama] = queue.SimpleQueue()
        self._extent = (0, 0)

    def _prepare(self, sequences: int, length: int) -> None:
        if self._extent != (sequences, length):
            self._extent, self._free = (sequences, length), queue.SimpleQueue()
            for _ in range(self._threads):
                self._free.put(Llama(self._shape, sequences, length))

    def gradients(self, parameters: Parameters, shards: list[I32Array], scale: float, out: list[Parameters]) -> float:
        """The sum of the losses; out[i] = scale times the gradients of shard i (n, T + 1)."""
        self._prepare(shards[0].shape[0], shards[0].shape[1] - 1)

        def one(tokens: I32Array, gradients: Parameters) -> float:
            model = self._free.get()
            try:
                return model.gradients(parameters, tokens, scale, gradients)
            finally:
                self._free.put(model)

        return sum(self._pool.map(one, shards, out))

    def losses(self, parameters: Parameters, windows: I32Array, sequences: int) -> F32Array:
        """(n, T + 1) -> (n, T), `sequences` at once; n need be no multiple of it."""
        n, length = windows.shape[0], windows.shape[1] - 1
        self._prepare(sequences, length)
        padding = np.zeros((-n % sequences, length + 1), np.int32)
        padded = np.concatenate([windows, padding]).reshape(-1, sequences, length + 1)

        def one(tokens: I32Array) -> F32Array:
            model = self._free.get()
            try:
                return model.losses(parameters, tokens).copy()
            finally:
                self._free.put(model)

        return np.concatenate(list(self._pool.map(one, padded)))[:n]


class Trainer:
    """Takes the steps of a run.

    Attributes:
        state: as it is after the last step.
    """

    def __init__(self, config: TrainingConfig, state: State | None, threads: int) -> None:
        self.config = config
        shape = config.model
        self.state = State.start(Parameters.initial(shape, config.seed).flat) if state is None else state
        self.parameters = Parameters(shape, self.state.parameters)
        self.average = Parameters(shape, self.state.average)
        self.workers = Workers(shape, min(threads, config.shards))
        self._backend = TrainingBackend(threads)
        self._gradients = [Parameters(shape) for _ in range(config.shards)]

    @staticmethod
    def size(config: TrainingConfig) -> int:
        """Numbers of the flat vector."""
        return Parameters(config.model).flat.size

    def step(self, batch: I32Array) -> StepResult:
        """One step on a batch (sequences, length + 1)."""
        config, state = self.config, self.state
        tokens = batch.shape[0] * (batch.shape[1] - 1)
        shards = list(batch.reshape(config.shards, -1, batch.shape[1]))
        loss = self.workers.gradients(self.parameters, shards, 1 / tokens, self._gradients) / tokens
        total = self._gradients[0].flat
        norm = self._backend.sum_gradients([g.flat for g in self._gradients], total)
        if not np.isfinite(norm):
            raise FloatingPointError(f"step {state.step}: the gradient's norm is {norm}")
        lr = config.lr_at(state.step)
        self._backend.adamw(
            state.parameters, total, (state.first_moment, state.second_moment), state.average,
            decayed=self.parameters.decayed, clip=min(1.0, config.clip / norm) if norm else 1.0, lr=lr,
            betas=(config.beta1, config.beta2), step=state.step + 1, eps=config.eps,
            weight_decay=config.weight_decay, average_rate=config.average_rate,
        )  # fmt: skip
        state.step += 1
        return StepResult(loss, norm, lr)

    def evaluate(self, parameters: Parameters, windows: I32Array) -> float:
        """The mean loss over windows (n, T + 1), in nats per token."""
        index, _ = self.config.stage_at(max(0, self.state.step - 1))
        stage = self.config.stages[index]
        sequences = stage.sequences // self.config.shards
        return float(np.mean(self.workers.losses(parameters, windows, sequences), dtype=np.float64))
