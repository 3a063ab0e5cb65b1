"""The requests of /v1/messages and /v1/messages/count_tokens, and how they become chat requests."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from quire_server.anthropic.blocks import AnyMessage, CacheControl, Texts, conversation, text_of
from quire_server.errors import refuse
from quire_server.openai.base import Strict
from quire_server.openai.chat_schema import ChatRequest
from quire_server.text import mentions

MIN_BUDGET = 1024


class CustomTool(Strict):
    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    refused = {  # noqa: RUF012
        "allowed_callers": ((["direct"],), "tools are called by the model alone"),
        "defer_loading": ((False,), "every tool is in the prompt"),
        "eager_input_streaming": ((False,), "a call is streamed once it is known to be one"),
        "input_examples": (([],), "put them into the description"),
    }

    @field_validator("type", mode="before")
    @classmethod
    def _custom(cls, kind: Any) -> Any:
        if isinstance(kind, str) and kind != "custom":
            raise ValueError(f"tools of type {kind[:40]!r} are not offered: only custom tools, which the client runs")
        return kind

    @field_validator("input_schema")
    @classmethod
    def _of_object(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("type") != "object":
            raise ValueError("must be a JSON schema with type 'object'")
        return schema

    def chat(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    disable_parallel_tool_use: bool | None = None

    def chat(self) -> Any:
        if (self.name is not None) != (self.type == "tool"):
            raise refuse("tool_choice.name", "tool_choice.name: given with type 'tool', and only with it")
        if self.type == "none" and self.disable_parallel_tool_use is not None:
            raise refuse("tool_choice", "tool_choice.disable_parallel_tool_use: not allowed with type 'none'")
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(Strict):
    """``budget_tokens`` chooses the template's effort or budget where it has one. Nothing cuts the thinking there:
    ``max_tokens`` bounds thinking and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=MIN_BUDGET, lt=2**31)] | None = None
    display: Literal["omitted"] | None = Field(None, description="Thinking is shown in full, or not at all.")

    def check(self, max_tokens: int | None) -> None:
        if (self.budget_tokens is not None) != (self.type == "enabled"):
            message = "thinking.budget_tokens: given with type 'enabled', and only with it"
            raise refuse("thinking.budget_tokens", message)
        if self.budget_tokens is not None and max_tokens is not None and self.budget_tokens >= max_tokens:
            message = f"thinking.budget_tokens: must be below max_tokens ({max_tokens}), not {self.budget_tokens}"
            raise refuse("thinking.budget_tokens", message)
        if self.display is not None and self.type == "disabled":
            raise refuse("thinking.display", "thinking.display: not allowed with type 'disabled'")

    @property
    def effort(self) -> str:
        budget = self.budget_tokens or 0
        return "low" if budget <= 4096 else "medium" if budget <= 16384 else "high"


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None

    def chat_format(self) -> dict[str, Any] | None:
        form = self.format
        if form is None:
            return None
        if form.get("type") != "json_schema" or set(form) != {"type", "schema"} or not isinstance(form["schema"], dict):
            where = "output_config.format"
            raise refuse(where, f"{where}: must be {{'type': 'json_schema', 'schema': {{...}}}}")
        return {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"]}}


class Metadata(Strict):
    user_id: Annotated[str, Field(max_length=512)] | None = Field(None, description="Shown in the server's log.")


class CountRequest(Strict):
    """What decides the prompt."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[AnyMessage], Field(fail_fast=True, min_length=1)]
    system: Texts | None = None
    tools: Annotated[list[CustomTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    refused = {  # noqa: RUF012
        "speed": (("standard",), "there is one speed"),
        "user_profile_id": ((), "this server keeps no profiles"),
        "workspace_id": ((), "this server has no workspaces"),
        "context_management": ((), "this server edits no conversations"),
        "mcp_servers": (([],), "this server calls no tools itself"),
        "betas": (([],), "this server has no beta features"),
    }

    def chat(self, **more: Any) -> ChatRequest:
        """The same as chat has it, but for thinking, which depends on the template. Raises ApiError."""
        messages = conversation(self.messages)
        prefilled = messages[-1]["role"] == "assistant"
        if prefilled and self.thinking is not None and self.thinking.type != "disabled":
            raise refuse("messages", "messages: with thinking, the last one cannot be the answer's own beginning")
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": text_of(self.system)})
        choice = self.tool_choice
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": messages,
                "tools": [tool.chat() for tool in self.tools or ()] or None,
                "tool_choice": choice.chat() if choice is not None else None,
                "parallel_tool_calls": not (choice is not None and choice.disable_parallel_tool_use),
                "response_format": self.output_config.chat_format() if self.output_config is not None else None,
                "add_generation_prompt": not prefilled,
                "continue_final_message": prefilled,
                **more,
            }
        )

    def template_variables(self, template: str, thinks: bool) -> dict[str, Any]:
        """Thinking and effort in the template's terms. ``thinks``: whether there is thinking to be told apart.

        Without ``thinking`` a model that can do without it does, as Anthropic's. Raises ApiError.
        """
        thinking = self.thinking or Thinking(type="disabled", display=None)
        switch = _switch(template)
        by_effort = mentions(template, "reasoning_effort")
        variables: dict[str, Any] = {}
        if thinking.type == "enabled":
            if switch is None and not by_effort and not thinks:
                raise refuse("thinking", "thinking: this model's chat template knows no thinking")
            if by_effort:
                variables["reasoning_effort"] = thinking.effort
            if mentions(template, "thinking_budget"):
                variables["thinking_budget"] = thinking.budget_tokens
        elif thinking.type == "disabled" and self.thinking is not None and switch is None and (by_effort or thinks):
            raise refuse("thinking.type", "thinking.type: this model cannot do without thinking")
        if switch is not None and thinking.type != "adaptive":
            variables[switch] = thinking.type == "enabled"
        effort = self.output_config.effort if self.output_config is not None else None
        if effort is not None and by_effort:
            variables["reasoning_effort"] = effort
        elif effort not in (None, "high"):  # high is what no effort means
            raise refuse("output_config.effort", "output_config.effort: this model's chat template has no such setting")
        return variables


class MessagesRequest(CountRequest):
    """/v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    refused = {  # noqa: RUF012
        **CountRequest.refused,
        "service_tier": (("auto", "standard_only"), "this server has one tier"),
        "container": ((), "this server runs no code"),
        "diagnostics": ((), "it speaks of a cache that this server does not have"),
        "inference_geo": ((), "the model runs where this server runs"),
    }

    def chat(self, **more: Any) -> ChatRequest:
        """``max_tokens`` is left out: it may be more than the context holds."""
        return super().chat(
            stop=self.stop_sequences or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            user=self.metadata.user_id if self.metadata is not None else None,
            **more,
        )


_THINKING = re.compile(r"\bif\s+(?:not\s+)?thinking\b|(?<![.\w])thinking\s+is\s+(?:not\s+)?defined\b")


def _switch(template: str) -> str | None:
    """The template's variable that turns thinking on and off."""
    if mentions(template, "enable_thinking"):
        return "enable_thinking"
    return "thinking" if _THINKING.search(template) else None
