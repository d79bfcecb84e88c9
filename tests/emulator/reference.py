"""What instructions must give, in Python's exact integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

# significand bits, smallest exponent of a normal number, largest exponent
F64, F32, F16, BF16 = (53, -1022, 1023), (24, -126, 127), (11, -14, 15), (8, -126, 127)
E4M3, E5M2, TF32 = (4, -6, 8), (3, -14, 15), (11, -126, 127)


def wrap(value: int, kind: str) -> int:
    """An integer in the range of a PTX type such as u32 or s16."""
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def rounded(value: Fraction | float, form: tuple[int, int, int], mode: str = "rn") -> float:
    """A finite value in a floating-point format: rn to nearest even, rna ties away, rz, rm and rp directed."""
    exact = Fraction(value)
    if exact == 0:
        return float(value)
    precision, smallest, largest = form
    exponent = max(exact.numerator.bit_length() - exact.denominator.bit_length() - 1, smallest)
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    exponent = max(exponent, smallest)
    unit = Fraction(2) ** (exponent - precision + 1)
    count = exact / unit
    if mode == "rna":
        whole = math.floor(abs(count) + Fraction(1, 2)) * (1 if count > 0 else -1)
    else:
        whole = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](count)
    result = whole * unit
    limit = (Fraction(2) - Fraction(2) ** (1 - precision)) * Fraction(2) ** largest
    if abs(result) > limit:
        away = {"rn": True, "rna": True, "rz": False, "rm": result < 0, "rp": result > 0}[mode]
        return (1 if result > 0 else -1) * (math.inf if away else float(limit))
    if result == 0:
        return 0.0 if exact > 0 else -0.0
    return float(result)
