"""Backends: one implementation of the ops per device."""

from __future__ import annotations

from tinyllm.backends.base import Backend
from tinyllm.errors import DeviceError

__all__ = ["DEVICES", "create_backend"]

DEVICES = ("auto", "cpu", "reference")


def create_backend(device: str = "auto", num_threads: int | None = None) -> Backend:
    """The backend for a device name. Imports nothing of the others. Raises DeviceError."""
    if device in ("auto", "cpu"):
        from tinyllm.backends.cpu import CpuBackend

        return CpuBackend(num_threads=num_threads)
    if device == "reference":
        from tinyllm.backends.reference import ReferenceBackend

        return ReferenceBackend()
    raise DeviceError(f"unknown device {device!r}; the devices are {', '.join(DEVICES)}")
