"""Runs items one after another, in a process of its own: a kernel that faults or hangs takes only this one with it.

    device  {"device": facts}                first of all
    start   {"start": id}                    before each item, so that it is known what was running
    result  {"id": id, "seconds": ..., ...}  a check's error and bound, a timing's figures, or what went wrong

One JSON text a line. The process leaves with status FAULTED when the device cannot be used any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from cuda_kernels.gpu import GpuRuntime
from cuda_kernels.launch import Runtime
from cuda_kernels.roofline import Ceilings, TileWork
from gpu_checks import draws, flash, linear, paged, rows
from gpu_checks.suite import Check, Context, Prepared, Timing

__all__ = ["CEILINGS", "FAULTED", "all_items", "device_facts", "floor_seconds", "run_items"]

CEILINGS = "ceilings"  # an item too: the device's own figures
FAULTED = 3
_PARTS = (paged, linear, flash, draws, rows)

Item = Check | Timing
Say = Callable[[dict[str, Any]], None]


def all_items() -> dict[str, Item]:
    """Every check, then every timing, by id."""
    checks: list[Item] = [check for part in _PARTS for check in part.checks()]
    timings: list[Item] = [timing for part in _PARTS for timing in part.timings()]
    return {item.id: item for item in checks + timings}


def run_items(rt: Runtime, ids: Iterable[str], say: Say, *, small: bool, quick: bool, deadline: float) -> int:
    """Runs items by id and reports on each. Returns the exit status."""
    items, context = all_items(), Context(rt, np.random.default_rng(7), small=small, quick=quick)
    if isinstance(rt, GpuRuntime):
        context.l2_nbytes = int(rt.device.attributes["L2CacheSize"])
    for id_ in ids:
        say({"start": id_})
        begin = time.monotonic()
        # Each item starts from the same random numbers, whatever ran before it.
        fresh = replace(context, rng=np.random.default_rng([7, *id_.encode()]))
        try:
            result = _run(fresh, id_, items.get(id_), begin > deadline)
        except ImportError as error:
            result = {"missing": _line(error)}
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {_line(error)}"}
        say({"id": id_, "seconds": time.monotonic() - begin, **result})
        if not _is_alive(rt):
            return FAULTED
    return 0


def _run(context: Context, id_: str, item: Item | None, late: bool) -> dict[str, Any]:
    if late:
        return {"failed": "no time was left for it"}
    if id_ == CEILINGS:
        return _measure(context.rt)
    if isinstance(item, Check):
        outcome = item.run(context)
        return {"error": outcome.error, "bound": outcome.bound, "passed": bool(outcome.passed)}
    if isinstance(item, Timing):
        return _time(context, item.prepare(context))
    return {"failed": "there is no such item"}


def _measure(rt: Runtime) -> dict[str, Any]:
    from gpu_checks.stopwatch import measure_ceilings

    assert isinstance(rt, GpuRuntime)
    ceilings = measure_ceilings(rt)
    _free(rt)
    return {
        "bandwidth": ceilings.bandwidth,
        "tensor_flops": ceilings.tensor_flops,
        "f32_flops": ceilings.f32_flops,
    }


def _time(context: Context, prepared: Prepared) -> dict[str, Any]:
    from gpu_checks.stopwatch import time_launches, time_torch

    rt = context.rt
    assert isinstance(rt, GpuRuntime)
    result: dict[str, Any] = {
        "time": time_launches(rt, prepared.launches),
        "flop": prepared.work.flop,
        "nbytes": prepared.work.nbytes,
        "tensor": prepared.work.tensor,
        "rivals": {},
    }
    for name, make in prepared.rivals.items() if find_spec("torch") is not None else ():
        try:
            result["rivals"][name] = time_torch(make)
        except ImportError:
            continue  # it is not installed
        except Exception as error:
            result["rivals"][name] = f"{type(error).__name__}: {_line(error)}"[:120]
    _free(rt)
    return result


def _free(rt: GpuRuntime) -> None:
    """Gives memory back: PyTorch and CuPy keep pools of their own."""
    rt.synchronize()
    rt.xp.get_default_memory_pool().free_all_blocks()
    if find_spec("torch") is not None:
        import torch

        torch.cuda.empty_cache()


def _is_alive(rt: Runtime) -> bool:
    """After an illegal access nothing works any more in the process."""
    if not isinstance(rt, GpuRuntime):
        return True
    try:
        rt.synchronize()
        rt.download(rt.from_host(np.zeros(1, np.float32)))
    except Exception:
        return False
    return True


def device_facts(rt: Runtime) -> dict[str, Any]:
    """What a result depends on."""
    if not isinstance(rt, GpuRuntime):
        return {"device": rt.name}
    properties = rt.xp.cuda.runtime.getDeviceProperties(rt.device.id)
    return {
        "device": properties["name"].decode(),
        "architecture": rt.architecture,
        "multiprocessors": rt.num_multiprocessors,
        "driver": rt.xp.cuda.runtime.driverGetVersion(),
        "cupy": rt.xp.__version__,
    }


def floor_seconds(ceilings: Ceilings, result: dict[str, Any]) -> float:
    """The roofline's bound of a timing's work."""
    return ceilings.floor_seconds(TileWork(result["flop"], result["nbytes"], result["tensor"]))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300]
