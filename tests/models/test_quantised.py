"""Quantised GGUF files: the model they make is that of their dequantised weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models.harness import DEVICES, backend, difference, run
from tests.models.quantised_files import FORMATS, VOCAB, make
from tinyllm.models.model import Model
from tinyllm.models.registry import load_model, model_config, parameters_nbytes
from weights import open_checkpoint


def load(path: Path, device: str) -> Model:
    with open_checkpoint(path) as checkpoint:
        config = model_config(checkpoint)
        model = load_model(checkpoint, config, backend(device))
        assert model.nbytes == parameters_nbytes(checkpoint, config, backend(device))
        return model


# in the last two, the parts of one packed matrix differ in format, as llama.cpp's mixtures do
MIXTURES = [*([kind] for kind in FORMATS), ["Q4_K", "Q6_K", "Q5_K"], ["Q8_0", "Q4_1", "Q5_0", "Q4_0", "Q5_1"]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kinds", MIXTURES, ids="-".join)
def test_quantised_weights_equal_their_dequantised_form(tmp_path: Path, kinds: list[str], device: str) -> None:
    path, plain = make(tmp_path, kinds)
    rng = np.random.default_rng(2)
    sequences = [rng.integers(0, VOCAB, n).tolist() for n in (1, 9, 20)]
    wanted = run(load(plain, "reference"), sequences)
    assert np.ptp(wanted) > 1  # the weights are of a size that makes a model of them
    found = run(load(path, device), sequences)
    if device == "reference":
        assert found.tobytes() == wanted.tobytes()
    assert difference(found, wanted) < 1e-5
    assert run(load(path, device), sequences, "odd_chunks", seed=3).tobytes() == found.tobytes()
