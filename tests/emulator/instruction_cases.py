"""One case for each form of an instruction: its inputs, its PTX, and what it must give for each thread."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator import reference
from tests.emulator.ptx_text import DTYPES, WIDTHS, kernel
from tests.emulator.reference import rounded, wrap

THREADS = 64
Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """inputs: PTX type -> values [64]. expected: from one value of each input to the result of that thread."""

    name: str
    kinds: tuple[str, ...]
    output: str
    body: str
    expected: Callable[..., Any]
    values: tuple[Array, ...] = ()
    tolerance: float = 0.0

    @property
    def ptx(self) -> str:
        return kernel(self.kinds, self.output, self.body)


def integers(kind: str, seed: int) -> Array:
    """Edge cases and random values of an integer type."""
    return _integers(kind, seed).copy()


@cache
def _integers(kind: str, seed: int) -> Array:
    random = np.random.default_rng(seed)
    bits = WIDTHS[kind]
    edges = [0, 1, 2, 3, 7, 31, 32, 33, (1 << bits) - 1, (1 << bits) - 2, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    sizes = random.integers(0, 60, THREADS).astype(np.uint64)
    words = (random.integers(0, 1 << 64, THREADS, dtype=np.uint64) >> sizes) & np.uint64((1 << bits) - 1)
    chosen = np.where(random.random(THREADS) < 0.4, random.choice(np.array(edges, np.uint64), THREADS), words)
    return chosen.astype(f"u{bits // 8}").view(DTYPES[kind])


def floats(kind: str, seed: int) -> Array:
    """Finite floats of all sizes: zeros of both signs, subnormal numbers, ties of later roundings."""
    return _floats(kind, seed).copy()


@cache
def _floats(kind: str, seed: int) -> Array:
    random = np.random.default_rng(seed)
    form = {"f16": reference.F16, "bf16": reference.BF16, "f32": reference.F32, "f64": reference.F64}[kind]
    span = {"f16": 6, "bf16": 30, "f32": 30, "f64": 200}[kind]
    values = np.ldexp(random.uniform(-2, 2, THREADS), random.integers(-span, span, THREADS))
    tiny = math.ldexp(1.0, form[1])
    edges = [0.0, -0.0, 1.0, -1.0, 1.5, 0.5, 2.5, -2.5, tiny, tiny / 4, -tiny / 2, 3.0, 1 + 2.0 ** (1 - form[0])]
    chosen = np.where(random.random(THREADS) < 0.35, random.choice(edges, THREADS), values)
    if kind == "bf16":
        return (chosen.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return chosen.astype(DTYPES[kind])


def inputs(kind: str, seed: int) -> Array:
    if kind in ("f16x2", "bf16x2"):
        low, high = floats(kind[:-2], seed), floats(kind[:-2], seed + 50)
        return low.view("u2").astype("u4") | high.view("u2").astype("u4") << 16
    return floats(kind, seed) if kind in ("f16", "bf16", "f32", "f64") else integers(kind, seed)


def case(name: str, kinds: str, output: str, body: str, expected: Callable[..., Any], **options: Any) -> Case:
    names = tuple(kinds.split())
    given = options.pop("values", None) or tuple(inputs(kind, 7 * seed + 1) for seed, kind in enumerate(names))
    return Case(name, names, output, body, expected, given, **options)


def simple(opcode: str, kinds: str, output: str, expected: Callable[..., Any], **options: Any) -> Case:
    """An instruction whose operands are the inputs in order."""
    operands = ", ".join(f"%{letter}" for letter in "abcdefgh"[: len(kinds.split())])
    return case(opcode, kinds, output, f"{opcode} %y, {operands};", expected, **options)


# ---- integers


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def nonzero(kind: str) -> Array:
    values = integers(kind, 3)
    return np.where(values == 0, values.dtype.type(5), values)


def integer_cases() -> Iterator[Case]:
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        bits, two, three = WIDTHS[kind], f"{kind} {kind}", f"{kind} {kind} {kind}"
        yield simple(f"add.{kind}", two, kind, lambda a, b: a + b)
        yield simple(f"sub.{kind}", two, kind, lambda a, b: a - b)
        yield simple(f"mul.lo.{kind}", two, kind, lambda a, b: a * b)
        yield simple(f"mul.hi.{kind}", two, kind, lambda a, b, n=bits: a * b >> n)
        yield simple(f"mad.lo.{kind}", three, kind, lambda a, b, c: a * b + c)
        yield simple(f"mad.hi.{kind}", three, kind, lambda a, b, c, n=bits: (a * b >> n) + c)
        if bits < 64:
            wide = f"{kind[0]}{2 * bits}"
            yield simple(f"mul.wide.{kind}", two, wide, lambda a, b: a * b)
            yield simple(f"mad.wide.{kind}", f"{two} {wide}", wide, lambda a, b, c: a * b + c)
        divisors = (integers(kind, 1), nonzero(kind))
        limit = -(1 << (bits - 1))
        skip = kind[0] == "s"
        if skip:  # the quotient of the smallest number and -1 does not fit
            divisors = (np.where(divisors[0] == limit, divisors[0].dtype.type(9), divisors[0]), divisors[1])
        yield simple(f"div.{kind}", two, kind, quotient, values=divisors)
        yield simple(f"rem.{kind}", two, kind, lambda a, b: a - quotient(a, b) * b, values=divisors)
        yield simple(f"min.{kind}", two, kind, min)
        yield simple(f"max.{kind}", two, kind, max)
        if kind[0] == "s":
            yield simple(f"neg.{kind}", kind, kind, lambda a: -a)
            yield simple(f"abs.{kind}", kind, kind, abs)
        yield simple(f"sad.{kind}", three, kind, lambda a, b, c: abs(a - b) + c)
        yield simple(f"shr.{kind}", f"{kind} u32", kind, lambda a, n, w=bits: a >> min(n, w))
        yield case(f"shr.{kind} by 3", kind, kind, f"shr.{kind} %y, %a, 3;", lambda a: a >> 3)
        for relation in ("eq", "ne", "lt", "le", "gt", "ge"):
            yield comparison(relation, kind)
        yield selection(f"selp.{kind}", kind)
        yield simple(f"slct.{kind}.s32", f"{kind} {kind} s32", kind, lambda a, b, c: a if c >= 0 else b)
    for relation in ("lo", "ls", "hi", "hs"):
        yield comparison(relation, "u32")
    for kind in ("b16", "b32", "b64"):
        bits = WIDTHS[kind]
        yield simple(f"and.{kind}", f"{kind} {kind}", kind, lambda a, b: a & b)
        yield simple(f"or.{kind}", f"{kind} {kind}", kind, lambda a, b: a | b)
        yield simple(f"xor.{kind}", f"{kind} {kind}", kind, lambda a, b: a ^ b)
        yield simple(f"not.{kind}", kind, kind, lambda a: ~a)
        yield simple(f"cnot.{kind}", kind, kind, lambda a: int(a == 0))
        yield simple(f"shl.{kind}", f"{kind} u32", kind, lambda a, n, w=bits: 0 if n >= w else a << n)
        yield simple(f"shr.{kind}", f"{kind} u32", kind, lambda a, n: a >> min(n, 64))
        yield simple(f"mov.{kind}", kind, kind, lambda a: a)
        yield selection(f"selp.{kind}", kind)
        yield comparison("eq", kind)
        yield comparison("ne", kind)
    for bits in (32, 64):
        kind = f"b{bits}"
        yield simple(f"popc.{kind}", kind, "u32", lambda a: bin(a).count("1"))
        yield simple(f"clz.{kind}", kind, "u32", lambda a, n=bits: n - a.bit_length())
        yield simple(f"brev.{kind}", kind, kind, lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2))
        for sign in "us":
            yield simple(f"bfind.{sign}{bits}", f"{sign}{bits}", "u32", leading)
            yield simple(f"bfind.shiftamt.{sign}{bits}", f"{sign}{bits}", "u32",
                         lambda a, n=bits: -1 if leading(a) < 0 else n - 1 - leading(a))  # fmt: skip
            yield simple(f"bfe.{sign}{bits}", f"{sign}{bits} u32 u32", f"{sign}{bits}", field_of(sign, bits))
        yield simple(f"bfi.{kind}", f"{kind} {kind} u32 u32", kind, lambda a, b, p, n, w=bits: inserted(a, b, p, n, w))
    yield simple("add.sat.s32", "s32 s32", "s32", lambda a, b: max(-(2**31), min(2**31 - 1, a + b)))
    yield simple("sub.sat.s32", "s32 s32", "s32", lambda a, b: max(-(2**31), min(2**31 - 1, a - b)))
    for kind in ("u32", "s32"):
        low = (lambda a: a & 0xFFFFFF) if kind == "u32" else (lambda a: wrap(a << 8, "s32") >> 8)
        yield simple(f"mul24.lo.{kind}", f"{kind} {kind}", kind, lambda a, b, f=low: f(a) * f(b))
        yield simple(f"mul24.hi.{kind}", f"{kind} {kind}", kind, lambda a, b, f=low: f(a) * f(b) >> 16)
        yield simple(f"mad24.lo.{kind}", f"{kind} {kind} {kind}", kind, lambda a, b, c, f=low: f(a) * f(b) + c)
    for first in ("s32", "u32"):
        for second in ("s32", "u32"):
            yield simple(f"dp4a.{first}.{second}", f"{first} {second} s32", "s32",
                         lambda a, b, c, x=first, y=second: dot_bytes(a, b, c, x, y))  # fmt: skip
    yield from carry_cases()
    yield from byte_cases()


def leading(a: int) -> int:
    """bfind: position of the highest bit that differs from the sign, -1 for none."""
    return (~a if a < 0 else a).bit_length() - 1


def field_of(sign: str, width: int) -> Callable[[int, int, int], int]:
    def field(a: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        bits = [(a >> min(i, width - 1 if sign == "s" else 999)) & 1 for i in range(position, position + length)]
        if sign == "u":
            bits = [(a & ((1 << width) - 1)) >> i & 1 if i < width else 0 for i in range(position, position + length)]
            return sum(bit << i for i, bit in enumerate(bits[:width]))
        if length == 0:
            return 0
        fill = (a >> min(position + length - 1, width - 1)) & 1
        kept = [(a >> i) & 1 if i < width else fill for i in range(position, position + length)][:width]
        return sum(bit << i for i, bit in enumerate(kept + [fill] * (width - len(kept))))

    return field


def inserted(a: int, b: int, position: int, length: int, width: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < width and i < width:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def dot_bytes(a: int, b: int, c: int, first: str, second: str) -> int:
    def parts(x: int, kind: str) -> list[int]:
        return [wrap(x >> 8 * i, f"{kind[0]}8") for i in range(4)]

    return c + sum(x * y for x, y in zip(parts(a, first), parts(b, second), strict=True))


def comparison(relation: str, kind: str) -> Case:
    tests: dict[str, Callable[[Any, Any], bool]] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b,
        "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
    }  # fmt: skip
    a, b = inputs(kind, 1), inputs(kind, 2)
    b[::3] = a[::3]
    body = f"setp.{relation}.{kind} %p1, %a, %b;\nselp.u32 %y, 1, 0, %p1;"
    return case(f"setp.{relation}.{kind}", f"{kind} {kind}", "u32", body,
                lambda x, y: int(tests[relation](x, y)), values=(a, b))  # fmt: skip


def selection(opcode: str, kind: str) -> Case:
    body = f"setp.lt.u32 %p1, %tid, 20;\n{opcode} %y, %a, %b, %p1;"
    position = np.arange(THREADS, dtype="u4")
    return case(f"{opcode}", f"{kind} {kind} u32", kind, body, lambda a, b, t: a if t < 20 else b,
                values=(inputs(kind, 1), inputs(kind, 2), position))  # fmt: skip


def carry_cases() -> Iterator[Case]:
    mask = (1 << 64) - 1
    add = """mov.b64 {%r1, %r2}, %a; mov.b64 {%r3, %r4}, %b;
        add.cc.u32 %r1, %r1, %r3; addc.u32 %r2, %r2, %r4; mov.b64 %y, {%r1, %r2};"""
    yield case("add.cc addc", "u64 u64", "u64", add, lambda a, b: a + b & mask)
    subtract = add.replace("add.cc", "sub.cc").replace("addc", "subc")
    yield case("sub.cc subc", "u64 u64", "u64", subtract, lambda a, b: a - b & mask)
    chain = "add.cc.u32 %r1, %a, %a; addc.cc.u32 %r2, %b, %b; addc.u32 %y, 0, 0;"
    yield case("addc.cc", "u32 u32", "u32", chain, lambda a, b: (b * 2 + (a * 2 >> 32)) >> 32)
    chain = "sub.cc.u32 %r1, %a, %b; subc.cc.u32 %r2, %b, %b; subc.u32 %y, 0, 0;"
    yield case("subc.cc", "u32 u32", "u32", chain, lambda a, b: -int(a < b))
    multiply = """mad.lo.cc.u32 %r1, %a, %b, %a; madc.hi.u32 %r2, %a, %b, 0; mov.b64 %y, {%r1, %r2};"""
    yield case("mad.lo.cc madc.hi", "u32 u32", "u64", multiply, lambda a, b: a * b + a)


def byte_cases() -> Iterator[Case]:
    def permuted(a: int, b: int, selector: int) -> int:
        both = a | b << 32
        result = 0
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = both >> 8 * (pick & 7) & 255
            result |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
        return result

    yield simple("prmt.b32", "b32 b32 b32", "b32", permuted)
    order: dict[str, Callable[[int, int], int]] = {
        "f4e": lambda s, i: s + i, "b4e": lambda s, i: (s - i) % 8, "rc8": lambda s, i: s,
        "ecl": lambda s, i: max(s, i), "ecr": lambda s, i: min(s, i), "rc16": lambda s, i: 2 * (s & 1) + (i & 1),
    }  # fmt: skip
    for mode, pick in order.items():
        yield simple(f"prmt.b32.{mode}", "b32 b32 b32", "b32",
                     lambda a, b, s, f=pick: sum(((a | b << 32) >> 8 * f(s & 3, i) & 255) << 8 * i
                                                 for i in range(4)))  # fmt: skip
    for table in (0x00, 0x80, 0x96, 0xE8, 0x3C, 0xFF):
        yield case(f"lop3.b32 {table:#x}", "b32 b32 b32", "b32", f"lop3.b32 %y, %a, %b, %c, {table};",
                   lambda a, b, c, k=table: sum((k >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i
                                                for i in range(32)))  # fmt: skip
    for side in "lr":
        for limit in ("clamp", "wrap"):

            def shifted(a: int, b: int, n: int, side: str = side, limit: str = limit) -> int:
                n = n & 31 if limit == "wrap" else min(n, 32)
                return (b << 32 | a) << n >> 32 if side == "l" else (b << 32 | a) >> n

            yield simple(f"shf.{side}.{limit}.b32", "b32 b32 u32", "b32", shifted)


# ---- floating point


def fma(form: tuple[int, int, int], mode: str = "rn") -> Callable[[float, float, float], float]:
    def result(a: float, b: float, c: float) -> float:
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact == 0:  # the sign of a sum of zeros
            return a * b + c
        return rounded(exact, form, mode)

    return result


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def float_cases() -> Iterator[Case]:
    f32, f64 = reference.F32, reference.F64
    ties = np.array([1 + k * 2.0**-23 for k in range(THREADS)], "f4")  # products of these end on ties
    for suffix in ("", ".rn"):
        for kind, form in (("f32", f32), ("f64", f64)):
            two = f"{kind} {kind}"
            yield simple(f"add{suffix}.{kind}", two, kind, lambda a, b, f=form: rounded_sum(a, b, f))
            yield simple(f"sub{suffix}.{kind}", two, kind, lambda a, b, f=form: rounded_sum(a, -b, f))
            yield simple(f"mul{suffix}.{kind}", two, kind, lambda a, b, f=form: rounded_product(a, b, f))
    for mode in ("rz", "rm", "rp"):
        yield simple(f"add.{mode}.f32", "f32 f32", "f32", lambda a, b, m=mode: rounded_sum(a, b, f32, m))
        yield simple(f"sub.{mode}.f32", "f32 f32", "f32", lambda a, b, m=mode: rounded_sum(a, -b, f32, m))
        yield simple(f"mul.{mode}.f32", "f32 f32", "f32", lambda a, b, m=mode: rounded_product(a, b, f32, m))
        yield simple(f"fma.{mode}.f32", "f32 f32 f32", "f32", fma(f32, mode))
    yield simple("fma.rn.f32", "f32 f32 f32", "f32", fma(f32))
    yield case("fma.rn.f32 at ties", "f32 f32 f32", "f32", "fma.rn.f32 %y, %a, %b, %c;", fma(f32),
               values=(ties, ties[::-1].copy(), np.array([(-1) ** k * 2.0**-60 for k in range(THREADS)], "f4"))
               )  # fmt: skip
    yield case("fma.rn.f32, subnormal results", "f32 f32 f32", "f32", "fma.rn.f32 %y, %a, %b, %c;", fma(f32),
               values=(ties * np.float32(2.0**-70), ties[::-1] * np.float32(2.0**-70),
                       np.full(THREADS, 2.0**-149, "f4")))  # fmt: skip
    # 2**-150 and a little more, added to even multiples of 2**-149: float64 loses the little, and with it the way up.
    above = (np.float32((2**23 + 2048) * 2.0**-98), np.float32((2**24 - 4095) * 2.0**-99))
    yield case("fma.rn.f32 at subnormal ties", "f32 f32 f32", "f32", "fma.rn.f32 %y, %a, %b, %c;", fma(f32),
               values=(*(np.full(THREADS, factor) for factor in above),
                       np.array([2.0**-127 + k * 2.0**-148 for k in range(THREADS)], "f4")))  # fmt: skip
    moderate = tuple(np.random.default_rng(k).standard_normal(THREADS) for k in range(3))
    yield case("fma.rn.f64", "f64 f64 f64", "f64", "fma.rn.f64 %y, %a, %b, %c;", fma(f64), values=moderate,
               tolerance=2.0**-52)  # fmt: skip
    yield simple("add.ftz.f32", "f32 f32", "f32", lambda a, b: flushed(rounded_sum(flushed(a), flushed(b), f32)))
    yield simple("mul.ftz.f32", "f32 f32", "f32", lambda a, b: flushed(rounded_product(flushed(a), flushed(b), f32)))
    yield simple("fma.rn.ftz.f32", "f32 f32 f32", "f32",
                 lambda a, b, c: flushed(fma(f32)(flushed(a), flushed(b), flushed(c))))  # fmt: skip
    yield simple("add.sat.f32", "f32 f32", "f32", lambda a, b: min(1.0, max(0.0, rounded_sum(a, b, f32))))
    for kind, form in (("f32", f32), ("f64", f64)):
        divisors = (floats(kind, 5), np.where(floats(kind, 6) == 0, 3, floats(kind, 6)).astype(DTYPES[kind]))
        yield simple(f"div.rn.{kind}", f"{kind} {kind}", kind,
                     lambda a, b, f=form: signed_zero(a * b, rounded(Fraction(a) / Fraction(b), f)),
                     values=divisors)  # fmt: skip
        positive = (np.abs(floats(kind, 7)) + np.finfo(DTYPES[kind]).tiny,)
        yield simple(f"sqrt.rn.{kind}", kind, kind, lambda a, f=form: rounded_root(a, f), values=positive)
        yield simple(f"rcp.rn.{kind}", kind, kind, lambda a, f=form: rounded(1 / Fraction(a), f), values=(divisors[1],))
        yield simple(f"neg.{kind}", kind, kind, lambda a: -a)
        yield simple(f"abs.{kind}", kind, kind, abs)
        yield simple(f"copysign.{kind}", f"{kind} {kind}", kind, lambda a, b: math.copysign(b, a))
        yield simple(f"min.{kind}", f"{kind} {kind}", kind, lesser)
        yield simple(f"max.{kind}", f"{kind} {kind}", kind, lambda a, b: -lesser(-a, -b))
        yield simple(f"mov.{kind}", kind, kind, lambda a: a)
        yield selection(f"selp.{kind}", kind)
        for relation in ("eq", "ne", "lt", "le", "gt", "ge"):
            yield comparison(relation, kind)
        for test, holds in (("finite", math.isfinite), ("infinite", math.isinf), ("notanumber", math.isnan)):
            yield predicate(f"testp.{test}.{kind}", special(kind), holds)
        tiny = float(np.finfo(DTYPES[kind]).tiny)
        yield predicate(f"testp.number.{kind}", special(kind), lambda a: not math.isnan(a))
        yield predicate(f"testp.normal.{kind}", special(kind), lambda a, t=tiny: math.isfinite(a) and abs(a) >= t)
        yield predicate(f"testp.subnormal.{kind}", special(kind), lambda a, t=tiny: 0 < abs(a) < t)
    for name, function, values in (
        ("ex2", lambda a: 2.0**a, np.linspace(-20, 20, THREADS)),
        ("lg2", math.log2, np.geomspace(1e-6, 1e6, THREADS)),
        ("sin", math.sin, np.linspace(-3, 3, THREADS)),
        ("cos", math.cos, np.linspace(-3, 3, THREADS)),
        ("tanh", math.tanh, np.linspace(-4, 4, THREADS)),
        ("rcp", lambda a: 1 / a, np.geomspace(1e-6, 1e6, THREADS)),
        ("rsqrt", lambda a: a**-0.5, np.geomspace(1e-6, 1e6, THREADS)),
        ("sqrt", math.sqrt, np.geomspace(1e-6, 1e6, THREADS)),
    ):
        forms = (".approx.f32",) if name == "tanh" else (".approx.f32", ".approx.ftz.f32")
        for form_name in forms:
            yield simple(f"{name}{form_name}", "f32", "f32", function, values=(values.astype("f4"),),
                         tolerance=2.0**-23)  # fmt: skip
    for form_name in ("div.full.f32", "div.approx.f32", "div.approx.ftz.f32"):
        pair = (np.linspace(1, 5, THREADS).astype("f4"), np.linspace(-9, -1, THREADS).astype("f4"))
        yield simple(form_name, "f32 f32", "f32", lambda a, b: a / b, values=pair, tolerance=2.0**-23)
    for form_name in ("rcp.approx.ftz.f64", "rsqrt.approx.f64", "rsqrt.approx.ftz.f64"):
        power = -1 if form_name[1] == "c" else -0.5
        yield simple(form_name, "f64", "f64", lambda a, p=power: a**p, values=(np.geomspace(1e-9, 1e9, THREADS),),
                     tolerance=2.0**-52)  # fmt: skip
    yield from unordered_cases()
    yield from half_cases()


def special(kind: str) -> Array:
    values = floats(kind, 4)
    values[:4] = [math.inf, -math.inf, math.nan, values[3]]
    return values


def signed_zero(sign: float, value: float) -> float:
    return math.copysign(0.0, sign) if value == 0 else value


def rounded_sum(a: float, b: float, form: tuple[int, int, int], mode: str = "rn") -> float:
    exact = Fraction(a) + Fraction(b)
    return rounded(exact, form, mode) if exact else a + b


def rounded_product(a: float, b: float, form: tuple[int, int, int], mode: str = "rn") -> float:
    exact = Fraction(a) * Fraction(b)
    return rounded(exact, form, mode) if exact else math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))


def rounded_root(a: float, form: tuple[int, int, int]) -> float:
    """A square root, from an integer square root of 2 * 60 more bits than are kept, made sticky."""
    exact = Fraction(a)
    shift = 2 * (120 + max(0, -math.frexp(a)[1]))
    scaled = exact * Fraction(2) ** shift
    root = math.isqrt(math.floor(scaled))
    return rounded(Fraction(2 * root + (root * root != scaled), 2) / Fraction(2) ** (shift // 2), form)


def lesser(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return a if a < b or (a == b and math.copysign(1, a) < 0) else b


def predicate(opcode: str, values: Array, holds: Callable[[float], bool]) -> Case:
    kind = opcode.rsplit(".", 1)[1]
    body = f"{opcode} %p1, %a;\nselp.u32 %y, 1, 0, %p1;"
    return case(opcode, kind, "u32", body, lambda a: int(holds(a)), values=(values,))


def unordered_cases() -> Iterator[Case]:
    a, b = special("f32"), floats("f32", 9)
    b[5:8] = math.nan
    b[8:20] = a[8:20]
    ordered: dict[str, Callable[[float, float], bool]] = {
        "equ": lambda x, y: x == y, "neu": lambda x, y: x != y, "ltu": lambda x, y: x < y, "leu": lambda x, y: x <= y,
        "gtu": lambda x, y: x > y, "geu": lambda x, y: x >= y,
    }  # fmt: skip
    tests: dict[str, Callable[[float, float], bool]] = {
        name: lambda x, y, f=test: math.isnan(x) or math.isnan(y) or f(x, y) for name, test in ordered.items()
    }
    tests["nan"] = lambda x, y: math.isnan(x) or math.isnan(y)
    tests["num"] = lambda x, y: not (math.isnan(x) or math.isnan(y))
    tests["ne"] = lambda x, y: not (math.isnan(x) or math.isnan(y)) and x != y
    for relation, test in tests.items():
        for kind in ("f32", "f64"):
            body = f"setp.{relation}.{kind} %p1, %a, %b;\nselp.u32 %y, 1, 0, %p1;"
            pair = (a.astype(DTYPES[kind]), b.astype(DTYPES[kind]))
            yield case(f"setp.{relation}.{kind} with NaN", f"{kind} {kind}", "u32", body,
                       lambda x, y, f=test: int(f(x, y)), values=pair)  # fmt: skip
    yield case("min.f32 with NaN", "f32 f32", "f32", "min.f32 %y, %a, %b;", lesser, values=(a, b))
    yield case("min.NaN.f32", "f32 f32", "f32", "min.NaN.f32 %y, %a, %b;",
               lambda x, y: math.nan if math.isnan(x) or math.isnan(y) else min(x, y), values=(a, b))  # fmt: skip
    yield case("max.NaN.f32", "f32 f32", "f32", "max.NaN.f32 %y, %a, %b;",
               lambda x, y: math.nan if math.isnan(x) or math.isnan(y) else max(x, y), values=(a, b))  # fmt: skip
    chained = "setp.lt.s32 %p2, %b, 0;\nsetp.gt.{op}.s32 %p1|%p3, %a, 5, %p2;\nselp.u32 %r1, 1, 0, %p1;\n"
    chained += "selp.u32 %r2, 2, 0, %p3;\nor.b32 %y, %r1, %r2;"
    logic: dict[str, Callable[[bool, bool], bool]] = {
        "and": lambda x, y: x and y, "or": lambda x, y: x or y, "xor": lambda x, y: x != y,
    }  # fmt: skip
    for name, operation in logic.items():
        yield case(f"setp.gt.{name}.s32", "s32 s32", "u32", chained.replace("{op}", name),
                   lambda x, y, f=operation: f(x > 5, y < 0) + 2 * f(not x > 5, y < 0))  # fmt: skip
        body = f"setp.gt.s32 %p1, %a, 5;\nsetp.lt.s32 %p2, %b, 0;\n{name}.pred %p3, %p1, %p2;\nselp.u32 %y, 1, 0, %p3;"
        yield case(f"{name}.pred", "s32 s32", "u32", body, lambda x, y, f=operation: int(f(x > 5, y < 0)))
    body = "setp.gt.s32 %p1, %a, 5;\nnot.pred %p2, %p1;\nmov.pred %p3, %p2;\nselp.u32 %y, 1, 0, %p3;"
    yield case("not.pred mov.pred", "s32", "u32", body, lambda a: int(a <= 5))
    yield case("set.lt.u32.s32", "s32 s32", "u32", "set.lt.u32.s32 %y, %a, %b;", lambda a, b: -int(a < b))
    yield case("set.lt.f32.s32", "s32 s32", "f32", "set.lt.f32.s32 %y, %a, %b;", lambda a, b: float(a < b))


def bf16_value(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def bf16_bits(value: float) -> int:
    return (
        struct.unpack("<I", struct.pack("<f", rounded(value, reference.BF16) if math.isfinite(value) else value))[0]
        >> 16
    )


def f16_value(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def f16_bits(value: float) -> int:
    value = rounded(value, reference.F16) if math.isfinite(value) else value
    return int(np.float16(value).view("u2"))


def half_cases() -> Iterator[Case]:
    """f16 and bf16, alone and in pairs: computed on bits."""
    for brain in (False, True):
        kind, form = ("bf16", reference.BF16) if brain else ("f16", reference.F16)
        value, bits = (bf16_value, bf16_bits) if brain else (f16_value, f16_bits)
        operations: dict[str, tuple[int, Callable[..., float]]] = {
            "add.rn": (2, lambda a, b, f=form: rounded_sum(a, b, f)),
            "add": (2, lambda a, b, f=form: rounded_sum(a, b, f)),
            "sub": (2, lambda a, b, f=form: rounded_sum(a, -b, f)),
            "mul": (2, lambda a, b, f=form: rounded_product(a, b, f)),
            "fma.rn": (3, fma(form)),
            "fma.rn.relu": (3, lambda a, b, c, f=form: max(0.0, fma(f)(a, b, c))),
            "min": (2, lesser),
            "max": (2, lambda a, b: -lesser(-a, -b)),
            "neg": (1, lambda a: -a),
            "abs": (1, abs),
        }
        for name, (count, function) in operations.items():
            yield simple(f"{name}.{kind}", " ".join(["b16"] * count), "b16",
                         lambda *x, f=function, v=value, e=bits: e(f(*map(v, x))),
                         values=tuple(inputs(kind, 31 + k).view("u2") for k in range(count)))  # fmt: skip
            yield simple(f"{name}.{kind}x2", " ".join(["b32"] * count), "b32",
                         lambda *x, f=function, v=value, e=bits: e(f(*(v(a & 0xFFFF) for a in x)))
                         | e(f(*(v(a >> 16) for a in x))) << 16,
                         values=tuple(inputs(f"{kind}x2", 41 + k) for k in range(count)))  # fmt: skip
        relation = f"setp.lt.{kind}"
        body = f"{relation} %p1, %a, %b;\nselp.u32 %y, 1, 0, %p1;"
        yield case(relation, "b16 b16", "u32", body, lambda a, b, v=value: int(v(a) < v(b)),
                   values=(inputs(kind, 1).view("u2"), inputs(kind, 2).view("u2")))  # fmt: skip


# ---- conversions


def conversion_cases() -> Iterator[Case]:
    f32, f64, f16 = reference.F32, reference.F64, reference.F16
    whole = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
    for to in whole:
        for source in whole:
            if to != source:
                yield simple(f"cvt.{to}.{source}", source, to, lambda a: a)
    for to, source in (("u8", "s32"), ("s8", "s32"), ("u16", "s32"), ("u32", "s64"), ("s32", "s64"), ("s16", "s64")):
        bits = WIDTHS[to]
        low, high = (0, (1 << bits) - 1) if to[0] == "u" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        yield simple(f"cvt.sat.{to}.{source}", source, to, lambda a, x=low, y=high: max(x, min(y, a)))
    for kind, form in (("f32", f32), ("f64", f64), ("f16", f16)):
        for source in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
            yield simple(f"cvt.rn.{kind}.{source}", source, kind, lambda a, f=form: rounded(Fraction(a), f) + 0.0)
    for mode in ("rz", "rm", "rp"):
        yield simple(f"cvt.{mode}.f32.s32", "s32", "f32", lambda a, m=mode: rounded(Fraction(a), f32, m) + 0.0)
        yield simple(f"cvt.{mode}.f32.u32", "u32", "f32", lambda a, m=mode: rounded(Fraction(a), f32, m) + 0.0)
        yield simple(f"cvt.{mode}.f32.f64", "f64", "f32", lambda a, m=mode: rounded(a, f32, m))
    rounding: dict[str, Callable[[Any], int]] = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}
    for source in ("f32", "f64", "f16"):
        values = special(source).astype(DTYPES[source])
        values[10:40] = np.linspace(-40, 300, 30).astype(DTYPES[source])
        for to in ("s32", "u32", "s64", "u64", "s16", "u16", "s8", "u8"):
            bits = WIDTHS[to]
            low, high = (0, (1 << bits) - 1) if to[0] == "u" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
            for mode, function in rounding.items():

                def converted(a: float, f: Any = function, x: int = low, y: int = high) -> int:
                    if math.isnan(a):
                        return 0
                    return (y if a > 0 else x) if math.isinf(a) else max(x, min(y, f(Fraction(a))))

                yield simple(f"cvt.{mode}.{to}.{source}", source, to, converted, values=(values,))
    for mode, function in rounding.items():
        yield simple(f"cvt.{mode}.f32.f32", "f32", "f32", lambda a, f=function: signed_zero(a, float(f(Fraction(a)))))
        yield simple(f"cvt.{mode}.f64.f64", "f64", "f64", lambda a, f=function: signed_zero(a, float(f(Fraction(a)))))
    yield simple("cvt.f64.f32", "f32", "f64", lambda a: a)
    yield simple("cvt.rn.f32.f64", "f64", "f32", lambda a: rounded(a, f32))
    yield simple("cvt.f32.f16", "f16", "f32", lambda a: a)
    yield simple("cvt.f64.f16", "f16", "f64", lambda a: a)
    yield simple("cvt.rn.f16.f32", "f32", "b16", f16_bits)
    yield simple("cvt.rn.f16.f64", "f64", "b16", f16_bits, values=(floats("f32", 8).astype("f8"),))
    yield simple("cvt.sat.f32.f32", "f32", "f32", lambda a: min(1.0, max(0.0, a)))
    yield simple("cvt.ftz.f32.f32", "f32", "f32", flushed)
    yield simple("cvt.rn.bf16.f32", "f32", "b16", bf16_bits)
    yield simple("cvt.rn.relu.bf16.f32", "f32", "b16", lambda a: bf16_bits(max(0.0, a) + 0.0))
    yield simple("cvt.f32.bf16", "b16", "f32", bf16_value, values=(inputs("bf16", 3),))
    yield simple("cvt.rn.f16x2.f32", "f32 f32", "b32", lambda a, b: f16_bits(a) << 16 | f16_bits(b))
    yield simple("cvt.rn.bf16x2.f32", "f32 f32", "b32", lambda a, b: bf16_bits(a) << 16 | bf16_bits(b))
    yield simple("cvt.rn.relu.f16x2.f32", "f32 f32", "b32",
                 lambda a, b: f16_bits(max(0.0, a) + 0.0) << 16 | f16_bits(max(0.0, b) + 0.0))  # fmt: skip
    yield simple("cvt.rn.relu.bf16x2.f32", "f32 f32", "b32",
                 lambda a, b: bf16_bits(max(0.0, a) + 0.0) << 16 | bf16_bits(max(0.0, b) + 0.0))  # fmt: skip
    near_ties = np.array([1 + k * 2.0**-13 for k in range(-32, 32)], "f4")
    for mode in ("rna", "rn"):
        yield simple(f"cvt.{mode}.tf32.f32", "f32", "b32",
                     lambda a, m=mode: struct.unpack("<I", struct.pack("<f", rounded(a, reference.TF32, m)))[0],
                     values=(near_ties,))  # fmt: skip
    for kind in ("e4m3", "e5m2"):
        values = (np.geomspace(1e-6, 1e6, THREADS).astype("f4"), -np.linspace(0, 500, THREADS).astype("f4"))
        yield simple(f"cvt.rn.satfinite.{kind}x2.f32", "f32 f32", "b16",
                     lambda a, b, k=kind: f8_bits(a, k) << 8 | f8_bits(b, k), values=values)  # fmt: skip
        yield simple(f"cvt.rn.satfinite.{kind}x2.f16x2", "b32", "b16",
                     lambda a, k=kind: f8_bits(f16_value(a >> 16), k) << 8 | f8_bits(f16_value(a & 0xFFFF), k),
                     values=(inputs("f16x2", 5),))  # fmt: skip
        codes = np.arange(0, 2 * THREADS, 2, dtype="u2") * 257 + 256
        yield simple(f"cvt.rn.f16x2.{kind}x2", "b16", "b32",
                     lambda a, k=kind: f16_bits(f8_value(a >> 8, k)) << 16 | f16_bits(f8_value(a & 0xFF, k)),
                     values=(codes % 0x7C00 & 0x7B7B,))  # fmt: skip
    yield case("mov.b32 pack", "b16 b16", "b32", "mov.b32 %y, {%a, %b};", lambda a, b: a | b << 16)
    yield case("mov.b32 unpack", "b32", "b16", "mov.b32 {%h1, %h2}, %a;\nxor.b16 %y, %h1, %h2;",
               lambda a: a & 0xFFFF ^ a >> 16)  # fmt: skip
    body = "mov.b64 {%h1, %h2, %h3, %h4}, %a;\nmov.b64 %y, {%h4, %h3, %h2, %h1};"
    yield case("mov.b64 of four", "b64", "b64", body,
               lambda a: sum((a >> 16 * i & 0xFFFF) << 48 - 16 * i for i in range(4)))  # fmt: skip


def f8_value(code: int, kind: str) -> float:
    exponent_bits, fraction_bits = (4, 3) if kind == "e4m3" else (5, 2)
    bias = (1 << (exponent_bits - 1)) - 1
    exponent, fraction = (code & 0x7F) >> fraction_bits, code & ((1 << fraction_bits) - 1)
    size = (fraction + (exponent > 0) * 2.0**fraction_bits) * 2.0 ** (max(exponent, 1) - bias - fraction_bits)
    return -size if code & 0x80 else size


def f8_bits(value: float, kind: str) -> int:
    """The nearest finite code, by trying all; an even code at a tie."""
    codes = range(0x7F if kind == "e4m3" else 0x7C)
    best = min(codes, key=lambda code: (abs(Fraction(f8_value(code, kind)) - abs(Fraction(value))), code & 1))
    return best | (0x80 if math.copysign(1, value) < 0 else 0)


CASES: list[Case] = [*integer_cases(), *float_cases(), *conversion_cases()]
