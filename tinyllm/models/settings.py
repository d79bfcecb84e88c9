"""Typed reads of an untrusted configuration: every field is checked, and every mistake names its field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tinyllm.errors import ConfigError
from weights.errors import quoted

__all__ = ["Settings"]

MAX_INTEGER = 1 << 40
MAX_LAYERS = 1 << 12


class Settings:
    """A mapping parsed from a file. A value of None counts as absent. All reads raise ConfigError."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        """source: the file, for messages; prefix: put before every name asked for."""
        self.values = values
        self.source = source
        self.prefix = prefix

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {message}")

    def get(self, name: str) -> Any:
        """The raw value, or None."""
        return self.values.get(self.prefix + name)

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def _require(self, value: Any, name: str) -> Any:
        if value is None:
            raise self.error(f"{self.prefix}{name} is missing")
        return value

    def _mistake(self, name: str, expected: str, value: Any) -> ConfigError:
        return self.error(f"{self.prefix}{name} must be {expected}, not {quoted(value)}")

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_INTEGER) -> int:
        """An integer in [low, high]; required where there is no default."""
        value = self.get(name)
        value = default if value is None else value
        value = self._require(value, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._mistake(name, f"an integer from {low} to {high}", value)
        return value

    def optional_integer(self, name: str, *, low: int = 1, high: int = MAX_INTEGER) -> int | None:
        return self.integer(name, low=low, high=high) if self.has(name) else None

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; required where there is no default."""
        value = self.get(name)
        value = self._require(default if value is None else value, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300 or math.isnan(value):
            raise self._mistake(name, "a finite number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._mistake(name, "true or false", value)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name)
        value = self._require(default if value is None else value, name)
        if not isinstance(value, str):
            raise self._mistake(name, "a string", value)
        return value

    def section(self, name: str) -> Settings | None:
        """A nested mapping, or None where it is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._mistake(name, "an object", value)
        return Settings(value, f"{self.source}: {self.prefix}{name}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of ids; () where absent."""
        value = self.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self._mistake(name, "a token id or a list of them", value)
        return tuple(dict.fromkeys(ids))

    def layer_types(self, num_layers: int) -> tuple[bool, ...] | None:
        """Hugging Face's `layer_types`: (num_layers,) whether a layer's attention slides. None where absent."""
        value = self.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != num_layers:
            raise self._mistake("layer_types", f"a list of {num_layers} layer types", value)
        for layer_type in value:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise self.error(f"layer type {quoted(layer_type)} is not supported")
        return tuple(layer_type == "sliding_attention" for layer_type in value)

    def refuse(self, *names: str) -> None:
        """Raises where a feature that changes the model, and that is not supported, is configured."""
        for name in names:
            if self.get(name) not in (None, False, 0):
                raise self.error(f"{self.prefix}{name} is not supported")
