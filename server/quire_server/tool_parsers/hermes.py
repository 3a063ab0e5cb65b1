"""Hermes 2 Pro, Qwen 2.5 and 3, Granite 4 and the demo model:
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

from collections.abc import Sequence

from quire_server.reader import Steps, Tags
from quire_server.tool_calls import Framed, json_calls
from quire_server.tool_grammar import Forceable, Grammar, Opening, Tool, literal


class Hermes(Framed, Forceable):
    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    AGAIN = "\n"

    def steps(self) -> Steps[None]:
        """The arguments may hold any text, the closing mark too: a call ends with its last bracket."""
        marks, close = Tags(self.OPEN), Tags(self.CLOSE)
        while (yield from self.say_until(marks)):
            raw = self.OPEN + (yield from self.reader.space())
            calls = None
            if (yield from self.reader.ahead("{[")):
                text, closed = yield from self.reader.value()
                after = yield from self.reader.space()
                end = yield from self.reader.accept(self.CLOSE)
                raw += text + after + end
                good = closed and (end or not self.reader.held)
                calls = json_calls(text, "arguments") if good else None
            else:
                body, end = yield from self.reader.body(close)
                raw += body + end
            self.give(calls, raw)

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        line, close = literal("\n"), g.mark(cls.CLOSE)
        return [Opening(cls.OPEN, g.one_of(f"{line} {g.json_call(tool)} {line} {close}" for tool in tools))]
