"""What the CPU is that kernels are compiled for, without LLVM where the operating system says it.

NUMBA_CPU_NAME and NUMBA_CPU_FEATURES (say "x86-64-v3" and "+avx2,+fma,+f16c") make numba compile for another one;
then the kernels take the forms of that one too.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

__all__ = ["HostCPU", "host_cpu"]

# Of /proc/cpuinfo, on x86 and on ARM: all that what the CPU can run depends on.
_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags")
_ARM_FIELDS = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features")
_MAX_CHARS = 1 << 16  # of the first of its CPUs


@dataclass(frozen=True)
class HostCPU:
    """What is asked of a CPU.

    Attributes:
        identity: the same for CPUs that the same machine code suits.
        features: by LLVM's names without punctuation ("amxint8"), with which the operating system's agree.
    """

    identity: str
    features: frozenset[str]

    def has(self, feature: str) -> bool:
        return feature in self.features


def _plain(feature: str) -> str:
    return feature.replace("_", "").replace("-", "")


@cache
def host_cpu() -> HostCPU:
    return _from_settings() or _from_proc() or _from_llvm()


def _from_settings() -> HostCPU | None:
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is None:
        return None
    name = os.environ.get("NUMBA_CPU_NAME", "")
    present = [feature[1:] for feature in chosen.split(",") if feature.startswith("+")]
    return HostCPU(f"{name}\n{chosen}", frozenset(map(_plain, present)))


def _from_proc() -> HostCPU | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(_MAX_CHARS).partition("\n\n")[0]
    except OSError:
        return None
    lines = (line.partition(":") for line in first.split("\n"))
    fields = {name.strip(): value.strip() for name, _, value in lines}
    features = fields.get("flags") or fields.get("Features")
    if features is None:
        return None
    known = [fields.get(name, "") for name in (*_FIELDS, *_ARM_FIELDS)]
    return HostCPU("\n".join([platform.machine(), *known]), frozenset(map(_plain, features.split())))


def _from_llvm() -> HostCPU:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    identity = "\n".join([llvm.get_process_triple(), llvm.get_host_cpu_name(), features.flatten()])
    return HostCPU(identity, frozenset(_plain(name) for name, present in features.items() if present))
