"""Device functions are pasted into the kernel, so that the rest of the emulator knows one function only."""

from __future__ import annotations

import re
from dataclasses import replace

from cuda_kernels.emulator.errors import PtxError
from cuda_kernels.emulator.ptx import Function, Instruction, Label, Module

MAX_DEPTH = 40
MAX_INSTRUCTIONS = 1 << 20

_IDENTIFIER = re.compile(r"[%$]?[A-Za-z_$][\w$]*")


def inline_calls(module: Module, entry: Function) -> Function:
    """The kernel with every call replaced by the body of its function.

    Registers, labels, local and parameter variables of each pasted body get names of their own; its shared variables
    are one per function, as in hardware. Raises PtxError for recursion, unknown functions and indirect calls.
    """
    merged = Function(
        entry.name,
        True,
        entry.parameters,
        registers=dict(entry.registers),
        variables=list(entry.variables),
        max_threads=entry.max_threads,
    )
    _Inliner(module, merged).paste(entry.code, entry.tables, (entry.name,))
    return merged


class _Inliner:
    def __init__(self, module: Module, merged: Function) -> None:
        self.module, self.merged = module, merged
        self.calls = 0

    def paste(self, code: list[Instruction | Label], tables: dict[str, list[str]], callers: tuple[str, ...]) -> None:
        self.merged.tables.update(tables)
        for item in code:
            if isinstance(item, Instruction) and item.base == "call":
                self.call(item, callers)
            else:
                self.merged.code.append(item)
        if len(self.merged.code) > MAX_INSTRUCTIONS:
            raise PtxError(f"more than {MAX_INSTRUCTIONS} instructions after the device functions are inlined")

    def call(self, call: Instruction, callers: tuple[str, ...]) -> None:
        function, arguments, results = self.target(call)
        if function.name in callers or len(callers) > MAX_DEPTH:
            raise PtxError(f"recursive device functions are not supported: {call.where()}")
        if len(arguments) != len(function.parameters) or len(results) != len(function.results):
            raise PtxError(f"the call does not fit the parameters of {function.name}: {call.where()}")
        self.calls += 1
        prefix = f"i{self.calls}$"
        end, skip = f"{prefix}$end", f"{prefix}$skip"

        names = {name: f"%{prefix}{name.lstrip('%')}" for name in function.registers}
        names |= {item.name: prefix + item.name for item in function.code if isinstance(item, Label)}
        names |= {name: prefix + name for name in function.tables}
        names |= {v.name: prefix + v.name for v in function.variables if v.space in ("local", "param")}
        names |= {parameter.name: argument for parameter, argument in zip(function.parameters, arguments, strict=True)}
        names |= {result.name: name for result, name in zip(function.results, results, strict=True)}

        def renamed(text: str) -> str:
            return _IDENTIFIER.sub(lambda match: names.get(match[0], match[0]), text)

        self.merged.registers.update({names[name]: dtype for name, dtype in function.registers.items()})
        known = {variable.name for variable in self.merged.variables}
        own = [replace(variable, name=names.get(variable.name, variable.name)) for variable in function.variables]
        self.merged.variables += [variable for variable in own if variable.name not in known]

        body: list[Instruction | Label] = []
        for item in function.code:
            if isinstance(item, Label):
                body.append(Label(names[item.name]))
                continue
            moved = replace(
                item,
                operands=tuple(renamed(operand) for operand in item.operands),
                predicate=names.get(item.predicate, item.predicate) if item.predicate else None,
            )
            if item.base == "call":  # the callee's name is no variable of the caller
                moved = replace(moved, operands=self.keep_target(item.operands, moved.operands))
            elif item.base == "ret":
                moved = replace(moved, opcode="bra", operands=(end,))
            body.append(moved)

        if call.predicate:
            self.merged.code.append(replace(call, opcode="bra", operands=(skip,), negated=not call.negated))
        tables = {
            names[name]: [names.get(label, label) for label in labels] for name, labels in function.tables.items()
        }
        self.paste(body, tables, (*callers, function.name))
        self.merged.code.append(Label(end))
        if call.predicate:
            self.merged.code.append(Label(skip))

    @staticmethod
    def keep_target(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
        position = 1 if before and before[0].startswith("(") else 0
        return tuple(b if index == position else a for index, (b, a) in enumerate(zip(before, after, strict=True)))

    def target(self, call: Instruction) -> tuple[Function, list[str], list[str]]:
        """(function, argument names, result names) of a call."""
        operands = list(call.operands)
        results = _list(operands.pop(0)) if operands and operands[0].startswith("(") else []
        if not operands:
            raise PtxError(f"a call without a function: {call.where()}")
        name = operands.pop(0)
        arguments = _list(operands[0]) if operands else []
        function = self.module.functions.get(name)
        if function is None:
            kind = "an indirect call" if name in self.merged.registers else f"a call of the unknown function {name}"
            raise PtxError(f"{kind} is not supported: {call.where()}")
        return function, arguments, results


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.strip("()").split(",") if word.strip()]
