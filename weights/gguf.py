"""Reads GGUF files, versions 2 and 3, little-endian (github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    magic "GGUF" | version u32 | tensor count u64 | key-value count u64
    key-values:   key | type u32 | value              a string is its length u64 and that many bytes of UTF-8;
    tensor infos: name | n_dims u32 | dims u64 x n_dims | type u32 | offset u64         an array its item type
    padding to general.alignment, then the tensors' data, which offsets count from      u32, length u64, items

The file is untrusted: every count and length is held against the bytes that are left before anything is
allocated. Strings that are not valid UTF-8 are refused: the vocabularies that this project can use write other
bytes as escapes, so such a string means damage, and a token with replacement characters would be a wrong one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from weights.errors import WeightsError, quoted
from weights.mapped import MappedCheckpoint, MappedFile
from weights.quants import FORMATS
from weights.tensor import Tensor

__all__ = ["MAGIC", "open_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME_NBYTES = 65535  # of keys, by the specification; here of tensor names too
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
MAX_SPLITS = 1024

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# value types by their numbers; strings and arrays are read by methods of their own
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: _U32, 5: struct.Struct("<i"), 6: struct.Struct("<f"),
    10: _U64, 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MIN_STRING_NBYTES, _MIN_ARRAY_NBYTES = 8, 12
_MIN_KEY_VALUE_NBYTES = 8 + 4 + 1  # the key's length, the type, one byte of value
_MIN_TENSOR_INFO_NBYTES = 8 + 4 + 8 + 4 + 8  # the name's length, n_dims, one dimension, the type, the offset

# ggml's tensor types; those that FORMATS lacks are named in the message that refuses them
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


def open_gguf(path: Path) -> MappedCheckpoint:
    """Maps a GGUF file and reads its header; for the first file of a split model, the other files' too.

    Metadata values are int, float, bool and str; arrays of strings are list[str], of numbers numpy arrays, of
    arrays lists. Raises WeightsError.
    """
    first = _Parser(MappedFile(path))
    files = [first.file]
    count = first.split_field("split.count", 1)
    if count > 1:
        for number, name in enumerate(_split_names(first, count)[1:], start=1):
            part = _Parser(MappedFile(path.parent / name))
            files.append(part.file)
            first.merge(part, number, count)
        if first.split_field("split.tensors.count", len(first.tensors)) != len(first.tensors):
            first.fail(f"its {count} files hold {len(first.tensors)} tensors, not as many as it declares")
    return MappedCheckpoint(path, "gguf", first.metadata, first.tensors, files)


def _split_names(first: _Parser, count: int) -> list[str]:
    """File names of a split model, from `NAME-00001-of-0000N.gguf`, the first one."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", first.path.name)
    if match is None or int(match[3]) != count:
        first.fail(f"a split model of {count} files must be named like NAME-00001-of-{count:05}.gguf")
    if int(match[2]) != 1 or first.split_field("split.no", 0) != 0:
        first.fail(f"name the first file of the split model instead, {match[1]}-00001-of-{count:05}.gguf")
    if count > MAX_SPLITS:
        first.fail(f"a model split into {count} files is not supported (at most {MAX_SPLITS})")
    return [f"{match[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


class _Parser:
    """Reads one file in its constructor, front to back; `at` is the next byte to be read."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.path = file.path
        self.at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

        if self.take(4) != MAGIC:
            self.fail(f"not a GGUF file (it does not begin with {quoted(MAGIC)})")
        version = self.u32()
        if version not in VERSIONS:
            if int.from_bytes(_U32.pack(version), "big") in VERSIONS:
                self.fail("a big-endian GGUF file, which is not supported")
            self.fail(f"GGUF version {version} is not supported (versions 2 and 3 are)")
        tensor_count, key_value_count = self.u64(), self.u64()
        self.need(tensor_count, _MIN_TENSOR_INFO_NBYTES, "tensors")
        self.need(key_value_count, _MIN_KEY_VALUE_NBYTES, "key-value pairs")
        self.read_metadata(key_value_count)
        self.read_tensors(tensor_count)

    # ---- the bytes

    def fail(self, cause: str) -> NoReturn:
        raise WeightsError(f"{self.path}: {cause}")

    def need(self, count: int, nbytes: int, what: str) -> None:
        """Refuses a count of things of at least `nbytes` each that the rest of the file cannot hold."""
        if count * nbytes > self.file.size - self.at:
            self.fail(
                f"truncated or damaged: {count} {what} at byte {self.at} do not fit into a file of "
                f"{self.file.size} bytes"
            )

    def take(self, nbytes: int) -> bytes:
        self.need(nbytes, 1, "bytes")
        self.at += nbytes
        return self.file.buffer[self.at - nbytes : self.at]

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def string(self, what: str, max_nbytes: int | None = None) -> str:
        nbytes = self.u64()
        if max_nbytes is not None and nbytes > max_nbytes:
            self.fail(f"{what} before byte {self.at} is {nbytes} bytes long (at most {max_nbytes} are possible)")
        raw = self.take(nbytes)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8: {quoted(raw)}")

    # ---- metadata

    def read_metadata(self, count: int) -> None:
        for _ in range(count):
            key = self.string("a key", MAX_NAME_NBYTES)
            if key in self.metadata:
                self.fail(f"the key {quoted(key)} appears twice")
            self.metadata[key] = self.value(self.u32(), key, depth=0)

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _SCALARS:
            form = _SCALARS[kind]
            return form.unpack(self.take(form.size))[0]
        if kind == _STRING:
            return self.string(f"the value of {quoted(key)}")
        if kind == _BOOL:
            return bool(self.bools(1, key)[0])
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        self.fail(f"{quoted(key)} has the unknown value type {kind}")

    def array(self, key: str, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{quoted(key)} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind, count = self.u32(), self.u64()
        items = f"items of {quoted(key)}"
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind].format)
            self.need(count, dtype.itemsize, items)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).astype(dtype.newbyteorder("="))
        if kind == _BOOL:
            self.need(count, 1, items)
            return self.bools(count, key)
        if kind == _STRING:
            self.need(count, _MIN_STRING_NBYTES, items)
            return self.strings(count, key)
        if kind == _ARRAY:
            self.need(count, _MIN_ARRAY_NBYTES, items)
            return [self.array(key, depth + 1) for _ in range(count)]
        self.fail(f"{quoted(key)} is an array of the unknown type {kind}")

    def bools(self, count: int, key: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        values = np.frombuffer(self.take(count), np.uint8)
        if (values > 1).any():
            self.fail(f"{quoted(key)} holds a boolean that is neither 0 nor 1")
        return values.astype(np.bool_)

    def strings(self, count: int, key: str) -> list[str]:
        """The vocabularies, of some 10^5 strings: this loop is most of the time that opening a file takes."""
        buffer, size, at = self.file.buffer, self.file.size, self.at
        unpack: Callable[[Any, int], tuple[int]] = _U64.unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(buffer, at)[0]
                if at > size:
                    raise struct.error
                append(buffer[start:at].decode())
        except struct.error:
            self.fail(f"truncated or damaged: item {len(strings)} of {quoted(key)} runs past the file's end")
        except UnicodeDecodeError:
            self.fail(f"item {len(strings)} of {quoted(key)} is not valid UTF-8: {quoted(buffer[start:at])}")
        self.at = at
        return strings

    # ---- tensors

    def alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or value & (value - 1):
            self.fail(f"general.alignment must be a power of two, not {quoted(value)}")
        return value

    def read_tensors(self, count: int) -> None:
        alignment = self.alignment()
        infos = [self.tensor_info() for _ in range(count)]
        base = -(-self.at // alignment) * alignment
        end_of_previous, previous = 0, ""
        for name, shape, dtype, offset in sorted(infos, key=lambda info: info[3]):
            nbytes = FORMATS[dtype].nbytes(prod(shape))
            if offset % alignment:
                self.fail(f"tensor {quoted(name)} at offset {offset} is not aligned to {alignment} bytes")
            if offset < end_of_previous:
                self.fail(f"tensors {quoted(previous)} and {quoted(name)} overlap")
            if base + offset + nbytes > self.file.size:
                self.fail(
                    f"truncated or damaged: tensor {quoted(name)} of {nbytes} bytes at byte {base + offset} runs "
                    f"past the file's end at {self.file.size}"
                )
            end_of_previous, previous = offset + nbytes, name
            data = self.file.data[base + offset : base + offset + nbytes]
            self.tensors[name] = Tensor(name, shape, dtype, data)
        if len(self.tensors) != count:
            self.fail(f"the tensor {quoted(_first_duplicate(info[0] for info in infos))} appears twice")
        self.tensors = {info[0]: self.tensors[info[0]] for info in infos}  # in the file's order

    def tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        """name, shape in numpy order, dtype, offset"""
        name = self.string("a tensor's name", MAX_NAME_NBYTES)
        num_dims = self.u32()
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"tensor {quoted(name)} has {num_dims} dimensions (1 to {MAX_DIMS} are possible)")
        shape = tuple(self.u64() for _ in range(num_dims))[::-1]
        kind, offset = self.u32(), self.u64()
        dtype = _TENSOR_TYPES.get(kind)
        if dtype is None:
            self.fail(f"tensor {quoted(name)} has the unknown type {kind}")
        if dtype not in FORMATS:
            self.fail(f"tensor {quoted(name)} has the unsupported type {dtype} ({', '.join(FORMATS)} are supported)")
        if 0 in shape or prod(shape) >= 1 << 63:
            self.fail(f"tensor {quoted(name)} has the impossible shape {shape}")
        if shape[-1] % FORMATS[dtype].block_size:
            self.fail(
                f"tensor {quoted(name)} has rows of {shape[-1]} values, not a multiple of {dtype}'s "
                f"{FORMATS[dtype].block_size}"
            )
        return name, shape, dtype, offset

    # ---- split models

    def split_field(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.fail(f"{key} must be a number, not {quoted(value)}")
        return value

    def merge(self, part: _Parser, number: int, count: int) -> None:
        """Takes over the tensors of another file of the same split model."""
        if part.split_field("split.no", 0) != number or part.split_field("split.count", 1) != count:
            part.fail(f"not file {number + 1} of {count} of the split model {self.path.name}")
        both = self.tensors.keys() & part.tensors.keys()
        if both:
            part.fail(f"the tensor {quoted(min(both))} is also in another file of the split model")
        self.tensors.update(part.tensors)


def _first_duplicate(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
