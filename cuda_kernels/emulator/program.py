"""A compiled kernel: PTX text, parsed, inlined, laid out in memory and translated once, to be launched many times."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuda_kernels.emulator.checks import Checks
from cuda_kernels.emulator.emitter import Emitter, immediate
from cuda_kernels.emulator.errors import PtxError
from cuda_kernels.emulator.inline import inline_calls
from cuda_kernels.emulator.launch import run_launch
from cuda_kernels.emulator.memory import DeviceMemory
from cuda_kernels.emulator.parser import parse_modules
from cuda_kernels.emulator.ptx import Function, Module, Variable, normalised_opcode
from cuda_kernels.emulator.report import Report
from cuda_kernels.emulator.translate import Translation, translate

MAX_SHARED_NBYTES = 227 << 10  # the most that any GPU so far gives one block
MAX_LOCAL_NBYTES = 512 << 10  # per thread (CUDA C++ Programming Guide, "Technical Specifications")
MAX_GLOBAL_NBYTES = 1 << 30


class Program:
    """A kernel in PTX, ready to run on numpy.

    ptx: one text, or several to link. entry: the kernel's name; it may be left out where there is one kernel.
    Raises PtxError for PTX that is malformed or that uses something the emulator does not know.
    """

    def __init__(self, ptx: str | Sequence[str], entry: str | None = None) -> None:
        module = parse_modules([ptx] if isinstance(ptx, str) else list(ptx))
        self._function = inline_calls(module, _entry(module, entry))
        self._module_variables = module.variables
        self._lay_out()
        emitter = Emitter(dict(self._function.registers), self._symbols, self._parameter_positions())
        self.translation: Translation = translate(self._function, emitter)

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return self._function.name

    @property
    def source(self) -> str:
        """The generated numpy code."""
        return self.translation.source

    @property
    def parameters(self) -> list[Variable]:
        """The kernel's parameters."""
        return self._function.parameters

    @property
    def max_threads(self) -> int | None:
        """The most threads of a block, where the kernel says so (.maxntid, .reqntid)."""
        return self._function.max_threads

    @property
    def opcodes(self) -> set[str]:
        """The opcodes of the kernel, device functions included, as in Report.opcodes."""
        return {opcode for block in self.translation.blocks for opcode in block.opcodes}

    def launch(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Any],
        *,
        shared_nbytes: int = 0,
        memory: DeviceMemory | None = None,
        checks: Checks = Checks(),  # noqa: B008 - frozen
        abi: str = "pointers",
    ) -> Report:
        """Run the kernel.

        args: numpy arrays and scalars (a Python float for a float parameter, an int for an integer one). abi: how an
        array is passed, "pointers" as its address, "numba" as numba's array structure. An array that lies in `memory`
        is passed as it is; any other one is copied in and, where it is writable, back.
        Raises LaunchError for arguments that do not fit, and EmulatorError at the end of a launch that had problems
        unless `checks.raise_on_problem` is off.
        """
        return run_launch(self, grid, block, args, shared_nbytes, memory, checks, abi)

    def _parameter_positions(self) -> dict[str, int]:
        return {parameter.name: position for position, parameter in enumerate(self._function.parameters)}

    def _lay_out(self) -> None:
        """Addresses of all variables: within the block's shared memory, the thread's local memory, or the globals."""
        self._symbols: dict[str, tuple[str, int]] = {}
        self.global_variables: list[tuple[int, Variable]] = []
        shared = local = global_nbytes = 0
        unsized: Variable | None = None
        for variable in self._module_variables + self._function.variables:
            if variable.space == "shared" and variable.unsized:
                unsized = variable if unsized is None or variable.alignment > unsized.alignment else unsized
            elif variable.space == "shared":
                shared = _aligned(shared, variable.alignment)
                self._symbols[variable.name] = ("shared", shared)
                shared += variable.nbytes
            elif variable.space == "local":
                local = _aligned(local, variable.alignment)
                self._symbols[variable.name] = ("local", local)
                local += variable.nbytes
            elif variable.space in ("global", "const"):
                global_nbytes = _aligned(global_nbytes, max(variable.alignment, 16))
                self.global_variables.append((global_nbytes, variable))
                self._symbols[variable.name] = ("global", global_nbytes)
                global_nbytes += variable.nbytes
        if unsized is not None:
            shared = _aligned(shared, max(16, unsized.alignment))
            for variable in self._module_variables + self._function.variables:
                if variable.space == "shared" and variable.unsized:
                    self._symbols[variable.name] = ("shared", shared)
        limits = ((shared, MAX_SHARED_NBYTES, "shared"), (local, MAX_LOCAL_NBYTES, "local"))
        for nbytes, limit, space in (*limits, (global_nbytes, MAX_GLOBAL_NBYTES, "global")):
            if nbytes > limit:
                raise PtxError(f"{nbytes} bytes of {space} memory; the emulator gives {limit}")
        self.static_shared_nbytes, self.local_nbytes, self.global_nbytes = shared, local, global_nbytes

    def initial_bytes(self, variable: Variable, base: int) -> bytes:
        """The initial contents of a module variable; base: the address of the module's variables."""
        values = [word for word in re.split(r"[{},\s]+", variable.initial or "") if word]
        packed = b""
        for word in values:
            name = re.sub(r"^generic\((.*)\)$", r"\1", word)
            if name in self._symbols:
                packed += struct.pack("<Q", self._symbols[name][1] + base)
                continue
            try:
                packed += np.asarray(immediate(name, variable.dtype)).tobytes()
            except (ValueError, OverflowError) as error:
                raise PtxError(f"cannot read the initial value {word!r} of {variable.name}") from error
        return packed.ljust(variable.nbytes, b"\0")[: variable.nbytes]


def opcodes_of(ptx: str | Sequence[str]) -> set[str]:
    """The opcodes of all functions of PTX texts, as in Report.opcodes. Raises PtxError for malformed PTX."""
    module = parse_modules([ptx] if isinstance(ptx, str) else list(ptx))
    items = (item for function in module.functions.values() for item in function.code)
    return {normalised_opcode(item.opcode) for item in items if hasattr(item, "opcode")}


def _entry(module: Module, name: str | None) -> Function:
    entries = {function.name: function for function in module.functions.values() if function.entry}
    if name is not None and name in entries:
        return entries[name]
    if name is not None or len(entries) != 1:
        wanted = f"no kernel {name!r}" if name is not None else "name one kernel"
        raise PtxError(f"{wanted}; the PTX has: {', '.join(entries) or 'none'}")
    return next(iter(entries.values()))


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
