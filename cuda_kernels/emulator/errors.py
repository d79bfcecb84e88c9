"""Everything that can go wrong in the emulator, as one family of named errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuda_kernels.errors import CudaKernelError

if TYPE_CHECKING:
    from cuda_kernels.emulator.report import Report


class EmulatorError(CudaKernelError):
    """A PTX text, a launch or the launched program is at fault; `report` is there when a launch had begun."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class PtxError(EmulatorError):
    """The PTX text is malformed, or uses something that the emulator does not know."""


class LaunchError(EmulatorError):
    """The arguments, the grid or the block of a launch do not fit the kernel."""


class DeviceMemoryError(EmulatorError):
    """An allocation does not fit, or an array does not belong to the device memory it was handed to."""
