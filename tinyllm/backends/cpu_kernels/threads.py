"""Runs lists of kernels on the calling thread and on helpers that claim tasks beside it.

The caller never waits for a helper to begin, only for tasks that a helper has claimed: on a machine that is busy with
other things, a helper that does not get a core delays nothing. (OpenMP's barrier waits for every thread.)

A job is four int64: | kernel | params | tasks | chunk |; `chunk` tasks are claimed at once, 0 means that the caller
does them all. The next job of a list begins when all tasks of the one before are done.

State, int64 each on a cache line of its own:

    0 TICKET   generation << 32 | tasks not yet claimed; claimed from the last one down
    1 DONE     tasks done of this generation
    2 KERNEL, 3 PARAMS, 4 CHUNK   the job; it stays as it is until all of its claimed tasks are done
    5 STOP     1 ends the helpers
    6 + w      helper w: 0 awake, 1 asleep, 2 to be woken

A claim is one compare-and-exchange of TICKET. The generation makes a claim on an older job fail.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.jit import Function, device
from tinyllm.backends.cpu_kernels.simd import (
    Builder,
    atomic_add,
    atomic_load,
    atomic_store,
    call_task,
    compare_exchange,
    emit_call,
    instruction,
    load_i64,
    pause,
)

__all__ = ["JOB", "ThreadPool"]

JOB = 4  # int64 of a job

_LINE = 64
_TICKET, _DONE, _KERNEL, _PARAMS, _CHUNK, _STOP, _HELPERS = (_LINE * i for i in range(7))
_IDLE_YIELDS = 4096  # times that a helper looks for work, giving its core away in between, before it sleeps: 1 to 2 ms
_SPINS = 64  # times that a thread looks again at once, before it gives its core away
_REMAINING = (1 << 32) - 1

_YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


@instruction(types.void)
def _yield(b: Builder) -> None:
    """Gives the core to another thread that wants it."""
    emit_call(b, _YIELD, ir.IntType(32))


@device
def _work(state: int, worker: int) -> bool:
    """Claims and does tasks until none is left; says whether there was any."""
    worked = False
    while True:
        ticket = atomic_load(state + _TICKET)
        remaining = ticket & _REMAINING
        if remaining == 0:
            return worked
        n = min(atomic_load(state + _CHUNK), remaining)
        if compare_exchange(state + _TICKET, ticket, ticket - n):
            kernel, params = atomic_load(state + _KERNEL), atomic_load(state + _PARAMS)
            call_task(kernel, params, worker, remaining - n, remaining)
            atomic_add(state + _DONE, n)
            worked = True


@device
def _wait(idle: int) -> None:
    """What a thread does that has looked `idle` times in vain."""
    if idle < _SPINS:
        pause()
    else:
        _yield()


@device
def _publish(state: int, helpers: int, job: int) -> int:
    """Shows the helpers a job; returns how many sleep and must be woken (2 in their slots)."""
    atomic_store(state + _KERNEL, load_i64(job))
    atomic_store(state + _PARAMS, load_i64(job + 8))
    atomic_store(state + _CHUNK, load_i64(job + 24))
    atomic_store(state + _DONE, 0)
    generation = (atomic_load(state + _TICKET) >> 32) + 1 & 0x3FFFFFFF
    atomic_store(state + _TICKET, generation << 32 | load_i64(job + 16))
    sleeping = 0
    for helper in range(helpers):
        if compare_exchange(state + _HELPERS + _LINE * helper, 1, 2):
            sleeping += 1
    return sleeping


def run_jobs(state: int, helpers: int, jobs: int, begin: int, end: int, published: int) -> int:
    """Does the jobs begin <= j < end; returns end, or a job that was published while helpers sleep.

    Once those are woken, it is to be called again from that job on, with `published` 1.
    """
    for j in range(begin, end):
        job = jobs + 8 * JOB * j
        tasks = load_i64(job + 16)
        if load_i64(job + 24) == 0:
            call_task(load_i64(job), load_i64(job + 8), 0, 0, tasks)
            continue
        if (j > begin or published == 0) and _publish(state, helpers, job) > 0:
            return j
        _work(state, 0)
        idle = 0
        while atomic_load(state + _DONE) < tasks:
            _wait(idle)
            idle += 1
    return end


def help_jobs(state: int, helper: int) -> None:
    """A helper's loop: returns when it has found nothing to do for a while."""
    asleep = state + _HELPERS + _LINE * helper
    idle = 0
    while idle < _IDLE_YIELDS and atomic_load(state + _STOP) == 0:
        if _work(state, helper + 1):
            idle = 0
        else:
            _wait(idle)
            idle += 1
    atomic_store(asleep, 1)
    # a job published before this helper said so would not wake it; the caller can do that job alone


_FUNCTIONS = (
    Function(run_jobs),
    Function(help_jobs),
)


class ThreadPool:
    """`num_threads` - 1 helper threads, started at the first parallel job, and the caller. One job at a time.

    A process that was forked has no helpers: its caller does every task itself.
    """

    def __init__(self, num_threads: int, on_compile: Callable[[], None]) -> None:
        self._state = np.zeros((6 + num_threads) * 8 + 8, np.int64)
        self._address = int(self._state.ctypes.data + _LINE - 1) // _LINE * _LINE
        self._helpers = num_threads - 1
        self._locks: list[Any] = []
        self._run_jobs, self._help_jobs = (f.build(on_compile) for f in _FUNCTIONS)

    def run(self, jobs: int, count: int, *, parallel: bool) -> None:
        """Runs `count` jobs at address `jobs`; parallel: whether helpers have a part in any. 0 < tasks < 2**31"""
        if parallel and len(self._locks) < self._helpers:
            self._start()
        done = self._run_jobs(self._address, len(self._locks), jobs, 0, count, 0)
        while done < count:
            slots = self._slots()
            for helper, lock in enumerate(self._locks):
                if slots[helper] == 2:
                    slots[helper] = 0
                    lock.release()
            done = self._run_jobs(self._address, len(self._locks), jobs, done, count, 1)

    def _slots(self) -> Any:
        first = (self._address + _HELPERS - int(self._state.ctypes.data)) // 8
        return self._state[first :: _LINE // 8]

    def _start(self) -> None:
        """Starts the helpers, asleep; they end when the pool is garbage."""
        self._slots()[: self._helpers] = 1
        for helper in range(self._helpers):
            lock = threading.Lock()
            lock.acquire()
            self._locks.append(lock)
            arguments = (self._help_jobs, self._state, self._address, helper, lock)
            threading.Thread(target=_help, args=arguments, name=f"tinyllm-{helper}", daemon=True).start()
        weakref.finalize(self, _stop, self._state, self._address, self._locks)


def _help(help_jobs: Callable[..., Any], state: Any, address: int, helper: int, lock: Any) -> None:
    """What a helper thread runs; it holds `state` so that the memory lives as long as the thread."""
    stop = (address + _STOP - int(state.ctypes.data)) // 8
    while True:
        lock.acquire()
        if state[stop]:
            return
        help_jobs(address, helper)


def _stop(state: Any, address: int, locks: list[Any]) -> None:
    state[(address + _STOP - int(state.ctypes.data)) // 8] = 1
    for lock in locks:
        if lock.locked():
            lock.release()
