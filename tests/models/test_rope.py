"""Rotary angles: exact values, scalings, and the same bits whatever else is looked up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tinyllm.config import RopeConfig
from tinyllm.models.rope import CHUNK, MAX_CHUNKS, RotaryTable, inverse_frequencies


def config(**fields: Any) -> RopeConfig:
    return RopeConfig(**{"rotary_dim": 16, "theta": 10000.0, **fields})


@pytest.mark.parametrize("position", [0, 1, 255, 256, 4095, 1_000_003, 2**31 - 1])
def test_values_are_the_exact_ones_rounded(position: int) -> None:
    cos, sin = RotaryTable(config()).lookup(np.array([position], np.int32))
    assert cos.dtype == sin.dtype == np.float32
    for i in range(8):
        angle = math.fmod(position * 10000.0 ** (-2 * i / 16), 2 * math.pi)
        assert cos[0, i] == pytest.approx(math.cos(angle), abs=6e-7)
        assert sin[0, i] == pytest.approx(math.sin(angle), abs=6e-7)


def test_linear_scaling_divides_positions() -> None:
    plain, scaled = RotaryTable(config()), RotaryTable(config(scaling="linear", factor=4.0))
    wanted = plain.lookup(np.arange(50))
    for found, table in zip(scaled.lookup(4 * np.arange(50)), wanted, strict=True):
        np.testing.assert_allclose(found, table, atol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    rope = config(rotary_dim=64, theta=500000.0, scaling="llama3", factor=8.0)
    plain = inverse_frequencies(config(rotary_dim=64, theta=500000.0))
    ratio = plain / inverse_frequencies(rope)
    wavelengths = 2 * math.pi / plain
    assert (ratio[wavelengths < 8192 / 4] == 1).all()
    np.testing.assert_allclose(ratio[wavelengths > 8192], 8.0, rtol=1e-15)
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert len(between) >= 2
    assert ((between > 1) & (between < 8)).all()
    assert (np.diff(ratio) >= 0).all()


def test_divisors_come_before_scaling() -> None:
    divisors = tuple(1.0 + i for i in range(8))
    found = inverse_frequencies(config(freq_divisors=divisors, scaling="linear", factor=2.0))
    np.testing.assert_array_equal(found, inverse_frequencies(config()) / np.array(divisors))


def test_a_position_has_the_same_bits_whatever_else_is_looked_up() -> None:
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 5 * CHUNK, 300)
    together = RotaryTable(config()).lookup(positions)
    alone = RotaryTable(config())
    for row, position in enumerate(positions):
        for found, wanted in zip(alone.lookup(positions[row : row + 1]), together, strict=True):
            assert found[0].tobytes() == wanted[row].tobytes(), position


def test_results_go_where_they_are_asked_for() -> None:
    table, positions = RotaryTable(config()), np.array([3, CHUNK + 1, 3], np.int32)
    wanted = table.lookup(positions)
    for part in (positions, positions[:1]):  # over two chunks, and within one
        out = np.full((len(part), 8), np.nan, np.float32), np.full((len(part), 8), np.nan, np.float32)
        found = table.lookup(part, out)
        assert found[0] is out[0]
        assert found[1] is out[1]
        np.testing.assert_array_equal(out[0], wanted[0][: len(part)])
        np.testing.assert_array_equal(out[1], wanted[1][: len(part)])


def test_no_positions() -> None:
    cos, sin = RotaryTable(config()).lookup(np.array([], np.int32))
    assert cos.shape == sin.shape == (0, 8)


def test_memory_is_bounded_and_forgotten_positions_come_back_the_same() -> None:
    table = RotaryTable(config())
    first = table.lookup(np.array([7]))[0].tobytes()
    for chunk in range(MAX_CHUNKS + 10):
        table.lookup(np.array([chunk * CHUNK]))
    assert len(table._chunks) == MAX_CHUNKS
    assert 0 not in table._chunks
    assert table.lookup(np.array([7]))[0].tobytes() == first


def test_the_positions_in_use_are_the_ones_kept() -> None:
    table = RotaryTable(config())
    for chunk in range(1, MAX_CHUNKS + 10):
        table.lookup(np.array([0, chunk * CHUNK]))
    assert 0 in table._chunks
    assert 1 not in table._chunks
