"""Backends: one implementation of the ops per device."""

from __future__ import annotations

from collections.abc import Callable

from tinyllm.backends.base import Backend
from tinyllm.errors import DeviceError

__all__ = ["DEVICES", "create_backend"]

DEVICES = ("auto", "cpu", "reference")


def create_backend(
    device: str = "auto", num_threads: int | None = None, *, on_event: Callable[[str], None] | None = None
) -> Backend:
    """The backend for a device name, importing none of the others.

    Args:
        num_threads: CPU threads to use; None means all that this process may.
        on_event: receives one-line notices, e.g. that kernels are being compiled.

    Raises:
        DeviceError: there is no such device.
    """
    if device in ("auto", "cpu"):
        from tinyllm.backends.cpu import CpuBackend

        return CpuBackend(num_threads=num_threads, on_compile=on_event)
    if device == "reference":
        from tinyllm.backends.reference import ReferenceBackend

        return ReferenceBackend()
    raise DeviceError(f"unknown device {device!r}; the devices are {', '.join(DEVICES)}")
