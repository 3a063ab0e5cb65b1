"""What a model's text says beside plain content: reasoning and tool calls. Incremental, so that streamed and whole
answers are the same by construction: a whole answer is one that is pushed at once.

A parser (of the hooks ``quire_register_tool_parsers`` and ``quire_register_reasoning_parsers``) turns text into events.
Most formats are a :class:`StepParser`; a plugin's parser may be anything that has ``push`` and ``finish``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic_core import from_json

from quire_server.reader import MAX_HELD, Reader, Steps, Tags


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    name: str
    id: str | None = None  # None: the server makes one


@dataclass(frozen=True, slots=True)
class Arguments:
    """A fragment of the arguments' JSON of the call that is open."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    pass


Event = Content | Reasoning | CallStart | Arguments | CallEnd


class Parser(Protocol):
    """Made anew for each sample. What all events give together depends on the text alone, not on how it is cut.

    A call that is malformed or cut off is content: a parser never raises, and loses nothing that the model wrote but
    the marks of its format and white space around calls and reasoning.
    """

    def push(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # a JSON object
    id: str | None = None


class StepParser:
    """A format as one generator, :meth:`steps`: it reads with ``self.reader`` and gives with ``say``, ``think`` and
    ``give``. What follows when it returns is content."""

    special_tokens = False
    """Whether the format's marks are special tokens, which a text must then keep."""

    def __init__(self) -> None:
        self.reader = Reader()
        self._events: list[Event] = []
        self._kind: type[Content] | type[Reasoning] = Content
        self._space = ""  # white space that the reader sees only if more of the same kind follows
        self._called = False
        self._over = False
        self.plain = False  # whether all that follows is content
        self._run = self._all()

    def steps(self) -> Steps[None]:
        raise NotImplementedError

    def push(self, text: str) -> list[Event]:
        if self.plain and not self.reader.held:
            self._emit(Content, text)
            events, self._events = self._events, []
            return events
        self.reader.add(text)
        return self._advance()

    def finish(self) -> list[Event]:
        self.reader.end()
        events = self._advance()
        if self._space and self._kind is Content and not self._called:
            events.append(Content(self._space))
        self._space = ""
        return events

    # -- what steps() gives ---------------------------------------------------------------------------------------
    def say(self, text: str) -> None:
        """Content."""
        self._emit(Content, text)

    def think(self, text: str) -> None:
        """Reasoning."""
        self._emit(Reasoning, text)

    def give(self, calls: Sequence[Call] | None, raw: str) -> None:
        """Calls; None, when what was read is none: then ``raw``, the text as it stands, is content."""
        if calls is None:
            self.say(raw)
            return
        for call in calls:
            self._space, self._called = "", True
            self._events += [CallStart(call.name, call.id), Arguments(call.arguments), CallEnd()]

    def say_until(self, tags: Tags) -> Steps[str]:
        """Text up to the first tag is content."""
        return self.reader.until(tags, self.say)

    def think_until(self, tags: Tags) -> Steps[str]:
        return self.reader.until(tags, self.think)

    # -- inside ---------------------------------------------------------------------------------------------------
    def _all(self) -> Steps[None]:
        yield from self.steps()
        self.plain = True
        yield from self.say_until(_NEVER)

    def _advance(self) -> list[Event]:
        if not self._over:
            try:
                next(self._run)
            except StopIteration:
                self._over = True
        events, self._events = self._events, []
        return events

    def _emit(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if kind is not self._kind:
            if self._space and self._kind is Content and not self._called:
                self._events.append(Content(self._space))
            self._kind, self._space = kind, ""
        sure = text.rstrip()
        if sure:
            self._events.append(kind(self._space + sure))
            self._space = ""
        self._space += text[len(sure) :]
        many = len(self._space) // 256 * 256  # never much is held
        if many:
            self._events.append(kind(self._space[:many]))
            self._space = self._space[many:]


_NEVER = Tags("\0never\0")


class Framed(StepParser):
    """Calls between two marks. ``FRAME`` are marks around groups of calls, which say nothing themselves; ``JSON`` is one
    behind which the arguments are a JSON object, whose strings may hold CLOSE."""

    OPEN: str
    CLOSE: str
    FRAME: tuple[str, ...] = ()
    JSON: str | None = None

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()
        self.tools = tools
        self._json = True  # whether every bracket has been closed so far

    def read(self, body: str) -> list[Call] | None:
        """The calls of what stands between the marks; None: it is malformed."""
        raise NotImplementedError

    def steps(self) -> Steps[None]:
        marks, close = Tags(self.OPEN, *self.FRAME), Tags(self.CLOSE)
        while mark := (yield from self.say_until(marks)):
            if mark == self.OPEN:
                head = yield from self._to_json()
                body, end = yield from self.reader.body(close, max(MAX_HELD - len(head), 0))
                self.give(self.read(head + body), self.OPEN + head + body + end)

    def _to_json(self) -> Steps[str]:
        """What stands up to the end of the JSON object, or less where there is none; CLOSE is not in it."""
        head = ""
        for mark in (self.JSON, "{"):
            if mark is None:
                return head
            text, tag = yield from self.reader.body(Tags(mark, self.CLOSE), max(MAX_HELD - len(head), 0))
            head += text
            if tag != mark:
                self.reader.back(tag)
                return head
            head += tag
        self.reader.back("{")
        return head[:-1] + (yield from self.value(limit=MAX_HELD - len(head)))

    def value(self, end: str = "", limit: int = MAX_HELD) -> Steps[str]:
        """Consume the JSON array or object that comes next, if it is closed and ``end`` follows; else nothing, and "".

        Once it was not, no other is looked for in this answer: nobody shall have text read again and again.
        """
        if not self._json or limit <= 0:
            return ""
        text = yield from self.reader.space()
        if not (yield from self.reader.ahead("[{")):
            self.reader.back(text)
            return ""
        value, closed = yield from self.reader.value(limit=limit)
        text += value
        if closed and end:
            text += yield from self.reader.space()
            closed = bool((yield from self.reader.accept(end)))
            if closed:
                self.reader.back(end)
        if closed:
            return text
        self._json = False
        self.reader.back(text)
        return ""


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError; NaN and Infinity are no JSON."""
    return from_json(text.strip(), allow_inf_nan=False)


def json_call(value: Any, key: str = "arguments") -> Call | None:
    """The call of ``{"name": ..., key: {...}}``, or None when ``value`` is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = dump_arguments(value.get(key))
    return None if arguments is None else Call(value["name"], arguments)


def json_calls(text: str, *keys: str) -> list[Call] | None:
    """The calls of a JSON object, or of an array of them; None when one is malformed."""
    try:
        value = read_json(text)
    except ValueError:
        return None
    calls = []
    for item in value if isinstance(value, list) else [value]:
        key = next((key for key in keys if isinstance(item, dict) and key in item), keys[0])
        call = json_call(item, key)
        if call is None:
            return None
        calls.append(call)
    return calls or None


def dump_arguments(value: Any) -> str | None:
    """Arguments as clients get them, the text of a JSON object: given as one, as its text, or not at all (None).

    None when they are anything else.
    """
    if value is None:
        return "{}"
    try:
        if isinstance(value, str):
            return value if isinstance(read_json(value), dict) else None
        return json.dumps(value, ensure_ascii=False, allow_nan=False) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


@dataclass
class Piece:
    """What more text brought, in the terms of a chat answer: ``calls`` are the ``tool_calls`` of a delta."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class AnswerParser:
    """One sample's text, first through the reasoning parser, its content then through the tool parser.

    With ``parallel`` False only the first call counts; with ``show_reasoning`` False reasoning is left out.
    """

    def __init__(
        self,
        reasoning: Parser | None = None,
        tools: Parser | None = None,
        parallel: bool = True,
        show_reasoning: bool = True,
    ) -> None:
        self._reasoning, self._tools = reasoning, tools
        self._parallel, self._show = parallel, show_reasoning
        self._calls = 0
        self._given = 0

    @property
    def reasoned(self) -> bool:
        """Whether no more reasoning can come."""
        return self._reasoning is None or getattr(self._reasoning, "plain", False)

    def read(self, text: str) -> list[Event]:
        """What more text says, in its order. Every call has an id."""
        first: Iterable[Event] = self._reasoning.push(text) if self._reasoning else [Content(text)]
        return self._kept(self._to_tools(first))

    def end(self) -> list[Event]:
        """What was held until the text's end."""
        events = self._to_tools(self._reasoning.finish() if self._reasoning else [])
        return self._kept(events + (self._tools.finish() if self._tools else []))

    def push(self, text: str) -> Piece:
        return self._piece(self.read(text))

    def finish(self) -> Piece:
        return self._piece(self.end())

    def whole(self, text: str) -> Piece:
        """All of a text at once, each call in one."""
        first, last = self.push(text), self.finish()
        calls: list[dict[str, Any]] = []
        for delta in first.calls + last.calls:
            if "id" in delta:
                calls.append({"id": delta["id"], "type": delta["type"], "function": delta["function"]})
            else:
                calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
        return Piece(first.content + last.content, first.reasoning + last.reasoning, calls)

    def _to_tools(self, events: Iterable[Event]) -> list[Event]:
        if self._tools is None:
            return list(events)
        through: list[Event] = []
        for event in events:
            through += self._tools.push(event.text) if isinstance(event, Content) else [event]
        return through

    def _kept(self, events: Iterable[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            if isinstance(event, CallStart):
                self._calls += 1
                event = CallStart(event.name, event.id or f"call_{uuid.uuid4().hex[:24]}")
            if isinstance(event, Reasoning):
                wanted = self._show
            else:
                wanted = self._parallel or self._calls <= 1 or isinstance(event, Content)
            if wanted:
                kept.append(event)
        return kept

    def _piece(self, events: Iterable[Event]) -> Piece:
        piece = Piece()
        for event in events:
            if isinstance(event, Content):
                piece.content += event.text
            elif isinstance(event, Reasoning):
                piece.reasoning += event.text
            elif isinstance(event, CallStart):
                self._given += 1
                function = {"name": event.name, "arguments": ""}
                piece.calls.append({"index": self._given - 1, "id": event.id, "type": "function", "function": function})
            elif isinstance(event, Arguments):
                if not piece.calls or piece.calls[-1]["index"] != self._given - 1:
                    piece.calls.append({"index": self._given - 1, "function": {"arguments": ""}})
                piece.calls[-1]["function"]["arguments"] += event.text
        return piece
