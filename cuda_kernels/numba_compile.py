"""The calls into numba-cuda's compiler. Some are not public, so they stand in this file alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from numba.core.compiler_lock import global_compiler_lock
from numba.cuda import compiler, dispatcher, types
from numba.cuda.compiler import compile_cuda, kernel_fixup
from numba.cuda.cudadrv import nvvm

__all__ = ["argument_types", "ptx", "without_driver"]

_ELEMENTS = {
    "f32": types.float32,
    "i32": types.int32,
    "u32": types.uint32,
    "u16": types.uint16,
    "i8": types.int8,
    "u8": types.uint8,
    "i64": types.int64,
    "u64": types.uint64,
}


def argument_types(signature: tuple[str, ...]) -> tuple[Any, ...]:
    """Numba's types of a Kernel's signature: pointers are bare addresses, one parameter each."""
    return tuple(types.CPointer(_ELEMENTS[kind[:-1]]) if kind.endswith("*") else _ELEMENTS[kind] for kind in signature)


@contextmanager
def without_driver(target: tuple[int, int]) -> Iterator[None]:
    """Device functions ask the driver for the compute capability: here they are told, so that no driver is needed."""
    modules = [module for module in (dispatcher, compiler) if hasattr(module, "get_current_device")]
    before = [module.get_current_device for module in modules]
    for module in modules:
        module.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.get_current_device = function


def ptx(
    function: Callable[..., Any],
    argument_types: tuple[Any, ...],
    target: tuple[int, int],
    launch_bounds: tuple[int, ...] | None,
    fuse: bool,
    line_info: bool,
) -> str:
    """numba's pipeline to NVVM IR, and libNVVM's to PTX, with options that numba.cuda.compile does not pass on."""
    with global_compiler_lock:
        result = compile_cuda(
            getattr(function, "py_func", function),
            types.void,
            argument_types,
            lineinfo=line_info,
            nvvm_options={"opt": 3, "fma": fuse},
            cc=target,
        )
        library = result.library
        kernel = library.get_function(result.fndesc.llvm_func_name)
        library._entry_name = result.fndesc.llvm_func_name
        kernel_fixup(kernel, False)
        nvvm.set_launch_bounds(kernel, launch_bounds)
        texts = library.get_asm_strs(cc=target)
    if library._linking_files:
        raise ValueError("it needs CUDA C++ to be linked in (float16 arithmetic?), which is not supported")
    return "\n".join(texts)
