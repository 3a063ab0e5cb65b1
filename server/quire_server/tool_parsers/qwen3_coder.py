"""Qwen3-Coder: ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``. Values are bare
text between line breaks. The model now and then leaves out the outer marks, of which the first does no harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire_server.reader import Steps, Tags
from quire_server.tool_calls import Call, Framed, dump_arguments
from quire_server.tool_grammar import Forceable, Grammar, Opening, Tool, literal
from quire_server.tool_parsers import typed


class Qwen3Coder(Framed, Forceable):
    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    BARE = "<function="
    AGAIN = "\n"
    START, END = "<parameter=NAME>\n", "\n</parameter>\n"
    MARKS = ("<parameter=", "</function>", CLOSE)  # that no bare text may hold

    def steps(self) -> Steps[None]:
        marks, close, end_of_bare = Tags(self.OPEN, self.BARE), Tags(self.CLOSE), Tags("</function>")
        while mark := (yield from self.say_until(marks)):
            body, end = yield from self.reader.body(close if mark == self.OPEN else end_of_bare)
            raw = mark + body + end
            if mark == self.OPEN:
                self.give(self.read(body), raw)
                continue
            calls = self.read(raw)
            self.give(calls, raw)
            if calls is not None:
                yield from self.reader.space()
                yield from self.reader.accept(self.CLOSE)

    def read(self, body: str) -> list[Call] | None:
        function, closed, after = body.strip().rpartition("</function>")
        head, *parts = function.split("<parameter=")
        start, opened, gap = head.partition(">")
        name = start.removeprefix("<function=").strip()
        if not (closed and opened and start.startswith("<function=") and name) or after or gap.strip():
            return None
        schemas = typed.properties(self.tools, name)
        values: dict[str, Any] = {}
        for part in parts:
            key, opened, rest = part.partition(">")
            text, closed, after = rest.rpartition("</parameter>")
            if not (opened and closed) or after.strip():
                return None
            values[key.strip()] = typed.value(text.removeprefix("\n").removesuffix("\n"), schemas.get(key.strip()))
        arguments = dump_arguments(values)
        return None if arguments is None else [Call(name, arguments)]

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        call = g.one_of(
            f"{literal(f'{tool.name}>' + chr(10))} {typed.arguments(g, tool, cls.START, cls.END, *cls.MARKS)}"
            for tool in tools
        )
        inner, end = literal("\n" + cls.BARE), literal("</function>\n" + cls.CLOSE)
        return [
            Opening(cls.OPEN, f"{inner} {call} {end}"),
            Opening(cls.BARE, f"{call} {end}", usual=False),
        ]
