"""Facts that a measurement is worth nothing without: the machine, the versions, the model by its content."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyllm import __version__
from tinyllm.hub import MODELS, resolve

__all__ = ["OthersMeter", "cpu_name", "machine_facts", "model_facts"]


def machine_facts(num_threads: int | None) -> dict[str, Any]:
    """What timings depend on."""
    import numba
    import numpy as np

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": num_threads or cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "tinyllm": __version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def model_facts(model: str) -> dict[str, str]:
    """The model by name and by content; a folder's content is that of its files."""
    path = resolve(model)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return {"name": model.lower() if model.lower() in MODELS else path.name, "sha256": digest.hexdigest()}


class OthersMeter:
    """What share of all cores' time other processes took since it was made; timings beside busy ones say little."""

    def __init__(self) -> None:
        self._begin = _cpu_seconds()

    def share(self) -> float | None:
        """From 0 to 1; None where the system does not say. Time that a hypervisor gave to others counts too."""
        end = _cpu_seconds()
        if self._begin is None or end is None:
            return None
        total, idle, own = (after - before for before, after in zip(self._begin, end, strict=True))
        return min(1.0, max(0.0, 1 - (idle + own) / total)) if total > 0 else None


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Of all cores together: in all, idle, and of this process."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]  # user, nice, system, idle, iowait, ..., steal
        times = os.times()
        scale = 1 / os.sysconf("SC_CLK_TCK")
        return sum(ticks) * scale, (ticks[3] + ticks[4]) * scale, times.user + times.system
    except (OSError, ValueError, IndexError, AttributeError):  # not on Linux
        return None
