"""Opens a Hugging Face folder: config.json, and safetensors in one file or in shards listed by an index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from weights.errors import WeightsError, quoted
from weights.json_file import read_json_object
from weights.mapped import MappedCheckpoint, MappedFile
from weights.safetensors import read_safetensors
from weights.tensor import Tensor

__all__ = ["open_huggingface"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")  # no separator, no "..": in this folder
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def open_huggingface(folder: Path) -> MappedCheckpoint:
    """Opens a folder; the metadata is the parsed config.json. Raises WeightsError.

    Where there are both a single file and an index, the single file counts, as in transformers. Pickles are never
    read. Files may be symbolic links, as in the hub's cache; names in an index may not leave the folder.
    """
    if not (folder / "config.json").exists():
        raise WeightsError(f"{folder}: no config.json in this folder")
    config = read_json_object(folder / "config.json")
    shards = {SINGLE_FILE: None} if (folder / SINGLE_FILE).exists() else _shards_of_index(folder)
    files: list[MappedFile] = []
    tensors: dict[str, Tensor] = {}
    for shard, expected in shards.items():
        files.append(MappedFile(folder / shard))
        found = read_safetensors(files[-1])
        if expected is not None:
            _check_names(files[-1].path, found.keys(), expected)
        tensors.update(found)
    return MappedCheckpoint(folder, "huggingface", config, tensors, files)


def _shards_of_index(folder: Path) -> dict[str, set[str]]:
    """The tensor names that the index expects in each shard, in the index's order."""
    path = folder / INDEX_FILE
    if not path.exists():
        _fail_without_weights(folder)
    weight_map: Any = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: weight_map must map tensor names to files")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise WeightsError(f"{path}: tensor {quoted(name)} is in {quoted(shard)}, not a file name here")
        shards.setdefault(shard, set()).add(name)
    for shard in shards:
        if not (folder / shard).exists():
            raise WeightsError(f"{path}: the shard {shard} is missing from the folder")
    return shards


def _check_names(path: Path, found: Any, expected: set[str]) -> None:
    for names, cause in ((expected - found, "is missing from"), (found - expected, "is not expected in")):
        if names:
            raise WeightsError(f"{path}: by the index, tensor {quoted(min(names))} {cause} this file")


def _fail_without_weights(folder: Path) -> NoReturn:
    names = sorted(p.name for p in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        raise WeightsError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is in this folder")
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise WeightsError(
            f"{folder}: only pickle files ({quoted(pickles[0])}), which are never read; safetensors are needed"
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        raise WeightsError(f"{folder}: no {SINGLE_FILE} in this folder; to use {quoted(gguf[0])}, name that file")
    raise WeightsError(f"{folder}: no {SINGLE_FILE} in this folder")
