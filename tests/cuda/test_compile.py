"""The compiler's cache on disk, what launches refuse, tools that are missing, and what importing the package costs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from cuda_kernels import compile as compiling
from cuda_kernels.compile import Compiler, assemble, compile_to_ptx, find_tool, kernel_digest
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError, KernelCompileError, NoDeviceError, ToolMissingError
from cuda_kernels.gpu import GpuRuntime, driver_device_count
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import check_arguments
from tests.cuda.test_sass import _build_clean

ROOT = Path(__file__).parents[2]


def _build_fill(*, value: float) -> Callable[..., None]:
    constant = np.float32(value)

    def fill(x: Any, n: Any) -> None:
        i = types.int32(cuda.blockIdx.x * 32 + cuda.threadIdx.x)
        if i < n:
            x[i] = constant

    return fill


def _build_refused() -> Callable[..., None]:
    def refused(x: Any, n: Any) -> None:
        x[0] = "text"

    return refused


def _fill(value: float = 1.0, **changes: Any) -> Kernel:
    facts = {"name": "fill", "build": _build_fill, "constants": (("value", value),), "signature": ("f32*", "i32")}
    return Kernel(**{**facts, "threads": 32, **changes})


class Counting(Compiler):
    """Counts what it compiles."""

    def __init__(self, folder: Path | None) -> None:
        self.compiled: list[str] = []
        super().__init__(folder, self.compiled.append)


# ---- the cache


def test_ptx_is_made_once_and_then_read(tmp_path: Path) -> None:
    first, second = Counting(tmp_path), Counting(tmp_path)
    ptx = first.ptx(_fill())
    assert first.ptx(_fill()) == second.ptx(_fill()) == ptx
    assert (first.compiled, second.compiled) == (["fill"], [])
    assert ".visible .entry fill(" in ptx and ".target sm_80" in ptx
    assert [path.suffix for path in tmp_path.iterdir()] == [".ptx"]


def test_machine_code_is_kept_for_each_architecture(tmp_path: Path) -> None:
    compiler = Counting(tmp_path)
    codes = {architecture: compiler.cubin(_fill(), architecture) for architecture in ("sm_80", "sm_90a")}
    assert compiler.compiled == ["fill"]
    assert codes["sm_80"] != codes["sm_90a"] and all(code.startswith(b"\x7fELF") for code in codes.values())
    assert Counting(tmp_path).cubin(_fill(), "sm_90a") == codes["sm_90a"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiler = Counting(None)
    assert compiler.ptx(_fill()) == compiler.ptx(_fill())
    assert compiler.compiled == ["fill"] and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:40] + b"?" + data[41:], lambda data: b""]
)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    Counting(tmp_path).ptx(_fill())
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    compiler, later = Counting(tmp_path), Counting(tmp_path)
    assert ".entry fill(" in compiler.ptx(_fill())
    assert later.ptx(_fill()) == compiler.ptx(_fill())
    assert (compiler.compiled, later.compiled) == (["fill"], [])


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("a file where the folder should be")
    assert ".entry fill(" in Counting(folder).ptx(_fill())


def test_kernels_differ_by_all_that_their_code_depends_on() -> None:
    kernels = [
        _fill(),
        _fill(2.0),
        _fill(name="other"),
        _fill(threads=64),
        _fill(min_blocks=2),
        _fill(signature=("f32*", "i64")),
        _fill(build=_build_clean, constants=()),
    ]
    assert len({kernel_digest(kernel) for kernel in kernels}) == len(kernels)
    assert kernel_digest(_fill()) == kernel_digest(_fill())
    assert kernel_digest(_fill()) != kernel_digest(_fill(), compilers=False)


def test_an_edit_of_a_source_makes_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the module itself, and of one that it imports; in a process of its own, since sources are read once."""
    package = tmp_path / "cuda_kernels"
    package.mkdir()
    for name in ("__init__", "compile", "errors", "kernel", "numba_compile"):
        (package / f"{name}.py").write_text((ROOT / "cuda_kernels" / f"{name}.py").read_text())
    (package / "helper.py").write_text("def helper(): ...\n")
    (package / "family.py").write_text("from cuda_kernels.helper import helper\ndef build(): ...\n")
    code = (
        "from cuda_kernels.compile import kernel_digest; from cuda_kernels.family import build; "
        "from cuda_kernels.kernel import Kernel; print(kernel_digest(Kernel('k', build, (), ('i32',), 32)))"
    )

    def digest() -> str:
        return _python(code, PYTHONPATH=str(tmp_path)).stdout

    found = [digest()]
    for name in ("family", "helper", "numba_compile"):
        with (package / f"{name}.py").open("a") as file:
            file.write("# an edit\n")
        found.append(digest())
    (package / "unrelated.py").write_text("")
    assert len(set(found)) == 4 and digest() == found[-1]


def test_a_source_edited_under_a_running_process_leaves_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is the old code, and the file would be named by the new."""
    monkeypatch.setattr(compiling, "_STARTED", 0.0)
    compiler = Counting(tmp_path)
    assert compiler.ptx(_fill()) == compiler.ptx(_fill())
    assert compiler.compiled == ["fill"] and not any(tmp_path.iterdir())


def test_a_cached_kernel_needs_no_compiler(tmp_path: Path) -> None:
    """Reading from the cache imports nothing of numba-cuda's compiler: the module that does is left alone."""
    ptx = Counting(tmp_path).ptx(_fill())
    code = (
        "import sys; from pathlib import Path; from cuda_kernels.compile import Compiler; "
        "from tests.cuda.test_compile import _fill; "
        f"print(len(Compiler(Path({str(tmp_path)!r})).ptx(_fill())), 'cuda_kernels.numba_compile' in sys.modules)"
    )
    assert _python(code).stdout.split() == [str(len(ptx)), "False"]


# ---- errors


def test_what_numba_refuses_is_one_line() -> None:
    with pytest.raises(KernelCompileError, match="refused") as error:
        Compiler(None).ptx(Kernel("refused", _build_refused, (), ("f32*", "i32"), 32))
    assert "\n" not in str(error.value)


def test_what_ptxas_refuses_is_one_line() -> None:
    for ptx, architecture in (("no PTX at all", "sm_80"), (Compiler(None).ptx(_fill()), "sm_1")):
        with pytest.raises(KernelCompileError, match="ptxas") as error:
            assemble(ptx, architecture)
        assert "\n" not in str(error.value)


def test_a_tool_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    find_tool.cache_clear()
    with pytest.raises(ToolMissingError, match="no_such_tool is not installed: pip install"):
        find_tool("no_such_tool")


def test_tools_are_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "made_up_tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("made_up_tool") == tool


def test_without_numba_cuda_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda_kernels.numba_compile", None)
    monkeypatch.delattr("cuda_kernels.numba_compile", raising=False)
    compiling._numba_cuda.cache_clear()
    try:
        with pytest.raises(ToolMissingError, match="pip install"):
            compile_to_ptx(_build_clean(), ())
    finally:
        compiling._numba_cuda.cache_clear()


@pytest.mark.skipif(driver_device_count() > 0, reason="there is a GPU")
def test_without_a_driver_the_gpu_says_so_in_one_line() -> None:
    pytest.importorskip("cupy")
    with pytest.raises(NoDeviceError, match="no NVIDIA GPU can be used") as error:
        GpuRuntime(Compiler(None))
    assert "\n" not in str(error.value)


# ---- arguments

ARRAY = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("grid", "arguments", "named"),
    [
        ((1, 1, 1), (ARRAY,), "takes 2 arguments, not 1"),
        ((0, 1, 1), (ARRAY, 4), "no grid"),
        ((1, 65536, 1), (ARRAY, 4), "no grid"),
        ((1, 1, 1), (ARRAY.astype(np.float64), 4), r"argument 0 must be f32\*, not float64"),
        ((1, 1, 1), (4, 4), r"argument 0 must be f32\*, not int"),
        ((1, 1, 1), (ARRAY, 4.0), "argument 1 must be i32"),
        ((1, 1, 1), (ARRAY, 1 << 31), "argument 1 must be i32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    grid: tuple[int, int, int], arguments: tuple[Any, ...], named: str, compiler: Compiler
) -> None:
    with pytest.raises(KernelArgumentError, match=named):
        check_arguments(_fill(), grid, arguments)
    with pytest.raises(KernelArgumentError, match=named):
        EmulatedRuntime(compiler, memory_nbytes=1 << 16).launch(_fill(), grid, arguments)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("u32", (1 << 32) - 1, 1 << 32),
        ("u32", 0, -1),
        ("u64", (1 << 64) - 1, 1 << 64),
        ("i64", -(1 << 63), 1 << 63),
        ("f32", 1.5, 1),
        ("f32", np.float32(1), None),
    ],
)
def test_scalars_are_checked_for_range(kind: str, good: Any, bad: Any) -> None:
    kernel = _fill(signature=("f32*", kind))
    check_arguments(kernel, (1, 1, 1), (ARRAY, good))
    with pytest.raises(KernelArgumentError, match=kind if kind != "f32" else "float"):
        check_arguments(kernel, (1, 1, 1), (ARRAY, bad))


@pytest.mark.parametrize("changes", [{"signature": ("f16*",)}, {"threads": 33}, {"threads": 0}, {"threads": 1056}])
def test_a_kernel_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="fill"):
        _fill(**changes)


# ---- imports


def test_importing_the_package_imports_neither_cupy_nor_numba() -> None:
    code = "import sys, cuda_kernels, cuda_kernels.compile, cuda_kernels.gpu, cuda_kernels.launch; print(*sys.modules)"
    modules = _python(code).stdout.split()
    assert not {"cupy", "numba", "llvmlite", "tinyllm", "weights"} & {name.partition(".")[0] for name in modules}


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=environment.get("PYTHONPATH", ROOT),
    )
