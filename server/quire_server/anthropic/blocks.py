"""Messages and their content blocks, and the same conversation as chat has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from quire_server.errors import refuse
from quire_server.openai.base import Strict
from quire_server.openai.chat_schema import TEXT_ONLY

Id = Annotated[str, Field(min_length=1, max_length=256)]
_UNREADABLE = {"redacted_thinking": "only who wrote it can read it"}
_ALONE = {
    "caller": (({"type": "direct"},), "tools are called by the model alone"),
    "toolset_name": ((), "this server has no toolsets"),
}


class CacheControl(Strict):
    """Honoured without doing anything: every prefix is kept and reused, for as long as the memory allows."""

    type: Literal["ephemeral"]
    refused = {"ttl": (("5m",), "how long pages are kept depends on the memory, not on a time")}  # noqa: RUF012


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    refused = {"citations": (([],), "citations are not supported")}  # noqa: RUF012


class ThinkingBlock(Strict):
    """``signature`` may be anything: as in chat, a client is trusted with what it says the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    refused = _ALONE


def _known(*kinds: str) -> BeforeValidator:
    """Refuses a block of another type by that type's name."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str):
            raise ValueError("must be a content block: an object with a type")
        if kind not in kinds:
            reason = _UNREADABLE.get(kind, TEXT_ONLY)
            raise ValueError(f"blocks of type {kind[:40]!r} are not supported here: {reason} ({', '.join(kinds)})")
        return value

    return BeforeValidator(check)


def _tag(value: Any) -> str:
    return f"({value['type'] if isinstance(value, dict) else value.type})"


# Chosen by what is there, so that an error speaks of the part at fault and not of every form.
_FORM = Discriminator(lambda value: "(blocks)" if isinstance(value, list) else "(text)")
Texts = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[Annotated[TextBlock, _known("text")]], Field(fail_fast=True), Tag("(blocks)")],
    _FORM,
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: Texts = ""
    is_error: bool = Field(False, description="Chat templates know no such mark: the text is then headed by 'Error:'.")
    cache_control: CacheControl | None = None
    refused = _ALONE

    @property
    def text(self) -> str:
        text = text_of(self.content)
        return f"Error: {text}" if self.is_error else text


UserBlock = Annotated[
    Annotated[
        Annotated[TextBlock, Tag("(text)")] | Annotated[ToolResultBlock, Tag("(tool_result)")], Discriminator(_tag)
    ],
    _known("text", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[
        Annotated[TextBlock, Tag("(text)")]
        | Annotated[ThinkingBlock, Tag("(thinking)")]
        | Annotated[ToolUseBlock, Tag("(tool_use)")],
        Discriminator(_tag),
    ],
    _known("text", "thinking", "tool_use"),
]


class UserMessage(Strict):
    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[UserBlock], Field(fail_fast=True), Tag("(blocks)")], _FORM
    ]


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[AssistantBlock], Field(fail_fast=True), Tag("(blocks)")], _FORM
    ]


class SystemMessage(Strict):
    """An instruction in the midst of a conversation."""

    role: Literal["system"]
    content: Texts


def _role(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"({role})" if role in ("assistant", "system") else "(user)"  # an unknown role is the user's error


AnyMessage = Annotated[
    Annotated[UserMessage, Tag("(user)")]
    | Annotated[AssistantMessage, Tag("(assistant)")]
    | Annotated[SystemMessage, Tag("(system)")],
    Discriminator(_role),
]


def text_of(content: str | Sequence[Any]) -> str:
    """As in chat, blocks are joined by line breaks."""
    return content if isinstance(content, str) else "\n".join(b.text for b in content if isinstance(b, TextBlock))


def conversation(messages: Sequence[UserMessage | AssistantMessage | SystemMessage]) -> list[dict[str, Any]]:
    """Chat's messages. Turns of one role in a row are one turn; results of tools are messages of their own.

    Raises ApiError for a result without its call, a call without its result, and a message that says nothing.
    """
    turns: list[tuple[str, int, list[Any]]] = []  # role, index of its first message, blocks
    for index, message in enumerate(messages):
        content = message.content
        blocks = [TextBlock(type="text", text=content)] if isinstance(content, str) else list(content)
        if turns and turns[-1][0] == message.role:
            turns[-1][2].extend(blocks)
        else:
            turns.append((message.role, index, blocks))
    if turns[-1][0] == "assistant" and not any(getattr(b, "text", True) for b in turns[-1][2]):
        turns.pop()  # nothing to go on from: the same as no beginning of an answer
    made: list[dict[str, Any]] = []
    pending: list[str] = []
    for role, index, blocks in turns:
        where = f"messages[{index}].content"
        results = [b for b in blocks if isinstance(b, ToolResultBlock)]
        _check_results(where, pending, blocks, results)
        pending = [b.id for b in blocks if isinstance(b, ToolUseBlock)]
        text = text_of(blocks)
        made += [{"role": "tool", "tool_call_id": r.tool_use_id, "content": r.text} for r in results]
        if role == "assistant":
            made.append(_answer(text, blocks))
        elif text or any(isinstance(b, TextBlock) for b in blocks):
            made.append({"role": role, "content": text})
        elif not results:
            raise refuse(where, f"{where}: must not be empty")
    if pending:
        raise refuse("messages", "messages: the last one calls a tool: its tool_result must follow in a user's message")
    if not made:
        raise refuse("messages", "messages: there is nothing to answer")
    return made


def _check_results(where: str, calls: list[str], blocks: list[Any], results: list[ToolResultBlock]) -> None:
    given = [r.tool_use_id for r in results]
    for one in given:
        if one not in calls or given.count(one) > 1:
            message = f"{where}: tool_result for {one[:64]!r}, which no tool_use in the turn before has, or the second"
            raise refuse(where, message)
    for one in calls:
        if one not in given:
            raise refuse(where, f"{where}: the tool_use {one[:64]!r} of the turn before has no tool_result here")
    if results and not all(isinstance(b, ToolResultBlock) for b in blocks[: len(results)]):
        raise refuse(where, f"{where}: tool_result blocks come first, then text")


def _answer(text: str, blocks: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    thoughts = [b.thinking for b in blocks if isinstance(b, ThinkingBlock)]
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    calls = [
        {
            "id": b.id,
            "type": "function",
            "function": {"name": b.name, "arguments": json.dumps(b.input, ensure_ascii=False)},
        }
        for b in blocks
        if isinstance(b, ToolUseBlock)
    ]
    if calls:
        message["tool_calls"] = calls
    return message
