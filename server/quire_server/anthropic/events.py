"""A message in the making: what the parsers read out of the model's text, as content blocks and as typed events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from quire.outputs import CompletionOutput, RequestOutput
from quire_server.reasoning_tokens import ReasoningTokens
from quire_server.tool_calls import AnswerParser, Arguments, CallEnd, CallStart, Content, Event, Reasoning

Events = Iterator[dict[str, Any]]
PING = {"type": "ping"}
_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


def sse(event: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))


class Answer:
    """Every method adds to ``message`` and gives the events that tell of it, so streamed and whole are the same."""

    def __init__(
        self,
        head: dict[str, Any],
        parser: AnswerParser,
        thoughts: ReasoningTokens,
        prompt_tokens: int,
        *,
        cut: bool,
        show_thinking: bool,
    ) -> None:
        """``cut``: the context, not the request, bounds the answer."""
        self.parser, self._thoughts, self.cut, self.show_thinking = parser, thoughts, cut, show_thinking
        self._prompt, self._cached, self._output = prompt_tokens, 0, 0
        self._open: dict[str, Any] | None = None  # the last block of the message, while it grows
        self._parts: list[str] = []  # what it has so far
        self._called = False
        self.message: dict[str, Any] = {
            **head, "type": "message", "role": "assistant", "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": self._usage(),
        }  # fmt: skip

    def start(self, first: RequestOutput) -> Events:
        """Before the first output is added."""
        self._cached = first.num_cached_tokens
        yield {"type": "message_start", "message": {**self.message, "content": [], "usage": self._usage()}}
        yield PING

    def add(self, output: RequestOutput) -> Events:
        self._cached = max(self._cached, output.num_cached_tokens)
        for sample in output.outputs:
            self._output += len(sample.token_ids)
            self._thoughts.add(sample.token_ids)
            for event in self.parser.read(sample.text):
                yield from self._tell(event)
            if sample.finish_reason is not None:
                for event in self.parser.end():
                    yield from self._tell(event)
                yield from self._finish(sample)

    def _usage(self) -> dict[str, Any]:
        """As Anthropic counts, the prompt is the sum of what was computed and what was read from the cache."""
        return {
            "input_tokens": self._prompt - self._cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached,
            "output_tokens": self._output,
            "output_tokens_details": {"thinking_tokens": self._thoughts.count},
            "service_tier": "standard",
        }

    def _finish(self, sample: CompletionOutput) -> Events:
        yield from self._close()
        reason, sequence = "end_turn", None
        if sample.finish_reason == "length":
            reason = "model_context_window_exceeded" if self.cut else "max_tokens"
        elif isinstance(sample.stop_reason, str):
            reason, sequence = "stop_sequence", sample.stop_reason
        elif self._called:
            reason = "tool_use"
        stopped = {"stop_reason": reason, "stop_sequence": sequence}
        self.message.update(stopped, usage=self._usage())
        yield {"type": "message_delta", "delta": stopped, "usage": self.message["usage"]}
        yield {"type": "message_stop"}

    # -- blocks ---------------------------------------------------------------------------------------------------
    def _tell(self, event: Event) -> Events:
        if isinstance(event, Content):
            yield from self._grow({"type": "text", "text": ""}, event.text)
        elif isinstance(event, Reasoning):
            yield from self._grow({"type": "thinking", "thinking": "", "signature": ""}, event.text)
        elif isinstance(event, CallStart):
            self._called = True
            yield from self._begin({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        elif isinstance(event, Arguments):
            self._parts.append(event.text)
            yield self._delta({"type": "input_json_delta", "partial_json": event.text})
        elif isinstance(event, CallEnd):
            yield from self._close()

    @property
    def _index(self) -> int:
        return len(self.message["content"]) - 1

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _begin(self, block: dict[str, Any]) -> Events:
        yield from self._close()
        self._open, self._parts = block, []
        self.message["content"].append(block)
        yield {"type": "content_block_start", "index": self._index, "content_block": dict(block)}

    def _grow(self, block: dict[str, Any], text: str) -> Events:
        kind = block["type"]
        if self._open is None or self._open["type"] != kind:
            yield from self._begin(block)
        if kind == "thinking" and not self.show_thinking:
            return
        self._parts.append(text)
        name, key = _DELTAS[kind]
        yield self._delta({"type": name, key: text})

    def _close(self) -> Events:
        block, self._open = self._open, None
        if block is None:
            return
        text = "".join(self._parts)
        if block["type"] == "tool_use":
            block["input"] = msgspec.json.decode(text or "{}")  # parsers give the JSON of an object
        else:
            block[block["type"]] = text
        yield {"type": "content_block_stop", "index": self._index}
