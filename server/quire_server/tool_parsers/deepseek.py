# ruff: noqa: RUF001 - the bars in DeepSeek's marks are full-width
"""DeepSeek V3 and R1: calls between marks that are special tokens, written with full-width bars; the arguments are a
JSON block. V3.1 has the bare JSON and no kind of call. Both are read by either name."""

from __future__ import annotations

from collections.abc import Sequence

from quire_server.tool_calls import Call, Framed, dump_arguments, read_json
from quire_server.tool_grammar import Forceable, Grammar, Opening, Tool, literal


class DeepSeek(Framed, Forceable):
    special_tokens = True
    OPEN, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    FRAME = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    SEPARATOR = JSON = "<｜tool▁sep｜>"
    BETWEEN = "\n"

    def read(self, body: str) -> list[Call] | None:
        head, separator, rest = body.partition(self.SEPARATOR)
        name, text = head.strip(), rest.strip()
        if text.endswith("```"):
            name, _, text = text[:-3].partition("```json")
            name = name.strip()
        try:
            arguments = dump_arguments(read_json(text))
        except ValueError:
            return None
        if not separator or not name or "\n" in name or arguments is None:
            return None
        return [Call(name, arguments)]

    @classmethod
    def written(cls, g: Grammar, tool: Tool) -> str:
        """What stands between the marks of a call."""
        head, block, end = literal("function"), literal(f"{tool.name}\n```json\n"), literal("\n```")
        return f"{head} {g.mark(cls.SEPARATOR)} {block} {g.json(tool.schema())} {end}"

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        call = g.one_of(f"{cls.written(g, tool)} {g.mark(cls.CLOSE)}" for tool in tools)
        between = literal(cls.BETWEEN) if cls.BETWEEN else ""
        more = f"({between} {g.mark(cls.OPEN)} {call})*" if many else ""
        begin, end = cls.FRAME
        return [
            Opening(begin, f"{g.mark(cls.OPEN)} {call} {more} {g.mark(end)}"),
            Opening(cls.OPEN, call, usual=False),
        ]


class DeepSeekV31(DeepSeek):
    BETWEEN = ""

    @classmethod
    def written(cls, g: Grammar, tool: Tool) -> str:
        return f"{literal(tool.name)} {g.mark(cls.SEPARATOR)} {g.json(tool.schema())}"
