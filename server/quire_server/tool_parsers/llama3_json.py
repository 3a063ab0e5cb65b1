"""Llama 3.1, 3.2 and 4 by JSON: the answer is ``{"name": ..., "parameters": {...}}``, maybe behind ``<|python_tag|>``;
several calls are divided by semicolons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire_server.reader import Steps
from quire_server.tool_calls import Call, StepParser, json_calls
from quire_server.tool_grammar import CannotWrite, Forceable, Grammar, Tool, literal, pattern, quoted

STARTS, END = ("<|python_tag|>", "<|python_start|>"), "<|python_end|>"


class Llama3Json(StepParser, Forceable):
    special_tokens = True

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()

    def steps(self) -> Steps[None]:
        reader = self.reader
        before = yield from reader.space()
        before += yield from reader.accept(*STARTS)
        before += yield from reader.space()
        while (yield from reader.ahead("{")):
            text, closed = yield from reader.value()
            calls = _calls(text) if closed else None
            self.give(calls, before + text)
            before = ""
            if calls is None:
                return
            before = yield from reader.space()
            divider = yield from reader.accept(";")
            before += divider + ((yield from reader.space()) if divider else "")
        if (yield from reader.accept(END)) and not before.strip():
            return
        self.say(before)

    @classmethod
    def forced(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> str:
        call = g.one_of(g.json_call(tool, "parameters") for tool in tools)
        return framed(g, f"{call} ({literal('; ')} {call})*" if many else call)

    @classmethod
    def free(cls, g: Grammar, tools: Sequence[Tool]) -> str:
        return f"{cls.forced(g, tools, True)} | {text_not_from(g, '{')}?"

    @classmethod
    def either(cls, g: Grammar, tools: Sequence[Tool], many: bool, answer: dict[str, Any]) -> str:
        """One schema for both, since both begin with a bracket; then there is one call at most."""
        if _may_be_a_call(answer):
            raise CannotWrite(
                "a JSON answer could be taken for a call, which this model writes as bare JSON: give the answer's schema "
                "additionalProperties false and no properties 'parameters' or 'arguments', or use tool_choice 'none'"
            )
        schemas = [answer, *(tool.schema() for tool in tools)]
        parts: list[dict[str, Any]] = [{"$ref": "#/$defs/0"}]
        for i, tool in enumerate(tools, 1):
            given = {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{i}"}}
            parts.append({"type": "object", "properties": given, "required": [*given], "additionalProperties": False})
        return g.json(
            {"anyOf": parts, "$defs": {str(i): _moved(part, f"#/$defs/{i}") for i, part in enumerate(schemas)}}
        )


def _may_be_a_call(answer: dict[str, Any]) -> bool:
    closed = answer.get("type") == "object" and answer.get("additionalProperties") is False
    known = answer.get("properties")
    return not closed or not isinstance(known, dict) or bool({"parameters", "arguments"} & set(known))


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at ``place`` of another: its references follow it."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value.removeprefix("#")
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else value
        if key in ("const", "enum", "default", "examples")
        else _moved(value, place)
        for key, value in schema.items()
    }


def framed(g: Grammar, calls: str) -> str:
    """``calls`` as they are, or behind a mark that the model's tokenizer has."""
    forms = [calls]
    for mark in STARTS:
        if g.special(mark) is not None:
            close = f"{g.mark(END)}?" if mark == STARTS[1] and g.special(END) is not None else ""
            forms.append(f"{g.mark(mark)} {calls} {close}")
    return g.one_of(forms)


def text_not_from(g: Grammar, bracket: str) -> str:
    """Text that does not begin as calls do, which have no mark in this format but that they begin the answer."""
    start, marks = quoted(bracket), "|".join(map(quoted, STARTS))
    usual = pattern(rf"[ \n\r\t]*([^ \n\r\t{start}](.|\n)*)?")
    marked = pattern(rf"[ \n\r\t]*({marks})(.|\n)*")
    return g.terminal(f"{usual} & ~{marked}")


def _calls(text: str) -> list[Call] | None:
    """An answer in JSON that only happens to have a name is no call."""
    if '"parameters"' not in text and '"arguments"' not in text:
        return None
    return json_calls(text, "parameters", "arguments")
