"""The request of /v1/messages, and the chat request that it is.

https://platform.claude.com/docs/en/api/messages, as the anthropic Python client of 2026 has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from quire_server.anthropic.blocks import Block, TextBlock, messages, text_of
from quire_server.errors import ApiError, refuse
from quire_server.openai.base import Strict
from quire_server.openai.chat_schema import ChatRequest, FunctionName, FunctionSpec, Message, NamedChoice, Tool
from quire_server.openai.responses_items import only
from quire_server.openai.structure import ResponseFormat

Count = Annotated[int, Field(ge=1, lt=2**31)]
_EPHEMERAL = "equal prefixes are reused without it"


class InputMessage(Strict):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[Block], Field(fail_fast=True), Tag("(blocks)")],
        Discriminator(lambda value: "(blocks)" if isinstance(value, list) else "(text)"),
    ]


class CustomTool(Strict):
    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    refused = {  # noqa: RUF012
        "allowed_callers": ((["direct"],), "only the model itself calls tools here"),
        "defer_loading": ((False,), "every tool is in the prompt"),
        "eager_input_streaming": ((False, True), ""),  # arguments are streamed as they come in any case
        "input_examples": (([],), "the chat template has no place for them: put them into the description"),
    }

    @model_validator(mode="before")
    @classmethod
    def _only_custom(cls, data: Any) -> Any:
        return only(data, ("custom",), "tools", "this server runs none itself")

    def chat(self) -> Tool:
        spec = FunctionSpec(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return Tool(function=spec)


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """``budget_tokens`` is checked as Anthropic does; ``max_tokens`` bounds thinking and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1024, lt=2**31)] | None = None
    refused = {"display": ((), "thinking is shown as it is")}  # noqa: RUF012


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh"] | None = None
    format: dict[str, Any] | None = None


class Metadata(Strict):
    user_id: Annotated[str, Field(max_length=512)] | None = None


System = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextBlock], Field(fail_fast=True), Tag("(blocks)")],
    Discriminator(lambda value: "(blocks)" if isinstance(value, list) else "(text)"),
]


class Prompt(Strict):
    """What decides the prompt; count_tokens takes this much."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[InputMessage], Field(fail_fast=True, min_length=1)]
    system: System | None = None
    tools: Annotated[list[CustomTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(None, description=_EPHEMERAL)
    refused = {  # noqa: RUF012
        "speed": (("standard",), "there is one speed"),
        "user_profile_id": ((), "this server keeps no profiles"),
        "workspace_id": ((), "this server has no workspaces"),
    }

    def chat(self, **more: Any) -> ChatRequest:
        """As a request that chat knows. Raises ApiError."""
        conversation = messages([(message.role, message.content) for message in self.messages])
        if self.system is not None:
            system = self.system if isinstance(self.system, str) else text_of(self.system)
            conversation.insert(0, Message(role="system", content=system))
        choice, parallel = self._choice()
        prefilled = conversation[-1].role == "assistant"  # the answer goes on from its own beginning
        if prefilled and conversation[-1].tool_calls:
            raise refuse("messages", "messages: the last message calls a tool: its tool_result must follow")
        return ChatRequest(
            model=self.model,
            messages=conversation,
            tools=[tool.chat() for tool in self.tools] if self.tools else None,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            reasoning_effort=self._effort(),
            response_format=self._format(),
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            **more,
        )

    def _choice(self) -> tuple[Any, bool]:
        choice = self.tool_choice
        if choice is None:
            return None, True
        if (choice.name is not None) != (choice.type == "tool"):
            raise refuse("tool_choice.name", "tool_choice.name: given with type 'tool', and only with it")
        if choice.type == "tool":
            assert choice.name is not None
            return NamedChoice(function=FunctionName(name=choice.name)), not choice.disable_parallel_tool_use
        return {"any": "required"}.get(choice.type, choice.type), not choice.disable_parallel_tool_use

    def _effort(self) -> Any:
        """Thinking in chat's terms; None leaves it to the template."""
        effort = self.output_config.effort if self.output_config is not None else None
        if self.thinking is None:
            return effort
        if self.thinking.type == "disabled":
            return "none"
        return effort or ("medium" if self.thinking.type == "enabled" else None)

    def _format(self) -> ResponseFormat | None:
        form = self.output_config.format if self.output_config is not None else None
        if form is None:
            return None
        if form.get("type") != "json_schema" or set(form) != {"type", "schema"} or not isinstance(form["schema"], dict):
            message = "output_config.format: must be {'type': 'json_schema', 'schema': {...}}"
            raise refuse("output_config.format", message)
        return ResponseFormat(type="json_schema", json_schema={"name": "output", "schema": form["schema"]})


class CountRequest(Prompt):
    """/v1/messages/count_tokens."""


class MessagesRequest(Prompt):
    """/v1/messages."""

    max_tokens: Count
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    refused = {  # noqa: RUF012
        **Prompt.refused,
        "container": ((), "this server runs no code"),
        "context_management": ((), "this server edits no conversations"),
        "diagnostics": ((), "it is about Anthropic's prompt cache"),
        "inference_geo": ((), "the model runs where this server runs"),
        "mcp_servers": ((), "this server calls no tools itself"),
    }

    def chat_request(self) -> ChatRequest:
        """``max_tokens`` is left out: it may go beyond the context here. Raises ApiError."""
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if self.thinking is not None and (budget is not None) != (self.thinking.type == "enabled"):
            raise refuse(
                "thinking.budget_tokens", "thinking.budget_tokens: given with type 'enabled', and only with it"
            )
        if budget is not None and budget >= self.max_tokens:
            raise refuse(
                "thinking.budget_tokens", f"thinking.budget_tokens: must be below max_tokens, {self.max_tokens}"
            )
        sampling = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "user": self.metadata.user_id if self.metadata is not None else None,
        }
        given = {name: value for name, value in sampling.items() if value is not None}
        return self.chat(stream=self.stream, **given)


NAMES = {
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_effort": "thinking",
    "parameters": "input_schema",
    "stop": "stop_sequences",
}


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
        text = re.sub(rf"(?<![\w-]){re.escape(theirs)}(?=:|$|\.)", ours, text)
    return text.replace(".function.", ".")
