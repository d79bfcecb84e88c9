"""Mutants of the GPU kernels: one barrier, wait, bound, mask or index of a kernel's source changed at a time.

`mutants(module)` lists what can be changed in the device code of a module of cuda_kernels: the functions decorated with
`device_function`, and those nested in a builder (a function named build_... or _build_...). Sites are found in the
syntax tree:

    barrier   cuda.syncthreads(), cuda.syncwarp()           removed
    wait      cp_async_wait(n)                              removed; n + 1
    commit    cp_async_commit()                             removed
    bound     a < b in a condition, or kept as a flag       a <= b, and likewise for >, <=, >=; left out
              min(a, b), max(a, b)                          the first that is no constant
    mask      a bound whose branch puts zeros or -inf       as for a bound
    index     an element of a block table, or of a list of  one more
              slots, rows, ids or pairs of blocks
              tile & 1, tile % stages                       the other stage

A condition left out is true where it guards work or stands beside `and`, false where it guards a return or puts a mask,
or stands beside `or`. Conditions that only a builder's constants decide are no sites: they choose a variant.

`installed(mutant)` makes imports of the package give the mutant, under the real file's name and line numbers.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import cuda_kernels
from cuda_kernels.kernel import Kernel

__all__ = ["KINDS", "PACKAGE", "Mutant", "contains", "installed", "mutant_named", "mutants", "source_of"]

PACKAGE = cuda_kernels.__name__
KINDS = ("barrier", "wait", "commit", "bound", "mask", "index")

_FOLDER = Path(cuda_kernels.__path__[0])
_EMPTY = ("NEG_INF", "masked", "zero", "ZERO", "_ZERO", "nothing", "NOTHING", "_MINUS_INF")  # what masks put
_MASK_FUNCTIONS = ("lowest_key", "window_and_sinks", "_first_key")
_INDEX_ARRAYS = ("block_tables", "tables", "pairs", "slots", "slot_mapping", "ids", "rows")
_STAGE_COUNTERS = ("tile", "step", "s", "column_tile >> 2")
_LOOSER: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        module: name inside cuda_kernels, "sampling".
        function: where, with the functions around it: "_build_sample.scan".
        kind: one of KINDS.
        change: what becomes of what; a number in parentheses tells repeated ones apart.
        line: of the source; no part of the name.
    """

    module: str
    function: str
    kind: str
    change: str
    line: int

    @property
    def name(self) -> str:
        """Stays the same when lines move."""
        return f"{self.module}.{self.function}: {self.change}"


@dataclass(frozen=True)
class _Site:
    """A change that can be made to the syntax tree in which it was found."""

    function: str
    kind: str
    change: str
    line: int
    apply: Callable[[], None]


def source_of(module: str) -> Path:
    """The file of a module of cuda_kernels."""
    return _FOLDER / f"{module}.py"


@cache
def mutants(module: str) -> tuple[Mutant, ...]:
    """All mutants of a module, in the order of its source."""
    return tuple(mutant for mutant, _ in _numbered(module, ast.parse(source_of(module).read_text("utf-8"))))


def mutant_named(name: str) -> Mutant:
    """The mutant of this name. Raises KeyError where the sources have no such site."""
    return {mutant.name: mutant for mutant in mutants(name.split(".", 1)[0])}[name]


def _numbered(module: str, tree: ast.Module) -> list[tuple[Mutant, _Site]]:
    """Mutants with the sites of this very tree."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for site in _sites(tree):
        seen[site.function, site.change] += 1
        repeated = seen[site.function, site.change]
        change = site.change if repeated == 1 else f"{site.change} ({repeated})"
        found.append((Mutant(module, site.function, site.kind, change, site.line), site))
    return found


def _mutated(mutant: Mutant) -> ast.Module:
    tree = ast.parse(source_of(mutant.module).read_text("utf-8"))
    site = next(site for found, site in _numbered(mutant.module, tree) if found.name == mutant.name)
    site.apply()
    return ast.fix_missing_locations(tree)


# ---- which kernels have it


def contains(kernel: Kernel, mutant: Mutant) -> bool:
    """Whether the kernel's code may have come from the function at the top of the module that the mutant changes."""
    return (mutant.module, mutant.function.split(".")[0]) in _parts(kernel.build.__module__, kernel.build.__name__)


@cache
def _parts(module: str, builder: str) -> frozenset[tuple[str, str]]:
    """(module of the package, name at its top) of all that a builder names, in turn, but for other kernels."""
    todo, seen = [(module, builder)], set[tuple[str, str]]()
    while todo:
        where, name = todo.pop()
        definitions, imports = _top_level(where)
        for used in _names(definitions[name]) if name in definitions else ():
            found = imports.get(used, (where, used))
            if found not in seen and not found[1].startswith("_build"):
                seen.add(found)
                todo.append(found)
    prefix = f"{PACKAGE}."
    parts = {
        (where.removeprefix(prefix), name) for where, name in {*seen, (module, builder)} if where.startswith(prefix)
    }
    return frozenset(parts)


@cache
def _top_level(module: str) -> tuple[dict[str, ast.stmt], dict[str, tuple[str, str]]]:
    """A module's definitions by name, and where in the package its imported names come from."""
    file = sys.modules[module].__file__
    assert file is not None
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.parse(Path(file).read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            definitions |= dict.fromkeys(_stored(node), node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            imports |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
    return definitions, imports


def _stored(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


# ---- importing


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, tree: ast.Module) -> None:
        super().__init__(fullname, path)
        self._tree = tree

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._tree, self.path, "exec")
        return code


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._name, self._path = f"{PACKAGE}.{mutant.module}", str(source_of(mutant.module))
        self._tree = _mutated(mutant)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self._path, loader=_Loader(fullname, self._path, self._tree)
        )


@contextmanager
def installed(mutant: Mutant, also_afresh: Sequence[str] = ()) -> Iterator[None]:
    """While it lasts, the package and the packages `also_afresh` are imported anew, with the mutant's module in place.

    What was imported before keeps its modules, and gets them back afterwards.
    """
    packages = (PACKAGE, *also_afresh)

    def ours() -> list[str]:
        return [name for name in sys.modules if name in packages or name.startswith(tuple(f"{p}." for p in packages))]

    kept = {name: sys.modules.pop(name) for name in ours()}
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)


# ---- sites


def _sites(tree: ast.Module) -> Iterator[_Site]:
    for function, factory, name in _device_functions(tree):
        yield from _Finding(function, factory, name).sites()


def _device_functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.FunctionDef | None, str]]:
    """(function, the function around it, its name with that of those around it)."""

    def walk(
        nodes: list[ast.stmt], around: list[ast.FunctionDef]
    ) -> Iterator[tuple[ast.FunctionDef, list[ast.FunctionDef]]]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                yield node, around
                yield from walk(node.body, [*around, node])
            elif isinstance(node, (ast.If, ast.ClassDef)):
                yield from walk(node.body, around)

    for node, around in walk(tree.body, []):
        decorated = any(ast.unparse(d) == "device_function" for d in node.decorator_list)
        built = bool(around) and around[0].name.lstrip("_").startswith("build_")
        if decorated or built:
            yield node, around[-1] if around else None, ".".join(f.name for f in (*around, node))


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _true(value: bool, at: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Constant(value), at)


class _Finding:
    """The sites of one device function."""

    def __init__(self, function: ast.FunctionDef, factory: ast.FunctionDef | None, name: str) -> None:
        self.function, self.factory, self.name = function, factory, name
        self.runtime = self._runtime_names()

    def _runtime_names(self) -> set[str]:
        """Names whose values the compiler cannot know: parameters, what is loaded, and what is made of these."""
        known = {a.arg for a in self.function.args.args}
        while True:
            before = len(known)
            for node in ast.walk(self.function):
                pairs: list[tuple[ast.expr, ast.expr]] = []
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and several:
                            pairs += zip(target.elts, node.value.elts, strict=True)
                        else:
                            pairs.append((target, node.value))
                elif isinstance(node, (ast.AugAssign, ast.For)):
                    pairs.append((node.target, node.value if isinstance(node, ast.AugAssign) else node.iter))
                for to, value in pairs:
                    if self._depends(value, known) or (isinstance(node, ast.Assign) and self._in_runtime_loop(node)):
                        known |= {
                            n.id for n in ast.walk(to) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                        }
            if len(known) == before:
                return known

    def _in_runtime_loop(self, node: ast.AST) -> bool:
        """Whether it is assigned inside a while loop: `step += 1` is no constant there."""
        return any(
            isinstance(loop, ast.While) and any(n is node for n in ast.walk(loop)) for loop in ast.walk(self.function)
        )

    @staticmethod
    def _depends(value: ast.expr, known: set[str]) -> bool:
        for node in ast.walk(value):
            if isinstance(node, ast.Name) and node.id in known:
                return True
            if isinstance(node, ast.Attribute) and node.attr in ("threadIdx", "blockIdx", "gridDim", "atomic"):
                return True
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("place", "cuda.shared.array"):
                return True
        return False

    def _site(self, kind: str, change: str, node: ast.expr | ast.stmt, apply: Callable[[], None]) -> _Site:
        return _Site(self.name, kind, change, node.lineno, apply)

    def sites(self) -> Iterator[_Site]:
        for statement, put in self._statements(self.function):
            yield from self._calls(statement, put)
            yield from self._conditions(statement)
            yield from self._indices(statement)

    def _statements(self, node: ast.AST) -> Iterator[tuple[ast.stmt, Callable[[ast.stmt], None]]]:
        """The statements of the function and its blocks, but not of functions in it, and how to replace one."""
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            for i, statement in enumerate(block):
                if isinstance(statement, ast.FunctionDef):
                    continue

                def put(new: ast.stmt, block: list[ast.stmt] = block, i: int = i) -> None:
                    block[i] = new

                yield statement, put
                yield from self._statements(statement)

    def _calls(self, statement: ast.stmt, put: Callable[[ast.stmt], None]) -> Iterator[_Site]:
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
            return
        call = statement.value
        kind = {
            "cuda.syncthreads": "barrier",
            "cuda.syncwarp": "barrier",
            "cp_async_wait": "wait",
            "cp_async_commit": "commit",
        }.get(ast.unparse(call.func))
        if kind is None:
            return
        text = ast.unparse(call)
        yield self._site(kind, f"{text} removed", statement, lambda: put(ast.copy_location(ast.Pass(), statement)))
        if kind == "wait":
            count = ast.unparse(call.args[0])
            yield self._site(
                kind, f"{text} -> cp_async_wait({count} + 1)", statement, lambda: self._wait_for_less(call)
            )

    def _wait_for_less(self, call: ast.Call) -> None:
        """The count must be a literal or a name: a sum is made before the kernel's definition."""
        argument = call.args[0]
        if isinstance(argument, ast.Constant):
            assert isinstance(argument.value, int)
            argument.value += 1
            return
        assert self.factory is not None
        made = ast.parse(f"one_more_pending = {ast.unparse(argument)} + 1").body[0]
        position = self.factory.body.index(self.function)
        self.factory.body.insert(position, ast.copy_location(made, self.function))
        call.args[0] = ast.copy_location(ast.Name("one_more_pending", ast.Load()), argument)

    # ---- conditions

    def _conditions(self, statement: ast.stmt) -> Iterator[_Site]:
        if isinstance(statement, (ast.If, ast.While)):
            masks = any(self._is_empty(s.value) for s in statement.body if isinstance(s, ast.Assign))
            leaves = isinstance(statement.body[0], (ast.Return, ast.Continue)) and len(statement.body) == 1
            left_out = None if isinstance(statement, ast.While) else not (masks or leaves)

            def put(new: ast.expr) -> None:
                statement.test = new

            yield from self._compares(statement.test, put, left_out, masks)
        for expression, put_expression in self._expressions(statement):
            if isinstance(expression, ast.IfExp):
                first, last = self._is_empty(expression.body), self._is_empty(expression.orelse)

                def put_test(new: ast.expr, owner: ast.IfExp = expression) -> None:
                    owner.test = new

                yield from self._compares(expression.test, put_test, not first, (first or last))
            elif isinstance(expression, ast.Call):
                yield from self._clamps(expression, put_expression)
        if isinstance(statement, ast.Assign) and isinstance(statement.value, (ast.Compare, ast.BoolOp)):

            def put_value(new: ast.expr) -> None:
                statement.value = new

            yield from self._compares(statement.value, put_value, True, False)

    @staticmethod
    def _is_empty(value: ast.expr) -> bool:
        text = ast.unparse(value)
        return text in (*_EMPTY, "i32(0)", "_i32(0)", "i32(-1)", "_i32(-1)") or text in [f"({e}, {e})" for e in _EMPTY]

    def _compares(
        self, test: ast.expr, put: Callable[[ast.expr], None], left_out: bool | None, mask: bool
    ) -> Iterator[_Site]:
        """left_out: the value that stands for the whole test being left out, None if it must stay."""
        if isinstance(test, ast.BoolOp):
            for i, operand in enumerate(test.values):

                def put_operand(new: ast.expr, i: int = i) -> None:
                    test.values[i] = new

                yield from self._compares(operand, put_operand, isinstance(test.op, ast.And), mask)
            return
        if not isinstance(test, ast.Compare) or not self._depends(test, self.runtime):
            return
        if any(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops):
            return
        kind = "mask" if mask or self.function.name in _MASK_FUNCTIONS else "bound"
        text = ast.unparse(test)
        for i, op in enumerate(test.ops):
            if type(op) not in _LOOSER:
                continue
            other = _LOOSER[type(op)]()
            changed = ast.Compare(test.left, [*test.ops[:i], other, *test.ops[i + 1 :]], test.comparators)

            def apply(i: int = i, other: ast.cmpop = other) -> None:
                test.ops[i] = other

            yield self._site(kind, f"{text} -> {ast.unparse(changed)}", test, apply)
        if left_out is not None:
            yield self._site(kind, f"{text} -> {left_out}", test, lambda: put(_true(bool(left_out), test)))
        if isinstance(test.left, ast.Compare):

            def put_left(new: ast.expr) -> None:
                test.left = new

            yield from self._compares(test.left, put_left, None, mask)

    def _clamps(self, call: ast.Call, put: Callable[[ast.expr], None]) -> Iterator[_Site]:
        if ast.unparse(call.func) not in ("min", "max") or not self._depends(call, self.runtime):
            return
        left = next(argument for argument in call.args if self._depends(argument, self.runtime))
        yield self._site("bound", f"{ast.unparse(call)} -> {ast.unparse(left)}", call, lambda: put(left))

    # ---- indices

    def _indices(self, statement: ast.stmt) -> Iterator[_Site]:
        for expression, put in self._expressions(statement):
            text = ast.unparse(expression)
            changed: ast.expr | None = None
            if isinstance(expression, ast.Subscript) and isinstance(expression.ctx, ast.Load):
                if ast.unparse(expression.value) in _INDEX_ARRAYS:
                    changed = ast.parse(f"{text} + 1", mode="eval").body
            elif isinstance(expression, ast.BinOp):
                left, right = ast.unparse(expression.left), ast.unparse(expression.right)
                if isinstance(expression.op, ast.BitAnd) and right == "1" and left in _STAGE_COUNTERS:
                    changed = ast.parse(f"({text}) ^ 1", mode="eval").body
                elif isinstance(expression.op, ast.Mod) and "stages" in right.lower():
                    changed = ast.parse(f"({left} + u32(1)) % {right}", mode="eval").body
            if changed is not None:
                placed = ast.copy_location(changed, expression)
                change = f"{text} -> {ast.unparse(placed)}"
                yield self._site("index", change, expression, lambda put=put, placed=placed: put(placed))  # type: ignore[misc]

    def _expressions(self, node: ast.AST) -> Iterator[tuple[ast.expr, Callable[[ast.expr], None]]]:
        """The expressions of one statement, without those of statements in it, and how to replace one."""
        for field, value in ast.iter_fields(node):
            several = value if isinstance(value, list) else [value]
            for i, child in enumerate(several):
                if not isinstance(child, ast.expr):
                    continue

                def put(new: ast.expr, value: object = value, field: str = field, i: int = i) -> None:
                    if isinstance(value, list):
                        value[i] = new
                    else:
                        setattr(node, field, new)

                yield child, put
                yield from self._expressions(child)
            if field in ("keywords",):
                for keyword in several:
                    yield from self._expressions(keyword)
