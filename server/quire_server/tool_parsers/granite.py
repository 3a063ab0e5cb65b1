"""Granite 3: ``<|tool_call|>`` (3.0) or ``<tool_call>`` (3.1 on), then a JSON array of calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire_server.reader import Steps, Tags
from quire_server.tool_calls import StepParser, json_calls
from quire_server.tool_grammar import Forceable, Grammar, Opening, Tool, literal

MARKS = ("<|tool_call|>", "<tool_call>")


class Granite(StepParser, Forceable):
    special_tokens = True

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()

    def steps(self) -> Steps[None]:
        opening = Tags(*MARKS)
        while raw := (yield from self.say_until(opening)):
            raw += yield from self.reader.space()
            calls = None
            if (yield from self.reader.ahead("[{")):
                text, closed = yield from self.reader.value()
                calls, raw = json_calls(text, "arguments") if closed else None, raw + text
            self.give(calls, raw)
            if calls is not None:  # some write the closing mark of others
                yield from self.reader.space()
                yield from self.reader.accept("</tool_call>", "<|/tool_call|>")

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        """A model that has the first mark as a token takes the one that it was taught."""
        call = g.one_of(g.json_call(tool) for tool in tools)
        more = f"({literal(', ')} {call})*" if many else ""
        array = f"{literal('[')} {call} {more} {literal(']')}"
        return [Opening(mark, array, usual=mark == MARKS[1] or g.special(mark) is not None) for mark in MARKS]
