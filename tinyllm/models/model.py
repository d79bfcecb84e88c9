"""What the engine asks of a model."""

from __future__ import annotations

from typing import Protocol

from tinyllm.backends.base import Backend, Batch, F32Array, KVCache
from tinyllm.config import ModelConfig
from tinyllm.models.workspace import Workspace

__all__ = ["Model"]


class Model(Protocol):
    """A loaded decoder. T tokens of a step, M hidden size, R rows that need logits, V vocabulary."""

    config: ModelConfig
    backend: Backend

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters as the backend holds them."""
        ...

    def stage(self, batch: Batch, workspace: Workspace) -> Batch:
        """Brings a host batch, and all else that a step needs of the host, to the device: what `forward` takes."""
        ...

    def forward(self, batch: Batch, cache: KVCache, workspace: Workspace) -> F32Array:
        """Runs all layers over a staged step's tokens, writing their keys and values into the cache.

        Returns the hidden states after the final norm, (T, M): the workspace's `normed`, overwritten by the next
        step. T is at most the workspace's max_tokens. The host is not waited for, nor does it wait.
        """
        ...

    def compute_logits(self, hidden: F32Array, workspace: Workspace) -> F32Array:
        """(R, M) -> (R, V), soft-capping included: a view into the workspace. R is at most its max_logits_rows."""
        ...
