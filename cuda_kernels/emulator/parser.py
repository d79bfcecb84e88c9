"""PTX text to a Module (PTX ISA, chapters "Syntax" and "Directives"). Whatever it cannot read is a PtxError."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from cuda_kernels.emulator.errors import PtxError
from cuda_kernels.emulator.ptx import DTYPES, SIZES, Function, Instruction, Label, Module, Variable

MAX_REGISTERS = 1 << 18

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_SPACE = re.compile(r"\s*")
_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|file|loc)\b([^\n]*)")
_FUNCTION_HEAD = re.compile(r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(entry|func)\b([^{;]*)([{;])")
_STATEMENT = re.compile(r'((?:[^;"]|"[^"]*")*);')
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@\s*(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
_REGISTER_RANGE = re.compile(r"([\w$%]+)<(\d{1,9})>$")
_QUALIFIERS = re.compile(
    r"\.(?:visible|extern|weak|common|attribute\s*\([^)]*\))\s*|\.ptr\b(?:\s*\.(?:global|shared|const|local)\b)?"
)
_VARIABLE = re.compile(
    r"\.(shared|global|const|local|param)\b((?:\s*\.\w+(?:\s+\d+)?)*)\s+([\w$%]+)\s*((?:\[\s*\d*\s*\]\s*)*)(=.*)?$",
    re.S,
)
_LOCATION = re.compile(r"\s*(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"\n]*)"')
_IDENTIFIER = re.compile(r"[%$]?[A-Za-z_$][\w$]*(?:\.[xyz]\b)?")


def parse_modules(texts: Sequence[str]) -> Module:
    """Parse PTX texts and link them: the first definition of a name counts."""
    linked = Module()
    known: set[str] = set()
    for text in texts:
        module = _Parser(text).parse()
        for name, function in module.functions.items():
            linked.functions.setdefault(name, function)
        linked.variables += [variable for variable in module.variables if variable.name not in known]
        known |= {variable.name for variable in module.variables}
    return linked


def split_operands(text: str) -> list[str]:
    """Split at the commas that are outside of brackets."""
    found, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            found.append(text[start:position].strip())
            start = position + 1
    rest = text[start:].strip()
    return [*found, rest] if rest else found


def parse_variable(text: str) -> Variable:
    """Read a declaration such as `.shared .align 16 .b8 tile[1024]` or `.param .u64 x`."""
    match = _VARIABLE.match(_QUALIFIERS.sub("", text.strip()))
    if not match:
        raise PtxError(f"cannot read the declaration: {_shortened(text)}")
    space, modifiers, name, dimensions, initial = match.groups()
    types = [word for word in re.findall(r"\.(\w+)", modifiers) if word in DTYPES]
    if not types:
        raise PtxError(f"no type the emulator knows in the declaration: {_shortened(text)}")
    dtype = DTYPES[types[-1]]
    align = re.search(r"\.align\s+(\d+)", modifiers)
    vector = re.search(r"\.v([24])\b", modifiers)
    nbytes = SIZES[dtype] * (int(vector[1]) if vector else 1)
    alignment = int(align[1]) if align else nbytes
    if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 16:
        raise PtxError(f"alignment must be a power of two: {_shortened(text)}")
    unsized = False
    for dimension in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
        unsized |= not dimension
        nbytes *= int(dimension or 0)
    return Variable(space, name, alignment, nbytes, dtype, types[-1], initial and initial[1:].strip(), unsized)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:117] + "..."


class _Scopes:
    """Nested `{ }` scopes: a name declared inside one becomes unique, and outer names shine through."""

    def __init__(self) -> None:
        self._scopes: list[dict[str, str]] = [{}]
        self._numbers = itertools.count()

    @property
    def depth(self) -> int:
        return len(self._scopes)

    def open(self) -> None:
        self._scopes.append({})

    def close(self) -> None:
        self._scopes.pop()

    def declare(self, name: str) -> str:
        if len(self._scopes) == 1:
            return name
        unique = f"{name}$$s{next(self._numbers)}"
        self._scopes[-1][name] = unique
        return unique

    def resolve(self, text: str) -> str:
        if len(self._scopes) == 1:
            return text
        return _IDENTIFIER.sub(lambda match: self._lookup(match[0]), text)

    def _lookup(self, name: str) -> str:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return name


class _Parser:
    def __init__(self, text: str) -> None:
        # Comments leave their line ends behind, so that line numbers in messages are those of the text.
        self.text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n") + " ", text)
        self.files = {int(number): path for number, path in _FILE.findall(self.text)}
        self.position = 0
        self.module = Module()
        self._counted, self._lines = 0, 1

    def line(self) -> int:
        """The line of the current position."""
        self._lines += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines

    def error(self, message: str) -> PtxError:
        return PtxError(f"line {self.line()} of the PTX: {message}")

    def skip_space(self) -> bool:
        """Move to the next token; False at the end of the text."""
        match = _SPACE.match(self.text, self.position)
        self.position = match.end() if match else self.position
        return self.position < len(self.text)

    def statement(self) -> str:
        """Read up to the next semicolon."""
        match = _STATEMENT.match(self.text, self.position)
        if not match:
            raise self.error(f"no end of the statement: {_shortened(self.text[self.position : self.position + 200])}")
        self.position = match.end()
        return match[1].strip()

    def parse(self) -> Module:
        while self.skip_space():
            if match := _LINE_DIRECTIVE.match(self.text, self.position):
                if match[1] == "address_size" and match[2].strip() != "64":
                    raise self.error("the emulator runs 64-bit PTX only")
                self.position = match.end()
            elif self.text.startswith(".section", self.position):
                self.skip_section()
            elif match := _FUNCTION_HEAD.match(self.text, self.position):
                self.function(match)
            else:
                declaration = self.statement()
                if declaration and not declaration.startswith((".pragma", ".alias")):
                    self.module.variables.append(parse_variable(declaration))
        return self.module

    def skip_section(self) -> None:
        """Step over `.section name { ... }` (debug information)."""
        start = self.text.find("{", self.position)
        end = self.text.find("}", start)
        if start < 0 or end < 0:
            raise self.error("no end of the section")
        self.position = end + 1

    def function(self, match: re.Match[str]) -> None:
        function = self.head(match[3], match[2] == "entry")
        self.position = match.end()
        if match[4] == ";":
            return  # a declaration: the definition is elsewhere
        self.module.functions.setdefault(function.name, function)
        self.body(function)

    def head(self, text: str, entry: bool) -> Function:
        text = text.strip()
        results = ""
        if text.startswith("("):
            results, closed, text = text[1:].partition(")")
            if not closed:
                raise self.error("no end of the result list")
        name = re.match(r"\s*([\w$%]+)\s*", text)
        if not name:
            raise self.error("a function without a name")
        function = Function(name[1], entry)
        rest = text[name.end() :]
        parameters = ""
        if rest.startswith("("):
            parameters, closed, rest = _QUALIFIERS.sub("", rest[1:]).partition(")")
            if not closed:
                raise self.error("no end of the parameter list")
        function.parameters = [parse_variable(text) for text in split_operands(parameters)]
        function.results = [
            parse_variable(text if ".reg" not in text else text.replace(".reg", ".param"))
            for text in split_operands(results)
        ]
        if limit := re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", rest):
            x, y, z = (int(limit[axis] or 1) for axis in (1, 2, 3))
            function.max_threads = x * y * z
        return function

    def body(self, function: Function) -> None:
        scopes, location = _Scopes(), None
        while self.skip_space():
            character = self.text[self.position]
            if character == "{":
                scopes.open()
                self.position += 1
            elif character == "}":
                self.position += 1
                if scopes.depth == 1:
                    return
                scopes.close()
            elif character == ";":
                self.position += 1
            elif match := _LINE_DIRECTIVE.match(self.text, self.position):
                place = _LOCATION.match(match[2])
                if match[1] == "loc" and place:
                    location = (self.files.get(int(place[1]), "?"), int(place[2]))
                self.position = match.end()
            elif match := _LABEL.match(self.text, self.position):
                self.position = match.end()
                self.label(function, scopes.resolve(match[1]))
            else:
                self.body_statement(function, scopes, location)
        raise self.error(f"no end of the function {function.name}")

    def label(self, function: Function, name: str) -> None:
        self.skip_space()
        if self.text.startswith(".branchtargets", self.position):
            function.tables[name] = split_operands(self.statement()[len(".branchtargets") :])
        elif self.text.startswith((".callprototype", ".calltargets"), self.position):
            raise self.error("indirect calls are not supported")
        else:
            function.code.append(Label(name))

    def body_statement(self, function: Function, scopes: _Scopes, location: tuple[str, int] | None) -> None:
        line = self.line()
        text = self.statement()
        if text.startswith(".reg"):
            for name, dtype in self.registers(text):
                function.registers[scopes.declare(name)] = dtype
                if len(function.registers) > MAX_REGISTERS:
                    raise self.error(f"more than {MAX_REGISTERS} registers in {function.name}")
        elif re.match(r"\.(shared|local|param|global|const)\b", text):
            variable = parse_variable(text)
            name = scopes.declare(variable.name)
            function.variables.append(Variable(**(vars(variable) | {"name": name})))
        elif not text.startswith("."):
            match = _INSTRUCTION.match(text)
            if not match:
                raise self.error(f"cannot read the instruction: {_shortened(text)}")
            negated, predicate, opcode, operands = match.groups()
            function.code.append(
                Instruction(
                    opcode,
                    tuple(scopes.resolve(operand) for operand in split_operands(operands)),
                    scopes.resolve(predicate) if predicate else None,
                    bool(negated),
                    location,
                    " ".join(text.split()),
                    line,
                )
            )

    def registers(self, text: str) -> Iterator[tuple[str, str]]:
        match = _REGISTERS.match(text)
        if not match or match[1] not in DTYPES:
            raise self.error(f"cannot read the registers: {_shortened(text)}")
        for name in split_operands(match[2]):
            span = _REGISTER_RANGE.match(name)
            if span and int(span[2]) > MAX_REGISTERS:
                raise self.error(f"more than {MAX_REGISTERS} registers in one declaration")
            if not span and not re.match(r"[\w$%]+$", name):
                raise self.error(f"cannot read the registers: {_shortened(text)}")
            for register in [f"{span[1]}{number}" for number in range(int(span[2]))] if span else [name]:
                yield register, DTYPES[match[1]]
