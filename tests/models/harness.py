"""Runs a model over a paged cache as an engine would, but with the blocks shuffled and every unwritten slot NaN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.backends import create_backend
from tinyllm.backends.base import Backend, Batch, KVCache, KVCacheSpec
from tinyllm.config import ModelConfig
from tinyllm.models.model import Model
from tinyllm.models.registry import load_model, model_config
from tinyllm.models.workspace import Workspace
from weights import Checkpoint, Tensor, open_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
WITH_GGUF = ("llama", "llama_biased", "mistral", "qwen2", "qwen3", "gpt2", "gemma3")
ALL = (*WITH_GGUF, "qwen2_window", "gemma3_capped")
FILES = [*((name, "huggingface") for name in ALL), *((name, "gguf") for name in WITH_GGUF)]
DEVICES = ("reference", "cpu")
BLOCK_SIZES = {"reference": 4, "cpu": 16}

Step = list[tuple[int, int]]  # (sequence, how many of its next tokens)


@lru_cache
def backend(device: str) -> Backend:
    return create_backend(device, None)


def fixture_path(name: str, kind: str) -> Path:
    return FIXTURES / (f"{name}.gguf" if kind == "gguf" else name)


@lru_cache
def load_fixture(name: str, kind: str, device: str) -> Model:
    with open_checkpoint(fixture_path(name, kind)) as checkpoint:
        return load_model(checkpoint, model_config(checkpoint), backend(device))


@lru_cache
def expected(name: str) -> tuple[list[list[int]], np.ndarray]:
    """The sequences of a fixture, and transformers' logits (T, V) over all of them."""
    with np.load(FIXTURES / f"{name}.npz") as saved:
        parts = np.split(saved["token_ids"], np.cumsum(saved["lengths"])[:-1])
        return [part.tolist() for part in parts], saved["logits"]


class EditedCheckpoint:
    """A checkpoint with other metadata or tensors, which remembers what was released."""

    def __init__(
        self,
        original: Checkpoint,
        *,
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path = original.path
        self.kind = original.kind
        self.metadata = original.metadata if metadata is None else metadata
        self.tensors = dict(original.tensors if tensors is None else tensors)
        self.released: list[str] = []

    def release(self, tensor: Tensor) -> None:
        self.released.append(tensor.name)

    def close(self) -> None: ...

    def __enter__(self) -> EditedCheckpoint:
        return self

    def __exit__(self, *_: object) -> None: ...


def edited(name: str, kind: str, edits: Mapping[str, Any]) -> EditedCheckpoint:
    """A fixture with some metadata replaced; a value of ... removes the key."""
    original = open_checkpoint(fixture_path(name, kind))
    metadata = {k: v for k, v in {**original.metadata, **edits}.items() if v is not ...}
    return EditedCheckpoint(original, metadata=metadata)


def load_with(config: ModelConfig, name: str, kind: str = "huggingface", device: str = "reference") -> Model:
    """A fixture's weights under another configuration."""
    with open_checkpoint(fixture_path(name, kind)) as checkpoint:
        return load_model(checkpoint, config, backend(device))


# ---- schedules: how the tokens of all sequences are spread over steps


def whole(lengths: Sequence[int]) -> list[Step]:
    return [list(enumerate(lengths))]


def one_by_one(lengths: Sequence[int]) -> list[Step]:
    """A token of each sequence that has one left, step by step."""
    return [[(s, 1) for s, n in enumerate(lengths) if t < n] for t in range(max(lengths))]


def odd_chunks(lengths: Sequence[int]) -> list[Step]:
    """Chunks of 1 to 7 tokens of a changing choice of sequences, in a changing order."""
    rng, left, steps = np.random.default_rng(3), list(lengths), []
    while any(left):
        step = []
        for s in rng.permutation(len(lengths)).tolist():
            count = min(left[s], int(rng.integers(0, 8)))
            if count:
                step.append((s, count))
                left[s] -= count
        if step:
            steps.append(step)
    return steps


SCHEDULES: dict[str, Callable[[Sequence[int]], list[Step]]] = {
    "whole": whole,
    "one_by_one": one_by_one,
    "odd_chunks": odd_chunks,
}


def run(model: Model, sequences: Sequence[Sequence[int]], schedule: str = "whole", *, seed: int = 0) -> np.ndarray:
    """The logits (T, V) at every position of all sequences, in their order."""
    block_size = BLOCK_SIZES[model.backend.name]
    config, lengths = model.config, [len(ids) for ids in sequences]
    needed = [-(-n // block_size) for n in lengths]
    num_blocks = sum(needed) + 3  # three that nobody owns
    cache = poisoned_cache(model, num_blocks)
    blocks = np.random.default_rng(seed).permutation(num_blocks)
    tables = np.full((len(sequences), max(needed)), 2**31 - 1, np.int32)
    for s, part in enumerate(np.split(blocks[: sum(needed)], np.cumsum(needed)[:-1])):
        tables[s, : len(part)] = part

    steps = SCHEDULES[schedule](lengths)
    workspace = Workspace.allocate(
        config, max(sum(n for _, n in step) for step in steps), max(lengths) + 1, model.backend
    )
    for buffer in workspace.buffers.values():
        buffer.fill(np.nan)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for step in steps:
        hidden = model.forward(
            model.stage(build_batch(step, done, sequences, tables, block_size), workspace), cache, workspace
        )
        end = 0
        for s, count in step:
            start, end = end, end + count
            done[s] += count
            rows[s].append(model.compute_logits(hidden[start:end].copy(), workspace).copy())
    assert done == lengths
    return np.concatenate([row for sequence_rows in rows for row in sequence_rows])


def cache_spec(config: ModelConfig, num_blocks: int, block_size: int) -> KVCacheSpec:
    """A float32 cache for a model."""
    return KVCacheSpec(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="f32",
    )


def poisoned_cache(model: Model, num_blocks: int) -> KVCache:
    """A cache full of NaN, in blocks of the backend's size here."""
    cache = model.backend.allocate_kv_cache(cache_spec(model.config, num_blocks, BLOCK_SIZES[model.backend.name]))
    for layer in cache.layers:
        poison(layer)
    return cache


def poison(layer: object) -> None:
    """Fills a layer's keys and values with NaN."""
    arrays = [value for value in vars(layer).values() if isinstance(value, np.ndarray)]
    assert arrays
    for array in arrays:
        assert array.dtype == np.float32
        array.fill(np.nan)


def build_batch(
    step: Step, done: Sequence[int], sequences: Sequence[Sequence[int]], tables: np.ndarray, block_size: int
) -> Batch:
    ids, positions, slots = [], [], []
    for s, count in step:
        for p in range(done[s], done[s] + count):
            ids.append(sequences[s][p])
            positions.append(p)
            slots.append(int(tables[s, p // block_size]) * block_size + p % block_size)
    order = [s for s, _ in step]
    return Batch(
        token_ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        slot_mapping=np.array(slots, np.int32),
        cu_seqlens_q=np.cumsum([0] + [count for _, count in step], dtype=np.int32),
        seq_lens=np.array([done[s] + count for s, count in step], np.int32),
        block_tables=np.ascontiguousarray(tables[order]),
    )


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in parts of the range of what is wanted."""
    return float(np.abs(found - wanted).max() / np.ptp(wanted))
