"""Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, and since tokenizer 11
``[TOOL_CALLS]name[ARGS]{...}`` for each call, the marks [CALL_ID] and [ARGS] being optional."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quire_server.reader import Steps, Tags
from quire_server.tool_calls import Call, StepParser, dump_arguments, json_calls, read_json
from quire_server.tool_grammar import Forceable, Grammar, Opening, Tool, literal

OPEN = "[TOOL_CALLS]"
_AFTER_NAME, _AFTER_ID = Tags("[CALL_ID]", "[ARGS]", "{"), Tags("[ARGS]", "{")


class Mistral(StepParser, Forceable):
    special_tokens = True

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()

    def steps(self) -> Steps[None]:
        opening = Tags(OPEN)
        while (yield from self.say_until(opening)):
            space = yield from self.reader.space()
            if (yield from self.reader.ahead("[{")):
                text, closed = yield from self.reader.value()
                calls = json_calls(text, "arguments") if closed else None
                self.give(calls and [replace(call, id=new_id()) for call in calls], OPEN + space + text)
            else:
                yield from self._named(OPEN + space)

    def _named(self, raw: str) -> Steps[None]:
        reader = self.reader
        name, tag = yield from reader.body(_AFTER_NAME, 256)
        raw += name + tag
        made = ""
        if tag == "[CALL_ID]":
            made, tag = yield from reader.body(_AFTER_ID, 64)
            raw += made + tag
        if tag == "{":
            reader.back(tag)
            raw = raw[:-1]
        raw += yield from reader.space()
        text, closed = "", False
        if tag and (yield from reader.ahead("{")):
            text, closed = yield from reader.value()
        arguments = _object(text) if closed else None
        good = arguments is not None and name.strip() and not set(name.strip()) & set(" \n\t")
        self.give([Call(name.strip(), arguments, made.strip() or new_id())] if good and arguments else None, raw + text)

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        """The newer form where the tokenizer has its mark, else the array."""
        if g.special("[ARGS]") is None:
            call = g.one_of(g.json_call(tool) for tool in tools)
            more = f"({literal(', ')} {call})*" if many else ""
            return [Opening(OPEN, f"{literal(' [')} {call} {more} {literal(']')}")]
        made = ""
        if g.special("[CALL_ID]") is not None:
            made = f"({g.mark('[CALL_ID]')} {g.terminal('/[a-zA-Z0-9]{9}/')})?"
        start = g.one_of(f"{literal(tool.name)} {made} {g.mark('[ARGS]')} {g.json(tool.schema())}" for tool in tools)
        return [Opening(OPEN, f"{start} ({g.mark(OPEN)} {start})*" if many else start)]


def new_id() -> str:
    """Mistral's templates take only ids of nine letters and digits."""
    return uuid.uuid4().hex[:9]


def _object(text: str) -> str | None:
    try:
        return dump_arguments(read_json(text))
    except ValueError:
        return None
