"""Jinja2's immutable sandbox with bounds: a hostile chat template can use neither much memory nor much time.

The sandbox keeps a template away from Python's internals, but not from `'a' * 10**9`, from four nested loops over
`range(100000)`, or from a list that holds itself twice, thirty levels deep. So every operation pays out of a budget,
before it is done, in proportion to what it reads and makes. Operators and calls pass through the sandbox's own hooks;
filters and tests are wrapped; for the rest (loops, output, `~`, literals, comparisons, slices) the syntax tree is
rewritten to pass values through filters of ours, whose names no template can write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateAssertionError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tinyllm.tokenization.parts import words

__all__ = ["MAX_CHARS", "Budget", "TemplateEnvironment", "TemplateLimitError"]

MAX_CHARS = 1 << 22  # the longest string, and the most that a list or mapping may print
MAX_WORK = 1 << 21  # one unit an operation, and one for 16 characters that are read or made: about three seconds
_CALL = 8  # a macro's frame
_MAX_WIDTH = 10_000  # padding, indentation, decimals
_MAX_INT_BITS = 256
_BUDGET = " budget"  # a variable, and filters below, with names that no template can write


class TemplateLimitError(Exception):
    """A template asked for more memory or time than it may have."""


class Budget:
    """What one rendering may still do."""

    def __init__(self, work: int) -> None:
        self._work = work
        self._weights: dict[int, tuple[object, int]] = {}  # by id; the object is kept so that its id stays taken

    def spend(self, work: int) -> None:
        """Pays for an operation. Raises TemplateLimitError when the budget is used up."""
        self._work -= 1 + work
        if self._work < 0:
            raise TemplateLimitError("it runs for too long")

    def allow(self, chars: int) -> None:
        """Pays for a value of that many characters. Raises TemplateLimitError when it is too long."""
        if chars > MAX_CHARS:
            raise TemplateLimitError(f"it makes a value of more than {MAX_CHARS} characters")
        self.spend(chars >> 4)

    def weight(self, value: object) -> int:
        """About how many characters `str(value)` has, nested values counted as often as they are printed."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, range):
            return 8 * len(value)
        if isinstance(value, Namespace):  # the only values that change, so that their weight cannot be known
            raise TemplateLimitError("it prints or stores a namespace")
        if not isinstance(value, (list, tuple, dict)):
            return 32
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        items = value if not isinstance(value, dict) else [part for item in value.items() for part in item]
        total = 2
        for item in items:
            total += 8 + self.weight(item)
            if total > MAX_CHARS:
                raise TemplateLimitError(f"it makes a value of more than {MAX_CHARS} characters")
        self._weights[id(value)] = (value, total)
        return total

    def read(self, *values: object) -> None:
        """Pays for an operation that looks at all of these values, down to the last nested one."""
        self.spend(sum(self.weight(value) >> 4 for value in values if not isinstance(value, Namespace)))

    def scan(self, *values: object) -> None:
        """Pays for an operation that looks at these values, but not into what they hold."""
        self.spend(sum(_size(value) for value in values))

    def keep(self, value: Any) -> Any:
        """Checks and pays for a value that an operation made; returns it."""
        if isinstance(value, str):
            self.allow(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.weight(value)
            self.spend(_size(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise TemplateLimitError("it makes a number that is too large")
        return value


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value) >> 4
    return len(value) >> 1 if isinstance(value, (list, tuple, dict, range)) else 0


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[_BUDGET]
    return budget


# -- what the rewritten syntax tree calls ------------------------------------------------------------------------


def _text(budget: Budget, value: Any) -> str:
    """str(value), paid for before it is made."""
    budget.allow(budget.weight(value))
    return value if isinstance(value, str) else str(value)


@pass_context
def _emit(context: Context, value: Any) -> str:
    return _text(_budget(context), value)


@pass_context
def _concat(context: Context, values: tuple[Any, ...]) -> str:
    budget = _budget(context)
    budget.allow(sum(map(budget.weight, values)))
    return "".join(map(str, values))


@pass_context
def _each(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget(context)
    for value in values:
        budget.spend(0)
        yield value


@pass_context
def _work(context: Context, work: int) -> None:
    _budget(context).spend(work)


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _budget(context).keep(value)


@pass_context
def _compared(context: Context, value: Any) -> Any:
    _budget(context).read(value)
    return value


_OWN_FILTERS = {
    " emit": _emit,
    " concat": _concat,
    " each": _each,
    " work": _work,
    " made": _made,
    " compared": _compared,
}


class _Rewriter(NodeTransformer):
    """Passes what no hook of the sandbox sees through the filters above."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = [
            nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part
            for part in node.nodes
        ]
        node.nodes = [_through(" emit", part) for part in parts]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(" concat", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _through(" each", node.iter)
        node.body.insert(0, _work_of(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, _work_of(node))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, _work_of(node))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through(" compared", node.expr)
        for operand in node.ops:
            operand.expr = _through(" compared", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(" made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(" made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(" made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(" made", node) if node.ctx == "load" else node

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:  # noqa: N802
        _check_attribute(node.attr)
        return node

    def _no_other_templates(self, node: nodes.Node) -> nodes.Node:
        raise TemplateAssertionError("a chat template cannot load other templates", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _no_other_templates  # noqa: N815


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _work_of(block: nodes.Node) -> nodes.ExprStmt:
    """Pays, each time that a body runs, for its statements that nothing else counts, such as assignments."""
    work = sum(1 for _ in block.find_all(nodes.Node)) // 8
    return nodes.ExprStmt(_through(" work", nodes.Const(work, lineno=block.lineno)), lineno=block.lineno)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %}, which marks the assistant's words for training: here, just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


# -- filters, tests and methods ----------------------------------------------------------------------------------

_FILTERS = words(
    "abs batch capitalize center count d default dictsort e escape first float format groupby indent int items join "
    "last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort "
    "string sum title tojson trim truncate unique upper urlencode wordcount"
)
_READ_NOTHING = words("count d default first last length")
_READ_ITEMS = words("batch items list reverse slice")
_VISIT_ITEMS = words("groupby map max min reject rejectattr select selectattr sort sum title unique wordcount")
_TAKE_WIDTHS = words("batch center expandtabs indent ljust rjust round slice truncate zfill")
_READ_NOTHING_TESTS = words(
    "boolean callable defined even false float integer iterable mapping none number odd sameas sequence string true "
    "undefined"
)
_UNBOUNDED_METHODS = words("encode from_bytes maketrans to_bytes translate")


def _check_growth(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses filters and string methods whose result would be far larger than what they are given."""
    given = (*args, *kwargs.values())
    if name in _TAKE_WIDTHS:
        widths = [abs(x) if isinstance(x, int) else _MAX_WIDTH if isinstance(x, float) else 0 for x in given]
        widths += [len(x) for x in given if isinstance(x, str)]
        if max(widths, default=0) > _MAX_WIDTH:
            raise TemplateLimitError(f"it pads by more than {_MAX_WIDTH}")
        if name in ("indent", "expandtabs"):
            lines = 1 + sum(map(str(value).count, "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
            budget.allow(len(str(value)) + lines * max(widths, default=8))
    elif name == "replace" and len(given) >= 2:
        old, new = str(given[0]), str(given[1])
        budget.allow(len(str(value)) + str(value).count(old) * len(new))
    elif name == "format":
        _check_format(budget, value, given)
    elif name in ("int", "float") and isinstance(value, str) and len(value) > 1000:
        raise TemplateLimitError("it reads a number of more than 1000 digits")
    elif name == "sum" and any(isinstance(x, (list, tuple)) for x in given):
        raise TemplateLimitError("it sums lists")


def _check_format(budget: Budget, template: Any, values: Iterable[Any]) -> None:
    """For '%10s' and '{:10}': no wide fields, and no value printed so often that it becomes too long."""
    template = str(template)
    if re.search(r"[0-9]{4}|\*|\{[^{}]*\{", template):
        raise TemplateLimitError("it formats with a width of more than 999, or a computed one")
    fields = template.count("%") + template.count("{")
    budget.allow(len(template) + fields * (1000 + max(map(budget.weight, values), default=0)))


def _to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates get it: nothing is escaped for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TemplateLimitError("it indents JSON by more than 16")
    if separators is not None and sum(len(str(part)) for part in separators) > 16:
        raise TemplateLimitError("it separates JSON by more than 16 characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    length = 0
    for piece in encoder.iterencode(value):
        length += len(piece)
        if length > MAX_CHARS:
            break
        pieces.append(piece)
    budget.allow(length)
    return "".join(pieces)


def _guarded_filter(plain: ImmutableSandboxedEnvironment, name: str) -> Callable[..., Any]:
    @pass_context
    def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name == "join" and not isinstance(value, (str, list, tuple, dict, Undefined)):
            value = budget.keep(list(value))
        if name in _READ_NOTHING:
            budget.spend(0)
        elif name in _READ_ITEMS:
            budget.scan(value)
        elif name in _VISIT_ITEMS:
            budget.spend(16 * _size(value))
        else:
            budget.allow(budget.weight(value))
            budget.read(*args, *kwargs.values())
        _check_growth(budget, name, value, args, kwargs)
        if name == "tojson":
            return _to_json(budget, value, *args, **kwargs)
        if name == "join" and isinstance(value, (list, tuple, dict)):
            separator = args[0] if args else kwargs.get("d", "")
            budget.allow(budget.weight(value) + len(value) * len(str(separator)))
        return budget.keep(plain.call_filter(name, value, args, kwargs, context))

    return guarded


def _guarded_test(plain: ImmutableSandboxedEnvironment, name: str) -> Callable[..., Any]:
    @pass_context
    def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name in _READ_NOTHING_TESTS:
            budget.spend(0)
        else:
            budget.read(value, *args)
        return plain.call_test(name, value, args, kwargs, context)

    return guarded


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    values = dict(*args, **kwargs)
    for name in values:
        _check_attribute(str(name))
    return Namespace(values)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """An environment for one chat template, with transformers' settings, filters and functions.

    Args:
        functions: more functions that the template may call.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are not computed at compile time, where no budget holds
            extensions=[_GenerationBlock, loopcontrols],
        )
        plain = ImmutableSandboxedEnvironment()
        self.filters = {name: _guarded_filter(plain, name) for name in _FILTERS} | _OWN_FILTERS
        self.tests = {name: _guarded_test(plain, name) for name in plain.tests if name not in ("filter", "test")}
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": _namespace, **functions}

    def template(self, source: str) -> Callable[[Mapping[str, Any]], Iterator[str]]:
        """Compiles a template. The function returned renders it piece by piece, on a budget of its own each time."""
        tree = _Rewriter().visit(self.parse(source))
        tree.set_environment(self)
        template = self.from_string(tree)
        return lambda variables: template.generate({**variables, _BUDGET: Budget(MAX_WORK)})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNBOUNDED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                    budget.allow(budget.weight(sequence) * max(times, 0))
        elif operator == "+":
            budget.scan(left, right)
        elif operator == "%" and isinstance(left, str):
            values = right.values() if isinstance(right, dict) else right if isinstance(right, tuple) else (right,)
            _check_format(budget, left, values)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if right > 0 and left.bit_length() * right > _MAX_INT_BITS:
                raise TemplateLimitError("it makes a number that is too large")
        else:
            budget.spend(0)
        return budget.keep(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatter = super().wrap_str_format(value)
        if formatter is None:
            return None
        template: str = value.__self__

        def bounded(context: Context, *args: Any, **kwargs: Any) -> str:
            values = [x for arg in args for x in (arg.values() if isinstance(arg, dict) else (arg,))]
            _check_format(_budget(context), template, [*values, *kwargs.values()])
            return formatter(*args, **kwargs)

        return pass_context(bounded)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if name in ("changed", "count", "index"):  # of a loop, a list or a string: compared as a whole
            budget.read(owner, *args)
        elif isinstance(owner, str):
            budget.scan(owner, *args)
            if name == "join" and len(args) == 1:
                items = args[0] if isinstance(args[0], (str, list, tuple, dict)) else budget.keep(list(args[0]))
                budget.allow(budget.weight(items) + len(items) * len(owner))
                args = (items,)
            _check_growth(budget, name, owner, args, kwargs)
        elif isinstance(owner, (list, tuple, dict)):
            budget.scan(*args)
        else:  # a macro, most likely
            budget.spend(_CALL)
            budget.scan(*args, *kwargs.values())
        return budget.keep(super().call(context, obj, *args, **kwargs))
