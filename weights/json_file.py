"""Strict JSON from untrusted files: bounded in size, no duplicate keys, no NaN or Infinity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from weights.errors import WeightsError, quoted
from weights.mapped import read_prefix

__all__ = ["parse_json_object", "read_json_object"]

MAX_FILE_NBYTES = 64 << 20


def read_json_object(path: Path, max_nbytes: int = MAX_FILE_NBYTES) -> dict[str, Any]:
    """The JSON object in a file such as config.json. Raises WeightsError."""
    raw = read_prefix(path, max_nbytes + 1)
    if len(raw) > max_nbytes:
        raise WeightsError(f"{path}: larger than {max_nbytes} bytes")
    return parse_json_object(raw, str(path))


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """UTF-8 JSON -> its object. Raises WeightsError, beginning with `where`."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_int, parse_constant=_refuse)
    except RecursionError:
        raise WeightsError(f"{where}: JSON nested too deeply") from None
    except ValueError as e:  # bad UTF-8, bad JSON, or one of the hooks below
        raise WeightsError(f"{where}: bad JSON: {e}") from e
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {quoted(key)} appears twice")
        result[key] = value
    return result


def _int(digits: str) -> int:
    if len(digits) > 40:  # converting takes time that is quadratic in their number
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
