"""Sixteen float32 lanes as one numba value, and the instructions that kernels are written with.

Each function below becomes a few LLVM instructions inside a compiled kernel (LLVM splits 16 lanes into what the CPU
has: two AVX registers, one AVX-512 register, four NEON registers). Addresses are integers. Every operation rounds as
IEEE 754 says; a fused multiply-add is written as `fma`, and nothing else is ever fused or reordered.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from typing import Any, Protocol

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import Deferred, resolve, types
from tinyllm.backends.cpu_kernels.half import emit_float_of_half

__all__ = [
    "LANES", "Vec", "at_least", "atomic_add", "atomic_load", "atomic_store", "call_task", "compare_exchange",
    "copy_floats", "count_bits", "first_bit", "fma", "instruction", "iota_mask", "lane_max", "lane_sum", "load",
    "load_arguments", "load_f32", "load_f64", "load_first", "load_i32", "load_i64", "load_u8", "load_u16", "load_u32",
    "maximum", "pause", "prefetch_to_write", "scatter_floats", "splat", "sqrt", "sqrt_lanes", "store", "store_f32",
    "store_f64", "store_first", "store_i64", "store_u8", "store_u16", "store_u32", "unordered", "vec", "zeros",
]  # fmt: skip

LANES = 16

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any  # llvmlite.ir.Value

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
V8, V16, V32, VH, VF = (ir.VectorType(t, LANES) for t in (I8, I16, I32, F16, F32))


class Vec(Protocol):
    """Sixteen float32 lanes."""

    def __add__(self, other: Vec) -> Vec: ...
    def __sub__(self, other: Vec) -> Vec: ...
    def __mul__(self, other: Vec) -> Vec: ...
    def __truediv__(self, other: Vec) -> Vec: ...


def _make_vec() -> Any:
    from tinyllm.backends.cpu_kernels import vector_type

    return vector_type.vec


vec = Deferred(_make_vec)


# ---- emitting LLVM: helpers shared with the kernels that write their inner loops themselves


def const(value: int) -> Value:
    return ir.Constant(I64, value)


def const_vec(kind: Any, value: float) -> Value:
    return ir.Constant(kind, [value] * LANES)


def pointer(b: Builder, address: Value, kind: Any, offset: int | Value = 0) -> Value:
    """address + offset bytes as a pointer to `kind`."""
    if not isinstance(offset, int):
        address = b.add(address, offset)
    elif offset:
        address = b.add(address, const(offset))
    return b.inttoptr(address, kind.as_pointer())


def emit_load(b: Builder, address: Value, kind: Any, offset: int | Value = 0, align: int = 1) -> Value:
    return b.load(pointer(b, address, kind, offset), align=align)


def emit_prefetch(b: Builder, address: Value, to_write: bool = False) -> None:
    """Asks for a cache line that will be read, or written; an address of nothing does no harm."""
    arguments = (ir.Constant(I32, value) for value in (int(to_write), 3, 1))  # to keep, data
    emit_call(b, "llvm.prefetch.p0", ir.VoidType(), pointer(b, address, I8), *arguments)


def emit_order(b: Builder) -> None:
    """Memory is not accessed across this place: LLVM would load ahead until it ran out of registers."""
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)


def emit_opaque(b: Builder, x: Value) -> Value:
    """An int64 of which LLVM knows nothing: addresses at constant distances from it stay one register."""
    return b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [x], False)


def emit_splat(b: Builder, scalar: Value, kind: Any = VF) -> Value:
    undefined = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, LANES), None))


def emit_call(b: Builder, name: str, result: Any, *values: Value) -> Value:
    """Calls a function of LLVM's or of a library by its name."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [value.type for value in values]), name)
    return b.call(function, values)


def emit_fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return emit_call(b, "llvm.fma.v16f32", VF, x, y, z)


def emit_load_values(b: Builder, address: Value, dtype: str, offset: int | Value = 0) -> Value:
    """Sixteen consecutive values stored as "f32", "f16" or "bf16", as float32."""
    if dtype == "f32":
        return emit_load(b, address, VF, offset, align=4)
    if dtype == "f16":
        return emit_float_of_half(b, emit_load(b, address, VH, offset))
    assert dtype == "bf16"
    upper = b.zext(emit_load(b, address, V16, offset), V32)
    return b.bitcast(b.shl(upper, const_vec(V32, 16)), VF)


def emit_loop(
    b: Builder,
    start: Value,
    end: Value,
    step: int,
    state: list[Value],
    body: Callable[[Value, list[Value]], list[Value]],
) -> list[Value]:
    """for i in range(start, end, step): state = body(i, state). Returns the state after the loop."""
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("loop", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    phis = [b.phi(s.type) for s in state]
    for phi, initial in zip(phis, state, strict=True):
        phi.add_incoming(initial, before)
    b.cbranch(b.icmp_signed("<", i, end), inside, after)
    b.position_at_end(inside)
    new_state = body(i, list(phis))
    i.add_incoming(b.add(i, const(step)), b.block)
    for phi, new in zip(phis, new_state, strict=True):
        phi.add_incoming(new, b.block)
    b.branch(head)
    b.position_at_end(after)
    return list(phis)


def instruction(result: Any, *parameters: Any) -> Callable[[Callable[..., Value]], Callable[..., Any]]:
    """Makes a function for kernels out of `emit(builder, *values)`, given numba's types of its result and arguments."""

    def decorate(emit: Callable[..., Value]) -> Callable[..., Any]:
        def make() -> Any:
            from numba.extending import intrinsic

            made_result, made_parameters = resolve(result), [resolve(p) for p in parameters]

            def define(_typing_context: Any, *_arguments: Any) -> Any:
                def codegen(context: Any, b: Builder, _signature: Any, values: Any) -> Value:
                    value = emit(b, *values)
                    return context.get_dummy_value() if made_result is resolve(types.void) else value

                return made_result(*made_parameters), codegen

            define.__name__ = emit.__name__
            define.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]  # numba goes by it
            return intrinsic(define)

        return Deferred(make)

    return decorate


# ---- vector arithmetic


f32, i64 = types.float32, types.int64

fma: Callable[[Vec, Vec, Vec], Vec] = instruction(vec, vec, vec, vec)(emit_fma)  # x * y + z, rounded once
splat: Callable[[float], Vec] = instruction(vec, f32)(lambda b, x: emit_splat(b, x))
zeros: Callable[[], Vec] = instruction(vec)(lambda b: const_vec(VF, 0.0))


def _maximum(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def emit_reduce(b: Builder, x: Value, combine: Callable[[Builder, Value, Value], Value]) -> Value:
    """((v0 o v8) o (v4 o v12)) o ... : a tree that halves the lanes, always in the same order."""
    width = LANES
    while width > 1:
        width //= 2
        kind = ir.VectorType(I32, width)
        low = b.shuffle_vector(x, x, ir.Constant(kind, list(range(width))))
        high = b.shuffle_vector(x, x, ir.Constant(kind, list(range(width, 2 * width))))
        x = combine(b, low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


maximum: Callable[[Vec, Vec], Vec] = instruction(vec, vec, vec)(_maximum)
lane_sum: Callable[[Vec], float] = instruction(f32, vec)(lambda b, x: emit_reduce(b, x, lambda b, x, y: b.fadd(x, y)))
lane_max: Callable[[Vec], float] = instruction(f32, vec)(lambda b, x: emit_reduce(b, x, _maximum))


@instruction(vec, vec, i64, i64)
def iota_mask(b: Builder, x: Value, first: Value, end: Value) -> Value:
    """Lanes first <= i < end keep x; the others become -inf."""
    lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    kind = lanes.type
    above = b.icmp_signed(">=", lanes, emit_splat(b, first, kind))
    below = b.icmp_signed("<", lanes, emit_splat(b, end, kind))
    return b.select(b.and_(above, below), x, const_vec(VF, float("-inf")))


@instruction(types.void, i64)
def prefetch_to_write(b: Builder, address: Value) -> None:
    emit_prefetch(b, address, to_write=True)


# ---- one bit for each lane, the first lane's the lowest


def emit_bits(b: Builder, lanes: Value) -> Value:
    """Sixteen truth values as an int64."""
    return b.zext(b.bitcast(lanes, I16), I64)


@instruction(i64, vec, vec)
def at_least(b: Builder, x: Value, y: Value) -> Value:
    """Where x >= y; nowhere that one of them is NaN."""
    return emit_bits(b, b.fcmp_ordered(">=", x, y))


@instruction(i64, vec, vec)
def unordered(b: Builder, x: Value, y: Value) -> Value:
    """Where x or y is NaN."""
    return emit_bits(b, b.fcmp_unordered("uno", x, y))


@instruction(i64, i64)
def first_bit(b: Builder, bits: Value) -> Value:
    """The place of the lowest bit of an int64 that is not 0."""
    return b.cttz(bits, ir.Constant(I1, 1))


count_bits: Callable[[int], int] = instruction(i64, i64)(lambda b, bits: b.ctpop(bits))


# ---- square roots


@instruction(f32, f32)
def sqrt(b: Builder, x: Value) -> Value:
    return emit_call(b, "llvm.sqrt.f32", F32, x)


@instruction(vec, vec)
def sqrt_lanes(b: Builder, x: Value) -> Value:
    return emit_call(b, "llvm.sqrt.v16f32", VF, x)


# ---- memory

load: Callable[[int], Vec] = instruction(vec, i64)(lambda b, address: emit_load(b, address, VF, align=4))


@instruction(types.void, i64, vec)
def store(b: Builder, address: Value, x: Value) -> None:
    b.store(x, pointer(b, address, VF), align=4)


def _internal_function(b: Builder, name: str, result: Any, parameters: list[Any], body: Callable[..., Value]) -> Value:
    """A function of this module that is called, not inlined: what tails need, written once."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, parameters), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inside = ir.IRBuilder(function.append_basic_block("entry"))
        value = body(inside, *function.args)
        inside.ret_void() if value is None else inside.ret(value)
    return function


def _load_tail(b: Builder, address: Value, n: Value) -> Value:
    staging = b.ptrtoint(b.alloca(VF), I64)
    b.store(const_vec(VF, 0.0), pointer(b, staging, VF))

    def copy(offset: Value, _state: list[Value]) -> list[Value]:
        b.store(emit_load(b, address, F32, offset, align=4), pointer(b, staging, F32, offset))
        return []

    emit_loop(b, const(0), b.mul(n, const(4)), 4, [], copy)
    return emit_load(b, staging, VF, align=64)


def _store_tail(b: Builder, address: Value, x: Value, n: Value) -> None:
    staging = b.ptrtoint(b.alloca(VF), I64)
    b.store(x, pointer(b, staging, VF))

    def copy(offset: Value, _state: list[Value]) -> list[Value]:
        b.store(emit_load(b, staging, F32, offset, align=4), pointer(b, address, F32, offset), align=4)
        return []

    emit_loop(b, const(0), b.mul(n, const(4)), 4, [], copy)


@instruction(vec, i64, i64)
def load_first(b: Builder, address: Value, n: Value) -> Value:
    """The first n lanes (all where n >= 16) from memory, the rest zero; reads nothing past them."""
    function = _internal_function(b, "load_tail", VF, [I64, I64], _load_tail)
    with b.if_else(b.icmp_signed(">=", n, const(LANES))) as (whole, tail):
        with whole:
            all_lanes, whole_block = emit_load(b, address, VF, align=4), b.block
        with tail:
            some_lanes, tail_block = b.call(function, [address, n]), b.block
    result = b.phi(VF)
    result.add_incoming(all_lanes, whole_block)
    result.add_incoming(some_lanes, tail_block)
    return result


@instruction(types.void, i64, vec, i64)
def store_first(b: Builder, address: Value, x: Value, n: Value) -> None:
    """Writes the first n lanes (all where n >= 16), and nothing else."""
    function = _internal_function(b, "store_tail", ir.VoidType(), [I64, VF, I64], _store_tail)
    with b.if_else(b.icmp_signed(">=", n, const(LANES))) as (whole, tail):
        with whole:
            b.store(x, pointer(b, address, VF), align=4)
        with tail:
            b.call(function, [address, x, n])


@instruction(types.void, i64, i64, i64)
def copy_floats(b: Builder, source: Value, target: Value, n: Value) -> None:
    def copy(offset: Value, _state: list[Value]) -> list[Value]:
        b.store(emit_load(b, source, F32, offset, align=4), pointer(b, target, F32, offset), align=4)
        return []

    emit_loop(b, const(0), b.mul(n, const(4)), 4, [], copy)


@instruction(types.void, i64, i64, i64, i64)
def scatter_floats(b: Builder, source: Value, target: Value, n: Value, stride: Value) -> None:
    """n floats, from consecutive places to places `stride` bytes apart."""

    def copy(i: Value, _state: list[Value]) -> list[Value]:
        value = emit_load(b, source, F32, b.mul(i, const(4)), align=4)
        b.store(value, pointer(b, target, F32, b.mul(i, stride)), align=4)
        return []

    emit_loop(b, const(0), n, 1, [], copy)


def _loader(result: Any, kind: Any) -> Callable[[int], Any]:
    def emit(b: Builder, address: Value) -> Value:
        value = emit_load(b, address, kind)
        if isinstance(kind, ir.IntType) and kind.width < 64:
            value = b.sext(value, I64) if result == types.int32 else b.zext(value, I64)
        return value

    return instruction(i64 if result == types.int32 else result, i64)(emit)


def _storer(parameter: Any, kind: Any) -> Callable[[int, Any], None]:
    def emit(b: Builder, address: Value, value: Value) -> None:
        if value.type != kind:
            value = b.trunc(value, kind)
        b.store(value, pointer(b, address, kind), align=1)

    return instruction(types.void, i64, parameter)(emit)


load_f32: Callable[[int], float] = _loader(f32, F32)
load_f64: Callable[[int], float] = _loader(types.float64, F64)
load_i32: Callable[[int], int] = _loader(types.int32, I32)
load_i64: Callable[[int], int] = _loader(i64, I64)
load_u8: Callable[[int], int] = _loader(i64, I8)
load_u16: Callable[[int], int] = _loader(i64, I16)
load_u32: Callable[[int], int] = _loader(i64, I32)
store_f32: Callable[[int, float], None] = _storer(f32, F32)
store_f64: Callable[[int, float], None] = _storer(types.float64, F64)
store_i64: Callable[[int, int], None] = _storer(i64, I64)
store_u8: Callable[[int, int], None] = _storer(i64, I8)
store_u16: Callable[[int, int], None] = _storer(i64, I16)
store_u32: Callable[[int, int], None] = _storer(i64, I32)

# ---- running tasks


@instruction(i64, i64)
def atomic_load(b: Builder, address: Value) -> Value:
    return b.load_atomic(pointer(b, address, I64), "seq_cst", 8)


@instruction(types.void, i64, i64)
def atomic_store(b: Builder, address: Value, value: Value) -> None:
    b.store_atomic(value, pointer(b, address, I64), "seq_cst", 8)


@instruction(i64, i64, i64)
def atomic_add(b: Builder, address: Value, n: Value) -> Value:
    """Adds n to an int64; returns what it was."""
    return b.atomic_rmw("add", pointer(b, address, I64), n, "seq_cst")


@instruction(types.boolean, i64, i64, i64)
def compare_exchange(b: Builder, address: Value, expected: Value, value: Value) -> Value:
    """Stores value where the int64 is still `expected`, and says whether it was."""
    pair = b.cmpxchg(pointer(b, address, I64), expected, value, "seq_cst", "seq_cst")
    return b.extract_value(pair, 1)


@instruction(types.void)
def pause(b: Builder) -> None:
    """Tells the core that this thread spins, where there is such an instruction."""
    if platform.machine() in ("x86_64", "AMD64"):
        emit_call(b, "llvm.x86.sse2.pause", ir.VoidType())


@instruction(types.void, i64, i64, i64, i64, i64)
def call_task(b: Builder, task: Value, params: Value, worker: Value, begin: Value, end: Value) -> None:
    """Calls the compiled kernel at address `task`."""
    function = ir.FunctionType(ir.VoidType(), [I64] * 4)
    b.call(b.inttoptr(task, function.as_pointer()), [params, worker, begin, end])


def _make_load_arguments() -> Any:
    from numba.extending import intrinsic

    int64, float32, tuple_of = resolve(i64), resolve(f32), resolve(types.Tuple)

    def load_arguments(_typing_context: Any, params: Any, slots: Any) -> Any:
        codes = slots.literal_value
        result = tuple_of([int64 if code == "q" else float32 for code in codes])

        def codegen(context: Any, b: Builder, sig: Any, values: Any) -> Value:
            loaded = [emit_load(b, values[0], I64 if code == "q" else F64, 8 * i) for i, code in enumerate(codes)]
            narrowed = [b.fptrunc(x, F32) if code == "d" else x for x, code in zip(loaded, codes, strict=True)]
            return context.make_tuple(b, result, narrowed)

        return result(int64, slots), codegen

    return intrinsic(prefer_literal=True)(load_arguments)


# The arguments of a kernel as a tuple: 'q' an int64, 'd' a double narrowed to float32.
load_arguments: Callable[[int, str], Any] = Deferred(_make_load_arguments)
