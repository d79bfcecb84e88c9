"""All kernels of the package: a family is a module here that defines `kernels_for_report() -> list[Kernel]`.

A family may add, for its kernels as the report is to show them:

- `shared_nbytes_of(kernel) -> int`: dynamic shared memory of a block, 0 where it has none;
- `work_of(kernel) -> roofline.TileWork`: operations and bytes of one block's tile.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from cuda_kernels.kernel import Kernel
from cuda_kernels.roofline import TileWork
from cuda_kernels.tile_work import attention_work, linear_work

__all__ = ["all_kernels", "families", "shared_nbytes_of", "work_of"]

_TILE_WORK: dict[str, Callable[[Kernel], TileWork | None]] = {
    "linear": linear_work,
    "paged_attention_f32": attention_work,
    "paged_attention_mma": attention_work,
}


def _modules() -> dict[str, ModuleType]:
    folder = Path(__file__).parent
    found = {}
    for info in pkgutil.iter_modules([str(folder)]):
        if not info.ispkg and "\ndef kernels_for_report(" in (folder / f"{info.name}.py").read_text():
            found[info.name] = importlib.import_module(f"{__package__}.{info.name}")
    return found


def families() -> dict[str, Callable[[], list[Kernel]]]:
    """Each family's listing, by module name."""
    return {name: module.kernels_for_report for name, module in _modules().items()}


def all_kernels(family: str | None = None) -> dict[Kernel, str]:
    """Every kernel, or one family's, with the family that lists it first."""
    kernels: dict[Kernel, str] = {}
    for name, listing in families().items():
        if family in (None, name):
            for kernel in listing():
                kernels.setdefault(kernel, name)
    return kernels


def shared_nbytes_of(family: str, kernel: Kernel) -> int:
    """Dynamic shared memory of a block, as far as the family says."""
    hook = getattr(_modules()[family], "shared_nbytes_of", None)
    return int(hook(kernel)) if hook is not None else 0


def work_of(family: str, kernel: Kernel) -> TileWork | None:
    """Operations and bytes of a block's tile, where the family or tile_work says."""
    hook = getattr(_modules()[family], "work_of", None) or _TILE_WORK.get(family)
    return hook(kernel) if hook is not None else None
