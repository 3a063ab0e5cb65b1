"""A message in the making: what the parsers read out of the model's text becomes content blocks and typed events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from quire.outputs import CompletionOutput, RequestOutput
from quire_server.errors import ApiError
from quire_server.tool_calls import AnswerParser, Arguments, CallEnd, CallStart, Content, Event, Reasoning

Events = Iterator[dict[str, Any]]
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(status: int, message: str, request_id: str | None = None) -> dict[str, Any]:
    """https://platform.claude.com/docs/en/api/errors"""
    fallback = "invalid_request_error" if status < 500 else "api_error"
    error = {"type": _TYPES.get(status, fallback), "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


def sse(event: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class Answer:
    """``message`` is what is known so far. Every method that changes it gives the events that tell of it."""

    def __init__(self, message_id: str, model: str, parser: AnswerParser, prompt_tokens: int, cut: bool) -> None:
        """``cut``: the context holds fewer tokens than the request would allow."""
        self.parser, self.cut = parser, cut
        self._prompt, self._completion, self._cached = prompt_tokens, 0, 0
        self._block: dict[str, Any] | None = None  # the block that grows; its text is in _text until it is done
        self._text: list[str] = []
        self._called = False
        self.message: dict[str, Any] = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def start(self, output: RequestOutput) -> Events:
        """Before the first output is added."""
        self._cached = output.num_cached_tokens
        self.message["usage"] = self._usage()
        yield {"type": "message_start", "message": dict(self.message, content=[])}
        yield {"type": "ping"}

    def add(self, output: RequestOutput) -> Events:
        """What the engine has given."""
        self._cached = max(self._cached, output.num_cached_tokens)
        for sample in output.outputs:
            yield from self._sample(sample)

    def end(self) -> Events:
        """The engine has given everything."""
        yield from self._close()
        self.message["usage"] = usage = self._usage()
        stopped = {"stop_reason": self.message["stop_reason"], "stop_sequence": self.message["stop_sequence"]}
        yield {"type": "message_delta", "delta": stopped, "usage": usage}
        yield {"type": "message_stop"}

    @staticmethod
    def fail(error: ApiError, request_id: str | None) -> Events:
        yield error_body(error.status_code, error.message, request_id)

    def _usage(self) -> dict[str, Any]:
        """As with Anthropic, ``input_tokens`` are those that were not read from the cache."""
        return {
            "input_tokens": self._prompt - self._cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached,
            "output_tokens": self._completion,
            "service_tier": "standard",
        }

    # -- its blocks -----------------------------------------------------------------------------------------------
    def _sample(self, sample: CompletionOutput) -> Events:
        self._completion += len(sample.token_ids)
        for event in self.parser.read(sample.text):
            yield from self._tell(event)
        if sample.finish_reason is not None:
            for event in self.parser.end():
                yield from self._tell(event)
            self._stop(sample)

    def _stop(self, sample: CompletionOutput) -> None:
        reason = "end_turn"
        if sample.finish_reason in ("length", "deadline"):
            window = self.cut and sample.finish_reason == "length"
            reason = "model_context_window_exceeded" if window else "max_tokens"
        elif isinstance(sample.stop_reason, str):
            reason, self.message["stop_sequence"] = "stop_sequence", sample.stop_reason
        elif self._called:
            reason = "tool_use"
        self.message["stop_reason"] = reason

    def _tell(self, event: Event) -> Events:
        if isinstance(event, Content):
            yield from self._write("text", "text_delta", event.text)
        elif isinstance(event, Reasoning):
            yield from self._write("thinking", "thinking_delta", event.text)
        elif isinstance(event, CallStart):
            self._called = True
            yield from self._close()
            yield from self._open({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        elif isinstance(event, Arguments):
            yield from self._write("tool_use", "input_json_delta", event.text)
        elif isinstance(event, CallEnd):
            yield from self._close()

    def _open(self, block: dict[str, Any]) -> Events:
        self._block, self._text = block, []
        yield {"type": "content_block_start", "index": len(self.message["content"]), "content_block": dict(block)}

    def _write(self, kind: str, delta: str, text: str) -> Events:
        if self._block is None or self._block["type"] != kind:
            yield from self._close()
            yield from self._open(
                {"type": "text", "text": ""} if kind == "text" else {"type": kind, "thinking": "", "signature": ""}
            )
        self._text.append(text)
        key = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}[kind]
        place = {"type": "content_block_delta", "index": len(self.message["content"])}
        yield {**place, "delta": {"type": delta, key: text}}

    def _close(self) -> Events:
        block, self._block = self._block, None
        if block is None:
            return
        text = "".join(self._text)
        if block["type"] == "tool_use":
            block["input"] = msgspec.json.decode(text or "{}")  # parsers give whole JSON objects
        else:
            block[block["type"]] = text
        yield {"type": "content_block_stop", "index": len(self.message["content"])}
        self.message["content"].append(block)
