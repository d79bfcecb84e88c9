"""The safetensors reader: against the `safetensors` package, on hostile files, and under fuzzing."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import save, save_file

from tests.unit.model_files import safetensors_bytes
from weights import Tensor, WeightsError
from weights.mapped import MappedFile
from weights.safetensors import read_safetensors

DATA = np.arange(8, dtype=np.float32).tobytes()


def entry(shape: Any = (2, 4), begin: Any = 0, end: Any = 32, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def read(folder: Path, content: bytes) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return read_safetensors(MappedFile(path))


def test_equals_the_safetensors_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "embed": rng.standard_normal((5, 7)).astype(np.float32),
        "half": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "brain": rng.standard_normal((1, 9)).astype(ml_dtypes.bfloat16),
        "bias": rng.standard_normal(3).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "naïve \n": np.ones(1, np.float16),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = read_safetensors(MappedFile(tmp_path / "model.safetensors"))
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = tensors[name]
        assert tensor.name == name
        assert tensor.dtype == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[array.dtype.name]
        assert tensor.shape == (array.shape or (1,))
        assert not tensor.data.flags.writeable
        np.testing.assert_array_equal(tensor.dequantize(), array.astype(np.float32).reshape(tensor.shape))


def test_padded_header_and_no_tensors(tmp_path: Path) -> None:
    padded = json.dumps({"w": entry()}).encode() + b"   "
    assert read(tmp_path, safetensors_bytes(padded, DATA))["w"].shape == (2, 4)
    assert read(tmp_path, safetensors_bytes({})) == {}


def with_header(text: str, data: bytes = DATA) -> bytes:
    return safetensors_bytes(text.encode(), data)


def one(*args: Any, data: bytes = DATA, **kwargs: Any) -> bytes:
    return safetensors_bytes({"w": entry(*args, **kwargs)}, data)


GOOD = one()
W = json.dumps(entry())
HOSTILE = {
    "seven bytes": (bytes(7), "shorter than the 8 bytes"),
    "header past the end": (safetensors_bytes({}, header_nbytes=99), "a header of 99 bytes in a file of 10"),
    "header over 100 MB": (safetensors_bytes({}, header_nbytes=100_000_001), "not a safetensors file, or damaged"),
    "header of 2**64-1": (safetensors_bytes({}, header_nbytes=2**64 - 1), "a header of"),
    "empty header": (safetensors_bytes(b""), "does not begin with '{'"),
    "array header": (safetensors_bytes([]), "does not begin with '{'"),
    "leading space": (safetensors_bytes(b" {}"), "does not begin with '{'"),
    "bad JSON": (with_header("{"), "bad JSON"),
    "trailing JSON": (with_header("{} {}"), "bad JSON"),
    "bad UTF-8": (safetensors_bytes(b'{"\xff":1}'), "bad JSON"),
    "deep JSON": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "deep entry": (with_header('{"w":' + "[" * 900 + "]" * 900 + "}"), "must hold dtype"),
    "duplicate name": (with_header(f'{{"w\\n":{W},"w\\n":{W}}}'), r"'w\n' appears twice"),
    "duplicate field": (with_header('{"w":{"dtype":"F32","dtype":"F16"}}'), "'dtype' appears twice"),
    "NaN": (with_header('{"w":NaN}'), "NaN is not JSON"),
    "long integer": (with_header('{"w":' + "9" * 5000 + "}"), "an integer of 5000 digits"),
    "metadata list": (safetensors_bytes({"__metadata__": []}), "__metadata__"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry null": (safetensors_bytes({"w": None}), "must hold dtype, shape and data_offsets"),
    "entry without shape": (safetensors_bytes({"w": {"dtype": "F32", "data_offsets": [0, 0]}}), "must hold"),
    "entry with more": (one(surprise=1), "must hold"),
    "dtype I64": (one((8,), dtype="I64"), "64 bytes are due for I64 of shape [8], not 32"),
    "dtype Q4_0": (one((32,), 0, 18, dtype="Q4_0", data=bytes(18)), "dtype 'Q4_0' is unknown"),
    "dtype list": (one(dtype=["F32"]), "dtype a list is unknown"),
    "shape null": (safetensors_bytes({"w": {**entry(), "shape": None}}, DATA), "list of at most 8 sizes"),
    "shape negative": (one((-2, -4)), "list of at most 8 sizes"),
    "shape float": (one((2.0, 4)), "list of at most 8 sizes"),
    "shape boolean": (one((True, 8)), "list of at most 8 sizes"),
    "shape text": (one(("8",)), "list of at most 8 sizes"),
    "nine dimensions": (one((1,) * 8 + (8,)), "list of at most 8 sizes"),
    "zero-sized": (one((0, 4), 0, 0, data=b""), "impossible shape [0, 4]"),
    "shape overflow": (one((2**32, 2**32), 0, 0, data=b""), "impossible shape"),
    "shape 2**63": (one((2**63,)), "list of at most 8 sizes"),
    "offsets of three": (safetensors_bytes({"w": {**entry(), "data_offsets": [0, 32, 64]}}, DATA), "two sizes"),
    "offsets negative": (one((2, 4), -32, 0), "two sizes"),
    "offsets reversed": (one((2, 4), 32, 0), "32 bytes are due"),
    "offsets too short": (one((2, 4), 0, 31), "32 bytes are due for F32 of shape [2, 4], not 31"),
    "offsets too long": (one((2, 4), 0, 40, data=DATA + bytes(8)), "32 bytes are due for F32 of shape [2, 4], not 40"),
    "offsets past the end": (one((2, 5), 0, 40), "truncated"),
    "offsets far past the end": (one((2**60,), 0, 2**62), "truncated"),
    "hole at the start": (one((2, 4), 1, 33, data=DATA + b"x"), "leaves a gap"),
    "hole": (safetensors_bytes({"a": entry(), "b": entry(begin=36, end=68)}, DATA * 3), "'b' leaves a gap"),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry(begin=28, end=60)}, DATA * 2), "'b' overlaps"),
    "same place": (safetensors_bytes({"a": entry(), "b": entry()}, DATA * 2), "'b' overlaps"),
    "bytes left over": (GOOD + b"x", "truncated or damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_their_cause(tmp_path: Path, case: str) -> None:
    content, cause = HOSTILE[case]
    with pytest.raises(WeightsError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert cause in message
    assert "model.safetensors" in message
    assert message.isprintable()


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = save({"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float16)})
    assert len(read(tmp_path, whole)) == 2
    for size in range(len(whole)):
        with pytest.raises(WeightsError):
            read(tmp_path, whole[:size])


# ---- fuzzing: success or WeightsError, and memory in proportion to the file


def read_within_bounds(folder: Path, content: bytes) -> dict[str, Tensor] | None:
    tracemalloc.start()
    tensors = None
    try:
        tensors = read(folder, content)
        for tensor in tensors.values():
            assert tensor.data.nbytes == tensor.rows().nbytes
        message = ""
    except WeightsError as e:
        message = str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message.isprintable()
    assert peak < (1 << 20) + 64 * len(content)
    return tensors


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzz_damaged_bytes(fuzz_folder: Path, data: st.DataObject) -> None:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16), "c": np.ones((1, 1, 2), np.float32)}
    content = bytearray(save(arrays, metadata={"format": "np"}))
    changes = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255) | st.sampled_from(b'019{}[]",'))
    for at, value in data.draw(st.lists(changes, max_size=6)):
        content[at] = value
    size = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    read_within_bounds(fuzz_folder, bytes(content[:size]))


sizes = st.one_of(st.integers(-1, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**60]))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), sizes, st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
entries = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL"]), json_values),
            "shape": st.one_of(st.lists(sizes, max_size=4), json_values),
            "data_offsets": st.one_of(st.lists(sizes, min_size=2, max_size=2), json_values),
        }
    ),
)


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(json_values, st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entries)),
    st.binary(max_size=100),
    st.one_of(st.none(), st.integers(0, 200), st.sampled_from([2**32, 2**63, 2**64 - 1])),
)
def test_fuzz_structured_headers(fuzz_folder: Path, header: Any, data: bytes, header_nbytes: int | None) -> None:
    read_within_bounds(fuzz_folder, safetensors_bytes(header, data, header_nbytes=header_nbytes))


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(max_size=5).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(1, 4), max_size=4),
        max_size=4,
    )
)
def test_every_sound_file_is_read(fuzz_folder: Path, shapes: dict[str, list[int]]) -> None:
    arrays = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    tensors = read_within_bounds(fuzz_folder, save(arrays))
    assert tensors is not None
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].dequantize().reshape(array.shape), array)
