"""Compiles a function with numba, to an object file. Imported only when the cache lacks something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

__all__ = ["compile_object"]


def _flags() -> Any:
    flags = compiler.Flags()
    cpu_target.options.parse_as_flags(flags, {"error_model": "numpy"})
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True  # it would refer to Python's API and to numba's own library
    flags.no_compile = True  # not before the entry has been added
    flags.enable_pyobject = False
    return flags


@global_compiler_lock  # type: ignore[untyped-decorator]
def compile_object(function: Callable[..., Any], num_arguments: int, entry: str) -> tuple[bytes, int]:
    """The object file of a function of int64 arguments that returns an int64 or nothing, and raises nothing.

    Returns:
        The file, in which a C function named `entry` calls it, and the address of what LLVM loaded just now.
    """
    arguments = (types.int64,) * num_arguments
    compiled = compiler.compile_extra(
        cpu_target.typing_context, cpu_target.target_context, function, arguments, None, _flags(), {}
    )
    library = compiled.library
    _add_entry(library, compiled.fndesc, entry)
    library.enable_object_caching()
    address = library.get_pointer_to_function(entry)
    assert not library.has_dynamic_globals, f"{function.__name__} holds an address of this process"
    return library._get_compiled_object(), address


def _add_entry(library: Any, description: Any, entry: str) -> None:
    """A function of the C ABI; numba's own return a status, which says here that nothing was raised."""
    context = cpu_target.target_context
    module = context.create_module(entry)
    callee_type = context.call_conv.get_function_type(description.restype, description.argtypes)
    callee = ir.Function(module, callee_type, description.llvm_func_name)
    returns = description.restype != types.none
    result = ir.IntType(64) if returns else ir.VoidType()
    function = ir.Function(module, ir.FunctionType(result, [ir.IntType(64)] * len(description.argtypes)), entry)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    _, value = context.call_conv.call_function(
        builder, callee, description.restype, description.argtypes, function.args
    )
    builder.ret(value) if returns else builder.ret_void()
    library.add_ir_module(module)
