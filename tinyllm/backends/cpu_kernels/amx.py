"""AMX, the matrix unit of some x86 CPUs: whether there is one, its tile registers' shapes, and their instructions.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Mapping
from functools import cache

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.simd import (
    I8,
    I16,
    V32,
    Builder,
    Value,
    const,
    const_vec,
    emit_call,
    instruction,
    pointer,
)

__all__ = [
    "CONFIG_NBYTES", "TILE_NBYTES", "configure_tiles", "emit_tile_load", "emit_tile_product", "emit_tile_store",
    "emit_tile_zero", "has_amx", "has_amx_bf16", "release_tiles",
]  # fmt: skip

TILE_NBYTES = 1024  # of a tile register: sixteen rows of 64 bytes
CONFIG_NBYTES = 64

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux, x86-64

i64 = types.int64


@cache
def has_amx() -> bool:
    """Whether this process may use AMX; asks Linux for the permission, which a process must do once."""
    if not (host_cpu().has("amxint8") and host_cpu().has("avx512vnni") and sys.platform == "linux"):
        return False
    if platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    system_call.restype = ctypes.c_long
    return bool(system_call(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))) == 0)


def has_amx_bf16() -> bool:
    """Whether it multiplies bfloat16 as well, and vectors are rounded to it by an instruction."""
    return host_cpu().has("amxbf16") and host_cpu().has("avx512bf16") and has_amx()


def _emit(b: Builder, name: str, *values: Value) -> None:
    emit_call(b, f"llvm.x86.{name}", ir.VoidType(), *values)


def _tile(number: int) -> Value:
    return ir.Constant(I8, number)


def configure_tiles(shapes: Mapping[int, tuple[int, int]]) -> Callable[[int], None]:
    """(memory): gives tile registers their shapes (rows, bytes of a row); memory: CONFIG_NBYTES, aligned to 64."""

    @instruction(types.void, i64)
    def configure(b: Builder, memory: Value) -> None:
        """Palette 1: at byte 16 each tile's bytes in a row (int16), at 48 its rows (int8)."""
        b.store(const_vec(V32, 0), pointer(b, memory, V32), align=64)
        b.store(ir.Constant(I8, 1), pointer(b, memory, I8))
        for tile, (rows, nbytes) in shapes.items():
            b.store(ir.Constant(I16, nbytes), pointer(b, memory, I16, 16 + 2 * tile))
            b.store(ir.Constant(I8, rows), pointer(b, memory, I8, 48 + tile))
        _emit(b, "ldtilecfg", pointer(b, memory, I8))

    return configure


def _release(b: Builder) -> None:
    _emit(b, "tilerelease")


release_tiles: Callable[[], None] = instruction(types.void)(_release)


def emit_tile_zero(b: Builder, tile: int) -> None:
    _emit(b, "tilezero", _tile(tile))


def emit_tile_load(b: Builder, tile: int, address: Value, stride: int | Value) -> None:
    """Rows `stride` bytes apart."""
    stride = const(stride) if isinstance(stride, int) else stride
    _emit(b, "tileloadd64", _tile(tile), pointer(b, address, I8), stride)


def emit_tile_store(b: Builder, tile: int, address: Value, stride: int | Value) -> None:
    stride = const(stride) if isinstance(stride, int) else stride
    _emit(b, "tilestored64", _tile(tile), pointer(b, address, I8), stride)


def emit_tile_product(b: Builder, kind: str, C: int, A: int, B: int) -> None:
    """C += A B; kind: "dpbsud" (int8 times uint8), "dpbf16ps", ..."""
    _emit(b, f"t{kind}", _tile(C), _tile(A), _tile(B))
