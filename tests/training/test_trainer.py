"""Steps: against the formulas in float64, the same bits on any threads, and that a model learns."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.training import runs
from tests.training.reference import F64Array
from training.checkpoint import State
from training.config import TrainingConfig
from training.data import Batches, validation_windows
from training.llama import Llama
from training.parameters import Parameters
from training.trainer import StepResult, Trainer


def take_steps(config: TrainingConfig, threads: int, state: State | None = None) -> tuple[State, list[StepResult]]:
    """All the steps that are left, or all."""
    trainer, batches = Trainer(config, state, threads), Batches(config, runs.random_tokens())
    results = [trainer.step(batches.at(step)) for step in range(trainer.state.step, config.steps)]
    return trainer.state, results


def copy(state: State) -> State:
    return State(state.step, **{name: array.copy() for name, array in state.arrays().items()})


def same_bits(one: State, other: State) -> bool:
    arrays = zip(one.arrays().values(), other.arrays().values(), strict=True)
    return one.step == other.step and all(a.tobytes() == b.tobytes() for a, b in arrays)


# ---- one step


@pytest.mark.parametrize("clip", [0.05, 1000.0])
def test_steps_against_the_formula(clip: float) -> None:
    """Gradients of the whole batch at once, AdamW in float64: warm-up, clipping, decay of matrices, the average."""
    config = runs.config(clip=clip, weight_decay=0.5, eps=1e-3)
    trainer, batches = Trainer(config, None, 2), Batches(config, runs.random_tokens())
    p = trainer.parameters.flat.astype(np.float64)
    m, v, average = np.zeros_like(p), np.zeros_like(p), p.copy()
    matrices = Parameters(config.model)
    for name in config.model.matrices():
        matrices.arrays[name][...] = 1
    for step in range(config.warmup_steps + 2):
        batch = batches.at(step)
        n, length = batch.shape[0], batch.shape[1] - 1
        gradients = Parameters(config.model)
        before = Parameters(config.model, p.astype(np.float32))
        loss = Llama(config.model, n, length).gradients(before, batch, 1 / (n * length), gradients) / (n * length)
        g: F64Array = gradients.flat.astype(np.float64)
        norm = float(np.linalg.norm(g))
        g *= min(1.0, clip / norm)
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        corrected = m / (1 - config.beta1 ** (step + 1)), v / (1 - config.beta2 ** (step + 1))
        change = corrected[0] / (np.sqrt(corrected[1]) + config.eps)
        p -= config.lr_at(step) * (change + config.weight_decay * p * matrices.flat)
        average += config.average_rate * (p - average)

        result = trainer.step(batch)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.gradient_norm == pytest.approx(norm, rel=1e-4)
        assert result.gradient_norm > 0.05
        assert result.lr == config.lr_at(step)
        assert trainer.state.step == step + 1
        np.testing.assert_allclose(trainer.state.parameters, p, rtol=0, atol=2e-5)
        np.testing.assert_allclose(trainer.state.average, average, rtol=0, atol=2e-5)


def test_the_batch_is_scaled_by_all_its_tokens() -> None:
    """The gradient's norm is that of the mean loss, for every number of shards."""
    norms = []
    for shards in (1, 2, 4):
        config = runs.config(shards=shards)
        batch = Batches(config, runs.random_tokens()).at(0)
        norms.append(Trainer(config, None, 1).step(batch).gradient_norm)
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-5)


def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_nothing() -> None:
    config = runs.config()
    trainer = Trainer(config, None, 1)
    trainer.parameters.norm[3] = np.nan
    before = copy(trainer.state)
    with pytest.raises(FloatingPointError, match="step 0: the gradient's norm is nan"):
        trainer.step(Batches(config, runs.random_tokens()).at(0))
    assert same_bits(trainer.state, before)


# ---- the same bits


def test_steps_have_the_same_bits_on_any_number_of_threads() -> None:
    config = runs.config()
    state, results = take_steps(config, 1)
    assert state.step == config.steps == 30
    for threads in (1, 2, 3, 9):
        other, other_results = take_steps(config, threads)
        assert same_bits(other, state)
        assert other_results == results


@pytest.mark.parametrize("slow", range(4))
def test_the_order_in_which_shards_end_does_not_matter(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = runs.config()
    batch = Batches(config, runs.random_tokens()).at(0)
    expected = Trainer(config, None, 1)
    result = expected.step(batch)
    original, late = Llama.gradients, batch.reshape(4, 2, -1)[slow]

    def gradients(
        self: Llama, parameters: Parameters, tokens: NDArray[np.int32], scale: float, out: Parameters
    ) -> float:
        if (tokens == late).all():
            time.sleep(0.05)
        return original(self, parameters, tokens, scale, out)

    monkeypatch.setattr(Llama, "gradients", gradients)
    trainer = Trainer(config, None, 3)
    assert trainer.step(batch) == result
    assert same_bits(trainer.state, expected.state)


@pytest.mark.parametrize("stop", [1, 13, 14, 15, 29])
def test_going_on_from_a_state_gives_the_same_bits(stop: int) -> None:
    """Also at the border of the two stages, after step 14."""
    config = runs.config()
    expected, results = take_steps(config, 2)
    trainer, batches = Trainer(config, None, 1), Batches(config, runs.random_tokens())
    for step in range(stop):
        trainer.step(batches.at(step))
    state, rest = take_steps(config, 3, copy(trainer.state))
    assert same_bits(state, expected)
    assert rest == results[stop:]


def test_an_evaluation_changes_nothing() -> None:
    config = runs.config()
    expected, _ = take_steps(config, 2)
    trainer, batches = Trainer(config, None, 2), Batches(config, runs.random_tokens())
    for step in range(config.steps):
        trainer.step(batches.at(step))
        if step % 4 == 0:
            trainer.evaluate(trainer.average, validation_windows(runs.random_tokens()["valid"], 12 + step))
    assert same_bits(trainer.state, expected)


# ---- evaluation


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_evaluation_is_the_mean_of_the_losses(count: int) -> None:
    """Also where the windows are no multiple of what is computed at once."""
    config = runs.config()
    trainer = Trainer(config, None, 3)
    rng = np.random.default_rng(count)
    trainer.average.flat[...] += 0.1 * rng.standard_normal(trainer.average.flat.size, np.float32)
    windows = rng.integers(270, size=(count, 21)).astype(np.int32)
    for parameters in (trainer.parameters, trainer.average):
        expected = Llama(config.model, count, 20).losses(parameters, windows).mean(dtype=np.float64)
        assert trainer.evaluate(parameters, windows) == pytest.approx(float(expected), rel=1e-5)


# ---- learning


def test_a_tiny_model_learns() -> None:
    """A text that repeats itself: from the loss of the uniform distribution to almost none."""
    config = runs.config(
        model={**runs.CONTENT["model"], "vocab_size": 32},
        stages=[{"steps": 60, "sequences": 8, "length": 24, "sources": {"text": 1}}],
    )
    text = np.tile(np.random.default_rng(0).permutation(32)[:11], 100).astype(np.uint16)
    trainer, batches = Trainer(config, None, 2), Batches(config, {"text": text})
    losses = [trainer.step(batches.at(step)).loss for step in range(config.steps)]
    assert losses[0] == pytest.approx(math.log(32), rel=0.05)
    assert losses[-1] < 0.1
    windows = validation_windows(text, 24)
    first = Trainer(replace(config, seed=2), None, 1)
    assert first.evaluate(first.average, windows) == pytest.approx(math.log(32), rel=0.05)
    assert trainer.evaluate(trainer.average, windows) < 0.3
