"""From a kernel to PTX (numba-cuda and NVVM) and to machine code (ptxas), on any machine: neither needs a GPU.

PTX is made for one target, sm_80, and ptxas makes machine code of it for newer ones: what the emulator runs is what
a GPU runs, up to ptxas. Multiplications and additions are not contracted behind the source's back: a fused one is
written as `fma`, so that the bits of a sum do not depend on the compiler's mood.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from cuda_kernels.errors import KernelCompileError, ToolMissingError
from cuda_kernels.kernel import Kernel

__all__ = ["PTX_TARGET", "Compiler", "assemble", "compile_to_ptx", "find_tool", "kernel_digest"]

PTX_TARGET = (8, 0)

_STARTED = time.time()  # a source edited later need not be what this process runs

# Modules of which no kernel's code depends, though kernels' modules import them.
HOST_ONLY = frozenset(f"{__package__}.{name}" for name in ("errors", "kernel", "launch", "roofline", "views"))


def compile_to_ptx(
    function: Callable[..., Any],
    argument_types: tuple[Any, ...],
    *,
    name: str | None = None,
    target: tuple[int, int] = PTX_TARGET,
    launch_bounds: tuple[int, ...] | None = None,
    fuse: bool = False,
    line_info: bool = True,
) -> str:
    """PTX of one kernel.

    Args:
        function: the Python function, or a numba dispatcher.
        argument_types: numba types, one for each argument.
        name: what the entry is called; None leaves numba's mangled name.
        target: compute capability.
        launch_bounds: threads of a block at the most, then blocks per multiprocessor at the least.
        fuse: allow a * b + c to become one fused operation.
        line_info: keep the source lines.

    Raises:
        KernelCompileError: numba or NVVM refused it.
        ToolMissingError: numba-cuda or NVVM is not installed.
    """
    numba_cuda = _numba_cuda()
    try:
        with numba_cuda.without_driver(target):
            text = numba_cuda.ptx(function, argument_types, target, launch_bounds, fuse, line_info)
    except ToolMissingError:
        raise
    except Exception as error:
        raise KernelCompileError(f"{getattr(function, '__name__', function)}: {_one_line(error)}") from error
    entry = re.search(r"\.visible \.entry (\w+)\(", text)
    if entry is None:
        raise KernelCompileError(f"{getattr(function, '__name__', function)}: the PTX has no entry")
    return text.replace(entry.group(1), name) if name is not None else text


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(lines[:6])[:800] or type(error).__name__


@cache
def _numba_cuda() -> Any:
    """The part that touches numba, imported when a kernel is first compiled."""
    try:
        from cuda_kernels import numba_compile
    except ImportError as error:
        raise ToolMissingError(
            f"kernels are compiled by numba-cuda, which is not installed ({error}): pip install 'tinyllm[emulator]'"
        ) from error
    return numba_compile


# ---- ptxas and its kin


@cache
def find_tool(name: str) -> Path:
    """ptxas, nvdisasm or nvcc: NVIDIA's pip package first, then CUDA_HOME, then the PATH. Raises ToolMissingError."""
    for entry in sys.path:
        for found in sorted(Path(entry or ".").glob(f"nvidia/cu*/bin/{name}"), reverse=True):
            if os.access(found, os.X_OK):
                return found
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which(name, path=f"{home}/bin") if home else None
    path = path or shutil.which(name)
    if path is None:
        raise ToolMissingError(f"{name} is not installed: pip install 'tinyllm[cuda]'")
    return Path(path)


def assemble(ptx: str, architecture: str) -> tuple[bytes, str]:
    """(machine code, ptxas's report on registers, memory and spills) for an architecture such as "sm_90".

    Raises KernelCompileError, ToolMissingError.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [str(find_tool("ptxas")), "-v", "-O3", f"-arch={architecture}", str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KernelCompileError(f"ptxas: {_one_line(Exception(done.stderr or done.stdout))}")
        return result.read_bytes(), done.stderr


# ---- the cache


def kernel_digest(kernel: Kernel, *, compilers: bool = True) -> str:
    """Names a kernel by all that its code depends on: its sources and theirs, constants, types, compilers.

    Without `compilers` the name is the same on a machine with other versions of them, or none.
    """
    digest = hashlib.sha256()
    for path in _sources(kernel.build.__module__):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    facts = (kernel.name, kernel.build.__qualname__, kernel.constants, kernel.signature, kernel.threads)
    digest.update(repr((facts, kernel.min_blocks, PTX_TARGET, _versions() if compilers else ())).encode())
    return digest.hexdigest()[:32]


@cache
def _versions() -> tuple[str, ...]:
    found = []
    for package in ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} none")
    return tuple(found)


@cache
def _sources(module: str) -> tuple[Path, ...]:
    """The file of a module, and of each module of this package with device code that it imports, in turn."""
    todo, seen = [module, f"{__package__}.numba_compile"], dict[str, Path]()
    while todo:
        name = todo.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        path = Path(file) if file else Path(__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if name in seen or name in HOST_ONLY or not path.is_file():
            continue
        seen[name] = path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == __package__:
                todo += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(seen[name] for name in sorted(seen))


class Compiler:
    """Compiles kernels once, and keeps the results in a folder: a file is named by what it was made of.

    Args:
        folder: where PTX and machine code are kept; None keeps them in memory alone.
        on_compile: called with a kernel's name before it is compiled.
    """

    def __init__(self, folder: Path | None, on_compile: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self._on_compile = on_compile
        self._kept: dict[str, bytes] = {}

    def ptx(self, kernel: Kernel) -> str:
        """PTX of a kernel whose entry has the kernel's name. Raises KernelCompileError, ToolMissingError."""

        def make() -> bytes:
            if self._on_compile is not None:
                self._on_compile(kernel.name)
            bounds = (kernel.threads, kernel.min_blocks) if kernel.min_blocks else (kernel.threads,)
            types = _numba_cuda().argument_types(kernel.signature)
            return compile_to_ptx(kernel.function(), types, name=kernel.name, launch_bounds=bounds).encode()

        return self._get(kernel, "ptx", make).decode()

    def cubin(self, kernel: Kernel, architecture: str) -> bytes:
        """Machine code for an architecture such as "sm_90". Raises KernelCompileError, ToolMissingError."""
        return self._get(kernel, f"{architecture}.cubin", lambda: assemble(self.ptx(kernel), architecture)[0])

    def _get(self, kernel: Kernel, suffix: str, make: Callable[[], bytes]) -> bytes:
        """The content of a file of the cache; one that is absent, cut short or altered is made again.

        Kernels of sources that were edited since the process began are kept in memory alone: the file would be named
        by the new text and hold the old code.
        """
        file = f"{kernel_digest(kernel)}.{suffix}"
        if file not in self._kept:
            edited = any(path.stat().st_mtime > _STARTED for path in _sources(kernel.build.__module__))
            content = None if edited else self._read(file)
            if content is None:
                content = make()
                if not edited:
                    self._write(file, content)
            self._kept[file] = content
        return self._kept[file]

    def _read(self, file: str) -> bytes | None:
        if self.folder is None:
            return None
        try:
            stored = (self.folder / file).read_bytes()
        except OSError:
            return None
        check, content = stored[:32], stored[32:]
        return content if hashlib.sha256(content).digest() == check else None

    def _write(self, file: str, content: bytes) -> None:
        """A folder that cannot be written is no error."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as temporary:
                temporary.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary.name, self.folder / file)
        except OSError:
            return
