"""Builders of small model files for the tests, sound ones and, through their arguments, damaged ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # GGUF value types
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_array(kind: int, items: Sequence[Any]) -> bytes:
    if kind == STRING:
        body = b"".join(gguf_string(item) for item in items)
    elif kind == ARRAY:
        body = b"".join(items)
    else:
        body = struct.pack(f"<{len(items)}{CODES[kind]}", *items)
    return struct.pack("<IQ", kind, len(items)) + body


def gguf_pair(key: str | bytes, kind: int, value: Any) -> bytes:
    """`value` is already encoded for arrays and where it is bytes."""
    if kind == STRING:
        body = gguf_string(value)
    else:
        body = value if isinstance(value, bytes) else struct.pack("<" + CODES[kind], value)
    return gguf_string(key) + struct.pack("<I", kind) + body


@dataclass
class Info:
    """A tensor info; `dims` in GGUF order, the row length first."""

    name: str | bytes = "w"
    dims: tuple[int, ...] = (4, 2)
    kind: int = 0  # F32
    offset: int = 0
    num_dims: int | None = None

    def encode(self) -> bytes:
        num_dims = len(self.dims) if self.num_dims is None else self.num_dims
        return gguf_string(self.name) + struct.pack(
            f"<I{len(self.dims)}QIQ", num_dims, *self.dims, self.kind, self.offset
        )


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    infos: Sequence[Info] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count = len(infos) if tensor_count is None else tensor_count
    pair_count = len(pairs) if pair_count is None else pair_count
    head = magic + struct.pack("<IQQ", version, tensor_count, pair_count)
    head += b"".join(pairs) + b"".join(info.encode() for info in infos)
    return head + bytes(-len(head) % alignment) + data


def safetensors_bytes(header: Any, data: bytes = b"", *, header_nbytes: int | None = None) -> bytes:
    """`header` is an object, or the header's raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if header_nbytes is None else header_nbytes) + raw + data
