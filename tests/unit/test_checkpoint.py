"""Opening Hugging Face folders, and what all checkpoints share: release, close, live arrays."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.model_files import Info, gguf_bytes
from weights import Tensor, WeightsError, open_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}
INDEX = "model.safetensors.index.json"


def matrix(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full((2, 4), value, np.float32)


def make_folder(folder: Path, shards: dict[str, list[str]], weight_map: Any = None, config: Any = CONFIG) -> Path:
    """A folder of safetensors files; with weight_map None, without an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for file, names in shards.items():
        save_file({name: matrix(ord(name[0])) for name in names}, folder / file)
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    return message


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_single_file(tmp_path: Path) -> None:
    with open_checkpoint(make_folder(tmp_path / "m", {"model.safetensors": ["a", "b"]})) as checkpoint:
        assert checkpoint.kind == "huggingface"
        assert checkpoint.path == tmp_path / "m"
        assert checkpoint.metadata == CONFIG
        assert checkpoint.tensors.keys() == {"a", "b"}
        np.testing.assert_array_equal(checkpoint.tensors["b"].dequantize(), matrix(ord("b")))


def test_shards(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {ONE: ["a", "b"], TWO: ["c"]}, {"a": ONE, "b": ONE, "c": TWO})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == {"a", "b", "c"}
        for name, tensor in checkpoint.tensors.items():
            np.testing.assert_array_equal(tensor.dequantize(), matrix(ord(name)))


def test_symbolic_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs, folder = make_folder(tmp_path / "blobs", {"model.safetensors": ["a"]}), tmp_path / "snapshot"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(blobs / name)
    assert open_checkpoint(folder).tensors.keys() == {"a"}


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "c:x.safetensors", "..",
     ".safetensors", "", "x.bin", "x.safetensors\n", "x\0.safetensors", 7, None, ["x.safetensors"]],
)  # fmt: skip
def test_shards_elsewhere_are_refused(tmp_path: Path, shard: Any) -> None:
    make_folder(tmp_path, {"x.safetensors": ["a"]})
    folder = make_folder(tmp_path / "m", {"x.safetensors": ["a"]}, {"a": shard})
    (folder / "a").mkdir()
    assert "not a file name here" in refusal(folder)


@pytest.mark.parametrize(
    ("shards", "weight_map", "cause"),
    [
        ({ONE: ["a"]}, {"a": ONE, "b": TWO}, f"{TWO} is missing"),
        ({ONE: ["a"]}, {"a": ONE, "b\n": ONE}, r"'b\n' is missing from"),
        ({ONE: ["a", "b"]}, {"a": ONE}, "'b' is not expected in"),
        ({ONE: ["a"], TWO: ["a", "b"]}, {"a": ONE, "b": TWO}, "'a' is not expected in"),
        ({ONE: ["a"]}, {}, "weight_map must map"),
        ({ONE: ["a"]}, [], "weight_map must map"),
        ({ONE: ["a"], TWO: ["b"]}, None, "neither model.safetensors nor"),
    ],
)
def test_bad_indexes(tmp_path: Path, shards: dict[str, list[str]], weight_map: Any, cause: str) -> None:
    assert cause in refusal(make_folder(tmp_path, shards, weight_map))


def test_an_index_without_a_weight_map(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {ONE: ["a"]})
    (folder / INDEX).write_text("{}")
    assert "weight_map must map" in refusal(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "'a' appears twice" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ("", "bad JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ("null", "must hold a JSON object"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        (" " * ((64 << 20) + 1), "larger than"),
    ],
)
def test_bad_configs(tmp_path: Path, config: str, cause: str) -> None:
    assert cause in refusal(make_folder(tmp_path, {"model.safetensors": ["a"]}, config=config))


def test_folders_of_something_else(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no model.safetensors" in refusal(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "name that file" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickle files ('pytorch_model.bin'), which are never read" in refusal(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path)


def test_a_safetensors_file_is_opened_by_its_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"model.safetensors": ["a"]})
    assert "name the folder" in refusal(folder / "model.safetensors")


# ---- release and close


@pytest.fixture(params=["gguf", "huggingface"])
def large_model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two tensors of 8 MiB."""
    values = np.arange(1 << 21, dtype=np.float32).reshape(1 << 11, 1 << 10)
    if request.param == "gguf":
        infos = [Info("a", (1 << 10, 1 << 11)), Info("b", (1 << 10, 1 << 11), offset=values.nbytes)]
        (tmp_path / "m.gguf").write_bytes(gguf_bytes([], infos, values.tobytes() * 2))
        return tmp_path / "m.gguf"
    folder = make_folder(tmp_path / "m", {})
    save_file({"a": values, "b": values}, folder / "model.safetensors")
    return folder


def resident_file_nbytes() -> int:
    """Bytes of mapped files in this process's memory."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssFile:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_release_gives_the_pages_back(large_model: Path) -> None:
    with open_checkpoint(large_model) as checkpoint:
        tensor = checkpoint.tensors["a"]
        before = resident_file_nbytes()
        total = int(tensor.rows().sum())
        touched = resident_file_nbytes()
        assert touched - before > tensor.nbytes * 3 // 4
        checkpoint.release(tensor.renamed("other"))
        assert touched - resident_file_nbytes() > tensor.nbytes * 3 // 4
        assert int(tensor.rows().sum()) == total  # reading brings them back


def test_release_takes_slices_copies_and_strangers(large_model: Path) -> None:
    with open_checkpoint(large_model) as checkpoint:
        tensor = checkpoint.tensors["b"]
        expected = tensor.dequantize()
        checkpoint.release(tensor.take_rows(slice(3, 1000)))
        checkpoint.release(tensor.take_rows(slice(3, 4)))
        checkpoint.release(tensor.take_rows(np.array([5, 1])))
        checkpoint.release(Tensor.from_float32("s", np.zeros((2, 4), np.float32)))
        checkpoint.release(Tensor("e", (0,), "F32", tensor.data[:0]))
        np.testing.assert_array_equal(tensor.dequantize(), expected)


def test_arrays_outlive_close(large_model: Path) -> None:
    checkpoint = open_checkpoint(large_model)
    tensor = checkpoint.tensors["a"]
    row = tensor.take_rows(slice(7, 8))
    checkpoint.close()
    checkpoint.close()
    assert not checkpoint.tensors
    checkpoint.release(tensor)  # of a closed checkpoint: nothing to do
    del checkpoint
    gc.collect()
    assert tensor.dequantize()[1, 0] == 1024
    assert row.dequantize()[0, 1] == 7 * 1024 + 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_stays_mapped_or_open(large_model: Path) -> None:
    def in_use() -> int:
        with open("/proc/self/maps") as f:
            return f.read().count(str(large_model)) + len(os.listdir("/proc/self/fd"))

    before = in_use()
    checkpoint = open_checkpoint(large_model)
    assert in_use() > before
    checkpoint.close()
    assert in_use() == before
    damaged = large_model / "model.safetensors" if large_model.is_dir() else large_model
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated"):  # nor where opening fails
        open_checkpoint(large_model)
    gc.collect()
    assert in_use() == before
