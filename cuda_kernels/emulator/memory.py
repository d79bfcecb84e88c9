"""Device memory: one arena of bytes with the state of every byte, so that kernels can be held to what is theirs."""

from __future__ import annotations

import bisect
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import DTypeLike

from cuda_kernels.emulator.errors import DeviceMemoryError
from cuda_kernels.emulator.ptx import GLOBAL_WINDOW, Array
from cuda_kernels.emulator.races import RaceShadow
from cuda_kernels.emulator.space import MAPPED, POISON, UNMAPPED, WRITTEN, Space

ALIGNMENT = 256
RED_ZONE = 1024  # unmapped bytes behind every allocation, and before the first
_POISONED_NBYTES = 1 << 20  # larger allocations are left untouched, so that their pages cost nothing before their use


class DeviceMemory:
    """An arena of `nbytes` that stands for a GPU's memory.

    Allocations are numpy arrays that lie in the arena; a launch with `memory=` passes them, and any slice of them, by
    address and copies nothing. Pages are touched lazily: an arena of many gigabytes costs what is used of it.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise DeviceMemoryError(f"device memory of {nbytes} bytes")
        nbytes = _aligned(nbytes)
        self.nbytes = nbytes
        self.bytes = _lazy_bytes(nbytes + 2 * RED_ZONE)  # [nbytes + red zones] uint8
        self.state = _lazy_bytes(nbytes + 2 * RED_ZONE)  # [nbytes + red zones] uint8
        self.space = Space(self.bytes, self.state, None, len(self.bytes))
        self._race_shadows: dict[int, RaceShadow] = {}  # by granule
        self._host_address = int(self.bytes.__array_interface__["data"][0])
        self._spans: list[tuple[int, int]] = [(RED_ZONE, RED_ZONE + nbytes)]  # free, sorted, disjoint
        self._allocations: dict[int, tuple[int, int]] = {}  # start -> (bytes asked for, end of the span)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes asked for and not freed."""
        return sum(nbytes for nbytes, _ in self._allocations.values())

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """A new C-contiguous array in the arena, 256-byte aligned, whose bytes count as never written.

        Raises DeviceMemoryError where no free span is large enough.
        """
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        if any(extent < 0 for extent in shape) or dtype.hasobject:
            raise DeviceMemoryError(f"cannot allocate an array of shape {shape} and type {dtype}")
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= int(extent)
        start = self._take(nbytes)
        block = self.bytes[start : start + nbytes]
        if nbytes <= _POISONED_NBYTES:
            block[:] = POISON
        self.state[start : start + nbytes] = MAPPED
        return np.ndarray(shape, dtype, self.bytes, start)  # a slice of no bytes would lose its address

    def _take(self, nbytes: int) -> int:
        needed = _aligned(nbytes) + RED_ZONE
        for position, (start, end) in enumerate(self._spans):
            room = end - start + (RED_ZONE if end == RED_ZONE + self.nbytes else 0)  # one more lies behind the arena
            if room >= needed:
                taken_end = min(start + needed, end)
                if taken_end < end:
                    self._spans[position] = (taken_end, end)
                else:
                    del self._spans[position]
                self._allocations[start] = (nbytes, taken_end)
                return start
        raise DeviceMemoryError(
            f"out of device memory: {nbytes} bytes asked for, {self.allocated_nbytes} of {self.nbytes} allocated"
        )

    def free(self, array: Array) -> None:
        """Give an array of `empty` back; a kernel that still uses its address is reported."""
        start = self.offset(array) if self.contains(array) else -1
        if start not in self._allocations:
            raise DeviceMemoryError("free of an array that is not an allocation of this device memory")
        nbytes, end = self._allocations.pop(start)
        self.state[start : start + nbytes] = UNMAPPED
        position = bisect.bisect(self._spans, (start, end))
        self._spans.insert(position, (start, end))
        if position + 1 < len(self._spans) and self._spans[position + 1][0] == end:
            self._spans[position] = (start, self._spans.pop(position + 1)[1])
        if position and self._spans[position - 1][1] == start:
            self._spans[position - 1] = (self._spans[position - 1][0], self._spans.pop(position)[1])

    def contains(self, array: Array) -> bool:
        """Whether the array's first element lies in the arena."""
        return 0 <= int(array.__array_interface__["data"][0]) - self._host_address < len(self.bytes)

    def offset(self, array: Array) -> int:
        """Where the array's first element lies in the arena, in bytes."""
        return int(array.__array_interface__["data"][0]) - self._host_address

    def address(self, array: Array) -> int:
        """The array's address on the device."""
        if not self.contains(array):
            raise DeviceMemoryError("the array does not lie in this device memory")
        return GLOBAL_WINDOW + self.offset(array)

    def mark_written(self, array: Array) -> None:
        """Tell that the host has written the array, or slice."""
        self._state_of(array)[...] = WRITTEN

    def written(self, array: Array) -> bool:
        """Whether every byte of the array, or slice, has been written."""
        return bool((self._state_of(array) == WRITTEN).all())

    def _state_of(self, array: Array) -> Array:
        """The states of an array's bytes [*shape, itemsize], as a view."""
        if not self.contains(array):
            raise DeviceMemoryError("the array does not lie in this device memory")
        return np.lib.stride_tricks.as_strided(
            self.state[self.offset(array) :], (*array.shape, array.itemsize), (*array.strides, 1)
        )

    def where(self, address: int) -> str:
        """A device address in words: the allocation that it hits or is next to."""
        offset = address - GLOBAL_WINDOW
        starts = sorted(self._allocations)
        position = bisect.bisect(starts, offset)
        for start in starts[max(0, position - 1) : position + 1]:
            nbytes = self._allocations[start][0]
            if start - RED_ZONE <= offset < start + nbytes + RED_ZONE:
                return f"byte {offset - start} of an array of {nbytes} bytes"
        return f"address {address:#x}, which belongs to no array"

    def race_shadow(self, granule: int, blocks: int) -> RaceShadow:
        """The shadow for the race checks of a launch of so many blocks, as large as what is allocated."""
        shadow = self._race_shadows.get(granule)
        used = max((start + nbytes for start, (nbytes, _) in self._allocations.items()), default=0)
        if shadow is None or shadow.nbytes < used or not shadow.has_room(blocks):
            next_block = shadow.next_block if shadow is not None and shadow.has_room(blocks) else 1
            size = min(len(self.bytes), used + used // 2)
            shadow = self._race_shadows[granule] = RaceShadow(size, granule, next_block)
        return shadow

    @contextmanager
    def copies(self, arrays: list[Array], uninitialised: list[bool]) -> Iterator[list[Array]]:
        """Copies of host arrays in the arena, for the length of a launch; the writable ones are copied back at its end.

        arrays: any layout; a Fortran-contiguous one stays so, others become C-contiguous.
        """
        taken: list[Array] = []
        placed: list[Array] = []
        try:
            for array, never_written in zip(arrays, uninitialised, strict=True):
                fortran = array.flags.f_contiguous and not array.flags.c_contiguous
                base = self.empty(array.shape[::-1] if fortran else array.shape, array.dtype)
                copy = base.T if fortran else base
                copy[...] = array
                if not never_written:
                    self.mark_written(copy)
                taken.append(base)
                placed.append(copy)
            yield placed
            for array, copy in zip(arrays, placed, strict=True):
                if array.flags.writeable:
                    array[...] = copy
        finally:
            for base in taken:
                self.free(base)


def _lazy_bytes(nbytes: int) -> Array:
    """Zeros [nbytes] uint8, page-aligned. Pages are taken at their first use, even where all of them would not fit."""
    if sys.platform == "win32":
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    no_reserve = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which the module names from 3.12 on alone
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def room_for(sizes: list[int]) -> int:
    """The size of an arena that holds allocations of these sizes."""
    return sum(_aligned(size) + RED_ZONE for size in sizes) + ALIGNMENT
