"""Decode steps as programs: recorded at their second time, run from then on, with the bits of the ops one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.tiny import random_prompt, tiny_model
from tinyllm.backends import cpu_program
from tinyllm.backends.base import NO_WINDOW, Batch, KVCacheSpec
from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_program import StagedBatches
from tinyllm.backends.host import EagerSteps
from tinyllm.config import EngineConfig
from tinyllm.engine.kv_cache import kv_cache_spec
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.sampling import SamplingParams


def decoding(lengths, columns=3):
    """One token for each sequence of so many tokens."""
    S = len(lengths)
    lens = np.array(lengths, np.int32)
    tables = np.arange(S * columns, dtype=np.int32).reshape(S, columns)[:, ::-1].copy()
    slots = tables[np.arange(S), (lens - 1) // 16] * 16 + (lens - 1) % 16
    return Batch(lens % 7, lens - 1, slots.astype(np.int32), np.arange(S + 1, dtype=np.int32), lens, tables)


class Counting:
    """A step that is counted, over ops of a backend."""

    def __init__(self, backend):
        self.backend, self.calls = backend, 0
        self.weight = np.linspace(0.5, 1.5, 40, dtype=np.float32)
        self.x, self.out = np.ones((2, 40), np.float32), np.zeros((2, 40), np.float32)

    def __call__(self):
        self.calls += 1
        self.backend.add(self.x, self.x)
        self.backend.rms_norm(self.x, self.weight, 1e-5, out=self.out)


def test_a_step_is_run_then_recorded_then_replayed():
    backend = CpuBackend(2)
    steps, step = backend.step_runner(), Counting(backend)
    for number, calls in enumerate((1, 2, 2, 2), 1):
        steps.run(backend.stage(decoding([5, 20])), step)
        assert step.calls == calls
        assert step.x[0, 0] == 2.0**number  # recording does nothing, and what is recorded is done once
    assert step.out.any()


def test_recorded_ops_leave_no_trace():
    backend = CpuBackend(1)
    step = Counting(backend)
    program = backend._record(step)
    assert (step.x == 1).all()
    assert not step.out.any()
    program.run(backend._threads)
    assert (step.x == 2).all()
    backend.add(step.x, step.x)  # ops run again at once
    assert (step.x == 4).all()


def test_a_failed_recording_ends():
    backend = CpuBackend(1)

    def step():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend._record(step)
    x = np.ones((1, 16), np.float32)
    backend.add(x, x)
    assert (x == 2).all()


def test_scratch_that_moves_makes_programs_anew():
    backend = CpuBackend(2)
    steps, step = backend.step_runner(), Counting(backend)
    for _ in range(3):
        steps.run(backend.stage(decoding([5])), step)
    assert step.calls == 2
    backend._reserve(backend._scratch.nbytes + 1)
    for _ in range(3):
        steps.run(backend.stage(decoding([5])), step)
    assert step.calls == 4

    def growing():
        growing.calls += 1
        if growing.calls == 1:
            backend._reserve(backend._scratch.nbytes + 1)

    growing.calls = 0
    backend._record(growing)
    assert growing.calls == 2  # what was recorded first may point at memory that is gone


def test_steps_of_other_kinds_are_run_op_by_op():
    backend = CpuBackend(1)
    steps, step = backend.step_runner(), Counting(backend)
    two = decoding([5, 20])
    streaming = replace(two, windows=np.full(2, NO_WINDOW, np.int32), num_sinks=np.zeros(2, np.int32))
    prefill = replace(two, cu_seqlens_q=np.array([0, 2], np.int32), seq_lens=np.array([20], np.int32))
    for batch in (streaming, prefill):
        for _ in range(3):
            staged = backend.stage(batch)
            assert staged is batch
            steps.run(staged, step)
    assert step.calls == 6


def test_staged_batches_keep_their_places():
    staging = StagedBatches()
    first = staging.stage(decoding([5, 20]))
    other = staging.stage(decoding([5, 20], columns=40))
    assert first.block_tables.shape == (2, 16)
    assert other.block_tables.shape == (2, 64)
    again = staging.stage(decoding([6, 30], columns=5))
    for name in ("token_ids", "positions", "slot_mapping", "cu_seqlens_q", "seq_lens", "block_tables"):
        assert getattr(again, name) is getattr(first, name)
        source = getattr(decoding([6, 30], columns=5), name)
        assert np.array_equal(getattr(again, name)[..., : source.shape[-1]], source)
    assert again.extent == decoding([6, 30], columns=5).extent


def test_few_shapes_are_remembered(monkeypatch):
    monkeypatch.setattr(cpu_program, "MAX_SHAPES", 2)
    backend = CpuBackend(1)
    steps, step = backend.step_runner(), Counting(backend)
    for _ in range(3):
        for sequences in (1, 2, 3):
            staged = backend.stage(decoding([5] * sequences))
            assert len(backend._staged._buffers) <= 2
            steps.run(staged, step)
    assert step.calls == 9  # each came back with other buffers: none was ever replayed at addresses that are gone


def test_a_program_is_of_its_buffers_alone(monkeypatch):
    """Another engine on the same backend may have pushed a shape's buffers out."""
    monkeypatch.setattr(cpu_program, "MAX_SHAPES", 2)
    backend = CpuBackend(1)
    ours, others, step = backend.step_runner(), backend.step_runner(), Counting(backend)
    for _ in range(3):
        ours.run(backend.stage(decoding([5])), step)
    for sequences in (2, 3):
        others.run(backend.stage(decoding([5] * sequences)), step)
    calls = step.calls
    ours.run(backend.stage(decoding([5])), step)
    assert step.calls == calls + 1


@pytest.mark.parametrize("threads", [1, 2])
def test_programs_give_the_bits_of_single_ops(threads, monkeypatch):
    """Sequences come and go, so that many shapes occur, some again and again."""
    model = tiny_model("cpu", threads)
    config = EngineConfig(device="cpu", num_blocks=64, max_batch_tokens=64)
    spec = kv_cache_spec(model.config, config, model.backend)
    seen = []
    for eager in (False, True):
        engine = LLMEngine(model, config, spec)
        if eager:
            engine.runner._steps = EagerSteps()
        digest = []
        use_logits = engine._decoding.use_logits
        monkeypatch.setattr(
            engine._decoding,
            "use_logits",
            lambda s, p, row, u=use_logits, d=digest: (d.append(row.tobytes()), u(s, p, row)),
        )
        monkeypatch.setattr(engine._decoding, "draws", lambda *_: None)
        for index in range(6):
            params = SamplingParams(max_tokens=20 + 30 * index, seed=index, ignore_eos=True)
            engine.add_request(str(index), random_prompt(5 + 9 * index, seed=index), params)
        tokens = []
        while engine.has_unfinished_requests():
            tokens += [output.outputs[0].token_ids for output in engine.step().finished]
        seen.append((tokens, digest))
        if not eager:
            assert sum(program is not None for _, program in engine.runner._steps._seen.values()) >= 6
    assert seen[0] == seen[1]


def test_a_cache_is_read_where_it_is(rng):
    """Two caches of one backend: a program of the one must not touch the other."""
    backend = CpuBackend(2)
    spec = KVCacheSpec(num_layers=1, num_blocks=3, block_size=16, num_kv_heads=1, head_dim=16, dtype="f32")
    caches = [backend.allocate_kv_cache(spec) for _ in range(2)]
    k = rng.standard_normal((1, 1, 16)).astype(np.float32)
    runners = [backend.step_runner() for _ in caches]
    for number in range(4):
        for cache, runner in zip(caches, runners, strict=True):
            staged = backend.stage(decoding([5 + number]))
            runner.run(staged, lambda c=cache, s=staged: backend.write_kv(k, k, c.layers[0], s.slot_mapping))
    for cache in caches:
        slots = 2 * 16 + np.arange(4, 8, dtype=np.int32)
        assert np.array_equal(backend.read_kv(cache.layers[0], slots)[0], np.repeat(k, 4, axis=0))
