"""Snapshot files: every byte kept, opened by the `safetensors` package, and refused wherever they are damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.unit.model_files import safetensors_bytes
from tinyllm.engine.snapshot import Snapshot
from tinyllm.errors import SnapshotError
from tinyllm.snapshot_file import check_snapshot, load_snapshot, save_snapshot

STORAGE: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def make(stored: str = "f16", *, tokens: int = 9, computed: int = 7, positions: Any = None, **changes: Any) -> Snapshot:
    """A snapshot of 2 layers, 2 heads of 4; by default one that holds every computed position."""
    rng = np.random.default_rng([tokens, computed])
    held = np.asarray(range(computed) if positions is None else positions, np.int32)
    keys, values = rng.standard_normal((2, 2, len(held), 2, 4)).astype(STORAGE[stored]).astype(np.float32)
    made = Snapshot(
        fingerprint="llama 1/reference",
        kv_dtype=stored,
        token_ids=rng.integers(0, 61, tokens).astype(np.int32),
        num_computed_tokens=computed,
        positions=held,
        keys=keys,
        values=values,
        window=None,
        sinks=4,
        cache_salt="",
    )
    return replace(made, **changes)


def assert_same(a: Snapshot, b: Snapshot) -> None:
    for field in fields(Snapshot):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), field.name
            assert y.flags.writeable  # and so no view of the file
        else:
            assert (type(x), x) == (type(y), y), field.name


SNAPSHOTS = {
    "f32": make("f32"),
    "f16": make("f16"),
    "bf16": make("bf16"),
    "every token computed": make(tokens=7),
    "nothing computed": make(computed=0),
    "no tokens": make(tokens=0, computed=0),
    "a window": make(computed=8, positions=[0, 1, 5, 6, 7], window=3, sinks=2),
    "no sinks": make(window=1 << 30, sinks=0, computed=3, positions=[2]),
    "a salt": make(cache_salt='a "sha256":"b" \\ é 🂡 \n\0'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_what_is_saved_is_loaded_byte_for_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.safetensors"
    save_snapshot(SNAPSHOTS[name], path)
    loaded = load_snapshot(path)
    assert_same(SNAPSHOTS[name], loaded)
    first = path.read_bytes()
    save_snapshot(loaded, str(path))
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["s.safetensors"]


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_the_safetensors_package_reads_the_same(tmp_path: Path, name: str) -> None:
    snapshot, path = SNAPSHOTS[name], tmp_path / "s.safetensors"
    save_snapshot(snapshot, path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "tinyllm snapshot"
    assert metadata["num_computed_tokens"] == str(snapshot.num_computed_tokens)
    assert metadata["cache_salt"] == snapshot.cache_salt
    tensors = load_file(path)
    assert tensors.keys() == {"token_ids", "positions", "keys", "values"}
    np.testing.assert_array_equal(tensors["token_ids"], snapshot.token_ids)
    np.testing.assert_array_equal(tensors["positions"], snapshot.positions)
    for part in ("keys", "values"):
        assert tensors[part].dtype == STORAGE[snapshot.kv_dtype]
        np.testing.assert_array_equal(tensors[part].astype(np.float32), getattr(snapshot, part))


def test_the_checksum_is_of_the_file_with_zeros_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_snapshot(make(), path)
    content = path.read_bytes()
    digest = re.findall(rb'"sha256":"([0-9a-f]{64})"', content)
    assert len(digest) == 1
    assert hashlib.sha256(content.replace(digest[0], b"0" * 64)).hexdigest().encode() == digest[0]
    assert (8 + struct.unpack("<Q", content[:8])[0]) % 8 == 0


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16"])
def test_every_value_of_a_half_precision_cache_survives(tmp_path: Path, kv_dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(STORAGE[kv_dtype]).astype(np.float32)  # NaNs and infinities too
    every = every.reshape(2, 1, 1, -1)
    one = np.zeros(1, np.int32)
    snapshot = make(kv_dtype, tokens=1, computed=1, positions=one, keys=every, values=every[:, :, :, ::-1].copy())
    save_snapshot(snapshot, tmp_path / "s")
    assert_same(snapshot, load_snapshot(tmp_path / "s"))


def test_arrays_need_not_be_contiguous(tmp_path: Path) -> None:
    snapshot = make("f32")
    turned = np.asfortranarray(snapshot.keys)
    save_snapshot(replace(snapshot, keys=turned, token_ids=np.repeat(snapshot.token_ids, 2)[::2]), tmp_path / "s")
    assert_same(snapshot, load_snapshot(tmp_path / "s"))


# ---- saving fails as a whole


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    save_snapshot(make("f32"), path)
    before = path.read_bytes()
    for stored in ("f16", "bf16"):
        inexact = make(stored, values=np.full((2, 7, 2, 4), 0.1, np.float32))
        with pytest.raises(SnapshotError, match=f"{re.escape(str(path))}: values hold numbers that {stored} does not"):
            save_snapshot(inexact, path)
    for error, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), SnapshotError)):

        def interrupt(*args: Any, error: BaseException = error) -> None:
            raise error

        for interrupted in ("fsync", "replace"):
            monkeypatch.setattr(os, interrupted, interrupt)
            with pytest.raises(seen) as caught:
                save_snapshot(make("bf16"), path)
            monkeypatch.undo()
            if seen is SnapshotError:
                assert str(caught.value) == f"{path}: cannot be written: No space left"
            assert path.read_bytes() == before
            assert os.listdir(tmp_path) == ["s"]


def test_the_file_is_whole_and_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync, rename = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check_rename(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        assert Path(source).stat().st_ino in synced
        assert_same(load_snapshot(source), make())
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", check_rename)
    save_snapshot(make(), tmp_path / "s")
    assert tmp_path.stat().st_ino in synced


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "s", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(SnapshotError, match=r"not a regular file|cannot be written"):
            save_snapshot(make(), path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="pipe: not a regular file"):
        save_snapshot(make(), tmp_path / "pipe")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "s")
    save_snapshot(make(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(load_snapshot(tmp_path / "there" / "s"), make())


INCONSISTENT: dict[str, tuple[dict[str, Any], str]] = {
    "dtype name": ({"kv_dtype": "f8"}, "kv_dtype must be one of"),
    "dtype": ({"token_ids": np.zeros(9)}, "token_ids must be an array of int32"),
    "no array": ({"keys": None}, "keys must be an array of float32"),
    "a bool": ({"num_computed_tokens": True}, "num_computed_tokens"),
    "below zero": ({"num_computed_tokens": -1}, "num_computed_tokens"),
    "too many computed": ({"num_computed_tokens": 10}, "9 tokens, 10 of them computed, cannot go with 7 positions"),
    "too few computed": ({"num_computed_tokens": 6}, "9 tokens, 6 of them computed, cannot go with 7 positions"),
    "negative id": ({"token_ids": np.full(9, -1, np.int32)}, "a token id is negative"),
    "two axes": ({"token_ids": np.zeros((3, 3), np.int32)}, "one axis"),
    "values shorter": ({"values": np.zeros((2, 6, 2, 4), np.float32)}, "keys have the shape"),
    "both longer": (
        {"values": np.zeros((2, 8, 2, 4), np.float32)} | {"keys": np.zeros((2, 8, 2, 4), np.float32)},
        "7 po",
    ),
    "no layers": (
        {"values": np.zeros((0, 7, 2, 4), np.float32)} | {"keys": np.zeros((0, 7, 2, 4), np.float32)},
        "keys of",
    ),
    "three axes": ({"values": np.zeros((2, 7, 8), np.float32)} | {"keys": np.zeros((2, 7, 8), np.float32)}, "keys of"),
    "twice": ({"positions": np.array([0, 1, 2, 2, 3, 4, 5], np.int32)}, "positions must ascend"),
    "past the end": ({"positions": np.array([0, 1, 2, 3, 4, 5, 7], np.int32)}, "positions must lie from 0 to 6"),
    "before the start": ({"positions": np.arange(-1, 6, dtype=np.int32)}, "positions must lie from 0 to 6"),
    "window": ({"window": 0}, "window must be an integer"),
    "sinks": ({"sinks": 257}, "sinks must be an integer"),
    "salt": ({"cache_salt": "x" * 4097}, "cache_salt must be"),
    "surrogate": ({"cache_salt": "\ud800"}, "cache_salt is not valid Unicode"),
    "fingerprint": ({"fingerprint": 5}, "fingerprint must be a string"),
    "long fingerprint": ({"fingerprint": "x" * 4097}, "fingerprint must be a string"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_a_snapshot_that_contradicts_itself_is_not_saved(tmp_path: Path, case: str) -> None:
    changes, cause = INCONSISTENT[case]
    with pytest.raises(SnapshotError, match=cause):
        check_snapshot(make(**changes))
    with pytest.raises(SnapshotError, match=f"s: .*{cause}"):
        save_snapshot(make(**changes), tmp_path / "s")
    assert os.listdir(tmp_path) == []


# ---- hostile files: their checksums are right


def parts(snapshot: Snapshot, folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a saved snapshot."""
    save_snapshot(snapshot, folder / "part")
    content = (folder / "part").read_bytes()
    (folder / "part").unlink()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def sealed(header: Any, data: bytes) -> bytes:
    """A file with a checksum made anew; header: an object, or its JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    raw = re.sub(rb'"sha256":"[0-9a-f]*"', b'"sha256":"' + b"0" * 64 + b'"', raw)
    content = safetensors_bytes(raw, data)
    digest = hashlib.sha256(content).hexdigest().encode()
    return content.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest)


def meta(**changes: Any) -> Any:
    return lambda header, data: (
        header | {"__metadata__": {k: v for k, v in (header["__metadata__"] | changes).items() if v is not None}},
        data,
    )


def tensor(name: str, **changes: Any) -> Any:
    return lambda header, data: (header | {name: header[name] | changes}, data)


def ids(index: int, value: int) -> Any:
    """Changes entry `index` of token_ids and positions, taken as one array of 16."""

    def change(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        array = np.frombuffer(data[:64], np.int32).copy()
        array[index] = value
        return header, array.tobytes() + data[64:]

    return change


def raw_header(change: Any) -> Any:
    return lambda header, data: (change(json.dumps(header, separators=(",", ":"))).encode(), data)


# make("f16"): token_ids 0-36, positions 36-64, keys 64-288, values 288-512
HOSTILE: dict[str, tuple[Any, str]] = {
    "another format": (meta(format="pt"), "a safetensors file, but not a snapshot"),
    "no format": (meta(format=None), "a safetensors file, but not a snapshot"),
    "no metadata": (lambda h, d: ({k: v for k, v in h.items() if k != "__metadata__"}, d), "but not a snapshot"),
    "metadata no strings": (meta(window=3), "must map strings to strings"),
    "metadata a list": (lambda h, d: (h | {"__metadata__": []}, d), "must map strings to strings"),
    "a later version": (meta(version="2"), "a snapshot of version '2'"),
    "no version": (meta(version=None), "a snapshot of version None"),
    "metadata missing": (meta(cache_salt=None), "metadata lack cache_salt"),
    "metadata unknown": (meta(extra="x" * 99999), "metadata hold an unknown 'extra'"),
    "digest missing": (meta(sha256=None), "metadata lack sha256"),
    "negative": (meta(sinks="-1"), "sinks is not a number"),
    "NaN": (meta(window="nan"), "window is not a number"),
    "long number": (meta(num_computed_tokens="9" * 5000), "num_computed_tokens is not a number"),
    "large number": (meta(num_computed_tokens="9" * 18), "999999999999999999 of them computed"),
    "other digits": (meta(sinks="٣"), "sinks is not a number"),
    "leading zero": (meta(sinks="04"), "sinks is not a number"),
    "newline": (meta(sinks="4\n"), "sinks is not a number"),
    "window 0": (meta(window="0"), "window must be an integer"),
    "sinks 300": (meta(sinks="300"), "sinks must be an integer"),
    "long salt": (meta(cache_salt="x" * 4097), "cache_salt must be"),
    "surrogate salt": (meta(cache_salt="\udc00"), "not valid Unicode"),
    "long fingerprint": (meta(fingerprint="x" * 4097), "fingerprint must be"),
    "more computed than tokens": (meta(num_computed_tokens="10"), "10 of them computed"),
    "fewer computed than held": (meta(num_computed_tokens="6"), "6 of them computed"),
    "tensor missing": (
        lambda h, d: ({k: v for k, v in h.items() if k != "values"}, d[:288]),
        "tensors lack values",
    ),
    "tensor unknown": (
        lambda h, d: (h | {"extra": {"dtype": "U8", "shape": [1], "data_offsets": [512, 513]}}, d + b"x"),
        "tensors hold an unknown 'extra'",
    ),
    "ids as floats": (tensor("token_ids", dtype="F32"), "token_ids cannot be F32"),
    "positions as U32": (tensor("positions", dtype="U32"), "positions cannot be U32"),
    "keys as I16": (tensor("keys", dtype="I16"), "keys cannot be I16"),
    "both as I16": (
        lambda h, d: tensor("values", dtype="I16")(*tensor("keys", dtype="I16")(h, d)),
        "keys cannot be I16",
    ),
    "values as BF16": (tensor("values", dtype="BF16"), "values cannot be BF16"),
    "unknown dtype": (tensor("keys", dtype="F4"), "dtype 'F4' is unknown"),
    "keys in another shape": (tensor("keys", shape=[2, 7, 4, 2]), "keys have the shape"),
    "keys flat": (
        lambda h, d: tensor("values", shape=[112])(*tensor("keys", shape=[112])(h, d)),
        "keys of shape (112,) for 7 positions",
    ),
    "positions of another number": (
        lambda h, d: tensor("values", shape=[7, 2, 2, 4])(*tensor("keys", shape=[7, 2, 2, 4])(h, d)),
        "keys of shape (7, 2, 2, 4) for 7 positions",
    ),
    "token_ids square": (tensor("token_ids", shape=[3, 3]), "must have one axis"),
    "huge shape": (tensor("keys", shape=[1 << 40, 1 << 40]), "impossible shape"),
    "huge shape of nothing": (tensor("keys", shape=[1 << 62, 0, 1 << 62, 4]), "bytes are due"),
    "overlap": (tensor("keys", data_offsets=[60, 284]), "overlaps"),
    "hole": (tensor("values", data_offsets=[290, 514]), "leaves a gap"),
    "offset overflow": (tensor("values", data_offsets=[(1 << 64) - 224, 1 << 64]), "data_offsets must be two sizes"),
    "negative offset": (tensor("token_ids", data_offsets=[-36, 0]), "data_offsets must be two sizes"),
    "offsets swapped": (tensor("keys", data_offsets=[288, 64]), "bytes are due"),
    "data short": (lambda h, d: (h, d[:-2]), "truncated"),
    "data long": (lambda h, d: (h, d + b"\0"), "truncated or damaged"),
    "negative id": (ids(0, -5), "a token id is negative"),
    "positions twice": (ids(10, 0), "positions must ascend"),
    "positions down": (ids(12, 0), "positions must ascend"),
    "position too far": (ids(15, 7), "positions must lie from 0 to 6"),
    "position negative": (ids(9, -1), "positions must lie from 0 to 6"),
    "key twice": (raw_header(lambda t: t[:-1] + ',"keys":{}}'), "the key 'keys' appears twice"),
    "NaN in JSON": (raw_header(lambda t: t.replace("[0,36]", "[0,NaN]")), "NaN is not JSON"),
    "deep JSON": (raw_header(lambda t: '{"a":' + "[" * 200_000), "nested too deeply"),
    "long integer": (raw_header(lambda t: t.replace("[0,36]", "[0," + "3" * 9999 + "]")), "an integer of 9999 digits"),
    "long header": (raw_header(lambda t: t + " " * 300_000), "not a snapshot, or damaged: a header of 300"),
    "spaced digest": (raw_header(lambda t: t.replace('"sha256":', '"sha256" :')), "sha256 is not written as"),
    "digest escaped": (raw_header(lambda t: t.replace('"sha256"', '"sha25\\u0036"')), "sha256 is not written as"),
}


def assert_refused(path: Path, content: bytes, cause: str = "") -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError) as caught:
            load_snapshot(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert message.isprintable()
    assert len(message) < 300 + len(str(path))
    assert cause in message
    assert peak < (1 << 20) + 64 * len(content)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_their_cause(folder: Path, case: str) -> None:
    change, cause = HOSTILE[case]
    header, data = parts(make(), folder)
    (folder / "sound").write_bytes(sealed(header, data))
    assert_same(load_snapshot(folder / "sound"), make())
    assert_refused(folder / "hostile", sealed(*change(header, data)), cause)


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    for content in (b"GGUF" + bytes(100), b"\x80\x04pickle" + bytes(50), b"{}", bytes(100), b"\xff" * 100):
        assert_refused(tmp_path / "s", content)
    for missing in (tmp_path / "none", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(SnapshotError):
            load_snapshot(missing)
    (tmp_path / "empty").touch()
    with pytest.raises(SnapshotError, match="empty"):
        load_snapshot(tmp_path / "empty")


# ---- damage anywhere


@pytest.fixture(scope="module")
def sound(folder: Path) -> bytes:
    save_snapshot(make(window=5, cache_salt="salt"), folder / "sound")
    return (folder / "sound").read_bytes()


def test_truncated_anywhere(folder: Path, sound: bytes) -> None:
    for size in range(1, len(sound)):
        (folder / "short").write_bytes(sound[:size])
        with pytest.raises(SnapshotError):
            load_snapshot(folder / "short")


def test_one_bit_flipped_anywhere(folder: Path, sound: bytes) -> None:
    for at in range(len(sound)):
        content = bytearray(sound)
        content[at] ^= 1 << at % 8
        (folder / "flipped").write_bytes(content)
        with pytest.raises(SnapshotError):
            load_snapshot(folder / "flipped")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_fuzz_damage(folder: Path, sound: bytes, data: st.DataObject) -> None:
    content = bytearray(sound)
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255) | st.sampled_from(b'019{}[]", \t\n'))
    for at, value in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[at] = value
    damaged = bytes(content) + data.draw(st.binary(max_size=3))
    if damaged != sound:
        assert_refused(folder / "fuzz", damaged)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzz_sealed_files_load_or_are_refused(folder: Path, data: st.DataObject) -> None:
    """Whatever numbers a file with a right checksum holds: what loads is consistent."""
    header, body = parts(make(), folder)
    sizes = st.integers(-1, 20) | st.sampled_from([1 << 31, 1 << 62, 1 << 63, 1 << 64])
    for name in ("token_ids", "positions", "keys", "values"):
        if data.draw(st.booleans()):
            header[name]["shape"] = data.draw(st.lists(sizes, max_size=5))
            header[name]["data_offsets"] = data.draw(st.lists(sizes, min_size=2, max_size=2))
    for name in ("num_computed_tokens", "window", "sinks"):
        if data.draw(st.booleans()):
            header["__metadata__"][name] = str(data.draw(sizes))
    array = np.frombuffer(body[:64], np.int32).copy()
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 15), st.integers(-2, 12)), max_size=3)):
        array[at] = value
    (folder / "fuzz").write_bytes(sealed(header, array.tobytes() + body[64:]))
    with contextlib.suppress(SnapshotError):
        check_snapshot(load_snapshot(folder / "fuzz"))
