"""The same-bits gate: probes run through an engine in every way there is to run them, and each row of logits that they
are sampled from must equal, byte for byte, that of one pass over the same tokens alone.

A probe is one request: a prompt that crosses several blocks and the first attention split, then some sampled tokens.
A `Run` sends the probes of several combinations through one engine together, each chunked, preempted, forked and
resumed as its combination says; they are each other's neighbours, besides fillers that come and go. Block ids are
shuffled, and blocks that are neither held nor cached are poisoned with NaN after every step.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from tests.poison import poison
from tests.tiny import random_prompt, tiny_engine
from tinyllm.backends import create_backend
from tinyllm.backends.base import F32Array
from tinyllm.config import EngineConfig
from tinyllm.engine.kv_cache import kv_cache_spec
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.scheduler import SchedulerOutput
from tinyllm.engine.sequence import Request, Sequence, SequenceStatus, Task
from tinyllm.engine.snapshot import Snapshot
from tinyllm.models.model import Model
from tinyllm.models.registry import load_model, model_config
from tinyllm.sampling import SamplingParams, TokenHistory, sample
from weights import open_checkpoint

__all__ = [
    "ALL",
    "NUM_FORKS",
    "Alone",
    "Combination",
    "FileSetting",
    "Run",
    "Setting",
    "alone",
    "one_pass",
    "parked_snapshot",
    "run",
]

NUM_FORKS = 3
ALL = 1 << 30  # a chunk that takes the whole prompt


@dataclass(frozen=True)
class Setting:
    """What the bits may depend on."""

    device: str = "cpu"
    kv_dtype: str = "f32"
    window: int | None = None
    sinks: int = 0
    prompt_len: int = 259
    new_tokens: int = 8

    @property
    def prompt(self) -> list[int]:
        return random_prompt(self.prompt_len, seed=3)

    def params(self, **more: Any) -> SamplingParams:
        window = {} if self.window is None else {"window": self.window, "sinks": self.sinks}
        return SamplingParams(**{"max_tokens": self.new_tokens, "seed": 11, **window, **more})

    def engine(self, **options: Any) -> LLMEngine:
        return tiny_engine(self.device, **{"kv_dtype": self.kv_dtype, **options})


@dataclass(frozen=True)
class FileSetting(Setting):
    """The same over a model in a file."""

    path: Path = Path()
    activations: str = "f32"

    def engine(self, *, threads: int | None = None, **options: Any) -> LLMEngine:
        model = model_in(self.path, threads, self.activations)
        config = EngineConfig(**{"num_blocks": 64, "max_batch_tokens": 64, "kv_dtype": self.kv_dtype, **options})
        return LLMEngine(model, config, kv_cache_spec(model.config, config, model.backend))


@lru_cache
def model_in(path: Path, threads: int | None, activations: str) -> Model:
    checkpoint = open_checkpoint(path)
    backend = create_backend("cpu", threads, activations=activations)
    return load_model(checkpoint, model_config(checkpoint), backend)


@dataclass(frozen=True)
class Combination:
    """What they may not depend on, of one probe; a Run has what is common to all of its probes."""

    chunk: int
    warm: bool = False  # the prompt's blocks are in the prefix cache already
    preempt: bool = False  # it loses its blocks before every step that would get it further
    fork: bool = False  # it goes on in NUM_FORKS ways from the first sampled token on
    restore: bool = False  # it resumes a snapshot of another engine, of other block size and chunk
    split: int = 1  # where that snapshot was taken
    stride: int = 1  # while its prompt is computed, it is preempted at every `stride`-th step alone
    offset: int = 0


@dataclass(frozen=True)
class Alone:
    """What a probe gives by single passes: of each fork its tokens and, by position, its logits; keys and values.

    Keys and values are those of the first fork at `positions`, the ones that a later token sees.
    """

    tokens: list[list[int]]
    logits: list[dict[int, bytes]]
    positions: np.ndarray
    keys: F32Array
    values: F32Array


@lru_cache
def alone(setting: Setting) -> Alone:
    """By nothing but single passes over all tokens from the first one on, each in an engine of its own."""
    tokens: list[list[int]] = []
    logits: list[dict[int, bytes]] = []
    for index in range(NUM_FORKS):
        ids = setting.prompt
        seen: dict[int, bytes] = {}
        for _ in range(setting.new_tokens):
            row = one_pass(setting, ids)[-1]
            seen[len(ids) - 1] = row.tobytes()
            history = TokenHistory.of(setting.prompt)
            ids = [
                *ids,
                sample(row, setting.params(), token_ids=ids, history=history, fork_path=(index,)).token_id,
            ]
        tokens.append(ids)
        logits.append(seen)
    held = parked_snapshot(setting, tokens[0], chunk=ALL, block_size=16)
    return Alone(tokens, logits, held.positions, held.keys, held.values)


def one_pass(setting: Setting, ids: list[int]) -> F32Array:
    """The logits (T, V) of one step by itself."""
    engine = setting.engine(threads=1, num_blocks=40, max_batch_tokens=512, prefix_caching=False)
    engine.add_request("only", ids, setting.params(), task=Task.LOGITS)
    result = engine.step()
    rows = result.finished[0].rows
    assert rows is not None
    return rows


@lru_cache
def fingerprint(setting: Setting, threads: int) -> str:
    return setting.engine(threads=threads).fingerprint


def parked_snapshot(setting: Setting, ids: list[int], *, chunk: int, block_size: int) -> Snapshot:
    """A snapshot of a sequence of which all tokens are computed, in chunks."""
    engine = setting.engine(
        threads=1, num_blocks=700 // block_size + 8, max_batch_tokens=min(chunk, 512), block_size=block_size
    )
    engine.add_request("only", ids, setting.params(), task=Task.PREFILL, keep=True)
    while engine.has_unfinished_requests():
        engine.step()
    return engine.snapshot(engine.take_kept("only"))


@lru_cache(maxsize=64)
def donated(setting: Setting, split: int) -> Snapshot:
    """The probe's first `split` tokens, computed in another engine."""
    return parked_snapshot(
        setting, setting.prompt[:split], chunk=13, block_size={"cpu": 48, "cuda-emulated": 32}.get(setting.device, 5)
    )


@dataclass(eq=False)
class Probe:
    """A request that is watched.

    Attributes:
        frontier: of each fork, how far it was computed when it was last preempted.
        seen: (fork, position) of the logits that were used.
    """

    name: str
    combination: Combination
    parent: Sequence | None = None
    request: Request | None = None
    frontier: Counter[int] = field(default_factory=Counter)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def is_to_be_preempted(self, sequence: Sequence, setting: Setting) -> bool:
        """Before the step at hand: if it got further since the last time."""
        computed, c = sequence.num_computed_tokens, self.combination
        if sequence.status is not SequenceStatus.RUNNING or computed <= self.frontier[sequence.index]:
            return False
        return computed >= setting.prompt_len or computed // c.chunk % c.stride == c.offset % c.stride


class Run:
    """One engine through which probes of several combinations go together.

    Args:
        batch: how many sequences each step has, fillers included; more only where probes fork beyond it.
        abort: a neighbour is aborted before every step; where there is none, one that waits.
        interrupt: some steps are interrupted when their keys and values are written.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        batch: int,
        block_size: int,
        threads: int = 1,
        abort: bool = False,
        interrupt: bool = False,
        prefix_caching: bool = True,
        num_blocks: int | None = None,
        seed: int = 0,
    ) -> None:
        per_probe = -(-(setting.prompt_len + setting.new_tokens) // block_size) + 4
        self.setting = setting
        self.batch = batch
        self.abort = abort
        self.interrupt = interrupt
        self.block_size = block_size
        self.engine = setting.engine(
            threads=threads,
            block_size=block_size,
            num_blocks=num_blocks or 2 * per_probe * (batch + NUM_FORKS),
            max_batch_tokens=512 if batch <= 2 else 8192,
            max_num_seqs=4 * batch + 4 * NUM_FORKS,
            prefix_caching=prefix_caching,
            debug_checks=False,
        )
        self.engine.observers.append(self)
        self.engine.runner.__dict__["fingerprint"] = fingerprint(setting, threads)  # costs more than most runs
        self.label = (
            f"{setting} batch={batch} block_size={block_size} threads={threads} abort={abort} "
            f"interrupt={interrupt} caching={prefix_caching}"
        )
        self.rng = np.random.default_rng([batch, block_size, threads, abort, seed])
        self.probes: dict[Request, Probe] = {}
        self.fillers: list[str] = []
        self.num_fillers = 0
        self.sizes: Counter[int] = Counter()
        self.num_preempted = self.num_copies = self.num_hit_tokens = self.num_interrupts = self.num_restored = 0
        self.failures: list[str] = []
        self._shuffle_blocks()

    def go(self, combinations: list[Combination]) -> list[str]:
        """Runs a probe of each; one line for each thing that differs from what it gives alone."""
        probes = [Probe(f"probe{i}", combination) for i, combination in enumerate(combinations)]
        for probe in probes:
            self._prepare(probe)
        self._poison(range(self.engine.block_manager.num_blocks))
        self._watch_freed_blocks()
        self._limit_chunks()
        if self.interrupt:
            self._interrupt_steps()
        for probe in probes:
            self._start(probe)
        while any(probe.name in self.engine.requests for probe in probes):
            self._fill()
            self._preempt()
            try:
                for output in self.engine.step().finished:
                    if output.request_id in self.fillers:
                        self.fillers.remove(output.request_id)
            except KeyboardInterrupt:
                self.num_interrupts += 1
            self._poison_freed_blocks()
        for probe in probes:
            self._check(probe)
        for filler in self.fillers:
            self.engine.abort(filler)
        self.engine.check_invariants()
        assert self.engine.block_manager.num_free_blocks == self.engine.block_manager.num_blocks
        return self.failures

    # ---- probes

    def _params(self, probe: Probe) -> SamplingParams:
        c = probe.combination
        return self.setting.params(n=NUM_FORKS if c.fork else 1, cache_salt="warm" if c.warm else probe.name)

    def _prepare(self, probe: Probe) -> None:
        """What is there before the probe comes: a restored parent, and the prefix cache."""
        c, engine = probe.combination, self.engine
        if c.restore:
            probe.parent = engine.restore(donated(self.setting, c.split))
            self.num_restored += probe.parent.num_computed_tokens > 0  # there may be no room
            if c.fork:  # what is resumed is a fork, the original is gone
                child = engine.fork(probe.parent)
                engine.release(probe.parent)
                probe.parent = child
        if c.warm and (c.restore or not engine.block_manager.num_cached_blocks):
            params = self.setting.params(cache_salt="warm", max_tokens=1)
            engine.add_request("warmer", self.setting.prompt, params, resume_from=probe.parent)
            while engine.has_unfinished_requests():
                engine.step()

    def _start(self, probe: Probe) -> None:
        self.engine.add_request(
            probe.name,
            self.setting.prompt,
            self._params(probe),
            resume_from=probe.parent,
            keep=not probe.combination.fork,
        )
        probe.request = self.engine.requests[probe.name]
        self.probes[probe.request] = probe

    def _preempt(self) -> None:
        for request, probe in self.probes.items():
            if probe.combination.preempt:
                for sequence in request.sequences:
                    if probe.is_to_be_preempted(sequence, self.setting):
                        probe.frontier[sequence.index] = sequence.num_computed_tokens
                        self.engine.scheduler._preempt(sequence)
                        self.num_preempted += 1

    def _check(self, probe: Probe) -> None:
        expected, request = alone(self.setting), probe.request
        assert request is not None
        for index, sequence in enumerate(request.sequences):
            if sequence.token_ids != expected.tokens[index]:
                self._fail(probe, f"the tokens of fork {index}")
        wanted = {(index, at) for index in range(len(request.sequences)) for at in expected.logits[index]}
        first = self.setting.prompt_len - 1  # is used once for all forks
        if {key for key in wanted if key[0] == 0 or key[1] > first} - probe.seen:
            self._fail(probe, "some logits were never used")
        if not probe.combination.fork:
            parked = self.engine.take_kept(probe.name)
            held = self.engine.snapshot(parked)
            self.engine.release(parked)
            at = np.searchsorted(expected.positions, held.positions)
            assert (expected.positions[at] == held.positions).all()
            # the last token was sampled, not computed; where blocks are short, parked sequences lose theirs
            assert len(at) in (0, len(expected.positions) - 1)
            for name, found, right in (("keys", held.keys, expected.keys), ("values", held.values, expected.values)):
                if found.tobytes() != right[:, at].tobytes():
                    self._fail(probe, f"the {name} in the cache")
        if probe.parent is not None:
            self.engine.release(probe.parent)

    def _fail(self, probe: Probe, what: str) -> None:
        self.failures.append(f"{self.label} {probe.combination}: {what}")

    # ---- neighbours

    def _fill(self) -> None:
        """Fillers come, end and are aborted, so that the step has `batch` sequences."""
        engine = self.engine
        of_probes = sum(
            sequence.status in (SequenceStatus.RUNNING, SequenceStatus.WAITING)
            for request in self.probes
            if request.request_id in engine.requests
            for sequence in request.sequences
        )
        wanted = max(0, self.batch - of_probes)
        if self.abort and self.fillers:
            engine.abort(self.fillers.pop(int(self.rng.integers(len(self.fillers)))))
        elif self.abort:
            engine.abort(self._add_filler())
        while len(self.fillers) < wanted:
            self.fillers.append(self._add_filler())
        for surplus in self.fillers[wanted:]:  # ends with its next token
            request = engine.requests[surplus]
            request.max_len = request.sequences[0].num_tokens + 1

    def _add_filler(self) -> str:
        """Some share the probes' prefix, others have nothing in common with them."""
        self.num_fillers += 1
        rng, name = self.rng, f"filler{self.num_fillers}"
        prompt, salt = rng.integers(0, 61, rng.integers(1, 5)).tolist(), ""
        if rng.random() < 0.3 and self.engine.block_manager.num_cached_blocks:
            prompt, salt = self.setting.prompt[: rng.integers(1, self.setting.prompt_len)] + prompt, "warm"
        params = SamplingParams(
            temperature=float(rng.random() < 0.1), max_tokens=int(rng.integers(2, 60)), cache_salt=salt
        )
        self.engine.add_request(name, prompt, params)
        return name

    # ---- chunks and blocks

    def _limit_chunks(self) -> None:
        scheduler = self.engine.scheduler
        largest = scheduler._max_chunk

        def max_chunk(sequence: Sequence) -> int:
            probe = self.probes.get(sequence.request)
            return min(largest(sequence), ALL if probe is None else probe.combination.chunk)

        scheduler._max_chunk = max_chunk  # type: ignore[method-assign]

    def _interrupt_steps(self) -> None:
        runner = self.engine.runner
        forward, calls = runner.forward, count()

        def interrupted(*arguments: Any) -> F32Array:
            hidden = forward(*arguments)
            if next(calls) in (1, 3, 6, 12, 24, 48, 96):
                raise KeyboardInterrupt
            return hidden

        runner.forward = interrupted  # type: ignore[method-assign]

    def _shuffle_blocks(self) -> None:
        manager = self.engine.block_manager
        manager._free = OrderedDict.fromkeys(self.rng.permutation(manager.num_blocks).tolist())

    def _watch_freed_blocks(self) -> None:
        manager = self.engine.block_manager
        drop = manager._drop
        self._dropped: list[int] = []

        def dropped(block: int) -> None:
            drop(block)
            self._dropped.append(block)

        manager._drop = dropped  # type: ignore[method-assign]

    def _poison_freed_blocks(self) -> None:
        self._poison(self._dropped)
        self._dropped.clear()

    def _poison(self, blocks: Any) -> None:
        """Writes NaN wherever nothing is held or cached."""
        manager = self.engine.block_manager
        free = [block for block in blocks if manager.ref_counts[block] == 0 and not manager.is_cached(block)]
        if free:
            for layer in self.engine.runner.cache.layers:
                poison(layer, free)

    # ---- as the engine's observer

    wants_logits = True

    def request_added(self, request: Request) -> None: ...

    def request_aborted(self, request: Request) -> None: ...

    def step_undone(self) -> None: ...

    def step_finished(self, output: SchedulerOutput, finished: list[Request]) -> None:
        self.sizes[len(output.scheduled)] += 1
        self.num_copies += len(output.copies)
        self.num_hit_tokens += sum(n for sequence, n in output.admitted if sequence.request in self.probes)

    def logits_used(self, sequence: Sequence, position: int, logits: F32Array) -> None:
        probe = self.probes.get(sequence.request)
        if probe is None:
            return
        probe.seen.add((sequence.index, position))
        if logits.tobytes() != alone(self.setting).logits[sequence.index].get(position):
            self._fail(probe, f"the logits of fork {sequence.index} at {position}")


def run(setting: Setting, combinations: list[Combination], **options: Any) -> list[str]:
    """What differs, of one Run."""
    return Run(setting, **options).go(combinations)
