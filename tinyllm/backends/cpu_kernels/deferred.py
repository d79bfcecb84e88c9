"""What kernels are written with, without numba: its types by name, and functions that become its own when it compiles.

Numba and LLVM take a fifth of a second and 90 MB to import, and a process that finds all its kernels in the cache
needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Deferred", "NumbaType", "resolve", "types"]


@dataclass(frozen=True)
class NumbaType:
    """A type of numba's by its name there."""

    name: str

    def resolve(self) -> Any:
        import numba

        return getattr(numba.types, self.name)


class _Types:
    """Stands for the module numba.types: `types.int64` is NumbaType("int64")."""

    def __getattr__(self, name: str) -> NumbaType:
        return NumbaType(name)


types = _Types()


class Deferred:
    """A function that kernels call, or a type: `make` imports numba, and is called when numba first meets it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def resolve(self) -> Any:
        return self._made

    @cached_property
    def _made(self) -> Any:
        return self._make()

    @property
    def _numba_type_(self) -> Any:
        """How numba asks for the type of a value that a function refers to."""
        from numba.core.registry import cpu_target

        made = self._made
        cpu_target.typing_context.refresh()  # registers what is new
        cpu_target.target_context.refresh()
        return cpu_target.typing_context.resolve_value_type(made)

    def __call__(self, *_arguments: object) -> Any:
        raise TypeError("only kernels can call this")


def resolve(kind: Any) -> Any:
    """Numba's type for a NumbaType or a Deferred; other types as they are."""
    return kind.resolve() if isinstance(kind, (NumbaType, Deferred)) else kind
