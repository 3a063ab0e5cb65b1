"""Qwen3-Coder: ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``. Values are bare
text between line breaks, which cannot hold ``</tool_call>``, or JSON, whose strings can. The model now and then leaves out
the outer marks, of which the first does no harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire_server.reader import Steps, Tags
from quire_server.tool_calls import Call, dump_arguments
from quire_server.tool_grammar import Forceable, Grammar, Opening, Tool, literal
from quire_server.tool_parsers import typed


class Qwen3Coder(typed.ByArgument, Forceable):
    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    BARE = "<function="
    FIRST = "<parameter="
    AGAIN = "\n"
    START, END = "<parameter=NAME>\n", "\n</parameter>\n"
    MARKS = ("<parameter=", "</function>", CLOSE)  # that no bare text may hold

    def steps(self) -> Steps[None]:
        marks = Tags(self.OPEN, self.BARE)
        while mark := (yield from self.say_until(marks)):
            raw, body, end = yield from self.body(self.CLOSE if mark == self.OPEN else "</function>")
            if mark == self.OPEN:
                self.give(self.read(body), mark + raw + end)
                continue
            calls = self.read(mark + body + end)
            self.give(calls, mark + raw + end)
            if calls is not None:
                yield from self.reader.space()
                yield from self.reader.accept(self.CLOSE)

    def function(self, head: str) -> str:
        return head.rpartition(self.BARE)[2].partition(">")[0].strip()

    def key(self) -> Steps[tuple[str, str | None]]:
        name, tag = yield from self.reader.body(Tags("<", ">"), 256)
        if tag != ">":
            self.reader.back(tag)
            return name, None
        return name + tag, name.strip()

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
            values[key.strip()] = self.argument(text.removeprefix("\n").removesuffix("\n"), schemas.get(key.strip()))
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
