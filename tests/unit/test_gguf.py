"""The GGUF reader: against the `gguf` package, on hostile files, and under fuzzing."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.unit.model_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Info,
    gguf_array,
    gguf_bytes,
    gguf_pair,
    gguf_string,
)  # fmt: skip
from weights import WeightsError, open_checkpoint
from weights.quants import FORMATS

FLOATS = np.arange(8, dtype=np.float32).tobytes()  # the data of Info()


def write(folder: Path, content: bytes, name: str = "m.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line, which names the file."""
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()  # so neither a line break nor an escape code of the file's
    return message


# ---- sound files


@pytest.fixture(scope="module")
def oracle_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every value type and tensor format, written by the gguf package."""
    path = tmp_path_factory.mktemp("gguf") / "oracle.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -32768)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -(2**31))
    writer.add_float32("a.f32", 0.1)
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_bool("a.no", False)
    writer.add_string("a.text", "déjà\n vu \U0001f600\0")
    writer.add_array("b.strings", ["", "a", "Ġthe", "\U0001f600" * 40])
    writer.add_array("b.ints", [-3, 0, 5])
    writer.add_array("b.floats", [0.5, -1.0])
    writer.add_array("b.bools", [True, False])
    writer.add_array("b.bytes", b"\x00\xff")
    writer.add_array("b.nested", [[1, 2], [3]])
    rng = np.random.default_rng(0)
    for i, dtype in enumerate(FORMATS):
        kind = gguf.GGMLQuantizationType[dtype]
        shape = ((256,), (3, 512), (2, 3, 256), (2, 1, 3, 256))[i % 4]
        if dtype in ("F32", "F16"):
            writer.add_tensor(f"t.{dtype}", rng.standard_normal(shape).astype("f4" if dtype == "F32" else "f2"))
        else:
            row = FORMATS[dtype].nbytes(shape[-1])
            raw = rng.integers(0, 255, (*shape[:-1], row), np.uint8)
            writer.add_tensor(f"t.{dtype}", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_equals_what_the_gguf_package_wrote(oracle_file: Path) -> None:
    with open_checkpoint(oracle_file) as checkpoint:
        metadata = checkpoint.metadata
    assert checkpoint.kind == "gguf"
    assert checkpoint.path == oracle_file
    expected = {
        "general.architecture": "llama",
        "a.u8": 255,
        "a.i8": -128,
        "a.u16": 65535,
        "a.i16": -32768,
        "a.u32": 2**32 - 1,
        "a.i32": -(2**31),
        "a.f32": float(np.float32(0.1)),
        "a.u64": 2**64 - 1,
        "a.i64": -(2**63),
        "a.f64": 0.1,
        "a.yes": True,
        "a.no": False,
        "a.text": "déjà\n vu \U0001f600\0",
        "b.strings": ["", "a", "Ġthe", "\U0001f600" * 40],
    }
    for key, value in expected.items():
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    for key, array in {
        "b.ints": np.array([-3, 0, 5], np.int32),
        "b.floats": np.array([0.5, -1.0], np.float32),
        "b.bools": np.array([True, False]),
        "b.bytes": np.array([0, 255], np.uint8),
    }.items():
        np.testing.assert_array_equal(metadata[key], array)
        assert metadata[key].dtype == array.dtype
    assert [list(inner) for inner in metadata["b.nested"]] == [[1, 2], [3]]


def test_tensors_equal_those_of_the_gguf_package(oracle_file: Path) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(oracle_file).tensors}
    with open_checkpoint(oracle_file) as checkpoint:
        assert list(checkpoint.tensors) == list(theirs)
        for name, tensor in checkpoint.tensors.items():
            other = theirs[name]
            assert tensor.name == name
            assert tensor.dtype == other.tensor_type.name
            assert tensor.shape == tuple(int(n) for n in other.shape[::-1])
            assert not tensor.data.flags.writeable
            np.testing.assert_array_equal(tensor.data, np.ascontiguousarray(other.data).reshape(-1).view(np.uint8))


@pytest.mark.parametrize("version", [2, 3])
def test_versions(tmp_path: Path, version: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path, gguf_bytes([], [Info()], FLOATS, version=version)))
    np.testing.assert_array_equal(checkpoint.tensors["w"].dequantize(), np.arange(8).reshape(2, 4))


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    infos = [Info("a"), Info("b", offset=-(-32 // alignment) * alignment)]
    data = FLOATS.ljust(infos[1].offset, b"\0") + FLOATS
    pairs = [gguf_pair("general.alignment", U32, alignment)]
    checkpoint = open_checkpoint(write(tmp_path, gguf_bytes(pairs, infos, data, alignment=alignment)))
    for name in "ab":
        np.testing.assert_array_equal(checkpoint.tensors[name].dequantize(), np.arange(8).reshape(2, 4))


def test_order_is_the_files_even_where_offsets_are_not(tmp_path: Path) -> None:
    infos = [Info("z", offset=32), Info("a", offset=0)]
    checkpoint = open_checkpoint(write(tmp_path, gguf_bytes([], infos, FLOATS * 2)))
    assert list(checkpoint.tensors) == ["z", "a"]


def test_a_file_without_tensors_and_the_largest_counts(tmp_path: Path) -> None:
    pairs = [gguf_pair("k" * 65535, U32, 1), gguf_pair("many", ARRAY, gguf_array(STRING, [""] * 70_000))]
    checkpoint = open_checkpoint(write(tmp_path, gguf_bytes(pairs)))
    assert not checkpoint.tensors
    assert checkpoint.metadata == {"k" * 65535: 1, "many": [""] * 70_000}


# ---- hostile files


def nested(depth: int) -> bytes:
    return gguf_array(U8, [1]) if depth == 1 else gguf_array(ARRAY, [nested(depth - 1)])


HUGE = 2**63
GOOD = gguf_bytes([gguf_pair("k", U32, 1)], [Info()], FLOATS)
TWICE = [gguf_pair("k\n", U32, 1), gguf_pair("k\n", U32, 1)]
OVERFLOW = Info(dims=(2**32, 2**32))  # 2**64 values, 0 in 64-bit arithmetic


def pair_file(kind: int, value: Any) -> bytes:
    return gguf_bytes([gguf_pair("k", kind, value)])


HOSTILE = {
    "magic": (gguf_bytes(magic=b"GGML"), "not a GGUF file"),
    "empty": (b"", "empty"),
    "pickle": (b"\x80\x04\x95", "never read"),
    "torch zip": (b"PK\x03\x04", "never read"),
    "version 0": (gguf_bytes(version=0), "version 0"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 4": (gguf_bytes(version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (gguf_bytes(tensor_count=HUGE), f"{HUGE} tensors"),
    "pair count": (gguf_bytes(pair_count=HUGE), f"{HUGE} key-value pairs"),
    "tensor count + 1": (gguf_bytes([], [Info()], FLOATS * 9, tensor_count=2), "dimensions"),
    "long key": (gguf_bytes([gguf_pair("k" * 65536, U32, 1)]), "65536 bytes long"),
    "endless key": (gguf_bytes([struct.pack("<Q", HUGE) + bytes(8)]), "bytes long"),
    "key of bad UTF-8": (gguf_bytes([gguf_pair(b"\xff\n", U32, 1)]), "not valid UTF-8"),
    "duplicate key": (gguf_bytes(TWICE), r"'k\n' appears twice"),
    "value type": (pair_file(13, b"\0" * 8), "unknown value type 13"),
    "endless string": (gguf_bytes([gguf_string("k") + struct.pack("<IQ", STRING, HUGE) + b"x"]), f"{HUGE} bytes"),
    "string of bad UTF-8": (pair_file(STRING, b"\xc3\x28"), "'k' is not valid UTF-8"),
    "boolean 2": (pair_file(BOOL, b"\x02"), "neither 0 nor 1"),
    "array type": (pair_file(ARRAY, struct.pack("<IQ", 99, 0)), "unknown type 99"),
    "array of numbers": (pair_file(ARRAY, struct.pack("<IQ", F32, HUGE) + bytes(99)), f"{HUGE} items"),
    "array of booleans": (pair_file(ARRAY, struct.pack("<IQ", BOOL, HUGE) + bytes(99)), f"{HUGE} items"),
    "array of strings": (pair_file(ARRAY, struct.pack("<IQ", STRING, HUGE) + bytes(99)), f"{HUGE} items"),
    "array of arrays": (pair_file(ARRAY, struct.pack("<IQ", ARRAY, HUGE) + bytes(99)), f"{HUGE} items"),
    "item past the end": (
        pair_file(ARRAY, struct.pack("<IQ", STRING, 2) + gguf_string("a") + struct.pack("<Q", HUGE)),
        "item 1 of 'k'",
    ),
    "item wraps around": (
        pair_file(ARRAY, struct.pack("<IQ", STRING, 2) + gguf_string("a") + struct.pack("<Q", 2**64 - 8)),
        "item 1 of 'k'",
    ),
    "item of bad UTF-8": (
        pair_file(ARRAY, struct.pack("<IQ", STRING, 2) + gguf_string("a") + gguf_string(b"\xf0\n")),
        "item 1 of 'k' is not valid UTF-8",
    ),
    "nested arrays": (pair_file(ARRAY, nested(5)), "more than 4 deep"),
    "very nested arrays": (pair_file(ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000), "more than 4 deep"),
    "duplicate tensor": (gguf_bytes([], [Info(), Info(offset=32)], FLOATS * 2), "'w' appears twice"),
    "0 dimensions": (gguf_bytes([], [Info(dims=(), num_dims=0)], FLOATS * 2), "0 dimensions"),
    "5 dimensions": (gguf_bytes([], [Info(dims=(1,) * 5)], FLOATS), "5 dimensions"),
    "2**32-1 dimensions": (gguf_bytes([], [Info(num_dims=2**32 - 1)], FLOATS), "dimensions"),
    "zero-sized": (gguf_bytes([], [Info(dims=(0, 4))], FLOATS), "impossible shape (4, 0)"),
    "shape overflow": (gguf_bytes([], [OVERFLOW], FLOATS), "impossible shape"),
    "half blocks": (gguf_bytes([], [Info(dims=(16, 2), kind=8)], bytes(34)), "multiple of Q8_0's 32"),
    "unknown type": (gguf_bytes([], [Info(kind=4)], FLOATS), "unknown type 4"),
    "huge type": (gguf_bytes([], [Info(kind=2**32 - 1)], FLOATS), "unknown type 4294967295"),
    "unsupported type": (gguf_bytes([], [Info(dims=(256,), kind=10)], bytes(84)), "unsupported type Q2_K"),
    "misaligned": (gguf_bytes([], [Info(offset=8)], FLOATS * 2), "not aligned to 32"),
    "same place": (gguf_bytes([], [Info("a"), Info("b")], FLOATS), "'a' and 'b' overlap"),
    "overlap": (
        gguf_bytes([], [Info("b", offset=32), Info("a", dims=(16,))], FLOATS * 3),
        "'a' and 'b' overlap",
    ),
    "past the end": (gguf_bytes([], [Info(offset=64)], FLOATS * 2), "past the file's end"),
    "far past the end": (gguf_bytes([], [Info(offset=2**64 - 32)], FLOATS), "past the file's end"),
    "one byte short": (GOOD[:-1], "past the file's end"),
    "alignment 0": (gguf_bytes([gguf_pair("general.alignment", U32, 0)], [Info()], FLOATS), "power of two, not 0"),
    "alignment 24": (gguf_bytes([gguf_pair("general.alignment", U32, 24)], [Info()], FLOATS), "not 24"),
    "alignment -32": (gguf_bytes([gguf_pair("general.alignment", I32, -32)], [Info()], FLOATS), "not -32"),
    "alignment True": (gguf_bytes([gguf_pair("general.alignment", BOOL, True)], [Info()], FLOATS), "not True"),
    "alignment 2**63": (gguf_bytes([gguf_pair("general.alignment", U64, HUGE)], [Info()], FLOATS), "past the"),
    "alignment text": (gguf_bytes([gguf_pair("general.alignment", STRING, "\n")], [Info()], FLOATS), r"not '\n'"),
    "alignment array": (
        gguf_bytes([gguf_pair("general.alignment", ARRAY, gguf_array(U8, [8]))], [Info()], FLOATS),
        "not a ndarray",
    ),
    "tensor name": (gguf_bytes([], [Info(name=b"\xff")], FLOATS), "not valid UTF-8"),
    "long tensor name": (gguf_bytes([], [Info(name=b"n" * 65536)], FLOATS), "65536 bytes long"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_their_cause(tmp_path: Path, case: str) -> None:
    content, cause = HOSTILE[case]
    assert cause in refusal(write(tmp_path, content))


def test_truncated_anywhere(tmp_path: Path) -> None:
    pairs = [
        gguf_pair("text", STRING, "abc"),
        gguf_pair("words", ARRAY, gguf_array(STRING, ["a", "bc"])),
        gguf_pair("ints", ARRAY, gguf_array(U16, [1, 2])),
        gguf_pair("flags", ARRAY, gguf_array(BOOL, [True])),
        gguf_pair("nest", ARRAY, nested(3)),
        gguf_pair("flag", BOOL, True),
    ]
    whole = gguf_bytes(pairs, [Info("a"), Info("b", offset=32)], FLOATS * 2)
    assert len(open_checkpoint(write(tmp_path, whole)).tensors) == 2
    for size in range(len(whole)):
        message = refusal(write(tmp_path, whole[:size]))
        assert any(word in message for word in ("truncated", "empty", "not a GGUF file"))


def test_not_a_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.gguf")
    with pytest.raises(WeightsError, match="no such file"):
        open_checkpoint(Path("a\0b"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo.gguf")  # reading it would wait for ever
        assert "not a regular file" in refusal(tmp_path / "fifo.gguf")


# ---- split models


def split_bytes(number: int, count: int, names: str, *, total: int | None = None) -> bytes:
    pairs = [gguf_pair("split.no", U16, number), gguf_pair("split.count", U16, count)]
    if total is not None:
        pairs.append(gguf_pair("split.tensors.count", I32, total))
    infos = [Info(name, offset=32 * i) for i, name in enumerate(names)]
    return gguf_bytes(pairs, infos, FLOATS * len(names))


def split_name(number: int, count: int) -> str:
    return f"m-{number + 1:05}-of-{count:05}.gguf"


def test_split_model(tmp_path: Path) -> None:
    for number, names in enumerate(("ab", "c", "de")):
        write(tmp_path, split_bytes(number, 3, names, total=5), split_name(number, 3))
    with open_checkpoint(tmp_path / split_name(0, 3)) as checkpoint:
        assert list(checkpoint.tensors) == list("abcde")
        for tensor in checkpoint.tensors.values():
            np.testing.assert_array_equal(tensor.dequantize(), np.arange(8).reshape(2, 4))
            checkpoint.release(tensor)


@pytest.mark.parametrize(
    ("parts", "opened", "cause"),
    [
        ([(0, 2, "a", 2)], 0, "no such file"),
        ([(0, 2, "a", 2), (1, 2, "a", 2)], 0, "'a' is also in another file"),
        ([(0, 2, "a", 3), (1, 2, "b", 3)], 0, "hold 2 tensors"),
        ([(0, 2, "a", 2), (0, 2, "b", 2)], 0, "not file 2 of 2"),
        ([(0, 2, "a", 2), (1, 3, "b", 2)], 0, "not file 2 of 2"),
        ([(0, 2, "a", 2), (1, 2, "b", 2)], 1, "name the first file"),
    ],
)
def test_bad_split_models(tmp_path: Path, parts: list[tuple[int, int, str, int]], opened: int, cause: str) -> None:
    for place, (number, count, names, total) in enumerate(parts):
        write(tmp_path, split_bytes(number, count, names, total=total), split_name(place, 2))
    with pytest.raises(WeightsError, match=cause):
        open_checkpoint(tmp_path / split_name(opened, 2))


def test_renamed_split_model(tmp_path: Path) -> None:
    assert "must be named like" in refusal(write(tmp_path, split_bytes(0, 2, "a")))
    assert "at most 1024" in refusal(write(tmp_path, split_bytes(0, 60000, "a"), "m-00001-of-60000.gguf"))
    content = gguf_bytes([gguf_pair("split.count", STRING, "2")])
    assert "split.count must be a number" in refusal(write(tmp_path, content))


# ---- fuzzing: success or WeightsError, and memory in proportion to the file


def open_within_bounds(path: Path) -> None:
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.tensors.values():
                assert tensor.data.nbytes == tensor.rows().nbytes
        message = ""
    except WeightsError as e:
        message = str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message.isprintable()
    assert peak < (1 << 20) + 64 * path.stat().st_size


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzz_damaged_bytes(fuzz_folder: Path, oracle_file: Path, data: st.DataObject) -> None:
    content = bytearray(oracle_file.read_bytes())
    head = 2500  # most of the file is tensor data, where damage cannot be seen
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, head), st.integers(0, 255)), max_size=8)):
        content[at] = value
    if data.draw(st.booleans()):
        at, width = data.draw(st.integers(0, head)), data.draw(st.sampled_from([4, 8]))
        extreme = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]))
        content[at : at + width] = extreme.to_bytes(8, "little")[:width]
    size = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    open_within_bounds(write(fuzz_folder, bytes(content[:size])))


sizes = st.one_of(st.integers(0, 40), st.sampled_from([2**16, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
names = st.one_of(st.sampled_from(["a", "b", "general.alignment", "split.count"]), st.binary(max_size=6))
arrays = st.builds(
    lambda kind, count, body: struct.pack("<IQ", kind, count) + body,
    st.integers(0, 13), sizes, st.binary(max_size=80),
)  # fmt: skip
pairs = st.one_of(
    st.builds(lambda k, v: gguf_pair(k, U32, v), names, st.integers(0, 2**32 - 1)),
    st.builds(lambda k, v: gguf_pair(k, STRING, v), names, st.binary(max_size=12)),
    st.builds(lambda k, v: gguf_pair(k, ARRAY, v), names, arrays),
    st.builds(
        lambda k, kind, v: gguf_string(k) + struct.pack("<I", kind) + v,
        names, st.integers(0, 14), st.binary(max_size=20),
    ),
)  # fmt: skip
infos = st.builds(
    Info,
    name=names,
    dims=st.lists(st.one_of(st.sampled_from([1, 32, 256]), sizes), max_size=5).map(tuple),
    kind=st.integers(0, 41),
    offset=st.one_of(st.sampled_from([0, 32, 64, 2**63]), sizes),
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(pairs, max_size=4),
    st.lists(infos, max_size=4),
    st.binary(max_size=200),
    st.one_of(st.none(), sizes),
    st.one_of(st.none(), sizes),
)
def test_fuzz_structured_files(
    fuzz_folder: Path,
    pairs: list[bytes],
    infos: list[Info],
    data: bytes,
    tensor_count: int | None,
    pair_count: int | None,
) -> None:
    content = gguf_bytes(pairs, infos, data, tensor_count=tensor_count, pair_count=pair_count)
    open_within_bounds(write(fuzz_folder, content))
