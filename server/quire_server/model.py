"""One checkpoint that is served: its engine, tokenizer, template, parsers and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire_server.engine import EngineClient
from quire_server.errors import refuse
from quire_server.parsers import Parsers
from quire_server.text import Text

if TYPE_CHECKING:
    from quire_server.state import Server


@dataclass(frozen=True)
class ModelSettings:
    """How one model is served."""

    names: tuple[str, ...] = ("demo",)  # the first is the model's own, the others are aliases
    chat_template: str | None = None  # instead of the checkpoint's
    parsers: Parsers = field(default_factory=Parsers)
    response_role: str = "assistant"


class Model:
    """What a request that names this model works with."""

    def __init__(self, server: Server, engine: EngineClient, settings: ModelSettings) -> None:
        self.server, self.engine, self.settings = server, engine, settings
        self.metrics = server.metrics.of(self.name)
        self._text: Text | None = None

    @property
    def name(self) -> str:
        return self.settings.names[0]

    @property
    def parsers(self) -> Parsers:
        return self.settings.parsers

    @property
    def text(self) -> Text:
        """Tokenizer and chat template; there once the engine has started."""
        if self._text is None:
            self._text = Text(self.engine.text, self.settings.chat_template, self.server.run)
        return self._text

    def room(self, prompt_tokens: int, max_tokens: int | None, param: str) -> int:
        """Tokens that may be generated. Raises 400 when prompt and ``max_tokens`` exceed the context."""
        limit = self.engine.info.max_model_len
        if prompt_tokens >= limit:
            message = (
                f"the {param} has {prompt_tokens} tokens; this model's context holds {limit}, "
                "prompt and output together, so at least one must be left to generate"
            )
            raise refuse(param, message, "context_length_exceeded")
        if max_tokens is None:
            return limit - prompt_tokens
        if prompt_tokens + max_tokens > limit:
            message = (
                f"this model's context holds {limit} tokens; {prompt_tokens + max_tokens} were requested: "
                f"{prompt_tokens} in the {param} and {max_tokens} to generate"
            )
            raise refuse("max_tokens", message, "context_length_exceeded")
        return max_tokens
