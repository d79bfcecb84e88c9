"""Compiles the kernels and caches them on disk.

A kernel is a function `f(worker, begin, end, *arguments)` that does the tasks begin <= task < end. Its arguments are
8-byte slots in memory (integers, addresses as integers, or doubles), so that `threads.py` can run any kernel.

The cache lies in the user's cache folder, in a folder named by a digest of these sources, of numba's version and of
the CPU: an edit anywhere in this package invalidates every kernel. Numba's own cache only looks at the file that
defines a function, not at the intrinsics it calls, and wants a writable source folder.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from numba import njit, types
from numba.core import compiler
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from tinyllm.backends.cpu_kernels.simd import load_arguments
from tinyllm.cache import cache_root

__all__ = ["Function", "Kernel", "address_of", "cache_folder", "device", "kernel"]

F = TypeVar("F", bound=Callable[..., Any])

_SLOT = {"int": "q", "float": "d"}  # struct codes of the arguments' slots
_TASK = types.void(types.intp, types.intp, types.intp, types.intp)  # params, worker, begin, end
_UNUSED_SECONDS = 30 * 24 * 3600  # folders of older sources go after this long without use


def device(function: F) -> F:
    """A function that kernels call; it is inlined into them."""
    options = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled: F = njit(error_model="numpy", **options)(function)
    return compiled


# ---- the cache


@cache
def cache_folder() -> Path:
    """Where this version's compiled kernels lie. See tinyllm.cache."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    versions = (numba.__version__, llvmlite.__version__, sys.implementation.cache_tag)
    digest.update(repr((versions, cpu_target.target_context.codegen().magic_tuple())).encode())
    return cache_root() / "kernels" / digest.hexdigest()[:24]


def _remove_unused_folders(parent: Path) -> None:
    for folder in parent.iterdir():
        if folder.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


class _DiskCache(NullCache):  # type: ignore[misc]
    """One file per compiled signature: a SHA-256 of the rest, then numba's pickled compile result.

    A function whose file is absent, cut short or altered is compiled, after a call of `on_compile`. A folder that
    cannot be written is no error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.on_compile: Callable[[], None] = lambda: None

    def path(self, signature: Any) -> Path:
        overload = hashlib.sha256(str(signature).encode()).hexdigest()[:8]
        return cache_folder() / f"{self._name}-{overload}.bin"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)  # of numba's library, all that compiled code calls
        try:
            content = self.path(sig).read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                return compiler.CompileResult._rebuild(target_context, *pickle.loads(content[32:]))
        except OSError:
            pass
        self.on_compile()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        assert not data.library.has_dynamic_globals, f"{self._name} holds an address of this process"
        content = dumps(data._reduce())
        path = self.path(sig)
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


# ---- kernels


class Kernel:
    """A kernel that is compiled, or loaded from the cache, at its first use.

    Attributes:
        address: the compiled function's address; 0 before `build`.
        pack_into: writes the arguments into their slots: struct.Struct.pack_into.
    """

    def __init__(self, name: str, function: Callable[..., None]) -> None:
        parameters = list(inspect.signature(function).parameters.values())[3:]
        slots = "".join(_SLOT[str(p.annotation)] for p in parameters)
        body = njit(error_model="numpy", inline="always")(function)

        # The body is inlined before it is compiled, which numba cannot do through body(..., *arguments): a quarter
        # of the time that compiling takes.
        passed = "".join(f", arguments[{i}]" for i in range(len(slots)))
        # The cached function finds its globals in the module that its scope names.
        scope: dict[str, Any] = {"__name__": function.__module__, "body": body, "slots": slots}
        scope["load_arguments"] = load_arguments
        source = f"""def task(params, worker, begin, end):
            arguments = load_arguments(params, slots)
            body(worker, begin, end{passed})"""
        exec(source, scope)

        self.name = name
        self.address = 0
        self.pack_into = struct.Struct(slots).pack_into
        self._building = threading.Lock()  # several backends may meet at a kernel's first use
        self._cache = _DiskCache(name)
        self._compiled = CFunc(scope["task"], (_TASK.args, _TASK.return_type), {}, {"error_model": "numpy"})
        self._compiled._cache = self._cache  # type: ignore[attr-defined]

    def build(self, on_compile: Callable[[], None]) -> None:
        """Loads or compiles the kernel; calls on_compile before it compiles."""
        with self._building:
            self._cache.on_compile = on_compile
            self._compiled.compile()
            self.address = int(self._compiled.address or 0)


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
    """A numba function of given signatures, compiled or loaded from the cache by `build`; it releases the GIL."""

    def __init__(self, function: Callable[..., Any], *signatures: tuple[Any, ...]) -> None:
        self._signatures = signatures
        self._dispatcher = njit(nogil=True, error_model="numpy")(function)
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._dispatcher._cache = self._cache = _DiskCache(name)

    def build(self, on_compile: Callable[[], None]) -> Callable[..., Any]:
        """The compiled function."""
        if not self._dispatcher.overloads:
            self._cache.on_compile = on_compile
            for signature in self._signatures:
                self._dispatcher.compile(signature)
            self._dispatcher.disable_compile()
        compiled: Callable[..., Any] = self._dispatcher
        return compiled


def _address_of(array: Any) -> Any:
    return array.ctypes.data


_ARRAYS = [types.Array(types.float32, n, "A", readonly=True) for n in (1, 2, 3)]
_ARRAYS += [types.Array(types.int32, n, "A", readonly=True) for n in (1, 2)]

# The address of an array's first element, in a fifth of the time that array.ctypes.data takes.
address_of = Function(_address_of, *((array,) for array in _ARRAYS))
