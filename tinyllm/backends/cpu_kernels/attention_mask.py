"""Which keys a query sees: `attention.py` draws it."""

from __future__ import annotations

from tinyllm.backends.cpu_kernels.jit import device

__all__ = ["lowest_key", "seen"]


@device
def lowest_key(position: int, window: int, sinks: int) -> int:
    """The first key that a query sees, the sinks' part left aside. It never decreases with the position."""
    return position - window + 1 if position >= sinks + window else 0


@device
def seen(position: int, tile: int, end: int, window: int, sinks: int) -> tuple[int, int]:
    """(first, end): the keys that a query sees of those from `tile` to `end`; none where first >= end."""
    return max(tile, lowest_key(position, window, sinks)), min(end, position + 1)
