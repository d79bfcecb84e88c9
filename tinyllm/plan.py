"""What a model will take in memory, to the byte, before anything of it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinyllm.backends.base import Backend, KVCacheSpec
from tinyllm.config import EngineConfig, ModelConfig
from tinyllm.engine.kv_cache import kv_cache_spec, max_logits_rows, max_sequence_len, scratch_sizes
from tinyllm.models.registry import parameters_nbytes
from tinyllm.models.workspace import Workspace
from weights import Checkpoint

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where the memory goes, in bytes; the sizes are exact.

    Attributes:
        weights_nbytes: the packed parameters.
        kv_cache_nbytes: keys and values of all layers; resident only once tokens were written there.
        workspace_nbytes: the activations of one step.
        scratch_nbytes: the most that the backend's kernels need besides; it grows to that on demand.
        kv_nbytes_per_token: keys and values of one token, over all layers.
        kv_cache_spec: the cache that is reserved.
        max_sequence_len: the longest prompt plus output that a request may have, in tokens.
        available_nbytes: memory that was free when the plan was made.
    """

    weights_nbytes: int
    kv_cache_nbytes: int
    workspace_nbytes: int
    scratch_nbytes: int
    kv_nbytes_per_token: int
    kv_cache_spec: KVCacheSpec
    max_sequence_len: int
    available_nbytes: int

    @property
    def num_blocks(self) -> int:
        return self.kv_cache_spec.num_blocks

    @property
    def block_size(self) -> int:
        return self.kv_cache_spec.block_size

    @property
    def num_tokens(self) -> int:
        """How many tokens the cache holds, over all sequences."""
        return self.num_blocks * self.block_size

    @property
    def total_nbytes(self) -> int:
        return self.weights_nbytes + self.kv_cache_nbytes + self.workspace_nbytes + self.scratch_nbytes

    @property
    def fits(self) -> bool:
        return self.total_nbytes <= self.available_nbytes

    def shares(self) -> dict[str, int]:
        """The parts of the total, by their names for people, in bytes."""
        return {
            "weights": self.weights_nbytes,
            "KV cache": self.kv_cache_nbytes,
            "workspace": self.workspace_nbytes,
            "scratch": self.scratch_nbytes,
        }


def plan_memory(checkpoint: Checkpoint, model: ModelConfig, engine: EngineConfig, backend: Backend) -> MemoryPlan:
    """Sizes everything that loading `checkpoint` and running it will reserve; nothing is loaded.

    Raises ConfigError or WeightsError: the options or the tensors do not fit together.
    """
    weights = parameters_nbytes(checkpoint, model, backend)
    workspace = Workspace.size_of(model, engine.max_batch_tokens, max_logits_rows(engine))
    max_len = max_sequence_len(model, engine)
    available = backend.available_nbytes()
    free = available - weights - workspace - _scratch_nbytes(model, engine, backend, max_len)
    spec = kv_cache_spec(model, engine, backend, max(0, free))
    one, two = (backend.kv_cache_nbytes(replace(spec, num_blocks=n)) for n in (1, 2))
    max_len = min(max_len, spec.num_blocks * spec.block_size)
    return MemoryPlan(
        weights_nbytes=weights,
        kv_cache_nbytes=backend.kv_cache_nbytes(spec),
        workspace_nbytes=workspace,
        scratch_nbytes=_scratch_nbytes(model, engine, backend, max_len),
        kv_nbytes_per_token=(two - one) // spec.block_size,
        kv_cache_spec=spec,
        max_sequence_len=max_len,
        available_nbytes=available,
    )


def _scratch_nbytes(model: ModelConfig, engine: EngineConfig, backend: Backend, max_len: int) -> int:
    max_context = -(-max_len // engine.block_size) * engine.block_size
    return backend.workspace_nbytes(*scratch_sizes(model, engine.max_batch_tokens, max_context))
