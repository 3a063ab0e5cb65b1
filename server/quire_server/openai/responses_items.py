"""Items, of which the input and the output of a response consist, and the chat messages that they make."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from quire_server.errors import refuse, refused_field
from quire_server.openai.base import Strict
from quire_server.openai.chat_schema import TEXT_ONLY, FunctionCall, Message, ToolCall

Status = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[str, Field(min_length=1, max_length=256)]
ALONE = {
    "namespace": ((), "tools have no namespaces here"),
    "caller": (({"type": "direct"},), "only the model itself calls tools here"),
    "async": ((False,), "calls are answered in the next request"),
    "created_by": ((), "it is not kept"),
}
"""Fields of calls and of their outputs."""


def only(value: Any, known: tuple[str, ...], what: str, why: str = "") -> Any:
    """Refuse by its name a type that this server does not know."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in known:
        reason = f"{what} of type {kind[:40]!r} are not supported{why and ': '}{why or ''}; known: {', '.join(known)}"
        raise refused_field("type", reason, "unsupported_parameter")
    return value


class Part(Strict):
    type: Literal["input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    logprobs: list[Any] | None = None  # of an answer that is sent back: they are not part of the conversation
    refused = {  # noqa: RUF012
        "annotations": (([],), "annotations are not supported"),
        "prompt_cache_breakpoint": ((), "equal prefixes are reused without it"),
    }

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        return only(data, ("input_text", "output_text", "refusal"), "content parts", TEXT_ONLY)

    @model_validator(mode="after")
    def _has_text(self) -> Part:
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None:
            raise refused_field(name, "a part of this type needs it", "missing_required_parameter")
        return self

    @property
    def words(self) -> str:
        return self.text or self.refusal or ""


Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Field(fail_fast=True), Tag("(parts)")],
    Discriminator(lambda value: "(parts)" if isinstance(value, list) else "(text)"),
]


def _words(content: str | list[Part]) -> str:
    """As in chat, parts are lines."""
    return content if isinstance(content, str) else "\n".join(part.words for part in content)


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Id | None = None
    status: Status | None = None
    refused = {"phase": ((), "the model knows no phases")}  # noqa: RUF012

    def stored(self) -> dict[str, Any]:
        mine = self.role == "assistant"
        plain = {"type": "output_text", "annotations": []} if mine else {"type": "input_text"}
        parts = [Part(type="input_text", text=self.content)] if isinstance(self.content, str) else self.content
        content = [
            {"type": "refusal", "refusal": part.refusal} if part.type == "refusal" else {**plain, "text": part.text}
            for part in parts
        ]
        return {"id": self.id or new_id("msg"), "type": "message", "role": self.role, **_done(self), "content": content}


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    id: Id | None = None
    status: Status | None = None
    refused = ALONE

    def stored(self) -> dict[str, Any]:
        return {"id": self.id or new_id("fc"), **self.model_dump(exclude={"id"}), **_done(self)}


class CallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Id
    output: Content
    name: str | None = None
    id: Id | None = None
    status: Status | None = None
    refused = ALONE

    def stored(self) -> dict[str, Any]:
        kept = self.model_dump(exclude={"id"}, exclude_none=True)
        return {"id": self.id or new_id("fco"), **kept, **_done(self)}


class Summary(Strict):
    type: Literal["summary_text"]
    text: str


class ReasoningPart(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    summary: Annotated[list[Summary], Field(fail_fast=True)] = Field(default_factory=list)
    content: Annotated[list[ReasoningPart], Field(fail_fast=True)] | None = None
    id: Id | None = None
    status: Status | None = None
    refused = {"encrypted_content": ((), "this server encrypts no reasoning: send its content")}  # noqa: RUF012

    @property
    def words(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary)

    def stored(self) -> dict[str, Any]:
        kept = self.model_dump(exclude={"id"}, exclude_none=True)
        return {"id": self.id or new_id("rs"), **kept, **_done(self)}


class UnknownItem(Strict):
    """What is none of the above."""

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type", "item_reference") == "item_reference":
            reason = "items cannot be referred to: send the item itself, or previous_response_id"
            raise refused_field("type", reason, "unsupported_parameter")
        only(data, KINDS, "items")
        raise ValueError("must be an item: an object with a type, or a message with role and content")


KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _tag(value: Any) -> str:
    if isinstance(value, dict):
        kind = value.get("type")
        kind = "message" if kind is None and "role" in value else kind
    else:
        kind = getattr(value, "type", None)
    return f"({kind})" if isinstance(kind, str) and kind in KINDS else "(unknown)"


Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[CallItem, Tag("(function_call)")]
    | Annotated[CallOutputItem, Tag("(function_call_output)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")]
    | Annotated[UnknownItem, Tag("(unknown)")],
    Discriminator(_tag),
]
Items = Sequence[MessageItem | CallItem | CallOutputItem | ReasoningItem]
ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])
"""From what is stored back to items."""


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _done(item: MessageItem | CallItem | CallOutputItem | ReasoningItem) -> dict[str, Any]:
    return {"status": item.status or "completed"}


def messages(items: Items) -> list[Message]:
    """The conversation as chat has it: an answer's reasoning, text and calls, which are items, are one message.

    Raises ApiError for the output of a call that nobody made.
    """
    made: list[Message] = []
    calls: set[str] = set()
    mine: Message | None = None  # the answer that may still go on
    for index, item in enumerate(items):
        if isinstance(item, CallOutputItem):
            if item.call_id not in calls:
                message = f"input: no function_call before it has the call_id {item.call_id[:64]!r} of item {index}"
                raise refuse("input", message)
            output = Message(role="tool", content=_words(item.output), tool_call_id=item.call_id, name=item.name)
            made.append(output)
            mine = None
        elif isinstance(item, MessageItem) and item.role != "assistant":
            made.append(Message(role=item.role, content=_words(item.content)))
            mine = None
        elif isinstance(item, MessageItem | CallItem | ReasoningItem):
            if mine is None or not _goes_on(mine, item):
                mine = Message(role="assistant")
                made.append(mine)
            _add(mine, item)
            if isinstance(item, CallItem):
                calls.add(item.call_id)
    return [m for m in made if m.content is not None or m.tool_calls or m.reasoning_content]


def _goes_on(message: Message, item: MessageItem | CallItem | ReasoningItem) -> bool:
    """Whether ``item`` can follow in the same message: reasoning, then text, then calls."""
    if isinstance(item, CallItem):
        return True
    begun = message.content is not None or bool(message.tool_calls)
    return not begun and not (isinstance(item, ReasoningItem) and message.reasoning_content)


def _add(message: Message, item: MessageItem | CallItem | ReasoningItem) -> None:
    if isinstance(item, ReasoningItem):
        message.reasoning_content = item.words or None
    elif isinstance(item, MessageItem):
        message.content = _words(item.content)
    else:
        call = FunctionCall(name=item.name, arguments=item.arguments)
        if message.tool_calls is None:
            message.tool_calls = []
        message.tool_calls.append(ToolCall(id=item.call_id, function=call))
