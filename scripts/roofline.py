"""The two limits of a machine, measured: reading memory, and fused multiply-adds. The time that a step cannot beat.

S. Williams, A. Waterman, D. Patterson: Roofline, an insightful visual performance model (CACM 52, 2009).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.jit import kernel
from tinyllm.backends.cpu_kernels.simd import (
    LANES,
    Builder,
    Value,
    const,
    emit_fma,
    emit_loop,
    instruction,
    lane_sum,
    splat,
    store_f32,
    vec,
)
from tinyllm.backends.cpu_limits import ReadMeter, run_seconds

__all__ = ["LimitMeter", "Limits", "measure_fma"]

STEPS = 1 << 17  # of each chain in one task: some tenths of a millisecond
TASKS_PER_THREAD = 8


def chains(count: int) -> Callable[[int, Any, Any], Any]:
    """(steps, x, y): so many accumulators in registers, each with a chain of `steps` fused multiply-adds."""

    @instruction(vec, types.int64, vec, vec)
    def run(b: Builder, steps: Value, x: Value, y: Value) -> Value:
        def step(_: Value, accs: list[Value]) -> list[Value]:
            return [emit_fma(b, acc, x, y) for acc in accs]

        starts = [x]
        while len(starts) < count:
            starts.append(b.fadd(starts[-1], x))  # different ones, else they would be one
        total, *others = emit_loop(b, const(0), steps, 1, starts, step)
        for one in others:
            total = b.fadd(total, one)
        return total

    return run


six_chains, twelve_chains = chains(6), chains(12)


@kernel
def six(worker: int, begin: int, end: int, steps: int, x: float, y: float, out: int) -> None:
    """Twelve registers where one holds 8 lanes, as many as fit there."""
    for task in range(begin, end):
        store_f32(out + 4 * task, lane_sum(six_chains(steps, splat(x), splat(y))))


@kernel
def twelve(worker: int, begin: int, end: int, steps: int, x: float, y: float, out: int) -> None:
    """Twelve registers where one holds 16 lanes: enough for two units of a latency of 5."""
    for task in range(begin, end):
        store_f32(out + 4 * task, lane_sum(twelve_chains(steps, splat(x), splat(y))))


def measure_fma(backend: CpuBackend, passes: int) -> float:
    """float32 multiply-adds per second with all threads, in the best of some passes."""
    tasks = TASKS_PER_THREAD * backend.num_threads
    out = np.zeros(tasks, np.float32)
    rates = []
    for count, one in ((6, six), (12, twelve)):
        work = tasks * STEPS * count * LANES
        for number in range(passes + 1):
            seconds = run_seconds(backend, one, tasks, STEPS, 0.5, 1.0, out.ctypes.data)
            if number:  # the first may have compiled
                rates.append(work / seconds)
        assert (out == 2 * count * LANES).all()  # acc = acc / 2 + 1 tends to 2
    return max(rates)


@dataclass(frozen=True)
class Limits:
    """What a machine does at most in a second.

    Attributes:
        read: bytes from memory.
        reread: bytes from as much memory as a step reads, again and again, so that caches may hold some of it.
        fma: multiply-adds in float32.
    """

    read: float
    reread: float
    fma: float

    def memory_seconds(self, nbytes: int) -> float:
        return nbytes / self.read

    def compute_seconds(self, multiply_adds: int) -> float:
        return multiply_adds / self.fma

    def seconds(self, nbytes: int, multiply_adds: int) -> float:
        """The roofline: the time of the limit that is met first."""
        return max(self.memory_seconds(nbytes), self.compute_seconds(multiply_adds))


@dataclass
class LimitMeter:
    """Measures the limits again whenever asked to, so that they are taken beside what is compared with them.

    Attributes:
        read_nbytes: of the buffer; None is the default of ReadMeter, far more than the caches hold.
        reread_nbytes: how much a step reads.
        rounds: the best of each round.
    """

    backend: CpuBackend
    reread_nbytes: int
    read_nbytes: int | None = None
    passes: int = 4
    rounds: list[Limits] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read = ReadMeter(self.backend, self.read_nbytes)
        self._reread = ReadMeter(self.backend, self.reread_nbytes)

    def measure(self) -> None:
        read, reread = self._read.measure(self.passes), self._reread.measure(4 * self.passes)
        self.rounds.append(Limits(read, reread, measure_fma(self.backend, 4 * self.passes)))

    def best(self) -> Limits:
        """Of all rounds: a limit is what the machine can do, not what others left of it."""
        return Limits(*(max(getattr(one, name) for one in self.rounds) for name in ("read", "reread", "fma")))

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"read_nbytes": self._read.nbytes, "reread_nbytes": self._reread.nbytes}
        for name in ("read", "reread", "fma"):
            values = [getattr(one, name) for one in self.rounds]
            facts[f"{name}_per_s"] = {
                "best": round(max(values)),
                "median_of_rounds": round(statistics.median(values)),
                "least_of_rounds": round(min(values)),
            }
        return facts
