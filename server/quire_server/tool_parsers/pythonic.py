"""Llama 4 (and 3.2) by Python: the answer is a list of calls, ``[f(a=1, b="x"), g()]``, maybe between
``<|python_start|>`` and ``<|python_end|>``. Nothing is evaluated: the text must be made of literals, as the grammar of
tokens below says before Python's own parser sees it."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Sequence
from typing import Any

from quire_server.reader import Steps
from quire_server.tool_calls import Call, StepParser, dump_arguments
from quire_server.tool_grammar import CannotWrite, Forceable, Grammar, Tool, literal
from quire_server.tool_parsers import typed
from quire_server.tool_parsers.llama3_json import framed, text_not_from

LIMIT = 2**16  # characters: a syntax tree is many times its text
_WORDS = {"true": True, "false": False, "null": None}
# No operator but a sign, no word but the name of a call or an argument, no bracket right behind a closing one: nothing
# that could nest, save brackets, whose depth the reader bounds.
_TOKENS = re.compile(
    r"""(?:\s+|[\[({,:=]|[\])}](?!\s*[\[({])|"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+'|-?\d[\d_]*+(?:\.\d*+)?(?:[eE][-+]?\d++)?
    |(?:True|False|None|true|false|null)\b|[A-Za-z_][\w.]{0,127}+(?=\s*[(=]))*+""",
    re.VERBOSE | re.DOTALL,
)


class Pythonic(StepParser, Forceable):
    special_tokens = True

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()

    def steps(self) -> Steps[None]:
        reader = self.reader
        before = yield from reader.space()
        before += yield from reader.accept("<|python_start|>")
        before += yield from reader.space()
        if not (yield from reader.ahead("[")):
            self.say(before)
            return
        text, closed = yield from reader.value("\"'", LIMIT)
        calls = _calls(text) if closed else None
        self.give(calls, before + text)
        if calls is not None:
            after = yield from reader.space()
            if not (yield from reader.accept("<|python_end|>")):
                self.say(after)

    @classmethod
    def forced(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> str:
        call = g.one_of(f"{literal(_written(tool.name) + '(')} {_arguments(g, tool)}" for tool in tools)
        more = f"({literal(', ')} {call})*" if many else ""
        return framed(g, f"{literal('[')} {call} {more} {literal(']')}")

    @classmethod
    def free(cls, g: Grammar, tools: Sequence[Tool]) -> str:
        return f"{cls.forced(g, tools, True)} | {text_not_from(g, '[')}?"

    @classmethod
    def either(cls, g: Grammar, tools: Sequence[Tool], many: bool, answer: dict[str, Any]) -> str:
        if answer.get("type") != "object":
            raise CannotWrite(
                "an answer by a schema beside tools must be one of type 'object', since this model's calls are a list: use "
                "such a schema, or tool_choice 'none'"
            )
        return super().either(g, tools, many, answer)


def _arguments(g: Grammar, tool: Tool) -> str:
    """``a=1, b="x")``: those that must be given and those that may, in the schema's order.

    JSON's texts are Python's here, since its strings have no escapes of their own; only at the top do true, false and
    null have Python's names, which the model knows.
    """
    if not tool.held:
        return _any_arguments(g, tool)
    rest = {False: literal(")"), True: literal(")")}  # by whether an argument stands before
    for name, schema, needed in reversed(typed.fields(tool)):
        given = f"{literal(_written(name, dots=False) + '=')} {_value(g, schema)}"
        rest = {
            before: g.one_of(
                [f"{literal(', ') if before else ''} {given} {rest[True]}", *([] if needed else [rest[before]])]
            )
            for before in (False, True)
        }
    return rest[False]


def _any_arguments(g: Grammar, tool: Tool) -> str:
    names = [name for name in (tool.parameters or {}).get("properties") or {} if _is_name(name)]
    if not names:
        return literal(")")
    given = g.one_of(f"{literal(name + '=')} {_value(g, {})}" for name in names)
    return f"({given} ({literal(', ')} {given})*)? {literal(')')}"


def _value(g: Grammar, schema: Any) -> str:
    kind = schema.get("type") if isinstance(schema, dict) and not set(schema) - typed.ANNOTATIONS - {"type"} else None
    if kind == "boolean":
        return '("True" | "False")'
    if kind == "null":
        return '"None"'
    return g.json(schema if isinstance(schema, dict) else {"allOf": [schema]})


def _is_name(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _written(name: str, dots: bool = True) -> str:
    if not all(map(_is_name, name.split(".") if dots else [name])) or len(name) > 128:
        raise CannotWrite(f"{name[:64]!r} is no name in Python, in which this model writes its calls: give it another")
    return name


def _calls(text: str) -> list[Call] | None:
    if not _TOKENS.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List):
            return None
        return [_call(node) for node in tree.elts] or None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    values = {argument.arg or "": _literal(argument.value) for argument in node.keywords}
    arguments = dump_arguments(values)
    if "" in values or arguments is None:
        raise ValueError("not JSON")
    return Call(_name(node.func), arguments)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("not a name")


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in node.keys):
        return {k.value: _literal(v) for k, v in zip(node.keys, node.values, strict=True)}  # type: ignore[union-attr]
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    raise ValueError("not a literal")
