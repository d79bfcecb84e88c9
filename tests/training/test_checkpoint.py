"""The state in a file: what comes back, and what is no checkpoint."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import checkpoint
from training.checkpoint import State
from training.config import ConfigError

SIZE, RUN = 160, "0123456789abcdef"


def some_state(step: int = 7, size: int = SIZE) -> State:
    rng = np.random.default_rng(step)
    return State(step, *(rng.standard_normal(size, np.float32) for _ in range(4)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.npz"
    checkpoint.save(path, some_state(), RUN)
    return path


def message_of(path: Path, run: str = RUN, size: int = SIZE) -> str:
    with pytest.raises(ConfigError) as mistake:
        checkpoint.load(path, run, size)
    message = str(mistake.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message


def test_everything_comes_back(path: Path) -> None:
    loaded, expected = checkpoint.load(path, RUN, SIZE), some_state()
    assert loaded.step == 7
    for name, array in expected.arrays().items():
        assert (loaded.arrays()[name] == array).all()
        assert loaded.arrays()[name].flags.writeable
    assert len({array.ctypes.data for array in loaded.arrays().values()}) == 4
    assert list(path.parent.iterdir()) == [path]


def test_the_first_state() -> None:
    parameters = np.ones(SIZE, np.float32)
    state = State.start(parameters)
    assert state.step == 0
    assert state.parameters is parameters
    assert (state.average == 1).all()
    assert not np.shares_memory(state.average, parameters)
    assert not state.first_moment.any()
    assert not state.second_moment.any()
    assert not np.shares_memory(state.first_moment, state.second_moment)


def test_other_configurations_and_sizes(path: Path) -> None:
    assert "belongs to another configuration" in message_of(path, run="another")
    assert "a model of another size" in message_of(path, size=SIZE + 16)


class _Explodes:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("unpickled"), "")


def edited(path: Path, **arrays: Any) -> None:
    """The checkpoint with some of its arrays replaced; None leaves one out."""
    with np.load(path) as content:
        whole = {**content, **arrays}
    np.savez(path, **{name: array for name, array in whole.items() if array is not None})


def header(content: object) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def as_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def as_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.npy", b"nothing")
        archive.writestr("parameters.npy", b"")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "a folder": as_folder,
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(random.Random(1).randbytes(3000)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(_Explodes())),
    "an array": as_npy,
    "another zip": as_other_zip,
    "an empty zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "pickled header": lambda path: edited(path, header=np.array(_Explodes(), object)),
    "pickled array": lambda path: edited(path, average=np.array([_Explodes()], object)),
    "no header": lambda path: edited(path, header=None),
    "no moments": lambda path: edited(path, second_moment=None),
    "double numbers": lambda path: edited(path, average=np.zeros(SIZE)),
    "two rows": lambda path: edited(path, average=np.zeros((2, SIZE), np.float32)),
    "a scalar": lambda path: edited(path, average=np.float32(1)),
    "header no JSON": lambda path: edited(path, header=np.frombuffer(b"\xff{", np.uint8)),
    "header a list": lambda path: edited(path, header=header([1, 2])),
    "header without a step": lambda path: edited(path, header=header({"run": RUN})),
    "no step": lambda path: edited(path, header=header({"run": RUN, "step": None})),
    "NaN step": lambda path: edited(path, header=header({"run": RUN, "step": float("nan")})),
    "endless step": lambda path: edited(path, header=header({"run": RUN, "step": float("inf")})),
    "negative step": lambda path: edited(path, header=header({"run": RUN, "step": -1})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_no_checkpoint(
    damage: Callable[[Path], object], path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(path)
    message_of(path)
    assert not Path("unpickled").exists()


def test_files_cut_short(path: Path) -> None:
    whole = path.read_bytes()
    for length in (1, 4, 30, 100, len(whole) // 2, len(whole) - 22, len(whole) - 1):
        path.write_bytes(whole[:length])
        message_of(path)


def test_files_with_changed_bytes(path: Path) -> None:
    """Either it is noticed, or the byte was of no use, such as a time: the numbers have a checksum."""
    whole, rng = path.read_bytes(), random.Random(2)
    for _ in range(300):
        changed = bytearray(whole)
        for place in rng.sample(range(len(whole)), rng.choice((1, 1, 8))):
            changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with suppress(ConfigError):
            loaded = checkpoint.load(path, RUN, SIZE)
            assert loaded.step == 7
            for name, array in some_state().arrays().items():
                assert (loaded.arrays()[name] == array).all()


@pytest.mark.parametrize("written", [0, 1000])
def test_a_save_that_fails_leaves_the_old_file(written: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: io.BufferedWriter, **arrays: object) -> None:
        file.write(b"x" * written)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fails)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(path, some_state(8), RUN)
    assert checkpoint.load(path, RUN, SIZE).step == 7
    checkpoint.save(path, some_state(8), RUN)  # what is left of the failed one is no hindrance
    assert checkpoint.load(path, RUN, SIZE).step == 8
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_replaced_only_when_it_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, some_state(8), RUN)
    assert checkpoint.load(path, RUN, SIZE).step == 7
