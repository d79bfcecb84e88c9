"""A run's state in one file: enough to go on as if it had never stopped. numpy's own format, no pickles."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.backends.base import F32Array
from training.config import ConfigError

__all__ = ["State", "load", "save"]

_ARRAYS = ("parameters", "first_moment", "second_moment", "average")


@dataclass
class State:
    """What a step changes."""

    step: int  # steps done
    parameters: F32Array  # (n,) all flat
    first_moment: F32Array
    second_moment: F32Array
    average: F32Array

    @classmethod
    def start(cls, parameters: F32Array) -> State:
        return cls(0, parameters, np.zeros_like(parameters), np.zeros_like(parameters), parameters.copy())

    def arrays(self) -> dict[str, F32Array]:
        return {name: getattr(self, name) for name in _ARRAYS}


def save(path: Path, state: State, run: str) -> None:
    """Writes the file whole or not at all; `run` is the configuration's digest."""
    partial = path.with_name(path.name + ".partial")
    header = json.dumps({"run": run, "step": state.step}).encode()
    with partial.open("wb") as file:
        np.savez(file, header=np.frombuffer(header, np.uint8), **state.arrays())  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, run: str, size: int) -> State:
    """Raises ConfigError where the file is of another run, or no checkpoint."""
    try:
        with np.load(path, allow_pickle=False) as content:
            header = json.loads(content["header"].tobytes())
            if header["run"] != run:
                raise ConfigError(f"{path} belongs to another configuration; name another --work folder, or remove it")
            arrays = {name: content[name] for name in _ARRAYS}
            step = int(header["step"])
    except ConfigError:
        raise
    except Exception as error:  # a damaged file makes numpy and zipfile raise errors of a dozen kinds
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path} is no checkpoint: {cause}") from error
    if step < 0:
        raise ConfigError(f"{path} is no checkpoint: it is of step {step}")
    if any(a.shape != (size,) or a.dtype != np.float32 for a in arrays.values()):
        raise ConfigError(f"{path} holds a model of another size")
    return State(step, **arrays)
