"""GLM 4.5: ``<tool_call>NAME``, then ``<arg_key>K</arg_key><arg_value>V</arg_value>`` for each argument,
``</tool_call>``. Strings are bare, so they cannot hold ``</arg_value>`` or ``</tool_call>``; those within JSON can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire_server.reader import Steps, Tags
from quire_server.tool_calls import Call, dump_arguments
from quire_server.tool_grammar import Forceable, Grammar, Opening, Tool, literal
from quire_server.tool_parsers import typed


class Glm45(typed.ByArgument, Forceable):
    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    FIRST = "<arg_key>"
    AGAIN = "\n"
    START, END = "<arg_key>NAME</arg_key>\n<arg_value>", "</arg_value>\n"
    MARKS = ("<arg_key>", CLOSE)  # that no bare text may hold

    def steps(self) -> Steps[None]:
        opening = Tags(self.OPEN)
        while (yield from self.say_until(opening)):
            raw, body, end = yield from self.body(self.CLOSE)
            self.give(self.read(body), self.OPEN + raw + end)

    def function(self, head: str) -> str:
        return head.strip()

    def key(self) -> Steps[tuple[str, str | None]]:
        name, tag = yield from self.reader.body(Tags("<"), 256)
        self.reader.back(tag)
        text = name + (yield from self.reader.accept("</arg_key>"))
        text += yield from self.reader.space()
        opened = yield from self.reader.accept("<arg_value>")
        return text + opened, name.strip() if opened else None

    def read(self, body: str) -> list[Call] | None:
        head, *parts = body.split("<arg_key>")
        name = head.strip()
        if not name or any(c in name for c in "<>{}\n"):
            return None
        schemas = typed.properties(self.tools, name)
        values: dict[str, Any] = {}
        for part in parts:
            key, closed, rest = part.partition("</arg_key>")
            gap, opened, rest = rest.partition("<arg_value>")
            text, ended, after = rest.partition("</arg_value>")
            if not (closed and opened and ended) or gap.strip() or after.strip():
                return None
            values[key.strip()] = self.argument(text, schemas.get(key.strip()))
        arguments = dump_arguments(values)
        return None if arguments is None else [Call(name, arguments)]

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        calls = (
            f"{literal(tool.name + chr(10))} {typed.arguments(g, tool, cls.START, cls.END, *cls.MARKS)} {literal(cls.CLOSE)}"
            for tool in tools
        )
        return [Opening(cls.OPEN, g.one_of(calls))]
