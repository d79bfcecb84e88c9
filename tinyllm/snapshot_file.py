"""Snapshots as files: safetensors, so that any tool can read them, with a checksum over every byte.

    tensors   token_ids (T,) I32 | positions (P,) I32 | keys, values (L, P, KH, D) in the dtype of the KV cache
    metadata  format, version, fingerprint, num_computed_tokens, window, sinks, cache_salt, sha256

`sha256` is the SHA-256 of the whole file, read with its own 64 hexadecimal digits as zeros. It finds damage, not
forgery: what a file says is checked as hostile even where the checksum is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array, I32Array
from tinyllm.config import KV_DTYPES
from tinyllm.engine.snapshot import Snapshot
from tinyllm.errors import InvalidRequestError, SnapshotError, reason
from tinyllm.sampling_params import SamplingParams
from weights import Tensor, WeightsError
from weights.errors import quoted
from weights.mapped import MappedFile
from weights.safetensors import ITEM_NBYTES, read_safetensors_file

__all__ = ["check_snapshot", "load_snapshot", "save_snapshot"]

FORMAT = "tinyllm snapshot"
FILE_DTYPES = ("f32", "f16", "bf16")  # of keys and values; the file has no place for the scales of int8 and fp8
VERSION = "1"
MAX_FINGERPRINT_LENGTH = 4096
MAX_HEADER_NBYTES = 1 << 18
NO_DIGEST = "0" * 64
DIGEST_KEY = b'"sha256":"'  # quotes inside a JSON string are escaped, so wherever these bytes stand, they are this key
TENSORS = ("token_ids", "positions", "keys", "values")
METADATA = ("format", "version", "fingerprint", "num_computed_tokens", "window", "sinks", "cache_salt", "sha256")

Shape = tuple[int, ...]


# ---- writing


def save_snapshot(snapshot: Snapshot, path: str | Path) -> None:
    """Writes a snapshot to a file, wholly or not at all: an interrupted save leaves the file that was there before.

    Raises:
        SnapshotError: the snapshot contradicts itself, or the file cannot be written.
    """
    try:
        check_snapshot(snapshot)
        if snapshot.kv_dtype not in FILE_DTYPES:
            raise SnapshotError(
                f"a session in {snapshot.kv_dtype} cannot be saved: files hold {', '.join(FILE_DTYPES)}"
            )
        target = Path(path).resolve()  # through a symbolic link, not over it
        if target.exists() and not target.is_file():
            raise SnapshotError("not a regular file")
        temporary = target.with_name(f".tinyllm-{secrets.token_hex(8)}.tmp")  # a rename stays in one file system
        try:
            with temporary.open("xb") as file:
                _write(snapshot, file)
                file.flush()
                os.fsync(file.fileno())  # before the rename: a crash must not leave a hollow file under the name
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from error.__cause__
    except (OSError, RuntimeError, ValueError) as error:  # no room, no folder, a loop of links, a NUL in the name
        raise SnapshotError(f"{path}: cannot be written: {reason(error)}") from error


def _write(snapshot: Snapshot, file: BinaryIO) -> None:
    header = _header(snapshot)
    digest = hashlib.sha256(header)
    file.write(header)
    for part in _data(snapshot):
        digest.update(part)
        file.write(part)
    file.seek(header.index(DIGEST_KEY) + len(DIGEST_KEY))
    file.write(digest.hexdigest().encode())


def _header(snapshot: Snapshot) -> bytes:
    """The file up to its data, with zeros for the digest."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": snapshot.fingerprint,
        "num_computed_tokens": str(snapshot.num_computed_tokens),
        "window": "none" if snapshot.window is None else str(snapshot.window),
        "sinks": str(snapshot.sinks),
        "cache_salt": snapshot.cache_salt,
        "sha256": NO_DIGEST,
    }
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in TENSORS:
        array = getattr(snapshot, name)
        kind = "I32" if name in TENSORS[:2] else snapshot.kv_dtype.upper()
        begin, end = end, end + ITEM_NBYTES[kind] * array.size
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _data(snapshot: Snapshot) -> Iterator[memoryview]:
    for ids in (snapshot.token_ids, snapshot.positions):
        yield _bytes_of(ids.astype("<i4"))
    for name, array in (("keys", snapshot.keys), ("values", snapshot.values)):
        for layer in array:  # (P, KH, D); one at a time, so that little memory is needed
            yield _bytes_of(_narrowed(layer, snapshot.kv_dtype, name))


def _narrowed(values: F32Array, dtype: str, name: str) -> NDArray[np.generic]:
    """float32 values as the storage dtype's bits, which must hold them exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if dtype == "f32":
        return bits.astype("<u4")
    if dtype == "bf16":
        exact = not np.any(bits & 0xFFFF)
        narrow: NDArray[np.generic] = (bits >> 16).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            narrow = values.astype("<f2")
        exact = np.array_equal(narrow.astype(np.float32).view(np.uint32), bits)
    if not exact:
        raise SnapshotError(f"{name} hold numbers that {dtype} does not")
    return narrow


def _bytes_of(array: NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last; only some systems can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- reading


def load_snapshot(path: str | Path) -> Snapshot:
    """Reads a file that save_snapshot wrote, and trusts nothing in it.

    Raises:
        SnapshotError: one line that names the file and what is wrong with it.
    """
    try:
        file = MappedFile(Path(path))
    except WeightsError as error:
        raise SnapshotError(str(error)) from None
    try:
        return _read(file)
    except WeightsError as error:
        raise SnapshotError(str(error)) from None
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from None
    finally:
        file.close()


def _read(file: MappedFile) -> Snapshot:
    """Checks all that is cheap to check before it reads or allocates what is large."""
    header_nbytes = struct.unpack("<Q", file.buffer[:8])[0] if file.size >= 8 else 0
    if header_nbytes > MAX_HEADER_NBYTES:
        raise SnapshotError(f"not a snapshot, or damaged: a header of {header_nbytes} bytes")
    tensors, metadata = read_safetensors_file(file, allow_empty=True)
    if metadata.get("format") != FORMAT:
        raise SnapshotError("a safetensors file, but not a snapshot")
    if metadata.get("version") != VERSION:
        raise SnapshotError(f"a snapshot of version {quoted(metadata.get('version'))}; this is version {VERSION}")
    _check_names("metadata", metadata, METADATA)
    _check_names("tensors", tensors, TENSORS)
    num_computed_tokens = _as_int(metadata, "num_computed_tokens")
    window = None if metadata["window"] == "none" else _as_int(metadata, "window")
    sinks = _as_int(metadata, "sinks")
    _check_settings(metadata["fingerprint"], window, sinks, metadata["cache_salt"])
    kv_dtype = tensors["keys"].dtype.lower()
    if kv_dtype not in FILE_DTYPES:
        raise SnapshotError(f"keys cannot be {tensors['keys'].dtype}")
    for name, dtype in zip(TENSORS, ("I32", "I32", kv_dtype.upper(), kv_dtype.upper()), strict=True):
        if tensors[name].dtype != dtype:
            raise SnapshotError(f"{name} cannot be {tensors[name].dtype}")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    _check_shapes(shapes, num_computed_tokens)
    _check_digest(file, metadata["sha256"])
    token_ids, positions = _int32(tensors["token_ids"]), _int32(tensors["positions"])
    _check_tokens(token_ids, positions, num_computed_tokens)
    return Snapshot(
        fingerprint=metadata["fingerprint"],
        kv_dtype=kv_dtype,
        token_ids=token_ids,
        num_computed_tokens=num_computed_tokens,
        positions=positions,
        keys=tensors["keys"].dequantize(),
        values=tensors["values"].dequantize(),
        window=window,
        sinks=sinks,
        cache_salt=metadata["cache_salt"],
    )


def _check_names(what: str, found: Mapping[str, object], due: tuple[str, ...]) -> None:
    for name in due:
        if name not in found:
            raise SnapshotError(f"its {what} lack {name}")
    for name in found:
        if name not in due:
            raise SnapshotError(f"its {what} hold an unknown {quoted(name)}")


def _as_int(metadata: Mapping[str, str], name: str) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,17}", metadata[name]):
        raise SnapshotError(f"{name} is not a number: {quoted(metadata[name])}")
    return int(metadata[name])


def _check_digest(file: MappedFile, digest: str) -> None:
    header_end = 8 + struct.unpack("<Q", file.buffer[:8])[0]
    header = file.buffer[:header_end]
    start = header.find(DIGEST_KEY) + len(DIGEST_KEY)
    end = start + len(NO_DIGEST)
    if header.count(DIGEST_KEY) != 1 or header[start : end + 1] != f'{digest}"'.encode():
        raise SnapshotError("damaged: its sha256 is not written as a snapshot's is")
    computed = hashlib.sha256(header[:start] + NO_DIGEST.encode() + header[end:])
    computed.update(file.data[header_end:].data)
    if computed.hexdigest() != digest:
        raise SnapshotError("damaged: its contents do not match their sha256")


def _int32(tensor: Tensor) -> I32Array:
    return np.frombuffer(tensor.data.tobytes(), "<i4").astype(np.int32)


# ---- what every snapshot keeps, from a file or not


def check_snapshot(snapshot: Snapshot) -> None:
    """Raises SnapshotError where a snapshot contradicts itself; the model that made it is the engine's to check."""
    if snapshot.kv_dtype not in KV_DTYPES:
        raise SnapshotError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, not {quoted(snapshot.kv_dtype)}")
    shapes = {}
    for name in TENSORS:
        array, dtype = getattr(snapshot, name), np.int32 if name in TENSORS[:2] else np.float32
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            raise SnapshotError(f"{name} must be an array of {dtype.__name__}")
        shapes[name] = array.shape
    if type(snapshot.num_computed_tokens) is not int or snapshot.num_computed_tokens < 0:
        raise SnapshotError("num_computed_tokens must be a number of tokens")
    _check_settings(snapshot.fingerprint, snapshot.window, snapshot.sinks, snapshot.cache_salt)
    _check_shapes(shapes, snapshot.num_computed_tokens)
    _check_tokens(snapshot.token_ids, snapshot.positions, snapshot.num_computed_tokens)


def _check_settings(fingerprint: object, window: int | None, sinks: int, cache_salt: str) -> None:
    if not isinstance(fingerprint, str) or len(fingerprint) > MAX_FINGERPRINT_LENGTH:
        raise SnapshotError(f"fingerprint must be a string of at most {MAX_FINGERPRINT_LENGTH} characters")
    try:
        SamplingParams(window=window, sinks=sinks, cache_salt=cache_salt)
    except InvalidRequestError as error:
        raise SnapshotError(str(error)) from None
    if any("\ud800" <= character <= "\udfff" for character in fingerprint):  # JSON of other tools would not hold it
        raise SnapshotError("fingerprint has a lone surrogate")


def _check_shapes(shapes: Mapping[str, Shape], num_computed_tokens: int) -> None:
    if len(shapes["token_ids"]) != 1 or len(shapes["positions"]) != 1:
        raise SnapshotError("token_ids and positions must have one axis")
    (num_tokens,), (num_positions,) = shapes["token_ids"], shapes["positions"]
    if not num_positions <= num_computed_tokens <= num_tokens:
        raise SnapshotError(
            f"{num_tokens} tokens, {num_computed_tokens} of them computed, cannot go with {num_positions} positions"
        )
    if shapes["keys"] != shapes["values"]:
        raise SnapshotError(f"keys have the shape {shapes['keys']}, values {shapes['values']}")
    if len(shapes["keys"]) != 4 or shapes["keys"][1] != num_positions or 0 in (shapes["keys"][i] for i in (0, 2, 3)):
        raise SnapshotError(f"keys of shape {shapes['keys']} for {num_positions} positions")


def _check_tokens(token_ids: I32Array, positions: I32Array, num_computed_tokens: int) -> None:
    if token_ids.size and int(token_ids.min()) < 0:
        raise SnapshotError("a token id is negative")
    if positions.size:
        if np.any(positions[1:] <= positions[:-1]):
            raise SnapshotError("positions must ascend")
        if positions[0] < 0 or positions[-1] >= num_computed_tokens:
            raise SnapshotError(f"positions must lie from 0 to {num_computed_tokens - 1}")
