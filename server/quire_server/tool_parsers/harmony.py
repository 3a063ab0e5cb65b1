"""Harmony, the form of gpt-oss (https://cookbook.openai.com/articles/openai-harmony): messages with a header that names
a channel and maybe a recipient. It says reasoning and calls alike, so one parser serves as both kinds. The
marks are special tokens, so a call's JSON is taken to end with the next one, wherever that stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quire_server.reader import Steps, Tags
from quire_server.tool_calls import Call, StepParser, dump_arguments, read_json
from quire_server.tool_grammar import Forceable, Grammar, Tool, literal

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN = "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MARKS = Tags(START, CHANNEL, MESSAGE, *ENDS)
_HEADER = Tags(MESSAGE)
_RECIPIENT = re.compile(r"\bto=([^\s<]{1,256})")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w{1,32})")


class Harmony(StepParser, Forceable):
    """Without tools, a call is content. A call ends the model's turn, so an answer has one at most when it is forced."""

    special_tokens = True
    REASONS = True

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()
        self.tools = tools

    def steps(self) -> Steps[None]:
        mark = yield from self.say_until(_MARKS)
        while mark:
            if mark in (START, CHANNEL):
                head, end = yield from self.reader.body(_HEADER, 1024)
                if not end:
                    self.say(mark + head)
                    mark = yield from self.say_until(_MARKS)
                    continue
                mark = yield from self._message(mark + head)
            else:
                mark = yield from self.say_until(_MARKS)

    def _message(self, header: str) -> Steps[str]:
        """Read a message; returns the mark behind it."""
        to, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        name = to[1].removeprefix("functions.") if to and to[1].startswith("functions.") else None
        if name:
            body, mark = yield from self.reader.body(_MARKS)
            arguments = _object(body)
            good = self.tools and arguments is not None
            self.give([Call(name, arguments)] if good and arguments else None, body)
            return mark
        if channel and channel[1] == "analysis":
            return (yield from self.think_until(_MARKS))
        return (yield from self.say_until(_MARKS))

    @classmethod
    def forced(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> str:
        return f"{_thought(g)} {_call(g, tools)}"

    @classmethod
    def free(cls, g: Grammar, tools: Sequence[Tool]) -> str:
        first = f"{g.until(ENDS[0])} {_again(g)}" if g.opened else ""
        begun = f"{g.mark(CHANNEL)} {g.one_of(map(literal, ('analysis', 'commentary', 'final')))} {g.mark(MESSAGE)}"
        message, last = g.rule(f"{begun} {g.until(ENDS[0])} {_again(g)}"), g.rule(f"{begun} {g.text}")
        return f"{first} {message}* {g.one_of([_call(g, tools), last])}"

    @classmethod
    def either(cls, g: Grammar, tools: Sequence[Tool], many: bool, answer: dict[str, Any]) -> str:
        final = f"{g.mark(CHANNEL)} {literal('final')} {g.mark(MESSAGE)} {g.json(answer)}"
        return f"{_thought(g)} {g.one_of([_call(g, tools), final])}"


def _again(g: Grammar) -> str:
    return f"{g.mark(START)} {literal('assistant')}"


def _thought(g: Grammar) -> str:
    """A message of the analysis, or none."""
    rest = f"{g.until(ENDS[0])} {_again(g)}"
    return rest if g.opened else g.rule(f"({g.mark(CHANNEL)} {literal('analysis')} {g.mark(MESSAGE)} {rest})?")


def _call(g: Grammar, tools: Sequence[Tool]) -> str:
    """Up to the mark that ends it, which ends the sequence too."""
    head = f"{g.mark(CONSTRAIN)} {literal('json')} {g.mark(MESSAGE)}"
    return g.one_of(
        f"{g.mark(CHANNEL)} {literal(f'commentary to=functions.{tool.name} ')} {head} {g.json(tool.schema())}"
        for tool in tools
    )


def _object(text: str) -> str | None:
    try:
        return dump_arguments(read_json(text) if text.strip() else None)
    except ValueError:
        return None
