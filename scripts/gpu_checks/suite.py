"""What a check and a timing are, and what they work with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.launch import Array, Runtime
from cuda_kernels.roofline import TileWork

__all__ = [
    "Check",
    "Context",
    "Outcome",
    "Prepared",
    "Timing",
    "bf16_bits",
    "bf16_values",
    "differing",
    "larger",
    "worst",
]

POOL = 1 << 20  # random numbers that large arrays repeat


@dataclass
class Context:
    """A device and a source of random numbers.

    Attributes:
        small: shapes for the emulator, which runs about a hundred thousand times slower than a GPU.
        quick: the most telling timings alone.
        l2_nbytes: of the device; timed inputs are rotated until they exceed it.
    """

    rt: Runtime
    rng: np.random.Generator
    small: bool = False
    quick: bool = False
    l2_nbytes: int = 64 << 20
    _pools: dict[str, NDArray[Any]] = field(default_factory=dict)
    _kept: dict[str, Any] = field(default_factory=dict)

    def normal(self, *shape: int, deviation: float = 1.0) -> NDArray[np.float32]:
        """Normal float32 numbers; in large arrays they repeat."""
        count = math.prod(shape)
        if count <= POOL:
            return (self.rng.standard_normal(count, np.float32) * np.float32(deviation)).reshape(shape)
        if "normal" not in self._pools:
            self._pools["normal"] = self.rng.standard_normal(POOL, np.float32)
        return np.resize(self._pools["normal"] * np.float32(deviation), shape)

    def put(self, array: NDArray[Any]) -> Array:
        return self.rt.from_host(np.ascontiguousarray(array))

    def zeros(self, *shape: int) -> Array:
        """float32 zeros on the device."""
        result = self.rt.empty(shape, np.float32)
        self.rt.fill(result, 0)
        return result

    def poisoned(self, *shape: int) -> Array:
        """float32 NaNs on the device, to see what was not written."""
        result = self.rt.empty(shape, np.float32)
        self.rt.fill(result, 0xFF)
        return result

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """The last thing made under a name, made again only for another name."""
        if name not in self._kept:
            self._kept.clear()
            self._kept[name] = make()
        return self._kept[name]

    def rotations(self, nbytes: int) -> int:
        """How many sets of inputs of this size keep the second-level cache from serving the next launch."""
        return max(1, min(32, -(-2 * self.l2_nbytes // max(nbytes, 1))))


@dataclass(frozen=True)
class Outcome:
    """The largest error found and what it may be at the most; of bits that differ, how many and 0."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN is not


@dataclass(frozen=True)
class Check:
    """One property of one family."""

    family: str
    name: str
    run: Callable[[Context], Outcome]

    @property
    def id(self) -> str:
        return f"check:{self.family}:{self.name}"


@dataclass(frozen=True)
class Prepared:
    """Something ready to be timed.

    Attributes:
        launches: the same work on different inputs, each.
        work: of one of them.
        rivals: by name, what makes the launches of another library for the same work.
    """

    launches: Sequence[Callable[[], None]]
    work: TileWork
    rivals: Mapping[str, Callable[[], Sequence[Callable[[], Any]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """One launch to be timed.

    Attributes:
        quick: whether --quick keeps it.
    """

    family: str
    name: str
    prepare: Callable[[Context], Prepared]
    quick: bool = False

    @property
    def id(self) -> str:
        return f"time:{self.family}:{self.name}"


# ---- oracles' helpers


def worst(found: NDArray[Any], exact: NDArray[Any], scale: NDArray[Any] | float = 1.0) -> float:
    """The largest |found - exact| / scale; NaN anywhere gives NaN. 0 / 0 is 0."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    difference = np.abs(found.astype(np.float64) - exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(difference == 0, 0.0, difference / scale)
    return float(ratio.max(initial=0.0))


def larger(a: float, b: float) -> float:
    """Their maximum; NaN if either is, which Python's max would lose."""
    return float(np.maximum(a, b))


def differing(a: NDArray[Any], b: NDArray[Any]) -> Outcome:
    """How many elements are not the same bits."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape)
    kind = np.dtype(f"u{a.dtype.itemsize}")
    a, b = np.ascontiguousarray(a).view(kind), np.ascontiguousarray(b).view(kind)
    return Outcome(float(np.count_nonzero(a != b)), 0.0)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bfloat16 bits, to nearest even; no NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)
