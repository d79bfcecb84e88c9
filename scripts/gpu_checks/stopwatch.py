"""Timing with CUDA events: medians of graph replays, and the ceilings of the device at hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuda_kernels.gpu import GpuRuntime
from cuda_kernels.roofline import Ceilings

__all__ = ["measure_ceilings", "time_launches", "time_torch"]

REPLAYS = 11
GRAPH_SECONDS = 5e-3  # a replay should take about this long, so that its own launch does not count
MAX_LAUNCHES = 400

Timer = Callable[[Callable[[], Any]], float]  # seconds on the device of what a function launches


def _median(seconds_of: Timer, run: Callable[[], Any], count: int, replays: int) -> float:
    """Median seconds of one of the `count` launches of a run."""
    return statistics.median(seconds_of(run) / count for _ in range(replays))


def _event_timer(rt: GpuRuntime) -> Timer:
    """Seconds on the device of what a function puts on the runtime's stream."""

    def seconds_of(run: Callable[[], Any]) -> float:
        begin, end = rt.xp.cuda.Event(), rt.xp.cuda.Event()
        begin.record(rt.stream)
        run()
        end.record(rt.stream)
        end.synchronize()
        return float(rt.xp.cuda.get_elapsed_time(begin, end)) * 1e-3

    return seconds_of


def _torch_timer(torch: Any) -> Timer:
    """The same for PyTorch's current stream."""

    def seconds_of(run: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return seconds_of


def _repeats(seconds: float, count: int) -> int:
    return max(1, min(int(GRAPH_SECONDS / max(seconds * count, 1e-9)), MAX_LAUNCHES // count))


def _replays(seconds: float) -> int:
    return 5 if seconds > 0.02 else REPLAYS


def time_launches(rt: GpuRuntime, launches: Sequence[Callable[[], None]]) -> float:
    """Median seconds of a launch, all of them captured in one graph as often as fills some milliseconds."""

    def run_all() -> None:
        for launch in launches:
            launch()

    run_all()
    rt.synchronize()
    timer = _event_timer(rt)
    first = _median(timer, run_all, len(launches), 3)
    repeats = _repeats(first, len(launches))

    def run_often() -> None:
        for _ in range(repeats):
            run_all()

    graph = rt.capture(run_often)
    graph.launch()
    rt.synchronize()
    return _median(timer, graph.launch, len(launches) * repeats, _replays(first))


def time_torch(make: Callable[[], Sequence[Callable[[], Any]]]) -> float:
    """The same for PyTorch's calls, in a graph too where they can be captured."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches = make()  # here, because a backward pass runs on its forward pass's stream
        for _ in range(3):
            for launch in launches:
                launch()
        stream.synchronize()

        def run_all() -> None:
            for launch in launches:
                launch()

        timer = _torch_timer(torch)
        first = _median(timer, run_all, len(launches), 3)
        repeats = _repeats(first, len(launches))
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(repeats):
                    run_all()
            run: Callable[[], Any] = graph.replay
        except Exception:  # whatever cannot be captured is timed as it is launched
            torch.cuda.synchronize()
            run, repeats = run_all, 1
        run()
        stream.synchronize()
        return _median(timer, run, len(launches) * repeats, _replays(first))


def measure_ceilings(rt: GpuRuntime) -> Ceilings:
    """What this device reaches: a copy's bytes, read and written, and cuBLAS's products of large matrices."""
    return Ceilings(_copy_bandwidth(rt), _gemm_flops(rt, "float16", 8192), _gemm_flops(rt, "float32", 4096))


def _copy_bandwidth(rt: GpuRuntime) -> float:
    nbytes = 1 << 30
    source, target = rt.empty(nbytes, np.uint8), rt.empty(nbytes, np.uint8)
    rt.fill(source, 0x5A)

    def copy() -> None:
        target.data.copy_from_device_async(source.data, nbytes, rt.stream)

    copy()
    return 2 * nbytes / _median(_event_timer(rt), copy, 1, REPLAYS)


def _gemm_flops(rt: GpuRuntime, dtype: str, size: int) -> float:
    values = np.random.default_rng(1).standard_normal(1 << 20, np.float32).astype(dtype)
    a = rt.from_host(np.resize(values, (size, size)))
    out = rt.empty((size, size), dtype)

    def multiply() -> None:
        with rt.stream:
            for _ in range(4):
                rt.xp.matmul(a, a, out=out)

    multiply()
    rt.synchronize()
    return 2 * size**3 / _median(_event_timer(rt), multiply, 4, 5)
