"""Batches: a pure function of the configuration and the step, windows that do not overlap, and files' shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from tests.training import runs
from training.config import ConfigError, Stage, TrainingConfig
from training.data import Batches, load_tokens, validation_windows

Files = dict[str, NDArray[np.uint16]]


def numbered(sizes: dict[str, int]) -> Files:
    """Files whose tokens are all different, so that a token names its place."""
    ends = np.cumsum(list(sizes.values()))
    return {name: np.arange(end - size, end).astype(np.uint16) for (name, size), end in zip(sizes.items(), ends)}  # noqa: B905


def config_of(stages: list[Stage], shards: int = 1, seed: int = 1) -> TrainingConfig:
    content = [vars(stage) for stage in stages]
    model = {**runs.CONTENT["model"], "vocab_size": 1 << 16}
    return runs.config(model=model, stages=content, shards=shards, seed=seed, warmup_steps=0)


def starts_of(config: TrainingConfig, files: Files, index: int) -> dict[str, list[int]]:
    """Where the windows of a stage begin in each file, having checked that they are windows."""
    batches = Batches(config, files)
    first = sum(stage.steps for stage in config.stages[:index])
    stage = config.stages[index]
    starts: dict[str, list[int]] = {name: [] for name in files}
    for step in range(first, first + stage.steps):
        batch = batches.at(step)
        assert batch.shape == (stage.sequences, stage.length + 1)
        assert batch.dtype == np.int32
        for window in batch:
            name = next(name for name, tokens in files.items() if tokens[0] <= window[0] <= tokens[-1])
            start = int(window[0]) - int(files[name][0])
            assert (window == files[name][start : start + stage.length + 1]).all()  # whole, and in one file
            starts[name].append(start)
    return starts


sizes = st.dictionaries(st.sampled_from("abc"), st.integers(20, 400), min_size=1)
weights = st.floats(0.1, 10) | st.integers(1, 5)


@st.composite
def described(draw: st.DrawFn) -> tuple[TrainingConfig, Files]:
    files = numbered(draw(sizes))
    shards = draw(st.integers(1, 3))
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        sources = draw(st.dictionaries(st.sampled_from(sorted(files)), weights, min_size=1))
        sequences = shards * draw(st.integers(1, 4))
        stages.append(Stage(draw(st.integers(1, 12)), sequences, draw(st.integers(1, 19)), sources))
    return config_of(stages, shards, draw(st.integers(0, 2**63 - 1))), files


@given(described())
@settings(deadline=None, max_examples=60)
def test_batches(run: tuple[TrainingConfig, Files]) -> None:
    config, files = run
    for index, stage in enumerate(config.stages):
        starts = starts_of(config, files, index)
        total = stage.steps * stage.sequences
        assert sum(map(len, starts.values())) == total
        whole = sum(weight * len(files[name]) for name, weight in stage.sources.items())
        for name, found in starts.items():
            share = total * stage.sources.get(name, 0) * len(files[name]) / whole
            assert abs(len(found) - share) < len(stage.sources)  # what rounding leaves goes to one file
            if not found:
                continue
            # Every pass sees each token at most once as an input; the shortest begins at the last offset.
            room = len(files[name]) - stage.length
            in_a_pass = -(-(room - min(stage.length, room) + 1) // stage.length)
            passes = -(-len(found) // max(1, in_a_pass))
            seen = Counter(start + i for start in found for i in range(stage.length))
            assert max(seen.values()) <= passes


@given(described(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_batches_do_not_depend_on_those_before(run: tuple[TrainingConfig, Files], random: Random) -> None:
    config, files = run
    batches = Batches(config, files)
    expected = [batches.at(step) for step in range(config.steps)]
    steps = list(range(config.steps))
    random.shuffle(steps)
    for step in steps:
        assert (batches.at(step) == expected[step]).all()
    assert (Batches(config, files).at(steps[0]) == expected[steps[0]]).all()
    with pytest.raises(IndexError):
        batches.at(config.steps)


def test_one_pass_sees_every_token_once() -> None:
    files = numbered({"a": 1000})
    starts = starts_of(config_of([Stage(49, 2, 10, {"a": 1})]), files, 0)["a"]
    assert len(set(starts)) == 98
    assert len({start % 10 for start in starts}) == 1
    assert starts != sorted(starts)


def test_passes_begin_at_other_offsets() -> None:
    files = numbered({"a": 1000})
    starts = starts_of(config_of([Stage(200, 2, 100, {"a": 1})]), files, 0)["a"]
    assert len({start % 100 for start in starts}) > 20
    assert min(starts) < 10
    assert max(starts) > 890


def test_files_are_shared_out_by_weight_and_size() -> None:
    files = numbered({"a": 3000, "b": 1000, "c": 1000})
    starts = starts_of(config_of([Stage(50, 10, 8, {"a": 1, "b": 2})]), files, 0)
    assert {name: len(found) for name, found in starts.items()} == {"a": 300, "b": 200, "c": 0}


def test_files_are_mixed_in_every_part_of_a_stage() -> None:
    files = numbered({"a": 3000, "b": 3000})
    batches = Batches(config_of([Stage(10, 30, 8, {"a": 1, "b": 1})]), files)
    for step in range(10):
        assert 3 < np.count_nonzero(batches.at(step)[:, 0] < 3000) < 27


def test_seeds_and_stages_give_other_orders() -> None:
    files, stage = numbered({"a": 3000}), Stage(4, 8, 8, {"a": 1})
    config = config_of([stage, stage])
    batches, others = Batches(config, files), Batches(config_of([stage, stage], seed=2), files)
    assert (batches.at(0) != batches.at(4)).any()
    assert (batches.at(0) != others.at(0)).any()


def test_the_order_of_the_sources_does_not_matter() -> None:
    """The digest does not see it either."""
    files = numbered({"a": 500, "b": 500, "c": 500})
    one, other = (config_of([Stage(4, 8, 8, dict.fromkeys(names, 1.0))]) for names in ("abc", "cab"))
    assert one.digest() == other.digest()
    assert all((Batches(one, files).at(i) == Batches(other, files).at(i)).all() for i in range(4))


# ---- held-out windows


@pytest.mark.parametrize(("size", "length", "count"), [(101, 10, 10), (100, 10, 9), (11, 10, 1), (50, 1, 49)])
def test_validation_windows(size: int, length: int, count: int) -> None:
    windows = validation_windows(np.arange(size).astype(np.uint16), length)
    assert windows.dtype == np.int32
    assert windows.tolist() == [list(range(i * length, (i + 1) * length + 1)) for i in range(count)]


def test_fewer_validation_windows_are_spread_over_the_file() -> None:
    tokens = np.arange(1001).astype(np.uint16)
    assert validation_windows(tokens, 10, 5)[:, 0].tolist() == [0, 240, 490, 740, 990]
    assert len(validation_windows(tokens, 10, 200)) == 100


# ---- mistakes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 500}, "stage 1: there are no tokens of 'b'"),
        ({"a": 500, "b": 20}, "stage 1: 'b' has 20 tokens, fewer than a window"),
        ({"a": 500, "b": 21, "c": 65500}, "'c' has the token 65535, and the vocabulary 270"),
    ],
)
def test_tokens_that_a_run_cannot_use(files: dict[str, int], message: str) -> None:
    stages = [{"steps": 1, "sequences": 4, "length": n, "sources": {name: 1}} for n, name in ((5, "a"), (20, "b"))]
    tokens = {name: np.full(size, 269, np.uint16) for name, size in files.items()}
    if "c" in tokens:
        tokens["c"][-1] = 65535
    with pytest.raises(ConfigError) as mistake:
        Batches(runs.config(stages=stages, warmup_steps=0), tokens)
    assert str(mistake.value) == message


def test_token_files(tmp_path: Path) -> None:
    assert load_tokens(tmp_path / "none") == {}
    np.save(tmp_path / "a.npy", np.arange(5, dtype=np.uint16))
    (tmp_path / "b.npy.partial").write_bytes(b"cut short")
    assert {name: tokens.tolist() for name, tokens in load_tokens(tmp_path).items()} == {"a": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x93NUMPY", b"random bytes", np.arange(4, dtype=np.int64), np.zeros((2, 2), np.uint16), np.array([{}])],
    ids=["empty", "cut short", "foreign", "int64", "two rows", "pickled"],
)
def test_files_that_hold_no_tokens(damage: bytes | NDArray[np.generic], tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        np.save(path, damage)
    with pytest.raises(ConfigError) as mistake:
        load_tokens(tmp_path)
    assert str(mistake.value).startswith(f"{path} holds no tokens: ")
    assert "\n" not in str(mistake.value)
