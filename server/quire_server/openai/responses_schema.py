"""The request of /v1/responses, and the chat request that it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag, model_validator

from quire_server.errors import ApiError, refuse
from quire_server.openai.base import Strict
from quire_server.openai.chat_schema import ChatRequest, FunctionName, FunctionSpec, Message, NamedChoice, Tool
from quire_server.openai.fields import REFUSED, CacheKey, GenerationFields, Int32, Metadata
from quire_server.openai.responses_items import Id, Item, Items, MessageItem, messages, only
from quire_server.openai.structure import ResponseFormat

LOGPROBS = "message.output_text.logprobs"


class FunctionTool(FunctionSpec):
    """``strict`` is false unless it is asked for: a form that may be left helps models that were not taught any."""

    type: Literal["function"]
    refused = {  # noqa: RUF012
        "allowed_callers": ((["direct"],), "only the model itself calls tools here"),
        "defer_loading": ((False,), "every tool is in the prompt"),
        "output_schema": ((), "outputs of tools are not checked"),
        "async": ((False,), "calls are answered in the next request"),
    }

    @model_validator(mode="before")
    @classmethod
    def _only_functions(cls, data: Any) -> Any:
        return only(data, ("function",), "tools")

    def chat(self) -> Tool:
        return Tool(function=FunctionSpec(**self.model_dump(exclude={"type"})))


class FunctionChoice(Strict):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=128)]

    @model_validator(mode="before")
    @classmethod
    def _only_functions(cls, data: Any) -> Any:
        return only(data, ("function", "allowed_tools"), "choices")


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(fail_fast=True, min_length=1)]


def _choice(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None and not isinstance(value, dict):
        return "(mode)"
    return "(allowed)" if kind == "allowed_tools" else "(function)"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(mode)")]
    | Annotated[FunctionChoice, Tag("(function)")]
    | Annotated[AllowedTools, Tag("(allowed)")],
    Discriminator(_choice),
]


class Reasoning(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    refused = {  # noqa: RUF012
        "summary": ((), "reasoning is not summarized: the whole of it is in the reasoning items"),
        "generate_summary": ((), "reasoning is not summarized: the whole of it is in the reasoning items"),
        "mode": (("standard",), "there is one mode"),
        "context": (("auto",), "the model's chat template decides which reasoning it sees again"),
    }


class TextConfig(Strict):
    format: dict[str, Any] | None = None
    refused = {"verbosity": (("medium",), "the model has no such setting")}  # noqa: RUF012

    def response_format(self) -> ResponseFormat | None:
        """As chat has it. Raises ApiError."""
        given = {name: value for name, value in (self.format or {}).items() if value is not None}
        kind = given.pop("type", None)
        if self.format is None or (kind == "text" and not given):
            return None
        if kind not in ("text", "json_object", "json_schema"):
            raise refuse("text.format.type", "text.format.type: must be 'text', 'json_object' or 'json_schema'")
        if kind != "json_schema" and given:
            name = f"text.format.{next(iter(given))[:64]}"
            raise refuse(name, f"{name}: type {kind!r} takes none")
        return ResponseFormat(type=kind, json_schema=given if kind == "json_schema" else None)


class ResponsesRequest(GenerationFields):
    """OpenAI's response, with vLLM's extra fields for sampling."""

    refused = {  # noqa: RUF012
        **REFUSED,
        "n": ((1,), "a response is one answer: send the request again"),
        "messages": ((), "use input"),
        "max_tokens": ((), "use max_output_tokens"),
        "max_completion_tokens": ((), "use max_output_tokens"),
        "response_format": ((), "use text.format"),
        "reasoning_effort": ((), "use reasoning.effort"),
        "stream_options": (({}, {"include_obfuscation": False}), "this server adds no padding to events"),
        "prompt_logprobs": ((), "use /v1/chat/completions"),
        "truncate_prompt_tokens": ((), "use /v1/chat/completions"),
        "truncation_side": ((), "use /v1/chat/completions"),
        "request_id": ((), "a response's id is the server's: send a header X-Request-Id"),
        "background_options": ((), "responses in the background need none"),
        "include_reasoning": ((True,), "reasoning is in items of its own"),
        "previous_input_messages": ((), "use previous_response_id, or send the items"),
        "enable_response_messages": ((False,), "/tokenize shows what a template makes of messages"),
        "media_io_kwargs": ((), "only text is supported"),
        "return_tokens_as_token_ids": ((False,), "use /v1/chat/completions"),
        "return_token_ids": ((False,), "use /v1/chat/completions"),
        "max_tool_calls": ((), "it counts calls of built-in tools, and this server has none"),
        "truncation": (("disabled",), "nothing is dropped silently: send fewer items"),
        "conversation": ((), "use previous_response_id"),
        "prompt": ((), "this server stores no prompts: send input and instructions"),
        "context_management": ((), "this server compacts no conversations"),
        "image": ((), "only text is supported"),
        "access_programs": ((), "this server has none"),
        "prompt_cache_retention": (("in_memory",), "pages are kept for as long as the memory allows"),
        "prompt_cache_options": ((), "equal prefixes are reused without it"),
    }

    input: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[list[Item], Field(fail_fast=True, min_length=1), Tag("(items)")],
            Discriminator(lambda value: "(items)" if isinstance(value, list) else "(text)"),
        ]
        | None
    ) = None
    instructions: str | None = Field(None, description="Not carried over by previous_response_id.")
    previous_response_id: Id | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    top_logprobs: Int32 | None = None
    metadata: Metadata | None = Field(None, description="Told in the JSON log and in the trace, too.")
    store: bool = True
    background: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_key: CacheKey | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description="The new name of user.")

    def items(self) -> Items:
        """What this request itself adds to the conversation."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return cast(Items, self.input or [])  # an UnknownItem is never made

    def check_own(self) -> None:
        """Refuse by name what contradicts another field here. Raises ApiError."""
        for value in self.include or ():
            if value == "reasoning.encrypted_content":
                raise refuse("include", "include: reasoning is not encrypted: the reasoning items carry it as text")
            if value != LOGPROBS:
                raise refuse("include", f"include: {value[:64]!r} is not supported; there is {LOGPROBS}")
        if self.top_logprobs and not self.include:
            raise refuse("top_logprobs", f"top_logprobs: only together with include: [{LOGPROBS!r}]")
        if self.background and not self.store:
            raise refuse("background", "background: a response that is not stored could not be retrieved")
        names = {tool.name for tool in self.tools or ()}
        if isinstance(self.tool_choice, AllowedTools):
            for choice in self.tool_choice.tools:
                if choice.name not in names:
                    raise refuse("tool_choice", f"tool_choice: no tool is named {choice.name!r}")

    def chat(self, items: Items) -> ChatRequest:
        """The conversation of ``items`` as a request that chat knows. Raises ApiError."""
        first = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        conversation = first + messages(items)
        if not conversation:
            raise refuse("input", "missing required parameter: input", "missing_required_parameter")
        shared = self.model_fields_set & (GenerationFields.model_fields.keys() | {"chat_template_kwargs"})
        tools, choice = self._tools()
        return ChatRequest(
            **{name: getattr(self, name) for name in shared},
            messages=conversation,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.text.response_format() if self.text is not None else None,
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
            max_completion_tokens=self.max_output_tokens,
            logprobs=LOGPROBS in (self.include or ()),
            top_logprobs=self.top_logprobs if self.include else None,
        )

    def _tools(self) -> tuple[list[Tool] | None, Any]:
        """The tools that are offered, and the choice among them."""
        tools, choice = self.tools or [], self.tool_choice
        if isinstance(choice, AllowedTools):
            allowed = {one.name for one in choice.tools}
            return [tool.chat() for tool in tools if tool.name in allowed], choice.mode
        if isinstance(choice, FunctionChoice):
            return [tool.chat() for tool in tools], NamedChoice(function=FunctionName(name=choice.name))
        return [tool.chat() for tool in tools] or None, choice


NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of chat, and what they are here; the longer first."""


@contextmanager
def in_our_names() -> Iterator[None]:
    """Chat's refusals speak of its own fields; the client must read of those that it has sent."""
    try:
        yield
    except ApiError as error:
        param, message = _renamed(error.param or ""), _renamed(error.message)
        raise ApiError(
            error.status_code, message, param=param or None, code=error.code, headers=error.headers
        ) from error


def _renamed(text: str) -> str:
    for theirs, ours in NAMES.items():
        text = re.sub(rf"(?<![\w-]){re.escape(theirs)}(?!\w)", ours, text)  # not in the name of a flag
    return text
