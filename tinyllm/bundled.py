"""The small story model that is installed with tinyllm, in the folder weights/bundled. It is never downloaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import ModelNotFoundError

__all__ = ["FILES", "BundledModel", "bundled_folder"]

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class BundledModel:
    """A model among the package data."""

    name: str
    description: str
    license: str

    @property
    def path(self) -> Path:
        return bundled_folder()

    @property
    def nbytes(self) -> int:
        return sum((self.path / name).stat().st_size for name in FILES if (self.path / name).is_file())

    @property
    def where(self) -> str:
        return f"comes with tinyllm: {self.path}" if self.is_cached() else "missing from this installation"

    def is_cached(self) -> bool:
        """Whether all of its files are there."""
        return self._missing() is None

    def check(self) -> Path:
        """Its folder. Raises ModelNotFoundError where a file is missing, as from a source tree without them."""
        missing = self._missing()
        if missing is not None:
            raise ModelNotFoundError(
                f"the model {self.name}, which comes with tinyllm, is missing from this installation: there is no "
                f"{missing}; install tinyllm again, or name another model"
            )
        return self.path

    def _missing(self) -> Path | None:
        return next((self.path / name for name in FILES if not (self.path / name).is_file()), None)


def bundled_folder() -> Path:
    """The folder `bundled` of the installed package `weights`, which need not be imported for it."""
    spec = importlib.util.find_spec("weights")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "bundled"
