"""Runs compiled PTX on the CPU with numpy, and checks it while it runs. docs/emulator.md tells what it covers."""

from cuda_kernels.emulator.checks import Checks
from cuda_kernels.emulator.errors import DeviceMemoryError, EmulatorError, LaunchError, PtxError
from cuda_kernels.emulator.memory import DeviceMemory
from cuda_kernels.emulator.program import Program, opcodes_of
from cuda_kernels.emulator.report import Problem, Report

__all__ = [
    "Checks",
    "DeviceMemory",
    "DeviceMemoryError",
    "EmulatorError",
    "LaunchError",
    "Problem",
    "Program",
    "PtxError",
    "Report",
    "opcodes_of",
]
