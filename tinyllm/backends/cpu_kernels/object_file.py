"""Loads the object files of compiled kernels: by itself on x86-64 Linux, elsewhere with LLVM.

An object file (ELF64) holds sections of code and constants and a list of relocations: places that need the address of
a symbol. Sections are copied one after another into memory of this process, the relocations are filled in, and the
memory is made executable. References to other libraries (logf) are looked up in this process.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
from functools import cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["load_object"]

_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")

_X86_64 = 62
_RELOCATABLE = 1
_SYMBOLS, _RELOCATIONS, _NO_BITS = 2, 4, 8  # types of sections
_ALLOCATED = 2  # a section's flag
_UNDEFINED, _ABSOLUTE, _COMMON = 0, 0xFFF1, 0xFFF2  # where a symbol is, beside the numbers of sections
_ABS64, _PC32, _PLT32, _PC64 = 1, 2, 4, 24  # kinds of relocations
_LOADED: list[Any] = []  # what must live as long as the process


class _UnsupportedError(Exception):
    """The object file needs LLVM to load it."""


def load_object(content: bytes, entry: str) -> int:
    """Loads an object file for the life of the process; returns the address of its function `entry`.

    The file is trusted: it is code to be run. Raises OSError where it cannot be loaded.
    """
    if sys.platform == "linux" and platform.machine() == "x86_64":
        try:
            return _load_elf(content, entry)
        except (_UnsupportedError, OSError):
            pass  # a security policy may forbid it
    return _load_with_llvm(content, entry)


# ---- ELF


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    item_size: int


def _load_elf(content: bytes, entry: str) -> int:
    header = _HEADER.unpack_from(content)
    if content[:6] != b"\x7fELF\x02\x01" or header[:2] != (_RELOCATABLE, _X86_64):
        raise _UnsupportedError
    sections = [_Section(*_SECTION.unpack_from(content, header[5] + i * _SECTION.size)) for i in range(header[11])]
    symbols = next(s for s in sections if s.kind == _SYMBOLS)
    names = sections[symbols.link].offset

    placed: dict[int, int] = {}  # where each section begins in the memory
    size = 0
    for index, section in enumerate(sections):
        if section.flags & _ALLOCATED:
            size = -(-size // max(section.align, 1)) * max(section.align, 1)
            placed[index] = size
            size += section.size

    table: list[tuple[str, int, int]] = []  # of symbols: name, section, value
    for name, _, _, index, value, nbytes in _SYMBOL.iter_unpack(content[symbols.offset :][: symbols.size]):
        text = content[names + name : content.index(0, names + name)].decode()
        if index == _COMMON:  # value is the alignment; numba's handles of functions' environments, which stay zero
            value, size = -(-size // value) * value, -(-size // value) * value + nbytes
        table.append((text, index, value))

    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = int(np.frombuffer(mapping, np.uint8).ctypes.data)
    for index, at in placed.items():
        section = sections[index]
        if section.kind != _NO_BITS:
            mapping[at : at + section.size] = content[section.offset : section.offset + section.size]

    def address(symbol: int) -> int:
        text, index, value = table[symbol]
        if index == _UNDEFINED:
            return _address_in_process(text)
        if index == _COMMON:
            return base + value
        if index == _ABSOLUTE or index not in placed:
            raise _UnsupportedError
        return base + placed[index] + value

    for section in sections:
        if section.kind == _RELOCATIONS and section.info in placed:
            entries = content[section.offset :][: section.size]
            for offset, info, addend in _RELOCATION.iter_unpack(entries):
                at = placed[section.info] + offset
                _relocate(mapping, at, base + at, info & 0xFFFFFFFF, address(info >> 32) + addend)

    start = next(i for i, symbol in enumerate(table) if symbol[0] == entry)
    _make_executable(base, size)
    _LOADED.append(mapping)
    return address(start)


def _relocate(mapping: mmap.mmap, at: int, place: int, kind: int, target: int) -> None:
    if kind == _ABS64:
        struct.pack_into("<Q", mapping, at, target)
    elif kind == _PC64:
        struct.pack_into("<q", mapping, at, target - place)
    elif kind in (_PC32, _PLT32) and -(1 << 31) <= target - place < 1 << 31:
        struct.pack_into("<i", mapping, at, target - place)
    else:
        raise _UnsupportedError


@cache
def _process() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _address_in_process(name: str) -> int:
    try:
        return ctypes.cast(getattr(_process(), name), ctypes.c_void_p).value or 0
    except AttributeError:
        raise _UnsupportedError from None


def _make_executable(address: int, size: int) -> None:
    read_and_execute = mmap.PROT_READ | mmap.PROT_EXEC
    if _process().mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), read_and_execute):
        raise OSError(ctypes.get_errno(), "mprotect")


# ---- LLVM


def _load_with_llvm(content: bytes, entry: str) -> int:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    try:
        engine.add_object_file(llvm.ObjectFileRef.from_data(content))
        engine.finalize_object()
    except RuntimeError as error:
        raise OSError(f"a compiled kernel cannot be loaded: {error}") from error
    _LOADED.append(engine)
    address = engine.get_function_address(entry)
    if not address:
        raise OSError(f"a compiled kernel has no {entry}")
    return int(address)
