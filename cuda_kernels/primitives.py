"""One name for each GPU primitive that numba.cuda does not have: inline PTX or LLVM IR, typed.

Pointers are what kernels get (`types.CPointer`), and shared or local arrays are numba's; `load4(x, i)` and its kin take
either, with i counted in elements. Halves travel in pairs, as the two 16-bit parts of a uint32, the first one low.
Instructions are documented in NVIDIA's PTX ISA manual, section "Instruction Set".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import _intrinsic as numba_intrinsic, intrinsic

__all__ = [
    "FULL_MASK",
    "Pointer",
    "Value",
    "and_or",
    "as_float",
    "as_uint",
    "byte_permute",
    "cp_async4",
    "cp_async16",
    "cp_async_commit",
    "cp_async_wait",
    "device_function",
    "exp2",
    "fma",
    "fma_bf16x2",
    "fma_f16x2",
    "fmax",
    "fmin",
    "ldmatrix_x4",
    "ldmatrix_x4_trans",
    "load2",
    "load4",
    "load4_streamed",
    "log2",
    "mma_bf16",
    "mma_f16",
    "multiply_wide",
    "pack_bf16",
    "pack_f16",
    "rcp",
    "rsqrt",
    "shift_right",
    "store2",
    "store4",
    "unpack_bf16",
    "unpack_f16",
]

Pointer = Any  # a kernel's pointer argument, typed by the kernel's signature
Value = Any  # a scalar inside a kernel

FULL_MASK = 0xFFFFFFFF

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_LLVM = {"r": _I32, "f": _F32, "l": _I64}  # by PTX register class, as in inline assembly's constraints
_NUMBA = {"r": types.uint32, "f": types.float32, "l": types.uint64}


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call; it is inlined into them."""
    return cuda.jit(device=True, forceinline=True)(function)


def _assembly(name: str, text: str, results: str, operands: str, *, volatile: bool = False) -> Any:
    """A primitive of one PTX instruction on registers.

    Args:
        text: PTX with $0, $1, ... for the results, then the operands.
        results, operands: one register class a letter: r = uint32, f = float32, l = uint64.
        volatile: whether it must stay where it is: it touches memory, or works on a whole warp.
    """
    constraints = ",".join([f"={r}" for r in results] + list(operands) + (["~{memory}"] if volatile else []))
    llvm_results = [_LLVM[r] for r in results]
    numba_result: Any = types.void
    llvm_result: Any = ir.VoidType()
    if len(results) == 1:
        numba_result, llvm_result = _NUMBA[results], llvm_results[0]
    elif results:
        numba_result = types.UniTuple(_NUMBA[results[0]], len(results))
        llvm_result = ir.LiteralStructType(llvm_results)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function_type = ir.FunctionType(llvm_result, [_LLVM[o] for o in operands])
        value = builder.call(ir.InlineAsm(function_type, text, constraints, side_effect=volatile), list(args))
        if len(results) > 1:
            parts = [builder.extract_value(value, k) for k in range(len(results))]
            return context.make_tuple(builder, signature.return_type, parts)
        return value if results else context.get_dummy_value()

    # An intrinsic's parameters are read off its Python signature, hence the generated one.
    parameters = ", ".join(f"a{k}" for k in range(len(operands)))
    scope: dict[str, Any] = {"signature": numba_result(*(_NUMBA[o] for o in operands)), "codegen": codegen}
    exec(f"def {name}(typingctx, {parameters}):\n    return signature, codegen", scope)
    return intrinsic(scope[name])


# ---- arithmetic

exp2 = _assembly("exp2", "ex2.approx.ftz.f32 $0, $1;", "f", "f")
"""2 ** x to 2 units in the last place; exp2(-inf) = 0."""

log2 = _assembly("log2", "lg2.approx.ftz.f32 $0, $1;", "f", "f")
"""The base-2 logarithm, absolute error 2 ** -22."""

rcp = _assembly("rcp", "rcp.approx.ftz.f32 $0, $1;", "f", "f")
"""1 / x to 1 unit in the last place."""

rsqrt = _assembly("rsqrt", "rsqrt.approx.ftz.f32 $0, $1;", "f", "f")
"""x ** -0.5, relative error 2 ** -22."""

as_uint = _assembly("as_uint", "mov.b32 $0, $1;", "r", "f")
"""The bits of a float32."""

as_float = _assembly("as_float", "mov.b32 $0, $1;", "f", "r")
"""The float32 of these bits."""

and_or = _assembly("and_or", "lop3.b32 $0, $1, $2, $3, 0xEA;", "r", "rrr")
"""a & b | c in one instruction."""

byte_permute = _assembly("byte_permute", "prmt.b32 $0, $1, $2, $3;", "r", "rrr")
"""(a, b, selector): byte i of the result is byte number (selector >> 4 i) & 7 of the eight of a, then b."""

multiply_wide = _assembly("multiply_wide", "mul.wide.s32 $0, $1, $2;", "l", "rr")
"""The 64-bit product of two int32, given and returned as unsigned: one instruction, wherever the operands come from."""

shift_right = _assembly("shift_right", "shr.s32 $0, $1, $2;", "r", "rr")
"""An int32, given as uint32, divided by 2 ** n and rounded down; numba's own >> would work in 64 bits."""


def _llvm_call(function: str, count: int) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        declared = ir.FunctionType(_F32, [_F32] * count)
        callee = builder.module.globals.get(function) or ir.Function(builder.module, declared, function)
        return builder.call(callee, args)

    return codegen


_FMA, _FMAX, _FMIN = _llvm_call("llvm.fma.f32", 3), _llvm_call("llvm.nvvm.fmax.f", 2), _llvm_call("llvm.nvvm.fmin.f", 2)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding, float32."""
    return types.float32(types.float32, types.float32, types.float32), _FMA


@intrinsic
def fmax(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger float32; where one is NaN, the other."""
    return types.float32(types.float32, types.float32), _FMAX


@intrinsic
def fmin(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller float32; where one is NaN, the other."""
    return types.float32(types.float32, types.float32), _FMIN


# ---- conversions, round to nearest even

pack_f16 = _assembly("pack_f16", "cvt.rn.f16x2.f32 $0, $2, $1;", "r", "ff")
"""(low, high) float32 -> a pair of float16"""

pack_bf16 = _assembly("pack_bf16", "cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff")
"""(low, high) float32 -> a pair of bfloat16"""

unpack_f16 = _assembly(
    "unpack_f16", "{.reg .b16 l,h; mov.b32 {l,h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}", "ff", "r"
)
"""A pair of float16 -> (low, high) float32"""

unpack_bf16 = _assembly("unpack_bf16", "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "ff", "r")
"""A pair of bfloat16 -> (low, high) float32"""

fma_f16x2 = _assembly("fma_f16x2", "fma.rn.f16x2 $0, $1, $2, $3;", "r", "rrr")
"""a * b + c with one rounding, on pairs of float16"""

fma_bf16x2 = _assembly("fma_bf16x2", "fma.rn.bf16x2 $0, $1, $2, $3;", "r", "rrr")
"""a * b + c with one rounding, on pairs of bfloat16"""


# ---- memory


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """The address of an element of a pointer or array, without numba's wrap-around of negative indices."""
    if isinstance(array_type, types.CPointer):
        return builder.gep(array, [index])
    return builder.gep(context.make_array(array_type)(context, builder, value=array).data, [index])


def _load(count: int) -> Any:
    def load(typingctx: Any, array: Any, index: Any) -> Any:
        element = array.dtype
        result = types.UniTuple(element, count)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
            vector = ir.VectorType(pointer.type.pointee, count)
            typed = builder.bitcast(pointer, vector.as_pointer(pointer.type.addrspace))
            value = builder.load(typed, align=count * element.bitwidth // 8)
            parts = [builder.extract_element(value, _I32(k)) for k in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return result(array, types.intp), codegen

    return intrinsic(load)


load2 = _load(2)
"""load2(x, i) -> (x[i], x[i + 1]) as one load; i must be even."""

load4 = _load(4)
"""load4(x, i) -> (x[i], ..., x[i + 3]) as one load; i must be a multiple of 4."""


@intrinsic
def load4_streamed(typingctx: Any, array: Any, index: Any) -> Any:
    """load4 from global memory that no thread writes during the launch, past the first-level cache: for data read once.

    It is issued where it stands: several in a row are in flight together.
    """
    kind = {types.uint32: "r", types.float32: "f"}[array.dtype]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        four = ir.LiteralStructType([_LLVM[kind]] * 4)
        text = f"ld.global.nc.L1::no_allocate.v4.{'u' if kind == 'r' else 'f'}32 {{$0,$1,$2,$3}}, [$4];"
        constraints = f"={kind},={kind},={kind},={kind},l"
        assembly = ir.InlineAsm(ir.FunctionType(four, [_I64]), text, constraints, side_effect=True)
        value = builder.call(assembly, [builder.ptrtoint(pointer, _I64)])
        return context.make_tuple(builder, signature.return_type, [builder.extract_value(value, k) for k in range(4)])

    return types.UniTuple(array.dtype, 4)(array, types.intp), codegen


def _vector_store(builder: Any, context: Any, signature: Any, args: Any, count: int) -> Any:
    pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
    vector = ir.VectorType(pointer.type.pointee, count)
    value = ir.Constant(vector, ir.Undefined)
    for k in range(count):
        value = builder.insert_element(value, args[2 + k], _I32(k))
    typed = builder.bitcast(pointer, vector.as_pointer(pointer.type.addrspace))
    builder.store(value, typed, align=count * signature.args[0].dtype.bitwidth // 8)
    return context.get_dummy_value()


@intrinsic
def store2(typingctx: Any, array: Any, index: Any, a: Any, b: Any) -> Any:
    """x[i], x[i + 1] = a, b as one store; i must be even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _vector_store(builder, context, signature, args, 2)

    return types.void(array, types.intp, array.dtype, array.dtype), codegen


@intrinsic
def store4(typingctx: Any, array: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """x[i], ..., x[i + 3] = a, b, c, d as one store; i must be a multiple of 4."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _vector_store(builder, context, signature, args, 4)

    t = array.dtype
    return types.void(array, types.intp, t, t, t, t), codegen


# ---- asynchronous copies, global to shared (PTX ISA, "cp.async"; sm_80)


def _shared_address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """The 32-bit address in the shared window of an element, index arithmetic in 32 bits."""
    base = context.make_array(array_type)(context, builder, value=array).data
    window = builder.addrspacecast(base, ir.PointerType(base.type.pointee, 3))
    offset = builder.mul(builder.trunc(index, _I32), _I32(array_type.dtype.bitwidth // 8))
    return builder.add(builder.ptrtoint(window, _I32), offset)


def _cp_async(text: str) -> Any:
    def cp_async(typingctx: Any, shared: Any, to: Any, source: Any, at: Any, nbytes: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            to_address = _shared_address(context, builder, signature.args[0], args[0], args[1])
            pointer = _element_pointer(context, builder, signature.args[2], args[2], args[3])
            from_address = builder.ptrtoint(pointer, _I64)
            function_type = ir.FunctionType(ir.VoidType(), [_I32, _I64, _I32])
            assembly = ir.InlineAsm(function_type, text, "r,l,r,~{memory}", side_effect=True)
            builder.call(assembly, [to_address, from_address, args[4]])
            return context.get_dummy_value()

        return types.void(shared, types.intp, source, types.intp, types.int32), codegen

    return intrinsic(cp_async)


cp_async16 = _cp_async("cp.async.cg.shared.global [$0], [$1], 16, $2;")
"""cp_async16(shared, to, source, at, nbytes) begins to copy 16 bytes from source[at] to shared[to]; both indices count
elements, both addresses are aligned. Only the first `nbytes` (0 to 16) are read, the rest is filled with zeros."""

cp_async4 = _cp_async("cp.async.ca.shared.global [$0], [$1], 4, $2;")
"""The same for 4 bytes; nbytes is 0 or 4."""


cp_async_commit = _assembly("cp_async_commit", "cp.async.commit_group;", "", "", volatile=True)
"""Closes the group of this thread's copies begun since the last commit."""


@numba_intrinsic(prefer_literal=True, target="cuda")
def cp_async_wait(typingctx: Any, pending: Any) -> Any:
    """Waits until at most `pending` (a constant) of this thread's newest groups are still on their way."""
    if not isinstance(pending, types.IntegerLiteral):
        return None
    text = f"cp.async.wait_group {pending.literal_value};"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        assembly = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), text, "~{memory}", side_effect=True)
        builder.call(assembly, [])
        return context.get_dummy_value()

    return types.void(pending), codegen


# ---- tensor cores (PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions")


def _ldmatrix(modifier: str) -> Any:
    text = f"ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{$0,$1,$2,$3}}, [$4];"

    def ldmatrix(typingctx: Any, shared: Any, at: Any) -> Any:
        result = types.UniTuple(types.uint32, 4)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _shared_address(context, builder, signature.args[0], args[0], args[1])
            four = ir.LiteralStructType([_I32] * 4)
            function_type = ir.FunctionType(four, [_I32])
            assembly = ir.InlineAsm(function_type, text, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
            value = builder.call(assembly, [address])
            parts = [builder.extract_value(value, k) for k in range(4)]
            return context.make_tuple(builder, signature.return_type, parts)

        return result(shared, types.intp), codegen

    return intrinsic(ldmatrix)


ldmatrix_x4 = _ldmatrix("")
"""Four 8 x 8 matrices of halves: lane l names row l % 8 of matrix l // 8 by shared[at], and gets of each matrix the
pair in row l // 4, columns 2 (l % 4) and the next."""

ldmatrix_x4_trans = _ldmatrix(".trans")
"""The same, each matrix transposed on the way."""

_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
)

mma_f16 = _assembly("mma_f16", _MMA.format("f16"), "ffff", "rrrrrrffff", volatile=True)
"""A (16, 16) times B (16, 8) plus C (16, 8), of the whole warp: (a0..a3, b0, b1, c0..c3) -> (d0..d3).

With g = lane // 4, t = lane % 4, pairs along k: a0 = A[g, 2t:], a1 = A[g + 8, 2t:], a2 = A[g, 2t + 8:],
a3 = A[g + 8, 2t + 8:]; b0 = B[2t:, g], b1 = B[2t + 8:, g]; c0, c1 = C[g, 2t:2t + 2]; c2, c3 = C[g + 8, 2t:2t + 2].
"""

mma_bf16 = _assembly("mma_bf16", _MMA.format("bf16"), "ffff", "rrrrrrffff", volatile=True)
"""mma_f16 for pairs of bfloat16."""
