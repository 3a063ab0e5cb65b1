"""Tokenizer and chat template for the routes. What may take milliseconds runs off the event loop."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from quire.sampling.params import SamplingParams
from quire_server.errors import from_engine, refuse

if TYPE_CHECKING:
    from quire_server.openai.chat_schema import ChatFields

T = TypeVar("T")


class Run(Protocol):
    """Server.run"""

    def __call__(self, size: int, work: Callable[[], T], /) -> Awaitable[T]: ...


# What the renderer itself is given: a request must not replace it.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "template"})


@dataclass
class ChatPrompt:
    text: str
    token_ids: list[int]


class Text:
    """``files`` is core's TextFiles: the tokenizer, the checkpoint's chat template and its recommended sampling."""

    def __init__(self, files: Any, chat_template: str | None, run: Run) -> None:
        self.files, self.tokenizer = files, files.tokenizer
        self._run = run
        if chat_template is not None:
            self.tokenizer.chat_templates = {"default": chat_template}

    @cached_property
    def defaults(self) -> SamplingParams:
        """What the checkpoint recommends where a request says nothing."""
        return self.files.default_sampling()

    def template(self, body: ChatFields | None = None) -> str | None:
        """The source of the chat template that ``body`` is rendered with; None: there is none."""
        if body is not None and body.chat_template is not None:
            return body.chat_template
        named: dict[str, str] = self.tokenizer.chat_templates
        if body is not None and body.offers_tools and "tool_use" in named:
            return named["tool_use"]
        return named.get("default")

    @lru_cache(maxsize=16)  # noqa: B019
    def thinking_prompt(self, template: str) -> str:
        """A prompt of ``template`` with thinking switched on; empty where it has no such switch."""
        if not mentions(template, "enable_thinking"):
            return ""
        ask = [{"role": "user", "content": "?"}]
        try:
            return self.files.render_chat(ask, template=template, add_generation_prompt=True, enable_thinking=True)
        except ValueError:  # it wants another conversation
            return ""

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """The token ids of each text."""
        work = partial(self.tokenizer.encode_batch, texts, add_special_tokens=add_special_tokens)
        return await self._run(sum(map(len, texts)), work)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        work = partial(self.tokenizer.decode, token_ids, skip_special_tokens=skip_special_tokens)
        return await self._run(len(token_ids), work)

    async def tokens(self, token_ids: Sequence[int]) -> list[str]:
        return await self._run(len(token_ids), lambda: [self.token(t) for t in token_ids])

    def token(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id)

    def special(self, text: str) -> int | None:
        """The id of a text that is one special token."""
        token: int | None = self.tokenizer.token_to_id(text)
        return token if token is not None and self.tokenizer.is_special(token) else None

    async def chat_prompt(self, body: ChatFields, extra: dict[str, Any] | None = None) -> ChatPrompt:
        """The conversation as the model expects it. Raises 400 when the template cannot or will not render it.

        ``extra`` are variables for the template that the server derived from other fields.
        """
        template = self.template(body)
        if template is None:
            message = "messages: this model has no chat template; use /v1/completions, or serve it with --chat-template"
            raise refuse("messages", message)
        variables = {**(body.chat_template_kwargs or {}), **(extra or {})}

        def render() -> ChatPrompt:
            self._check_used(template, body, variables)
            messages = [m.as_dict() for m in body.messages]
            if not mentions(template, "developer"):
                for message_dict in messages:
                    if message_dict["role"] == "developer":
                        message_dict["role"] = "system"
            offered = body.tools if body.offers_tools else None
            tools = [tool.model_dump(exclude_none=True) for tool in offered] if offered else None
            text = self.files.render_chat(
                messages,
                template=template,
                tools=tools,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                documents=body.documents,
                **variables,
            )
            return ChatPrompt(text, self.tokenizer.encode(text, add_special_tokens=body.add_special_tokens))

        try:
            return await self._run(body.size, render)
        except ValueError as error:
            raise from_engine(error, "messages") from None

    def _check_used(self, template: str, body: ChatFields, variables: dict[str, Any]) -> None:
        """What a template never looks at would be silently ignored."""
        if body.tools and not mentions(template, "tools"):
            raise refuse("tools", "tools: this model's chat template has no place for tools")
        if body.documents and not mentions(template, "documents"):
            raise refuse("documents", "documents: this model's chat template has no place for documents")
        for name in variables:
            if name in RESERVED:
                raise refuse("chat_template_kwargs", f"chat_template_kwargs: {name} is set by the request's own field")
            # Before it is looked for: a long name is a long pattern, and any text could be a part of the template.
            if not (name.isidentifier() and len(name) <= 64) or not mentions(template, name):
                shown = name[:64]
                raise refuse(
                    "chat_template_kwargs", f"chat_template_kwargs: this model's chat template has no {shown!r}"
                )


def mentions(template: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template) is not None
