"""The workspace: sized exactly, and nothing else allocated in a step."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from tests.models.harness import ALL, backend, build_batch, cache_spec, load_fixture
from tinyllm.models.workspace import Workspace, workspace_shapes


@pytest.mark.parametrize("name", ALL)
def test_the_buffers_are_those_announced(name: str) -> None:
    config = load_fixture(name, "huggingface", "reference").config
    workspace = Workspace.allocate(config, 9, 4, backend("reference"))
    shapes = workspace_shapes(config, 9, 4)
    assert {key: buffer.shape for key, buffer in workspace.buffers.items()} == shapes
    assert all(buffer.dtype == np.float32 for buffer in workspace.buffers.values())
    assert workspace.nbytes == Workspace.size_of(config, 9, 4) == 4 * sum(int(np.prod(s)) for s in shapes.values())
    assert (workspace.max_tokens, workspace.max_logits_rows) == (9, 4)
    assert workspace.logits(3).shape == (3, config.vocab_size)


def test_activations_are_views_of_the_first_rows() -> None:
    config = load_fixture("gemma3", "huggingface", "reference").config
    workspace = Workspace.allocate(config, 9, 4, backend("reference"))
    a = workspace.activations(5)
    assert (a.q.shape, a.k.shape, a.v.shape) == ((5, 2, 8), (5, 1, 8), (5, 1, 8))
    a.qkv[:] = np.arange(5 * 32, dtype=np.float32).reshape(5, 32)
    np.testing.assert_array_equal(a.q[3].ravel(), a.qkv[3, :16])
    np.testing.assert_array_equal(a.k[3].ravel(), a.qkv[3, 16:24])
    np.testing.assert_array_equal(a.v[3].ravel(), a.qkv[3, 24:])
    for view in (a.residual, a.normed, a.branch, a.q, a.k, a.v, a.heads, a.gate_up, a.mlp):
        assert view.shape[0] == 5
        assert any(np.shares_memory(view, buffer) for buffer in workspace.buffers.values())
    assert np.shares_memory(a.heads, a.attention)
    assert a.sink_q.shape == (5, 2, 8)
    assert np.shares_memory(a.sink_q, workspace.buffers["sink_q"])
    for prefix, rotation in (("", a.rotation), ("local_", a.local_rotation)):
        assert rotation is not None
        for part in ("cos", "sin", "sink_cos", "sink_sin"):
            assert getattr(rotation, part).shape == (5, 4)
            assert np.shares_memory(getattr(rotation, part), workspace.buffers[prefix + part])


def test_gpt2_has_no_buffers_of_rotations() -> None:
    workspace = Workspace.allocate(load_fixture("gpt2", "huggingface", "reference").config, 9, 4, backend("reference"))
    assert not {"cos", "sink_cos", "local_cos", "sink_q"} & set(workspace.buffers)
    assert workspace.activations(5).sink_q.size == 0


def test_more_than_was_reserved_is_a_programming_error() -> None:
    workspace = Workspace.allocate(load_fixture("llama", "huggingface", "reference").config, 9, 4, backend("reference"))
    with pytest.raises(AssertionError):
        workspace.activations(10)
    with pytest.raises(AssertionError):
        workspace.logits(5)


@pytest.mark.parametrize(
    ("name", "streams"), [*((name, False) for name in ALL), ("llama", True), ("gemma3", True), ("qwen2_window", True)]
)
def test_the_cpu_backend_s_steps_allocate_next_to_nothing(name: str, streams: bool) -> None:
    """Past the first step, memory grows by less than a tenth of one step's activations."""
    model = load_fixture(name, "huggingface", "cpu")
    config = model.config
    T = min(config.max_position, 64)
    cache = model.backend.allocate_kv_cache(cache_spec(config, 4, 16))
    workspace = Workspace.allocate(config, T, T, model.backend)
    batch = build_batch([(0, T)], [0], [[1] * T], np.arange(4, dtype=np.int32)[None], 16)
    if streams:
        sinks, windows = np.full(1, 2, np.int32), np.full(1, 3, np.int32)
        batch = replace(batch, windows=windows, num_sinks=sinks, sink_positions=np.minimum(batch.positions, 4))
    model.compute_logits(model.forward(model.stage(batch, workspace), cache, workspace), workspace)
    tracemalloc.start()
    try:
        hidden = model.forward(model.stage(batch, workspace), cache, workspace)
        logits = model.compute_logits(hidden, workspace)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.shares_memory(hidden, workspace.buffers["normed"])
    assert np.shares_memory(logits, workspace.buffers["logits"])
    assert peak < 30_000, f"{peak} bytes"
