"""Race detection: accesses to one granule must be ordered by a barrier, or come from one thread.

Every granule (the narrowest access of the kernel, at most 8 bytes) remembers its last writer and its last readers, each
as one 64-bit stamp: which block, how many barriers the block had passed (its epoch), which thread, and how many
bar.warp.sync its warp had passed. Two accesses, one of them a write, race when they are of different blocks, or of one
epoch of one block and of different threads, unless both are of one warp that synchronised in between. Atomic operations
race with plain accesses and not with one another.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cuda_kernels.emulator.errors import LaunchError
from cuda_kernels.emulator.ptx import Array
from cuda_kernels.emulator.report import ProblemLog
from cuda_kernels.emulator.threads import WARP, Threads

# A stamp from its low bits up: warp epoch 10, thread 11, block epoch 16, block 24 bits, two flags. Epochs wrap around.
_THREAD, _EPOCH, _BLOCK = 10, 21, 37
_SEVERAL_BLOCKS, _ATOMIC = 1 << 61, 1 << 62
_WARP_EPOCH_MASK, _THREAD_MASK, _EPOCH_MASK, _BLOCK_MASK = (1 << 10) - 1, (1 << 11) - 1, (1 << 16) - 1, (1 << 24) - 1
_BODY = _SEVERAL_BLOCKS - 1
# Thread codes: 0 .. 1023 a thread of the block, then several threads of one warp, and several warps.
_OF_WARP, _OF_MANY = 1024, 2047


class Clock:
    """The stamps of a batch's lanes, which grow at barriers. Blocks are numbered over all launches, from 1."""

    def __init__(self, threads: Threads, first_block: int) -> None:
        if first_block + threads.total_blocks > _BLOCK_MASK:
            raise LaunchError(f"race checks take grids of at most {_BLOCK_MASK - 1} blocks")
        self.threads, self.first_block = threads, first_block
        self._block_epochs: Array = np.zeros(threads.blocks, np.int64)
        self._warp_epochs: Array = np.zeros(threads.count // WARP, np.int64)
        self._thread: Array = (threads.lanes % threads.per_block) << _THREAD
        self._stamps: Array | None = None

    @property
    def stamps(self) -> Array:
        """[lanes] int64: the stamp of an access that a lane makes now."""
        if self._stamps is None:
            threads = self.threads
            block = self.first_block + threads.first_block + np.arange(threads.blocks)
            of_block = (block << _BLOCK) | ((self._block_epochs & _EPOCH_MASK) << _EPOCH)
            of_warp = np.repeat(of_block, threads.per_block // WARP) | (self._warp_epochs & _WARP_EPOCH_MASK)
            self._stamps = np.repeat(of_warp, WARP) | self._thread
        return self._stamps

    def begin_batch(self) -> None:
        self._stamps = None

    def block_barrier(self, blocks: Array) -> None:
        """Blocks [blocks] bool of the batch have passed a barrier."""
        self._block_epochs[blocks] += 1
        self._stamps = None

    def warp_barrier(self, warps: Array) -> None:
        """Warps [warps] bool of the batch have passed a bar.warp.sync."""
        self._warp_epochs[warps] += 1
        self._stamps = None

    def name(self, stamp: int) -> str:
        """The thread or threads of a stamp, in words."""
        if stamp & _SEVERAL_BLOCKS:
            return "several blocks"
        block = (stamp >> _BLOCK & _BLOCK_MASK) - self.first_block
        code = stamp >> _THREAD & _THREAD_MASK
        if code < _OF_WARP:
            return self.threads.name_of(block, code)
        place = self.threads.name_of(block, (code - _OF_WARP) * WARP) if code != _OF_MANY else ""
        return f"several threads of the warp of {place}" if place else "several warps"


def _warp(stamps: Array) -> Array:
    """The warp of each stamp's threads within their block; no real one for several warps."""
    code = (stamps >> _THREAD) & _THREAD_MASK
    return np.where(code < _OF_WARP, code >> 5, code - _OF_WARP)


class RaceShadow:
    """The stamps of a memory's granules. Lazily touched, and never cleared: stamps of launches before count as old."""

    def __init__(self, nbytes: int, granule: int, next_block: int = 1) -> None:
        self.nbytes = nbytes
        self.shift = granule.bit_length() - 1
        size = (nbytes >> self.shift) + 1
        self.writes, self.reads = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.next_block = next_block

    def has_room(self, blocks: int) -> bool:
        """Whether a launch of so many blocks can still be numbered."""
        return self.next_block + blocks <= _BLOCK_MASK

    def begin(self, clock: Clock, log: ProblemLog, space: str, place: Callable[[int], str]) -> None:
        """Start a launch. place: byte offset -> words."""
        self.clock, self.log, self.space, self.place = clock, log, space, place
        self.next_block = clock.first_block + clock.threads.total_blocks
        self.first_stamp = clock.first_block << _BLOCK

    def begin_batch(self) -> None:
        """Start over with a batch of blocks that have the memory to themselves, as with shared memory."""
        self.first_stamp = (self.clock.first_block + self.clock.threads.first_block) << _BLOCK

    def access(self, instruction: int, offset: Array, nbytes: int, lanes: Array, write: bool, atomic: bool) -> None:
        """Note an access of `nbytes` at the byte offsets [n] by the lanes [n], and report what it races with."""
        granules, count = offset >> self.shift, nbytes >> self.shift
        if count > 1:
            granules = (granules[:, None] + np.arange(count)).reshape(-1)
            lanes = np.repeat(lanes, count)
        own = self.clock.stamps.take(lanes)
        written = self.writes.take(granules)
        recent = (written & _BODY) >= self.first_stamp
        recent_writes = recent.any()
        if recent_writes:
            relevant = recent & ((written & _ATOMIC) == 0) if atomic else recent
            action = "write-write" if write else "read-after-write"
            self.report(instruction, action, self.conflicts(written, own, relevant), granules, lanes, written)
        if not write:
            read = self.reads.take(granules)
            self.note(self.reads, granules, own, read, (read & _BODY) >= self.first_stamp)
            return
        read = self.reads.take(granules)
        recent_reads = (read & _BODY) >= self.first_stamp
        if recent_reads.any():
            race = self.conflicts(read, own, recent_reads)
            self.report(instruction, "write-after-read", race, granules, lanes, read)
        if atomic:
            self.note(self.writes, granules, own | _ATOMIC, written, recent & ((written & _ATOMIC) != 0))
            return
        self.writes[granules] = own
        now = self.writes.take(granules)
        clash = now != own
        if clash.any():
            self.report(instruction, "write-write", clash, granules, lanes, now)

    @staticmethod
    def conflicts(other: Array, own: Array, relevant: Array) -> Array:
        """[n] bool: accesses `own` that are not ordered after the relevant ones of `other`."""
        difference = (other ^ own) & _BODY
        same_block = (difference >> _BLOCK) == 0
        same_epoch = (difference >> _EPOCH) == 0
        same_thread = ((difference >> _THREAD) & _THREAD_MASK) == 0
        ordered = (_warp(other) == _warp(own)) & ((difference & _WARP_EPOCH_MASK) != 0)
        apart = ~same_block | ((other & _SEVERAL_BLOCKS) != 0)
        return relevant & (apart | (same_epoch & ~same_thread & ~ordered))

    @staticmethod
    def includes(before: Array, own: Array) -> Array:
        """[n] bool: stamps that the access `own` adds nothing to."""
        everybody = (((before ^ own) & _BODY) >> _EPOCH == 0) & ((before & _OF_MANY << _THREAD) == _OF_MANY << _THREAD)
        return ((before & _SEVERAL_BLOCKS) != 0) | everybody

    @staticmethod
    def note(table: Array, granules: Array, own: Array, before: Array, recent: Array) -> None:
        """Stamp granules that several threads may touch at once, and keep track of how many there are.

        table: [granules of the memory]; the rest [n]: this access, the stamps before it, and which of those count.
        """
        known = recent & RaceShadow.includes(before, own)
        if known.any():
            if known.all():
                return
            rest = np.flatnonzero(~known)
            granules, own, before, recent = granules[rest], own[rest], before[rest], recent[rest]
        table[granules] = own
        now = table.take(granules)
        clash = now != own
        changed = recent & (before != own)
        rest = np.flatnonzero(clash | changed)
        if not len(rest):
            return
        granules, own, before, recent, now, clash = (x[rest] for x in (granules, own, before, recent, now, clash))
        with_before, with_now = (before ^ own) & _BODY, (now ^ own) & _BODY
        apart = (clash & ((with_now >> _BLOCK) != 0)) | (
            recent & (((with_before >> _BLOCK) != 0) | ((before & _SEVERAL_BLOCKS) != 0))
        )
        near = np.flatnonzero(~apart)  # with several blocks, nothing more need be known
        if len(near):
            RaceShadow.note_in_block(table, *(x[near] for x in (granules, own, before, now, recent, clash)))
        table[granules[apart]] |= _SEVERAL_BLOCKS

    @staticmethod
    def note_in_block(
        table: Array, granules: Array, own: Array, before: Array, now: Array, recent: Array, clash: Array
    ) -> None:
        """The part of `note` that tells threads of one block apart. before, now: stamps around this access."""
        with_before = (before ^ own) & _BODY
        warp, warp_before, warp_now = _warp(own), _warp(before), _warp(now)
        same_time = (warp_before != warp) | ((with_before & _WARP_EPOCH_MASK) == 0)
        other_thread = ((with_before >> _THREAD) & _THREAD_MASK) != 0
        joins = recent & ((with_before >> _EPOCH) == 0) & other_thread & same_time
        other_warp = (joins & (warp_before != warp)) | (clash & (warp_now != warp))
        same_warp = (joins | clash) & ~other_warp
        unnamed = own & ~(_THREAD_MASK << _THREAD)
        # Lanes of one instruction may disagree on a granule: what includes more is written last.
        table[granules[same_warp]] = (unnamed | ((warp + _OF_WARP) << _THREAD))[same_warp]
        table[granules[other_warp]] = (unnamed | (_OF_MANY << _THREAD))[other_warp]

    def report(self, instruction: int, action: str, race: Array, granules: Array, lanes: Array, others: Array) -> None:
        if not race.any():
            return
        first = int(np.flatnonzero(race)[0])
        place = self.place(int(granules[first]) << self.shift)
        message = f"{action} race in {self.space} memory with {self.clock.name(int(others[first]))}, at {place}"
        self.log.add(f"{self.space}-race", message, instruction, lanes[race])
