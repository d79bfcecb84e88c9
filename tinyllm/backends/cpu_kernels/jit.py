"""Compiles the kernels and caches them on disk.

A kernel is a function `f(worker, begin, end, *arguments)` that does the tasks begin <= task < end. Its arguments are
8-byte slots in memory (integers, addresses as integers, or doubles), so that `threads.py` can run any kernel.

The cache lies in the user's cache folder, in a folder named by a digest of these sources, of numba's version and of
the CPU: an edit anywhere in this package invalidates every kernel. It holds object files, which are loaded without
numba and, on x86-64 Linux, without LLVM: both are imported only to compile what is not there.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from tinyllm.backends.cpu_kernels.deferred import Deferred
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.object_file import load_object
from tinyllm.backends.cpu_kernels.simd import load_arguments
from tinyllm.cache import cache_root

__all__ = ["Function", "Kernel", "address_of", "cache_folder", "called", "device", "kernel"]

F = TypeVar("F", bound=Callable[..., Any])

_SLOT = {"int": "q", "float": "d"}  # struct codes of the arguments' slots
_TASK_ARGUMENTS = 4  # params, worker, begin, end
_ENTRY = "tinyllm_entry"
_UNUSED_SECONDS = 30 * 24 * 3600  # folders of older sources go after this long without use


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    from numba import njit

    return njit(error_model="numpy", **options)(function)


def device(function: F) -> F:
    """A function that kernels call; it is inlined into them."""
    options = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(F, Deferred(lambda: _jit(function, **options)))


def called(function: F) -> F:
    """A function that kernels call, compiled once for all places that do: for what would be long to inline."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(F, Deferred(lambda: _jit(function, **options)))


# ---- the cache


def _version_of(package: str) -> bytes:
    """What names a package's version, without importing it."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("_version.py").read_bytes()


@cache
def cache_folder() -> Path:
    """Where this version's compiled kernels lie. See tinyllm.cache."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    versions = (_version_of("numba"), _version_of("llvmlite"), sys.implementation.cache_tag)
    digest.update(repr((versions, settings, host_cpu().identity)).encode())
    return cache_root() / "kernels" / digest.hexdigest()[:24]


def _remove_unused_folders(parent: Path) -> None:
    for folder in parent.iterdir():
        if folder.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _read(name: str) -> bytes | None:
    """A cached object file; None where it is absent, cut short or altered."""
    try:
        content = (cache_folder() / f"{name}.bin").read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _write(name: str, content: bytes) -> None:
    """A SHA-256 of the rest, then the object file. A folder that cannot be written is no error."""
    path = cache_folder() / f"{name}.bin"
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            _remove_unused_folders(path.parent.parent)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder, path.name)
            written.write_bytes(hashlib.sha256(content).digest() + content)
            written.replace(path)
    except OSError:
        return


def _build(
    name: str, function: Callable[[], Callable[..., Any]], arguments: int, on_compile: Callable[[], None]
) -> int:
    """The address of a function of int64 arguments, from the cache or compiled after a call of on_compile."""
    content = _read(name)
    if content is not None:
        try:
            return load_object(content, _ENTRY)
        except OSError:
            pass
    on_compile()
    from tinyllm.backends.cpu_kernels.compiling import compile_object

    content, address = compile_object(function(), arguments, _ENTRY)
    _write(name, content)
    return address


# ---- kernels


class Kernel:
    """A kernel that is compiled, or loaded from the cache, at its first use.

    Attributes:
        address: the compiled function's address; 0 before `build`.
        pack_into: writes the arguments into their slots: struct.Struct.pack_into.
    """

    def __init__(self, name: str, function: Callable[..., None]) -> None:
        parameters = list(inspect.signature(function).parameters.values())[3:]
        self._slots = "".join(_SLOT[str(p.annotation)] for p in parameters)
        self._function = function
        self.name = name
        self.address = 0
        self.pack_into = struct.Struct(self._slots).pack_into
        self._building = threading.Lock()  # several backends may meet at a kernel's first use

    def build(self, on_compile: Callable[[], None]) -> None:
        """Loads or compiles the kernel; calls on_compile before it compiles."""
        with self._building:
            if self.address == 0:
                self.address = _build(self.name, self._task, _TASK_ARGUMENTS, on_compile)

    def _task(self) -> Callable[..., None]:
        """What is compiled: takes the arguments out of their slots."""
        body = _jit(self._function, inline="always")
        # The body is inlined before it is compiled, which numba cannot do through body(..., *arguments): a quarter
        # of the time that compiling takes.
        passed = "".join(f", arguments[{i}]" for i in range(len(self._slots)))
        scope: dict[str, Any] = {"body": body, "slots": self._slots, "load_arguments": load_arguments}
        source = f"""def task(params, worker, begin, end):
            arguments = load_arguments(params, slots)
            body(worker, begin, end{passed})"""
        exec(source, scope)
        task: Callable[..., None] = scope["task"]
        return task


def kernel(function: Callable[..., None]) -> Kernel:
    """Decorator: a Kernel named after the function and its module.

    The parameters are (worker, begin, end) and then the arguments, each annotated int or float.
    """
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    source = Path(inspect.getfile(function))
    if source.parent != Path(__file__).parent:  # the cache folder's name says nothing of that file
        name += "-" + hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    return Kernel(name, function)


# ---- functions called from Python


class Function:
    """A function of int64 arguments that returns one or nothing, as annotated; it is called without the GIL.

    It is compiled, or loaded from the cache, by `build`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._arguments = len(inspect.signature(function).parameters)
        self._returns = str(inspect.signature(function).return_annotation) != "None"
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._building = threading.Lock()
        self._compiled: Callable[..., Any] | None = None

    def build(self, on_compile: Callable[[], None]) -> Callable[..., Any]:
        """The compiled function."""
        with self._building:
            if self._compiled is None:
                address = _build(self._name, lambda: self._function, self._arguments, on_compile)
                result = ctypes.c_int64 if self._returns else None
                self._compiled = ctypes.CFUNCTYPE(result, *(ctypes.c_int64,) * self._arguments)(address)
            return self._compiled


# ---- addresses of arrays

_DATA = object.__basicsize__  # where numpy's arrays hold the address of their data: their first field
_read_address = ctypes.c_int64.from_address


def _address_of(array: np.ndarray[Any, Any]) -> int:
    return _read_address(id(array) + _DATA).value


class _AddressOf:
    """The address of an array's first element, in a fifth of the time that array.ctypes.data takes."""

    def build(self, _on_compile: Callable[[], None]) -> Callable[[np.ndarray[Any, Any]], int]:
        return _address_of


address_of = _AddressOf()
