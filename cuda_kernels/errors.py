"""What can go wrong with kernels, by name."""

from __future__ import annotations

__all__ = ["CudaKernelError", "KernelArgumentError", "KernelCompileError", "NoDeviceError", "ToolMissingError"]


class CudaKernelError(Exception):
    """Whatever this package raises on purpose."""


class KernelArgumentError(CudaKernelError):
    """An array or number that a kernel cannot take."""


class KernelCompileError(CudaKernelError):
    """A kernel could not be compiled, or its machine code not loaded."""


class ToolMissingError(CudaKernelError):
    """A library or program that comes with an extra is not installed."""


class NoDeviceError(CudaKernelError):
    """There is no GPU, or no driver for it."""
