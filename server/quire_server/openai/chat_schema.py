"""The request of /v1/chat/completions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import from_json

from quire_server.errors import ApiError, refuse, refused_field
from quire_server.limits import Limits, excess
from quire_server.openai.base import Strict
from quire_server.openai.fields import REFUSED, CacheKey, GenerationFields, Int32, Metadata
from quire_server.openai.structure import Form, of_calls
from quire_server.tool_grammar import Tool as CallTool
from quire_server.tool_grammar import Writer

Count = Annotated[int, Field(ge=1, lt=2**31)]
TEXT_ONLY = "only text is supported"
CUSTOM = "custom tools are not supported, only functions: structured_outputs.grammar holds a whole answer to a grammar"
MOST_PARTS = 2**14  # messages, their parts and calls, whatever --max-messages says: more are not even looked at


class ContentPart(Strict):
    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    refused = {  # noqa: RUF012
        **dict.fromkeys(("image_url", "input_audio", "audio_url", "video_url", "file"), ((), TEXT_ONLY)),
        "prompt_cache_breakpoint": ((), "equal prefixes are reused without it"),
    }

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, kind: Any) -> Any:
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise ValueError(f"content parts of type {kind[:40]!r} are not supported: {TEXT_ONLY}")
        return kind


# Chosen by what is there, so that an error speaks of the part at fault and not of both forms.
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("(parts)")],
    Discriminator(lambda value: "(parts)" if isinstance(value, list) else "(text)"),
]


class FunctionCall(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    refused = {"index": (tuple(range(128)), "the place in the list says it")}  # noqa: RUF012


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refused = {  # noqa: RUF012
        "audio": ((), TEXT_ONLY),
        "refusal": ((), "send it as the message's content"),
        "function_call": ((), "deprecated by OpenAI: use tool_calls"),
        "annotations": (([],), "annotations are not supported"),
    }

    def as_dict(self) -> dict[str, Any]:
        """What a chat template sees: text parts joined, the arguments of calls as objects."""
        message: dict[str, Any] = {"role": self.role}
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text or part.refusal or "" for part in self.content)
        else:
            message["content"] = self.content if self.content is not None else ""
        for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return message


def _object(arguments: str) -> Any:
    """Templates write arguments as JSON, so they get the object; what is none stays the text that the model wrote."""
    if excess(arguments.encode(errors="surrogatepass"), Limits()):  # a text within the body, which was not looked into
        return arguments
    try:
        value = from_json(arguments, allow_inf_nan=False)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


class FunctionSpec(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: FunctionSpec
    refused = {"custom": ((), CUSTOM)}  # noqa: RUF012


class FunctionName(Strict):
    name: Annotated[str, Field(min_length=1, max_length=128)]


class NamedChoice(Strict):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName
    refused = {"custom": ((), CUSTOM)}  # noqa: RUF012


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(fail_fast=True, min_length=1)]


class AllowedChoice(Strict):
    """The only functions that may be called; the others are not even in the prompt."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None and not isinstance(value, dict):
        return "(mode)"
    return "(allowed)" if kind == "allowed_tools" else "(function)"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(mode)")]
    | Annotated[NamedChoice, Tag("(function)")]
    | Annotated[AllowedChoice, Tag("(allowed)")],
    Discriminator(_choice),
]


def _parts(items: Any) -> int:
    """Elements of a list that is not validated yet, with those of its messages' contents and calls."""
    if not isinstance(items, list):
        return 0
    lists = (item.get(name) for item in items if isinstance(item, dict) for name in ("content", "tool_calls"))
    return len(items) + sum(len(each) for each in lists if isinstance(each, list))


class ChatFields(Strict):
    """What decides the prompt; /tokenize takes the same."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    documents: Annotated[list[dict[str, str]], Field(fail_fast=True)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False

    @model_validator(mode="before")
    @classmethod
    def _not_huge(cls, data: Any) -> Any:
        """Each part becomes a model, which takes a thousand times as long as to read it."""
        for name in ("messages", "tools", "documents") if isinstance(data, dict) else ():
            count = _parts(data.get(name))
            if count > MOST_PARTS:
                raise refused_field(name, f"has {count} parts, more than {MOST_PARTS}", "too_many_parts")
        return data

    @property
    def offers_tools(self) -> bool:
        return bool(self.tools)

    def check_prompt(self, limits: Limits, trust_template: bool) -> None:
        limits.at_most("messages", len(self.messages), "max_messages")
        limits.at_most("tools", len(self.tools or ()), "max_tools")
        limits.at_most("documents", len(self.documents or ()), "max_documents")
        limits.at_most("chat_template_kwargs", len(self.chat_template_kwargs or ()), "max_template_kwargs")
        if self.chat_template is not None:
            if not trust_template:
                message = "chat_template: only taken by a server with --trust-request-chat-template"
                raise refuse("chat_template", message)
            limits.at_most("chat_template", len(self.chat_template), "max_template_chars")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message: cannot be true together with add_generation_prompt"
            raise refuse("continue_final_message", message)


class ChatRequest(GenerationFields, ChatFields):
    """OpenAI's chat completion with vLLM's extra fields."""

    refused = {  # noqa: RUF012
        **REFUSED,
        "audio": ((), TEXT_ONLY),
        "modalities": ((["text"],), TEXT_ONLY),
        "functions": ((), "deprecated by OpenAI: use tools"),
        "function_call": (("none",), "deprecated by OpenAI: use tool_choice"),
        "store": ((False,), "chat completions are not stored: use /v1/responses"),
        "prediction": ((), "predicted outputs are not supported"),
        "web_search_options": ((), "this server searches nothing"),
        "verbosity": (("medium",), "the model has no such setting"),
        "prompt_cache_retention": (("in_memory",), "pages are kept for as long as the memory allows"),
        "prompt_cache_options": ((), "equal prefixes are reused without it"),
        "best_of": ((1,), "chat has no best_of"),
        "return_prompt_text": ((False,), "/tokenize shows what a template makes of messages"),
        "media_io_kwargs": ((), TEXT_ONLY),
    }

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Old: use max_completion_tokens."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Int32 | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    echo: bool = False
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description="The new name of user.")
    metadata: Metadata | None = Field(None, description="Told in the JSON log and in the trace.")
    prompt_cache_key: CacheKey | None = None

    @model_validator(mode="after")
    def _only_allowed_tools(self) -> ChatRequest:
        """``allowed_tools`` are a list of tools and a choice of the other form."""
        if isinstance(self.tool_choice, AllowedChoice):
            allowed = self.tool_choice.allowed_tools
            names = {each.function.name for each in allowed.tools}
            unknown = sorted(names - {tool.function.name for tool in self.tools or ()})
            if unknown:
                raise refused_field("tool_choice", f"no tool is named {unknown[0]!r}", "invalid_value")
            self.tools = [tool for tool in self.tools or () if tool.function.name in names]
            self.tool_choice = allowed.mode
        return self

    @property
    def offers_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refuse("max_tokens", "max_tokens: max_completion_tokens is given too, with another value")
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise refuse("top_logprobs", "top_logprobs: only allowed when logprobs is true")
            if self.top_logprobs < 0:
                raise refuse("top_logprobs", f"top_logprobs: must be at least 0, not {self.top_logprobs}")
            limits.at_most("top_logprobs", self.top_logprobs, "max_logprobs")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise refuse("tool_choice", "tool_choice: only allowed when tools are given")
        if isinstance(self.tool_choice, NamedChoice):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools or ()):
                raise refuse("tool_choice", f"tool_choice: no tool is named {name!r}")

    @property
    def structure_field(self) -> str:
        return "tools" if self._by_tools else super().structure_field

    @property
    def _by_tools(self) -> bool:
        """Whether it is the tools that say what form the output must have."""
        strict = any(tool.function.strict for tool in self.tools or ())
        return self.offers_tools and (self.tool_choice not in (None, "auto") or strict)

    def form(self, writer: Writer | None) -> Form:
        """The form of the output, tools considered. ``writer`` writes calls as the model does; None: nobody can here.
        Raises ApiError, or InvalidParameter."""
        asked, choice = self.structure(), self.tool_choice
        tools = [CallTool(t.function.name, t.function.parameters) for t in self.tools or ()]
        if not self._by_tools:
            if asked is None or writer is None or not self.offers_tools or self.response_format is None:
                return Form(asked)
            if not (asked.json or asked.json_object):
                return Form(asked)
            answer = json.loads(asked.json) if asked.json else {"type": "object"}
            return of_calls(writer, lambda: writer.calls(tools, self.parallel_tool_calls, answer))
        if writer is None:
            raise self._cannot_force()
        if asked is not None:
            field = super().structure_field
            raise refuse(field, f"{field}: cannot be combined with a forced tool_choice or strict tools")
        if isinstance(choice, NamedChoice):
            named = [tool for tool in tools if tool.name == choice.function.name][:1]
            return of_calls(writer, lambda: writer.calls(named, many=False))
        if choice == "required":
            return of_calls(writer, lambda: writer.calls(tools, self.parallel_tool_calls))
        held = [replace(tool, held=bool(t.function.strict)) for tool, t in zip(tools, self.tools or (), strict=True)]
        return of_calls(writer, lambda: writer.free(held), free=True)

    def _cannot_force(self) -> ApiError:
        field = "tools" if self.tool_choice in (None, "auto") else "tool_choice"
        message = (
            f"{field}: calls cannot be forced or strict here: no parser of the server knows the form of calls that this "
            "model's chat template teaches, or the one in use (--tool-call-parser) has no grammar of it. Use tool_choice "
            "'auto' without strict, or ask for JSON by response_format"
        )
        return refuse(field, message)
