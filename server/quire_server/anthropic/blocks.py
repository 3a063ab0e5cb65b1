"""Content blocks, and the chat messages that they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from quire_server.errors import refuse, refused_field
from quire_server.openai.base import Strict
from quire_server.openai.chat_schema import TEXT_ONLY, FunctionCall, Message, ToolCall
from quire_server.openai.responses_items import only

Id = Annotated[str, Field(min_length=1, max_length=256)]
_ALONE = {
    "caller": (({"type": "direct"},), "only the model itself calls tools here"),
    "toolset_name": ((), "this server has no toolsets"),
}


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None  # equal prefixes are reused without it
    refused = {"citations": (([], {"enabled": False}), "citations are not supported")}  # noqa: RUF012

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        return only(data, ("text",), "blocks", TEXT_ONLY)


class ThinkingBlock(Strict):
    """What the model thought before; ``signature`` may be anything, since nothing is encrypted here."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    refused = _ALONE


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[TextBlock], Field(fail_fast=True), Tag("(blocks)")],
        Discriminator(lambda value: "(blocks)" if isinstance(value, list) else "(text)"),
    ] = ""
    is_error: bool = False
    cache_control: dict[str, Any] | None = None
    refused = _ALONE

    @property
    def words(self) -> str:
        text = self.content if isinstance(self.content, str) else text_of(self.content)
        return f"Error: {text}" if self.is_error else text


class UnknownBlock(Strict):
    """What is none of the above."""

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, data: Any) -> Any:
        if isinstance(data, dict) and "type" not in data:
            raise refused_field("type", "a block needs a type", "missing_required_parameter")
        only(data, KINDS, "blocks", TEXT_ONLY)
        raise ValueError("must be a content block: an object with a type")


KINDS = ("text", "thinking", "tool_use", "tool_result")


def _tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})" if isinstance(kind, str) and kind in KINDS else "(unknown)"


Block = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")]
    | Annotated[ToolResultBlock, Tag("(tool_result)")]
    | Annotated[UnknownBlock, Tag("(unknown)")],
    Discriminator(_tag),
]


def text_of(blocks: Sequence[TextBlock]) -> str:
    """As in chat, parts are lines."""
    return "\n".join(block.text for block in blocks)


def messages(conversation: Sequence[tuple[str, Any]]) -> list[Message]:
    """(role, text or blocks) as chat has it: results of tools are messages of their own.

    Raises ApiError for blocks that the role cannot say, and for the result of a call that nobody made.
    """
    made: list[Message] = []
    calls: set[str] = set()
    for index, (role, content) in enumerate(conversation):
        where = f"messages[{index}].content"
        if isinstance(content, str):
            made.append(Message(role=role, content=content))  # type: ignore[arg-type]
        elif role == "assistant":
            made.append(_mine(content, where))
            calls |= {call.id for call in made[-1].tool_calls or ()}
        else:
            made += _theirs(role, content, where, calls)
    if not made:
        raise refuse("messages", "messages: there is no content")
    return made


def _mine(blocks: Sequence[Any], where: str) -> Message:
    message = Message(role="assistant")
    texts, thoughts, calls = [], [], []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
        else:
            raise refuse(where, f"{where}: an assistant's message has no {block.type} blocks")
    message.content = text_of(texts) if texts else None
    message.reasoning_content = "\n".join(thoughts) or None
    message.tool_calls = calls or None
    return message


def _theirs(role: str, blocks: Sequence[Any], where: str, calls: set[str]) -> list[Message]:
    made: list[Message] = []
    texts: list[TextBlock] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock) and role == "user":
            if block.tool_use_id not in calls:
                message = f"{where}: no tool_use before it has the id {block.tool_use_id[:64]!r}"
                raise refuse(where, message)
            made.append(Message(role="tool", content=block.words, tool_call_id=block.tool_use_id))
        else:
            raise refuse(where, f"{where}: a {role}'s message has no {block.type} blocks")
    if texts or not made:
        made.append(Message(role=role, content=text_of(texts)))  # type: ignore[arg-type]
    return made
