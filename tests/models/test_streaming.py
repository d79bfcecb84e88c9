"""StreamingLLM in the models: absolute keys and a second query give the paper's positions inside the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.models.harness import ALL, BLOCK_SIZES, build_batch, cache_spec, difference, fixture_path, poisoned_cache
from tests.tiny import CONFIG, tiny_checkpoint, tiny_model
from tinyllm.backends.base import NO_WINDOW, Batch
from tinyllm.backends.reference import ReferenceBackend
from tinyllm.models.model import Model
from tinyllm.models.registry import load_model, model_config
from tinyllm.models.rope import RotaryTable, inverse_frequencies
from tinyllm.models.workspace import Workspace
from weights import open_checkpoint


def streaming(batch: Batch, masks: Sequence[tuple[int, int]]) -> Batch:
    """The batch with (sinks, window) of each sequence."""
    sinks, windows = (np.array([mask[i] for mask in masks], np.int64) for i in (0, 1))
    last = np.repeat(sinks + windows - 1, np.diff(batch.cu_seqlens_q))
    return replace(
        batch,
        windows=windows.astype(np.int32),
        num_sinks=sinks.astype(np.int32),
        sink_positions=np.minimum(batch.positions, last).astype(np.int32),
    )


def run(model: Model, ids: list[int], mask: tuple[int, int], chunks: list[int]) -> np.ndarray:
    """Logits (T, V); blocks between sinks and window are given up, and filled with NaN, before each step."""
    (sinks, window), config = mask, model.config
    size = BLOCK_SIZES[model.backend.name]
    num_blocks = -(-len(ids) // size)
    cache = poisoned_cache(model, num_blocks)
    tables = np.random.default_rng(1).permutation(num_blocks).astype(np.int32)[None]
    workspace = Workspace.allocate(config, max(chunks), max(chunks), model.backend)
    rows, done = [], 0
    while done < len(ids):
        count = min(chunks[len(rows) % len(chunks)], len(ids) - done)
        lowest = done - window + 1 if done >= sinks + window else 0
        freed = tables[0, -(-sinks // size) : max(-(-sinks // size), lowest // size)]
        for layer in cache.layers:
            layer.k[freed], layer.v[freed] = np.nan, np.nan
        batch = streaming(build_batch([(0, count)], [done], [ids], tables, size), [mask])
        rows.append(
            model.compute_logits(model.forward(model.stage(batch, workspace), cache, workspace), workspace).copy()
        )
        done += count
    return np.concatenate(rows)


# ---- the paper's formulation, dense and in float64


def _rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x (n, H, D) at positions (n,)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * CONFIG["rope_theta"] ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def _rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + CONFIG["rms_norm_eps"]) * weight


def paper_logits(ids: list[int], mask: tuple[int, int]) -> np.ndarray:
    """The tiny llama with a cache of unrotated keys, rotated at their positions inside the cache at every token."""
    w = {name: tensor.dequantize().astype(np.float64) for name, tensor in tiny_checkpoint().tensors.items()}
    (sinks, window), (H, KH, D) = mask, (4, 2, 8)
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(2):
        p = f"model.layers.{layer}."
        normed = _rms_norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((normed @ w[f"{p}self_attn.{name}_proj.weight"].T).reshape(len(ids), -1, D) for name in "qkv")
        heads = np.empty((len(ids), H, D))
        for t in range(len(ids)):
            kept = [j for j in range(t + 1) if j < sinks or j > t - window or t < sinks + window]
            assert len(kept) == min(t + 1, sinks + window)
            inside = np.arange(len(kept))
            keys, values = np.repeat(_rotated(k[kept], inside), H // KH, 1), np.repeat(v[kept], H // KH, 1)
            scores = np.einsum("hd,khd->hk", _rotated(q[t : t + 1], inside[-1:])[0], keys) * D**-0.5
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            heads[t] = np.einsum("hk,khd->hd", probs / probs.sum(-1, keepdims=True), values)
        x = x + heads.reshape(len(ids), -1) @ w[p + "self_attn.o_proj.weight"].T
        normed = _rms_norm(x, w[p + "post_attention_layernorm.weight"])
        gate, up = (normed @ w[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    return _rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("mask", [(4, 20), (1, 33), (17, 16), (0, 25), (3, 1)])
def test_the_positions_inside_the_cache_are_the_papers(mask: tuple[int, int], device: str) -> None:
    ids = np.random.default_rng(6).integers(0, 61, 90).tolist()
    found = run(tiny_model(device), ids, mask, [7, 16, 1, 1, 15])
    assert difference(found, paper_logits(ids, mask)) < 2e-6
    for chunks in ([90], [1]):
        assert run(tiny_model(device), ids, mask, chunks).tobytes() == found.tobytes()


def test_scores_depend_on_distance_alone_at_any_position() -> None:
    """What lets keys keep their absolute rotation: near 2**31 the scores are those near 0."""
    rope = model_config(tiny_checkpoint()).rope
    assert rope is not None
    q, k = np.random.default_rng(8).standard_normal((2, 1, 1, 8)).astype(np.float32)
    scores = []
    for start in (0, 1_000_000, 2**31 - 2000):
        pairs = [RotaryTable(rope).lookup(np.array([p], np.int32)) for p in (start + 1023, start)]
        turned_q, turned_k = q.copy(), k.copy()
        for x, (cos, sin) in zip((turned_q, turned_k), pairs, strict=True):
            ReferenceBackend().rope(x, x[:, :0], cos, sin)
        scores.append(float(np.sum(turned_q * turned_k)))
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=2e-6)


# ---- which query each layer gets


class Spy(ReferenceBackend):
    """Remembers the queries of each attention."""

    def __init__(self) -> None:
        self.seen: list[tuple[np.ndarray, np.ndarray | None, int | None]] = []

    def paged_attention(self, q: Any, layer: Any, batch: Batch, **options: Any) -> Any:
        sink_q = options.get("sink_q")
        self.seen.append((q.copy(), None if sink_q is None else sink_q.copy(), options["window"]))
        return super().paged_attention(q, layer, batch, **options)


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x (T, H, D) turned by angles (T, R / 2)."""
    half = angles.shape[1]
    cos, sin, result = np.cos(angles)[:, None], np.sin(angles)[:, None], x.astype(np.float64)
    first, second = x[..., :half].astype(np.float64), x[..., half : 2 * half].astype(np.float64)
    result[..., :half], result[..., half : 2 * half] = first * cos - second * sin, second * cos + first * sin
    return result


@pytest.mark.parametrize("name", [name for name in ALL if name != "gpt2"])
@pytest.mark.parametrize("window", [2, 5, 6])
def test_the_query_for_the_sinks_is_the_query_at_the_cache_s_end(name: str, window: int) -> None:
    """In every architecture and layer: by the layer's own RoPE, after QK-norm; none where its own window wins."""
    spy = Spy()
    with open_checkpoint(fixture_path(name, "huggingface")) as checkpoint:
        model = load_model(checkpoint, model_config(checkpoint), spy)
    config, T = model.config, 12
    cache = model.backend.allocate_kv_cache(cache_spec(config, 6, 4))
    ids = [np.arange(1, T + 1).tolist()] * 2
    batch = build_batch([(0, T), (1, T)], [0, 0], ids, np.arange(6, dtype=np.int32).reshape(2, 3), 4)
    workspace = Workspace.allocate(config, 2 * T, 1, model.backend)
    batch = streaming(batch, [(3, window), (0, NO_WINDOW)])
    model.forward(model.stage(batch, workspace), cache, workspace)
    assert len(spy.seen) == config.num_layers
    for q, sink_q, layer_window in spy.seen:
        if layer_window is not None and layer_window <= window:
            assert sink_q is None
            continue
        local = layer_window is not None and config.local_rope is not None
        rope = config.local_rope if local else config.rope
        assert rope is not None
        assert sink_q is not None
        assert batch.sink_positions is not None
        turn = (batch.sink_positions - batch.positions)[:, None] * inverse_frequencies(rope)
        np.testing.assert_allclose(sink_q, _turned(q, turn), atol=1e-5 * np.abs(q).max())
    layer_windows = {seen[2] for seen in spy.seen}
    if name == "gemma3":
        assert len(layer_windows) == 2


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_until_the_cache_is_full_nothing_changes(device: str) -> None:
    ids = np.arange(41).tolist()
    plain = run(tiny_model(device), ids, (0, NO_WINDOW), [41])
    found = run(tiny_model(device), ids, (4, 36), [13])
    assert found[:40].tobytes() == plain[:40].tobytes()
    assert found[40].tobytes() != plain[40].tobytes()
