"""What a kernel is before it is compiled: a function, its constants, the types of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

__all__ = ["POINTER_TYPES", "SCALAR_TYPES", "Kernel"]

SCALAR_TYPES = ("i32", "u32", "i64", "u64", "f32")
POINTER_TYPES = ("f32*", "i32*", "u32*", "u16*", "i8*", "u8*", "i64*", "u64*")


@dataclass(frozen=True)
class Kernel:
    """A kernel's definition; equal definitions compile to the same code.

    Attributes:
        name: what reports call it, with its variant: "rms_norm", "paged_decode_f16_d64_g3".
        build: makes the Python function that numba compiles, from the constants. Defined at the top of its module.
        constants: name and value of each of build's keyword arguments. Loops over them are unrolled.
        signature: one of SCALAR_TYPES or POINTER_TYPES for each argument.
        threads: threads of a block, exactly.
        min_blocks: blocks that should fit on a multiprocessor together: bounds the registers; 0 leaves it open.
    """

    name: str
    build: Callable[..., Callable[..., None]]
    constants: tuple[tuple[str, Hashable], ...]
    signature: tuple[str, ...]
    threads: int
    min_blocks: int = 0

    def __post_init__(self) -> None:
        for kind in self.signature:
            assert kind in SCALAR_TYPES or kind in POINTER_TYPES, f"{self.name}: unknown argument type {kind!r}"
        assert 1 <= self.threads <= 1024 and self.threads % 32 == 0, f"{self.name}: {self.threads} threads"

    def __hash__(self) -> int:
        """Made once a process: a kernel is looked up at every launch."""
        value: int | None = self.__dict__.get("_hash")
        if value is None:
            value = hash((self.name, self.constants))
            object.__setattr__(self, "_hash", value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash: another process has other hashes of strings."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def function(self) -> Callable[..., Any]:
        """The Python function, to be compiled."""
        return self.build(**dict(self.constants))
