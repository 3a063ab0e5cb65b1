"""Kimi K2: ``<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{...}<|tool_call_end|>`` in a section.
The head is the call's id, which the model wants to see again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quire_server.tool_calls import Call, Framed, dump_arguments, read_json
from quire_server.tool_grammar import CannotWrite, Forceable, Grammar, Opening, Tool, literal

_HEAD = re.compile(r"(?:functions\.)?([^\s:]{1,256}?)(?::\d{1,9})?")


class KimiK2(Framed, Forceable):
    special_tokens = True
    OPEN, CLOSE = "<|tool_call_begin|>", "<|tool_call_end|>"
    FRAME = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    ARGUMENTS = JSON = "<|tool_call_argument_begin|>"

    def read(self, body: str) -> list[Call] | None:
        head, separator, text = body.partition(self.ARGUMENTS)
        match = _HEAD.fullmatch(head.strip())
        try:
            arguments = dump_arguments(read_json(text))
        except ValueError:
            return None
        if not separator or match is None or arguments is None:
            return None
        return [Call(match[1], arguments, head.strip())]

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        for tool in tools:
            if ":" in tool.name:
                raise CannotWrite(f"{tool.name!r}: Kimi K2's calls have a colon behind the name: name it without one")
        index = g.terminal("/[0-9]{1,3}/")
        call = g.one_of(
            f"{literal(f'functions.{tool.name}:')} {index} {g.mark(cls.ARGUMENTS)} {g.json(tool.schema())} "
            + g.mark(cls.CLOSE)
            for tool in tools
        )
        more = f"({g.mark(cls.OPEN)} {call})*" if many else ""
        begin, end = cls.FRAME
        return [
            Opening(begin, f"{g.mark(cls.OPEN)} {call} {more} {g.mark(end)}"),
            Opening(cls.OPEN, call, usual=False),
        ]
