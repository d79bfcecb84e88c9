"""Small PTX texts for tests: a body between loads of the inputs and a store of the result."""

from __future__ import annotations

from collections.abc import Sequence

HEADER = ".version 8.4\n.target sm_80\n.address_size 64\n"
DTYPES = {
    "b8": "u1", "u8": "u1", "s8": "i1",
    "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
}  # fmt: skip
WIDTHS = {kind: 8 * int(dtype[1]) for kind, dtype in DTYPES.items()}
REGISTERS = """
    .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %rd<32>; .reg .f32 %f<32>; .reg .f64 %d<8>;
    .reg .b32 %tid; .reg .b64 %at;
"""


def _register(kind: str) -> str:
    """The register type that holds a PTX type."""
    return kind if kind in ("f32", "f64") else f"b{max(16, WIDTHS[kind])}"


def kernel(inputs: Sequence[str], output: str, body: str, declarations: str = "") -> str:
    """A kernel in which thread t loads element t of each input into %a, %b, ..., runs `body`, and stores %y.

    inputs, output: PTX types. A body may use the registers of REGISTERS too.
    """
    names = "abcdefgh"[: len(inputs)]
    lines = [f".param .u64 in_{name}" for name in names] + [".param .u64 out"]
    text = f"{HEADER}{declarations}\n.visible .entry k({', '.join(lines)})\n{{{REGISTERS}"
    for name, kind in zip([*names, "y"], [*inputs, output], strict=True):
        text += f"    .reg .{_register(kind)} %{name};\n"
    text += "    mov.u32 %tid, %tid.x;\n"
    for name, kind in zip(names, inputs, strict=True):
        nbytes = WIDTHS[kind] // 8
        text += f"    ld.param.u64 %at, [in_{name}];\n    mad.wide.u32 %at, %tid, {nbytes}, %at;\n"
        text += f"    ld.global.{_stored(kind)} %{name}, [%at];\n"
    text += "".join(f"    {line.strip()}\n" for line in body.strip().splitlines())
    text += f"    ld.param.u64 %at, [out];\n    mad.wide.u32 %at, %tid, {WIDTHS[output] // 8}, %at;\n"
    return text + f"    st.global.{_stored(output)} [%at], %y;\n    ret;\n}}\n"


def _stored(kind: str) -> str:
    return kind if kind in ("f32", "f64", "s8", "u8") else f"b{WIDTHS[kind]}"


def plain_kernel(parameters: str, body: str, declarations: str = "") -> str:
    """A kernel of a parameter list and a body, with REGISTERS declared."""
    return f"{HEADER}{declarations}\n.visible .entry k({parameters})\n{{{REGISTERS}{body}\n    ret;\n}}\n"


def parse_only(body: str) -> str:
    """A text that can be parsed and not run: for naming the opcodes of a body."""
    return f"{HEADER}.visible .entry k()\n{{\n{body}\nret;\n}}\n"


def with_lines(text: str) -> str:
    """Give every statement of a body a `.loc`: its line number in `text`, from 1."""
    numbered = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.split("//")[0].strip()
        plain = not bare or bare[0] in ".{}" or bare.endswith(":")
        numbered.append(line if plain else f".loc 1 {number} 0\n{line}")
    return "\n".join(numbered)
