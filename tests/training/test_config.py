"""The description of a run: what it derives, and every mistake named in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.training import runs
from training.config import ConfigError, Stage, TrainingConfig
from training.parameters import ModelShape


def message_of(content: Any) -> str:
    with pytest.raises(ConfigError) as mistake:
        TrainingConfig.parse(content)
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


def places(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"the configuration": content, "model": content["model"], "stage 1": content["stages"][1]}


# ---- what it derives


def test_files_of_the_repository() -> None:
    bundled = TrainingConfig.load(runs.SCRIPTS / "training" / "bundled.json")
    assert bundled.model.vocab_size == 4096


def test_the_sweep_of_the_repository() -> None:
    import training_sweep

    sweep = json.loads((runs.SCRIPTS / "training" / "sweep.json").read_text())
    configs = {v["name"]: training_sweep.configuration(sweep["base"], v, 90.0) for v in sweep["variants"]}
    assert len(configs) == len(sweep["variants"])
    for variant in sweep["variants"]:  # the tokens of 90 minutes, whatever the batches
        assert configs[variant["name"]].tokens == pytest.approx(variant["rate"] * 5400, rel=1e-3)


def test_steps_stages_and_tokens() -> None:
    config = runs.config()
    assert config.steps == 30
    assert config.tokens == 14 * 96 + 16 * 120
    assert [config.stage_at(step) for step in (0, 13, 14, 29)] == [(0, 0), (0, 13), (1, 0), (1, 15)]
    assert [config.tokens_after(step) for step in (0, 1, 14, 15, 30)] == [0, 96, 1344, 1464, config.tokens]
    with pytest.raises(IndexError):
        config.stage_at(30)


def test_learning_rate() -> None:
    config = runs.config()  # a peak of 0.01 after 5 steps, and a tenth of it after 30
    assert [config.lr_at(step) for step in range(6)] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    rates = [config.lr_at(step) for step in range(5, 30)]
    assert rates == sorted(rates, reverse=True)
    expected = [0.001 + 0.009 * (1 + math.cos(math.pi * i / 25)) / 2 for i in range(25)]
    assert rates == pytest.approx(expected)
    assert rates[-1] == pytest.approx(0.001, rel=0.05)


def test_learning_rate_without_warm_up_or_cosine() -> None:
    assert runs.config(warmup_steps=0).lr_at(0) == 0.01
    constant = runs.config(final_lr=1, warmup_steps=0)
    assert {constant.lr_at(step) for step in range(30)} == {0.01}
    assert runs.config(warmup_steps=30).lr_at(29) == pytest.approx(0.01)


# ---- the digest


def changed(config: Any, name: str) -> Any:
    """The configuration, or a part of it, with one number changed."""
    old: Any = getattr(config, name)
    if isinstance(old, dict):
        new: Any = {**old, "three": 1.0}
    elif name == "shards":
        new = old // 2
    elif name in ("num_heads", "head_dim", "sequences"):
        new = 2 * old
    else:
        new = old + 1 if isinstance(old, int) else old / 2
    return replace(config, **{name: new})


def test_the_digest_changes_with_every_field() -> None:
    config = runs.config()
    digests = [config.digest()]
    names = [field.name for field in fields(TrainingConfig) if field.name not in ("model", "stages")]
    digests += [changed(config, name).digest() for name in names]
    models = [changed(config.model, field.name) for field in fields(ModelShape)]
    digests += [replace(config, model=model).digest() for model in models]
    for field in fields(Stage):
        for i in range(2):
            stages = list(config.stages)
            stages[i] = changed(stages[i], field.name)
            digests.append(replace(config, stages=tuple(stages)).digest())
    digests.append(replace(config, stages=config.stages[::-1]).digest())
    assert len(set(digests)) == len(digests) == 1 + 11 + 9 + 8 + 1
    assert runs.config().digest() == digests[0] == "f7abde56e9b052e7"  # checkpoints name it


# ---- mistakes


def test_unknown_keys() -> None:
    for where in places(runs.content()):
        content = runs.content()
        places(content)[where]["learning_rate"] = 1
        assert message_of(content) == f"{where} has no 'learning_rate'"


def test_missing_keys() -> None:
    for where, part in places(runs.content()).items():
        for name in part:
            content = runs.content()
            del places(content)[where][name]
            assert message_of(content) == f"{where} lacks {name!r}"


@pytest.mark.parametrize("value", ["1", None, True, [1], {}], ids=repr)
def test_values_that_are_no_numbers(value: Any) -> None:
    for where, part in places(runs.content()).items():
        for name in part:
            if name not in ("model", "stages", "sources"):
                content = runs.content()
                places(content)[where][name] = value
                assert message_of(content) == f"{where}: {name} must be a number, not {value!r}"


@pytest.mark.parametrize("name", ["seed", "warmup_steps", "shards"])
def test_fractions_of_whole_numbers(name: str) -> None:
    assert message_of(runs.content(**{name: 1.5})) == f"the configuration: {name} must be a number, not 1.5"


@pytest.mark.parametrize("value", [None, [], 3, "x"], ids=repr)
def test_parts_of_another_kind(value: Any) -> None:
    assert message_of(value) == "the configuration must be an object"
    assert message_of(runs.content(model=value)) == "model must be an object"
    assert message_of(runs.content(stages=[value])) == "stage 0 must be an object"
    assert message_of(runs.content(stages=value)) == f"stages must {'not be empty' if value == [] else 'be a list'}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be between 0 and 2**63 - 1, not -1"),
        ({"seed": 1 << 63}, f"seed must be between 0 and 2**63 - 1, not {1 << 63}"),
        ({"shards": 0}, "shards must be positive, not 0"),
        ({"shards": -4}, "shards must be positive, not -4"),
        ({"shards": 3}, "stage 0: 8 sequences are no multiple of 3 shards"),
        ({"lr": 0}, "lr must be above 0, not 0"),
        ({"lr": math.nan}, "lr must be above 0, not nan"),
        ({"clip": -1.0}, "clip must be above 0, not -1.0"),
        ({"eps": math.inf}, "eps must be above 0, not inf"),
        ({"beta1": 1}, "beta1 must be at least 0 and below 1, not 1"),
        ({"beta2": -0.1}, "beta2 must be at least 0 and below 1, not -0.1"),
        ({"final_lr": 2}, "final_lr must be between 0 and 1, not 2"),
        ({"weight_decay": math.nan}, "weight_decay must be between 0 and 1, not nan"),
        ({"average_rate": -1}, "average_rate must be between 0 and 1, not -1"),
        ({"warmup_steps": 31}, "warmup_steps must be between 0 and 30, not 31"),
        ({"warmup_steps": -1}, "warmup_steps must be between 0 and 30, not -1"),
    ],
)
def test_impossible_values(changes: dict[str, Any], message: str) -> None:
    assert message_of(runs.content(**changes)) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "model: vocab_size must be positive, not 0"),
        ({"vocab_size": 65537}, "vocab_size must be at most 65536, not 65537: tokens are uint16"),
        ({"hidden_size": -1}, "model: hidden_size must be positive, not -1"),
        ({"num_layers": -1}, "model: num_layers must not be negative, and is -1"),
        ({"num_heads": 3, "num_kv_heads": 2}, "model: 3 heads cannot share 2 key heads evenly"),
        ({"num_kv_heads": 0}, "model: num_kv_heads must be positive, not 0"),
        ({"head_dim": 24}, "model: head_dim must be a multiple of 16, not 24"),
        ({"head_dim": 0}, "model: head_dim must be a multiple of 16, not 0"),
        ({"intermediate_size": 0}, "model: intermediate_size must be positive, not 0"),
        ({"rope_theta": 0.0}, "model: rope_theta must be above 0, not 0.0"),
        ({"rms_norm_eps": math.nan}, "model: rms_norm_eps must be above 0, not nan"),
    ],
)
def test_impossible_models(changes: dict[str, Any], message: str) -> None:
    assert message_of(runs.content(model={**runs.CONTENT["model"], **changes})) == message


SOURCES: list[Any] = [{}, [], "one", {"one": 0}, {"one": "1"}, {"one": True}, {"one": math.inf}, {"one": None}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "stage 1: steps, sequences and length must be positive"),
        ({"sequences": 0}, "stage 1: steps, sequences and length must be positive"),
        ({"length": -1}, "stage 1: steps, sequences and length must be positive"),
        *(({"sources": sources}, "stage 1: sources must name files, with weights above 0") for sources in SOURCES),
    ],
)
def test_impossible_stages(changes: dict[str, Any], message: str) -> None:
    content = runs.content()
    content["stages"][1].update(changes)
    assert message_of(content) == message


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text(""),
        lambda path: path.write_text('{"seed": 1,\n'),
        lambda path: path.write_bytes(b"\xff\xfe"),
    ],
    ids=["missing", "folder", "empty", "cut short", "not UTF-8"],
)
def test_files_that_cannot_be_read(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write(path)
    with pytest.raises(ConfigError) as mistake:
        TrainingConfig.load(path)
    assert str(mistake.value).startswith(f"{path}: ")
    assert "\n" not in str(mistake.value)
