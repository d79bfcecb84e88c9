"""The parts of a PTX module, as the parser leaves them, and PTX's scalar types in numpy's terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

# PTX ISA, "Fundamental Types", with numpy's codes. Packed and narrow floats are kept as bits.
DTYPES: dict[str, str] = {
    "b8": "u1",
    "u8": "u1",
    "s8": "i1",
    "b16": "u2",
    "u16": "u2",
    "s16": "i2",
    "f16": "f2",
    "bf16": "u2",
    "e4m3x2": "u2",
    "e5m2x2": "u2",
    "b32": "u4",
    "u32": "u4",
    "s32": "i4",
    "f32": "f4",
    "f16x2": "u4",
    "bf16x2": "u4",
    "tf32": "u4",
    "b64": "u8",
    "u64": "u8",
    "s64": "i8",
    "f64": "f8",
    "pred": "?",
}
SIZES: dict[str, int] = {"?": 1} | {kind + size: int(size) for size in "1248" for kind in "ui"}
SIZES |= {"f2": 2, "f4": 4, "f8": 8}

# Generic addresses: a window for each state space, far apart (PTX ISA, "Generic Addressing").
GLOBAL_WINDOW = 1 << 40
SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 1 << 52

SPECIAL_REGISTERS = frozenset(
    ["%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%clock", "%clock_hi", "%clock64", "%globaltimer"]
    + [f"%lanemask_{relation}" for relation in ("eq", "lt", "le", "gt", "ge")]
    + ["%dynamic_smem_size", "%total_smem_size"]
    + [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
)

# Instructions at which lanes wait for one another; each gets a basic block of its own.
COLLECTIVE = frozenset(
    [
        "bar",
        "barrier",
        "shfl",
        "vote",
        "match",
        "redux",
        "mma",
        "ldmatrix",
        "stmatrix",
        "movmatrix",
        "activemask",
        "elect",
        "wmma",
        "wgmma",
    ]
)
TERMINATORS = frozenset(["bra", "brx", "ret", "exit", "trap"])

_HINTS = frozenset(
    ["uni", "aligned", "volatile", "weak", "relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys"]
)
_CACHE_OPERATORS = frozenset(["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"])


def normalised_opcode(opcode: str) -> str:
    """The opcode without cache hints, memory-order qualifiers, `.uni` and `.aligned`: what names its arithmetic."""
    parts = opcode.split(".")
    cache = _CACHE_OPERATORS if parts[0] in ("ld", "ldu", "st") else frozenset[str]()
    spaces = [part.split("::")[0] if part.startswith("shared::") else part for part in parts[1:]]
    kept = [part for part in spaces if "::" not in part and part not in _HINTS and part not in cache]
    return ".".join([parts[0], *kept])


@dataclass(frozen=True)
class Instruction:
    """One instruction. predicate: the guarding register, negated when `@!`. location: (file, line) of the source."""

    opcode: str
    operands: tuple[str, ...] = ()
    predicate: str | None = None
    negated: bool = False
    location: tuple[str, int] | None = None
    text: str = ""
    ptx_line: int = 0

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    def where(self) -> str:
        """The instruction and its line, for messages."""
        line = f"{self.location[0]}:{self.location[1]}" if self.location else f"line {self.ptx_line} of the PTX"
        return f"{self.text} [{line}]"


@dataclass(frozen=True)
class Label:
    """A branch target."""

    name: str


@dataclass(frozen=True)
class Variable:
    """A variable of a state space. initial: the text after `=`. unsized: `extern .shared x[]`."""

    space: str
    name: str
    alignment: int
    nbytes: int
    dtype: str
    type: str
    initial: str | None = None
    unsized: bool = False


@dataclass
class Function:
    """A kernel (entry) or a device function. registers: name -> numpy code. tables: `.branchtargets` lists."""

    name: str
    entry: bool
    parameters: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instruction | Label] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)
    max_threads: int | None = None


@dataclass
class Module:
    """The functions and module-scope variables of one or more linked PTX texts."""

    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
