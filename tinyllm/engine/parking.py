"""Sequences at rest: kept on their blocks for whoever resumes them, forked, and carried in and out of the cache."""

from __future__ import annotations

import numpy as np

from tinyllm.backends.base import I32Array
from tinyllm.engine.admission import Admission
from tinyllm.engine.block_manager import RELEASED
from tinyllm.engine.model_runner import ModelRunner
from tinyllm.engine.prefix_hash import root_hash
from tinyllm.engine.scheduler import Scheduler
from tinyllm.engine.sequence import Sequence, SequenceStatus, Task
from tinyllm.engine.snapshot import Snapshot
from tinyllm.engine.text import TextStream
from tinyllm.errors import SnapshotError
from tinyllm.sampling import TokenHistory
from tinyllm.sampling_params import SamplingParams

__all__ = ["Parking"]


class Parking:
    """What can be done with parked sequences. Running requests take their blocks when there are no others.

    One that lost its blocks is computed again when it is resumed, with the same bits.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, admission: Admission) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.admission = admission
        self._num_restored = 0

    def fork(self, parked: Sequence) -> Sequence:
        """Another sequence at rest in the same state: references to the same blocks, no memory."""
        child = _at_rest(parked)
        self.scheduler.block_manager.fork(parked, child)
        self.scheduler.park(child)
        return child

    def release(self, parked: Sequence) -> None:
        """Gives the blocks of a sequence at rest back; for good."""
        self.scheduler.finish(parked)

    def snapshot(self, parked: Sequence) -> Snapshot:
        """The sequence with what the cache holds of it, as arrays of their own."""
        params, block_size = parked.request.params, self.scheduler.block_manager.block_size
        table = np.array(parked.block_table, np.int32)
        positions = _seen(parked.num_computed_tokens, parked.num_tokens, parked.request.window, parked.request.sinks)
        if len(table) == 0:  # it lost its blocks
            positions = positions[:0]
        assert (table[positions // block_size] != RELEASED).all()
        keys, values = self.runner.read_kv(_slots(table, positions, block_size))
        return Snapshot(
            fingerprint=self.runner.fingerprint,
            kv_dtype=self.runner.cache.spec.dtype,
            token_ids=np.array(parked.token_ids, np.int32),
            num_computed_tokens=parked.num_computed_tokens,
            positions=positions,
            keys=keys,
            values=values,
            window=params.window,
            sinks=params.sinks,
            cache_salt=params.cache_salt,
        )

    def restore(self, snapshot: Snapshot) -> Sequence:
        """A sequence at rest, as it was when the snapshot was taken; without its blocks if there is no room now.

        Others never share the blocks of a restored sequence, nor those computed after them: what a file says may be
        wrong.

        Raises:
            SnapshotError: it is of another model, device or cache dtype, or contradicts itself; nothing has changed.
            InvalidRequestError: the sequence is not one that this engine could serve.
        """
        if snapshot.fingerprint != self.runner.fingerprint or snapshot.kv_dtype != self.runner.cache.spec.dtype:
            raise SnapshotError(
                "the snapshot is of another model, device, version or kv_dtype: it would not resume bit for bit"
            )
        self._check_arrays(snapshot)
        self._num_restored += 1
        params = SamplingParams(window=snapshot.window, sinks=snapshot.sinks, cache_salt=snapshot.cache_salt)
        request = self.admission.request(
            f"restored {self._num_restored}",
            snapshot.token_ids.tolist(),
            params,
            prompt=None,
            task=Task.PREFILL,
            resume_from=None,
            keep=True,
        )
        request.prefix_root = root_hash(request.prefix_root, "restored", self._num_restored)
        text = TextStream(None, (), include_stop=False)
        sequence = Sequence(request, 0, request.prompt_token_ids.copy(), text, TokenHistory.of(()))
        sequence.status = SequenceStatus.FINISHED
        self._check_held(snapshot, request.window, request.sinks)
        self._fill(sequence, snapshot)
        self.scheduler.park(sequence)
        return sequence

    def _check_arrays(self, snapshot: Snapshot) -> None:
        spec = self.runner.cache.spec
        shape = spec.num_layers, len(snapshot.positions), spec.num_kv_heads, spec.head_dim
        if snapshot.keys.shape != shape or snapshot.values.shape != shape:
            raise SnapshotError(f"the snapshot's keys and values must have the shape {shape}")
        positions, computed = snapshot.positions, snapshot.num_computed_tokens
        if not 0 <= computed <= len(snapshot.token_ids):
            raise SnapshotError(f"the snapshot says that {computed} of {len(snapshot.token_ids)} tokens are computed")
        if len(positions) and not (positions[0] >= 0 and positions[-1] < computed and (np.diff(positions) > 0).all()):
            raise SnapshotError("the snapshot's positions do not ascend within its computed tokens")

    @staticmethod
    def _check_held(snapshot: Snapshot, window: int | None, sinks: int) -> None:
        """All that a later token will see must be there, unless nothing is: then all is computed again."""
        seen = _seen(snapshot.num_computed_tokens, len(snapshot.token_ids), window, sinks)
        if len(snapshot.positions) and not np.isin(seen, snapshot.positions).all():
            raise SnapshotError("the snapshot lacks keys and values that its next token would see")

    def _fill(self, sequence: Sequence, snapshot: Snapshot) -> None:
        """Takes blocks for the snapshot's positions, and writes its keys and values there."""
        blocks = self.scheduler.block_manager
        held = np.zeros(-(-snapshot.num_computed_tokens // blocks.block_size), np.bool_)
        held[snapshot.positions // blocks.block_size] = True
        if len(snapshot.positions) == 0 or not blocks.adopt(sequence, held.tolist()):
            return
        sequence.num_computed_tokens = snapshot.num_computed_tokens
        sequence.num_hashed_blocks = len(held)
        slots = _slots(np.array(sequence.block_table, np.int32), snapshot.positions, blocks.block_size)
        self.runner.write_kv(slots, snapshot.keys, snapshot.values)


def _at_rest(parked: Sequence) -> Sequence:
    child = Sequence(parked.request, parked.index, parked.token_ids.copy(), parked.text, parked.history.copy())
    child.status = SequenceStatus.FINISHED
    return child


def _seen(num_computed_tokens: int, num_tokens: int, window: int | None, sinks: int) -> I32Array:
    """The computed positions that tokens to come will see, or the last token, which may run again for its logits."""
    positions = np.arange(num_computed_tokens, dtype=np.int32)
    if window is None:
        return positions
    first = min(num_computed_tokens, num_tokens - 1) - window + 1
    return positions[(positions < sinks) | (positions >= first)]


def _slots(table: I32Array, positions: I32Array, block_size: int) -> I32Array:
    return (table[positions // block_size] * block_size + positions % block_size).astype(np.int32)
