"""Reads one safetensors file (github.com/huggingface/safetensors).

    header length u64 | header: JSON, space-padded | data

The header maps each tensor's name to its dtype, shape and [begin, end) offsets into the data, which the tensors
must cover without gap or overlap; "__metadata__" maps strings to strings. The file is untrusted.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from weights.errors import WeightsError, quoted
from weights.json_file import parse_json_object
from weights.mapped import MappedFile
from weights.tensor import Tensor

__all__ = ["DTYPES", "ITEM_NBYTES", "read_safetensors", "read_safetensors_file"]

DTYPES = ("F32", "F16", "BF16")  # those that a model's parameters may have
ITEM_NBYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I8": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
}  # fmt: skip
MAX_HEADER_NBYTES = 100_000_000  # the original library's bound
MAX_DIMS = 8


def read_safetensors(file: MappedFile) -> dict[str, Tensor]:
    """The tensors of a mapped file, by name, in the order of their data; views of the mapping.

    A scalar (shape []) is given the shape (1,), so that every tensor has rows. Tensors of other dtypes than DTYPES
    are listed, since old checkpoints carry such buffers, but have no values here. Empty tensors are refused: no
    supported model has a use for them. Raises WeightsError.
    """
    return read_safetensors_file(file)[0]


def read_safetensors_file(file: MappedFile, *, allow_empty: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same tensors, and the file's `__metadata__`. Raises WeightsError."""

    def fail(cause: str) -> NoReturn:
        raise WeightsError(f"{file.path}: {cause}")

    if file.size < 8:
        fail("truncated: shorter than the 8 bytes of a safetensors header length")
    header_nbytes = struct.unpack("<Q", file.buffer[:8])[0]
    if header_nbytes > MAX_HEADER_NBYTES:
        fail(f"not a safetensors file, or damaged: a header of {header_nbytes} bytes")
    base = 8 + header_nbytes
    if base > file.size:
        fail(f"truncated or damaged: a header of {header_nbytes} bytes in a file of {file.size}")
    raw = file.buffer[8:base]
    if not raw.startswith(b"{"):
        fail("not a safetensors file: the header does not begin with '{'")
    header = parse_json_object(raw, f"{file.path}: header")

    extra = header.pop("__metadata__", {})
    if not isinstance(extra, dict) or not all(isinstance(v, str) for v in extra.values()):
        fail("__metadata__ must map strings to strings")
    infos = [_tensor_info(name, info, file.path, allow_empty) for name, info in header.items()]
    tensors, end_of_previous = {}, 0
    for name, shape, dtype, begin, end in sorted(infos, key=lambda info: info[3:]):
        if begin != end_of_previous:
            how = "overlaps the one before it" if begin < end_of_previous else "leaves a gap before it"
            fail(f"the data of tensor {quoted(name)} {how}, at {begin} where {end_of_previous} is due")
        end_of_previous = end
        tensors[name] = Tensor(name, shape, dtype, file.data[base + begin : base + end])
    if base + end_of_previous != file.size:
        fail(f"truncated or damaged: its tensors end at byte {base + end_of_previous}, it at {file.size}")
    return tensors, extra


def _tensor_info(name: str, info: Any, path: Path, allow_empty: bool) -> tuple[str, tuple[int, ...], str, int, int]:
    """Checks one entry of the header -> name, shape, dtype, begin, end."""

    def fail(cause: str) -> NoReturn:
        raise WeightsError(f"{path}: tensor {quoted(name)}: {cause}")

    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        fail("its entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_NBYTES:
        fail(f"dtype {quoted(dtype)} is unknown")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in shape):
        fail(f"the shape must be a list of at most {MAX_DIMS} sizes")
    if (0 in shape and not allow_empty) or prod(shape) >= 1 << 63:
        fail(f"impossible shape {shape}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        fail("data_offsets must be two sizes")
    begin, end = offsets
    nbytes = ITEM_NBYTES[dtype] * prod(shape)
    if end - begin != nbytes:
        fail(f"{nbytes} bytes are due for {dtype} of shape {shape}, not {end - begin}")
    return name, tuple(shape) or (1,), dtype, begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
