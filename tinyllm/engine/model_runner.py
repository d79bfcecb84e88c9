"""Runs a batch through the model: copies blocks, runs the layers, and brings single rows of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice

import numpy as np

from tinyllm.backends.base import Batch, F32Array, I32Array, KVCache, KVCacheSpec
from tinyllm.engine.device_sampling import Draw
from tinyllm.engine.kv_cache import scratch_sizes
from tinyllm.models.model import Model
from tinyllm.models.workspace import Workspace

__all__ = ["ModelRunner"]

PROBE_TOKENS = 16


class ModelRunner:
    """The model, its KV cache and its workspace: everything of the engine that holds large arrays."""

    def __init__(self, model: Model, spec: KVCacheSpec, *, max_batch_tokens: int, max_logits_rows: int) -> None:
        self.model = model
        self.cache = model.backend.allocate_kv_cache(spec)
        self.workspace = Workspace.allocate(model.config, max_batch_tokens, max_logits_rows, model.backend)
        self.max_logits_rows = max_logits_rows
        self._steps = model.backend.step_runner()
        model.backend.reserve(*scratch_sizes(model.config, max_batch_tokens, spec.num_blocks * spec.block_size))

    def forward(self, batch: Batch, copies: Sequence[tuple[int, int]]) -> F32Array:
        """Carries out the block copies, then computes the final hidden states (T, M), a view of the workspace."""
        if copies:
            self.model.backend.copy_blocks(self.cache, np.array(copies, np.int32))
        return self._run(batch, self.cache)

    def _run(self, batch: Batch, cache: KVCache) -> F32Array:
        staged = self.model.stage(batch, self.workspace)

        def step() -> None:
            self.model.forward(staged, cache, self.workspace)

        self._steps.run(staged, step)
        return self.workspace.hidden(len(batch.token_ids))

    def host_rows(self, hidden: F32Array, first: int, end: int) -> F32Array:
        """Rows of hidden (T, M) as a numpy array."""
        return self.model.backend.to_host(hidden[first:end])

    def logits(self, hidden: F32Array, rows: Sequence[int]) -> Iterator[F32Array]:
        """The logits (V,) of the wanted rows of hidden (T, M), each valid until the next is asked for."""
        backend = self.model.backend
        for first in range(0, len(rows), self.max_logits_rows):
            chunk = np.array(rows[first : first + self.max_logits_rows], np.int32)
            yield from backend.to_host(self.model.compute_logits(backend.gather_rows(hidden, chunk), self.workspace))

    def outcomes(
        self, hidden: F32Array, rows: Sequence[int], draws: Sequence[list[Draw] | None], *, keep_logits: bool
    ) -> Iterator[tuple[F32Array | None, list[int] | None]]:
        """What becomes of each of the wanted rows of hidden (T, M): its logits (V,) on the host, or tokens.

        Args:
            draws: for each row the draws from it, if a device may make them, with that row's number.
            keep_logits: bring the logits of all rows to the host.

        Yields:
            (logits, valid until the next is asked for, or None; tokens where a device drew them). One of the two is
            there.
        """
        backend = self.model.backend
        if self.model.config.vocab_size > backend.max_sampled_vocab:
            for logits in self.logits(hidden, rows):
                yield logits, None
            return
        for first in range(0, len(rows), self.max_logits_rows):
            chunk = np.array(rows[first : first + self.max_logits_rows], np.int32)
            on_device = self.model.compute_logits(backend.gather_rows(hidden, chunk), self.workspace)
            wanted = draws[first : first + len(chunk)]
            flat = [draw for row in wanted for draw in row or ()]
            if first > 0:
                flat = [draw._replace(logits_row=draw.logits_row - first) for draw in flat]
            tokens = iter(backend.sample(on_device, flat) if flat else ())
            host = backend.to_host(on_device) if keep_logits or None in wanted else [None] * len(chunk)
            for logits, row in zip(host, wanted, strict=True):
                yield logits, None if row is None else list(islice(tokens, len(row)))

    # ---- the cache's contents

    def read_kv(self, slots: I32Array) -> tuple[F32Array, F32Array]:
        """Keys and values (L, P, KH, D) of the slots (P,) in all layers."""
        pairs = [self.model.backend.read_kv(layer, slots) for layer in self.cache.layers]
        return np.stack([k for k, _ in pairs]), np.stack([v for _, v in pairs])

    def write_kv(self, slots: I32Array, keys: F32Array, values: F32Array) -> None:
        """The reverse: exact, where the numbers come from a cache of the same dtype."""
        backend = self.model.backend
        device_slots = backend.to_device(slots)
        for layer, k, v in zip(self.cache.layers, keys, values, strict=True):
            backend.write_kv(backend.to_device(k), backend.to_device(v), layer, device_slots)

    @cached_property
    def fingerprint(self) -> str:
        """Names model, device, kernels and cache dtype by what they compute: a digest of a few tokens' logits.

        Two engines with the same fingerprint give a request the same bits.
        """
        spec = self.cache.spec
        blocks = -(-PROBE_TOKENS // spec.block_size)
        cache = self.model.backend.allocate_kv_cache(replace(spec, num_blocks=blocks))
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.model.config, self.model.backend.name, spec.dtype)).encode())
        token_ids = np.arange(PROBE_TOKENS, dtype=np.int64) * 7919 % self.model.config.vocab_size
        for position in range(PROBE_TOKENS):
            batch = self.model.stage(_probe_batch(token_ids, position, blocks), self.workspace)
            hidden = self.model.forward(batch, cache, self.workspace)
            digest.update(next(self.logits(hidden, [0])).tobytes())
        return digest.hexdigest()


def _probe_batch(token_ids: np.ndarray, position: int, blocks: int) -> Batch:
    """One token, at a position of a sequence in blocks 0, 1, ..."""

    def one(*values: int) -> I32Array:
        return np.array(values, np.int32)

    return Batch(
        token_ids=one(token_ids[position]),
        positions=one(position),
        slot_mapping=one(position),
        cu_seqlens_q=one(0, 1),
        seq_lens=one(position + 1),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
    )
