"""The whole model: losses against the float64 model, gradients against its finite differences."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.training import reference
from tests.training.reference import F64Array
from training.llama import Llama
from training.parameters import ModelShape, Parameters

# hidden size, vocabulary and MLP are no multiples of 16 or 32
TWO_LAYERS = ModelShape(
    vocab_size=77, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=40
)
SHAPES = {
    "no layer": replace(TWO_LAYERS, num_layers=0),
    "one layer": replace(TWO_LAYERS, num_layers=1),
    "two layers": TWO_LAYERS,
    "one key head": ModelShape(
        vocab_size=33, hidden_size=50, num_layers=1, num_heads=3, num_kv_heads=1, head_dim=32, intermediate_size=21,
        rope_theta=500.0, rms_norm_eps=1e-2,
    ),
    "as many key heads": ModelShape(
        vocab_size=17, hidden_size=20, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=48, intermediate_size=7
    ),
}  # fmt: skip
CASES = [  # up to 520 rows: 3 slices of the head
    ("no layer", 1, 1), ("no layer", 3, 91), ("no layer", 1, 520), ("one layer", 1, 1), ("one layer", 2, 70),
    ("one layer", 1, 127), ("two layers", 1, 37), ("two layers", 3, 91), ("one key head", 2, 65),
    ("as many key heads", 5, 13),
]  # fmt: skip


def random_parameters(shape: ModelShape, seed: int = 1) -> Parameters:
    """Far from the first ones, so that no part of the model is almost linear."""
    parameters = Parameters.initial(shape, seed)
    rng = np.random.default_rng(seed)
    for array in parameters.arrays.values():
        array += 0.1 * rng.standard_normal(array.shape, np.float32)
    return parameters


def random_tokens(shape: ModelShape, sequences: int, length: int) -> NDArray[np.int32]:
    rng = np.random.default_rng([sequences, length])
    return rng.integers(shape.vocab_size, size=(sequences, length + 1)).astype(np.int32)


@pytest.mark.parametrize(("name", "sequences", "length"), CASES)
def test_losses(name: str, sequences: int, length: int) -> None:
    shape = SHAPES[name]
    parameters, tokens = random_parameters(shape), random_tokens(shape, sequences, length)
    actual = Llama(shape, sequences, length).losses(parameters, tokens)
    np.testing.assert_allclose(actual, reference.losses(shape, reference.in_float64(parameters), tokens), rtol=2e-5)


@pytest.mark.parametrize(("name", "sequences", "length"), CASES)
def test_gradients(name: str, sequences: int, length: int) -> None:
    shape, scale = SHAPES[name], 0.5
    parameters, tokens = random_parameters(shape), random_tokens(shape, sequences, length)
    gradients = Parameters(shape)
    model = Llama(shape, sequences, length)
    total = model.gradients(parameters, tokens, scale, gradients)
    assert total == pytest.approx(float(model.losses(parameters, tokens).sum(dtype=np.float64)))
    values, rng = reference.in_float64(parameters), np.random.default_rng(0)
    long = sequences * length > 100
    for parameter, value in values.items():

        def f(changed: F64Array, parameter: str = parameter) -> float:
            return scale * float(reference.losses(shape, {**values, parameter: changed}, tokens).sum())

        reference.check_gradient(
            f, value, gradients.arrays[parameter], rng, directions=1 if long else 2, coordinates=1 if long else 4
        )


def test_every_coordinate_of_a_small_model() -> None:
    shape = ModelShape(
        vocab_size=5, hidden_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, intermediate_size=3
    )
    parameters, tokens = random_parameters(shape), random_tokens(shape, 2, 6)
    gradients = Parameters(shape)
    Llama(shape, 2, 6).gradients(parameters, tokens, 1.0, gradients)
    values = reference.in_float64(parameters)
    for name, value in values.items():
        flat, expected = value.reshape(-1), np.empty(value.size)
        for i in range(value.size):

            def f(x: F64Array, i: int = i, name: str = name, flat: F64Array = flat) -> float:
                changed = flat.copy()
                changed[i] = x[0]
                return float(
                    reference.losses(shape, {**values, name: changed.reshape(values[name].shape)}, tokens).sum()
                )

            expected[i] = reference.slope(f, flat[i : i + 1], np.ones(1), 1e-3)
        actual = gradients.arrays[name].reshape(-1)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_nothing_is_left_of_the_batch_before() -> None:
    """A used workspace, one full of NaN and gradients full of NaN give the bits that new ones give."""
    shape, sequences, length = TWO_LAYERS, 2, 150
    parameters, tokens = random_parameters(shape), random_tokens(shape, sequences, length)
    expected = Parameters(shape)
    loss = Llama(shape, sequences, length).gradients(parameters, tokens, 0.1, expected)

    used = Llama(shape, sequences, length)
    used.gradients(random_parameters(shape, 2), tokens[::-1].copy(), 1.0, Parameters(shape))
    poisoned = Llama(shape, sequences, length)
    for layer in poisoned._layers:
        for field in fields(layer):
            getattr(layer, field.name).fill(np.nan)
    for name, array in vars(poisoned).items():
        if isinstance(array, np.ndarray) and name not in ("_cos", "_sin"):
            array.fill(np.nan)
    for model in (used, poisoned):
        gradients = Parameters(shape)
        for array in gradients.arrays.values():
            array.fill(np.nan)
        assert model.gradients(parameters, tokens, 0.1, gradients) == loss
        assert (gradients.flat == expected.flat).all()


def test_sequences_do_not_see_each_other() -> None:
    shape = TWO_LAYERS
    parameters, tokens = random_parameters(shape), random_tokens(shape, 3, 20)
    together = Llama(shape, 3, 20).losses(parameters, tokens)
    alone = Llama(shape, 1, 20)
    for i in range(3):
        np.testing.assert_allclose(together[i], alone.losses(parameters, tokens[i : i + 1])[0], rtol=1e-5)


def test_tokens_see_none_that_follow() -> None:
    shape = TWO_LAYERS
    parameters, tokens = random_parameters(shape), random_tokens(shape, 1, 90)
    model = Llama(shape, 1, 90)
    before = model.losses(parameters, tokens).copy()
    tokens[0, 71:] = (tokens[0, 71:] + 1) % shape.vocab_size
    after = model.losses(parameters, tokens)
    assert (before[0, :70] == after[0, :70]).all()
    assert (before[0, 70:] != after[0, 70:]).all()


@pytest.mark.parametrize("token", [-1, 77])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    tokens = np.zeros((1, 5), np.int32)
    tokens[0, 3] = token
    with pytest.raises(AssertionError):
        Llama(TWO_LAYERS, 1, 4).losses(Parameters(TWO_LAYERS), tokens)


# ---- the flat vector


@pytest.mark.parametrize(("name", "padding"), [("two layers", 0), ("as many key heads", 12 + 8 + 4 + 3 * 12)])
def test_parameters_are_views_that_share_nothing(name: str, padding: int) -> None:
    parameters = Parameters(SHAPES[name])
    for i, array in enumerate(parameters.arrays.values()):
        assert array.base is not None and (array.ctypes.data - parameters.flat.ctypes.data) % 64 == 0
        assert not array.any()  # no earlier one reaches into it
        array[...] = i + 1
    numbers = sum(array.size for array in parameters.arrays.values())
    assert np.count_nonzero(parameters.flat) == numbers == SHAPES[name].num_parameters
    assert parameters.flat.size == numbers + padding
    for array in parameters.arrays.values():
        where = (array.ctypes.data - parameters.flat.ctypes.data) // 4
        assert (where < parameters.decayed) == (array.ndim == 2)


def test_initial_parameters() -> None:
    shape = replace(TWO_LAYERS, hidden_size=256, vocab_size=512, intermediate_size=256)
    first, same, other = (Parameters.initial(shape, seed) for seed in (1, 1, 2))
    assert (first.flat == same.flat).all()
    assert (first.flat != other.flat).any()
    for name, array in first.arrays.items():
        if array.ndim == 1:
            assert (array == 1).all()
        else:
            deviation = 0.01 if name.endswith((".o", ".down")) else 0.02
            assert array.std() == pytest.approx(deviation, rel=0.05), name
            assert abs(array.mean()) < deviation / 20, name
