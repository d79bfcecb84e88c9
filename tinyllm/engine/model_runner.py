"""Runs a batch through the model: copies blocks, runs the layers, and brings single rows of the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tinyllm.backends.base import Batch, F32Array, KVCacheSpec
from tinyllm.models.model import Model
from tinyllm.models.workspace import Workspace

__all__ = ["ModelRunner"]


class ModelRunner:
    """The model, its KV cache and its workspace: everything of the engine that holds large arrays."""

    def __init__(self, model: Model, spec: KVCacheSpec, *, max_batch_tokens: int, max_logits_rows: int) -> None:
        self.model = model
        self.cache = model.backend.allocate_kv_cache(spec)
        self.workspace = Workspace.allocate(model.config, max_batch_tokens, max_logits_rows)
        self.max_logits_rows = max_logits_rows

    def forward(self, batch: Batch, copies: Sequence[tuple[int, int]]) -> F32Array:
        """Carries out the block copies, then computes the final hidden states (T, M), a view of the workspace."""
        if copies:
            self.model.backend.copy_blocks(self.cache, np.array(copies, np.int32))
        return self.model.forward(batch, self.cache, self.workspace)

    def logits(self, hidden: F32Array, rows: Sequence[int]) -> Iterator[F32Array]:
        """The logits (V,) of the wanted rows of hidden (T, M), each valid until the next is asked for."""
        for first in range(0, len(rows), self.max_logits_rows):
            chunk = np.array(rows[first : first + self.max_logits_rows], np.intp)
            yield from self.model.compute_logits(hidden[chunk], self.workspace)
