"""A response in the making: what the parsers read out of the model's text becomes items and OpenAI's typed events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from quire.outputs import CompletionOutput, Logprob, RequestOutput
from quire_server.errors import ApiError
from quire_server.openai.responses_items import new_id
from quire_server.openai.responses_tokens import Ledger
from quire_server.tool_calls import AnswerParser, Arguments, CallEnd, CallStart, Content, Event, Reasoning

Events = Iterator[dict[str, Any]]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_STREAMS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}
_CUT_OFF = ("length", "deadline")


def sse(event: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class Answer:
    """``response`` is what is known so far. Every method that changes it gives the events that tell of it.

    ``entry`` makes OpenAI's log probability of a token; None: none are asked for.
    """

    def __init__(
        self,
        response: dict[str, Any],
        parser: AnswerParser,
        ledger: Ledger,
        prompt_tokens: int,
        entry: Callable[[int, dict[int, Logprob]], dict[str, Any]] | None,
    ) -> None:
        self.response, self.parser, self.ledger, self.entry = response, parser, ledger, entry
        self._prompt, self._completion, self._cached = prompt_tokens, 0, 0
        self._reason: str | None = None
        self._count = 0
        self._item: dict[str, Any] | None = None  # the item that grows; its text is in _text until it is done
        self._text: list[str] = []

    # -- the response as a whole ----------------------------------------------------------------------------------
    def queue(self) -> Events:
        """It waits for its turn without its client."""
        self.response["status"] = "queued"
        yield self._whole("response.created")
        yield self._whole("response.queued")

    def start(self) -> Events:
        self.response["status"] = "in_progress"
        if self._count == 0:
            yield self._whole("response.created")
        yield self._whole("response.in_progress")

    def add(self, output: RequestOutput) -> Events:
        """What the engine has given."""
        self._cached = max(self._cached, output.num_cached_tokens)
        for sample in output.outputs:
            yield from self._sample(sample)

    def end(self) -> Events:
        """The engine has given everything."""
        if not self.response["output"] and self._item is None:
            yield from self._open("message")
        cut = self._reason in _CUT_OFF
        yield from self._close("incomplete" if cut else "completed")
        self._finish("incomplete" if cut else "completed")
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._whole(f"response.{self.response['status']}")

    def fail(self, error: ApiError, untold: int = 0) -> Events:
        """``untold``: events that were given before and that nobody was told of."""
        self._count -= untold
        yield from self._close("incomplete")
        self._finish("failed")
        self.response["completed_at"] = self.response["incomplete_details"] = None
        code = _CODES.get(error.status_code, "server_error")
        self.response["error"] = {"code": code, "message": error.message}
        yield self._whole("response.failed")

    def cancel(self) -> Events:
        """OpenAI has no event for it: the stream ends with ``response.incomplete``, whose response is cancelled."""
        yield from self._close("incomplete")
        self._finish("cancelled")
        yield self._whole("response.incomplete")

    def snapshot(self) -> dict[str, Any]:
        """The response with what its last item has by now."""
        if self._item is None:
            return self.response
        return {**self.response, "output": [*self.response["output"], self._with_text(dict(self._item))]}

    def _finish(self, status: str) -> None:
        self.response["status"] = status
        if status == "completed":
            self.response["completed_at"] = time.time()
        self.response["usage"] = {
            "input_tokens": self._prompt,
            "input_tokens_details": {"cached_tokens": self._cached, "cache_write_tokens": 0},
            "output_tokens": self._completion,
            "output_tokens_details": {"reasoning_tokens": self.ledger.reasoning},
            "total_tokens": self._prompt + self._completion,
        }

    def _whole(self, kind: str) -> dict[str, Any]:
        return self._event(kind, response=dict(self.response, output=list(self.response["output"])))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **fields}

    # -- its items ------------------------------------------------------------------------------------------------
    def _sample(self, sample: CompletionOutput) -> Events:
        self._completion += len(sample.token_ids)
        # The token that ends an answer is none of its text.
        last = -1 if sample.finish_reason == "stop" and not isinstance(sample.stop_reason, str) else None
        rows = sample.logprobs[:last] if self.entry is not None and sample.logprobs is not None else None
        self.ledger.add(sample.token_ids[:last], rows)
        for event in self.parser.read(sample.text):
            yield from self._tell(event)
        if sample.finish_reason is not None:
            self._reason = sample.finish_reason
            for event in self.parser.end():
                yield from self._tell(event)

    def _tell(self, event: Event) -> Events:
        if isinstance(event, Content):
            taken = self.ledger.text(event.text)
            entries = [self.entry(token, row) for token, row in taken if row is not None] if self.entry else []
            yield from self._write("message", event.text, entries)
        elif isinstance(event, Reasoning):
            self.ledger.thought(event.text)
            yield from self._write("reasoning", event.text)
        elif isinstance(event, CallStart):
            self.ledger.call()
            yield from self._close("completed")
            yield from self._open("function_call", call_id=event.id, name=event.name, arguments="")
        elif isinstance(event, Arguments):
            yield from self._write("function_call", event.text)
        elif isinstance(event, CallEnd):
            yield from self._close("completed")

    def _open(self, kind: str, **fields: Any) -> Events:
        item: dict[str, Any] = {"id": new_id(_PREFIXES[kind]), "type": kind, "status": "in_progress", **fields}
        if kind == "message":
            item.update(role="assistant", content=[])
        elif kind == "reasoning":
            item.update(summary=[], content=[])
        yield self._event("response.output_item.added", output_index=len(self.response["output"]), item=dict(item))
        if kind != "function_call":
            item["content"] = [_part(kind)]
            yield self._event("response.content_part.added", **self._place(item), content_index=0, part=_part(kind))
        self._item, self._text = item, []

    def _write(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> Events:
        if self._item is None or self._item["type"] != kind:
            yield from self._close("completed")
            yield from self._open(kind)
        assert self._item is not None
        self._text.append(text)
        fields: dict[str, Any] = self._place(self._item)
        if kind != "function_call":
            fields["content_index"] = 0
        if kind == "message":
            self._item["content"][0]["logprobs"] += logprobs or []
            fields["logprobs"] = logprobs or []
        yield self._event(f"{_STREAMS[kind]}.delta", **fields, delta=text)

    def _close(self, status: str) -> Events:
        item, self._item = self._item, None
        if item is None:
            return
        self._with_text(item)
        place = self._place(item)
        kind, done = item["type"], f"{_STREAMS[item['type']]}.done"
        if kind == "function_call":
            yield self._event(done, **place, name=item["name"], arguments=item["arguments"])
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if kind == "message" else {}
            yield self._event(done, **place, content_index=0, text=part["text"], **more)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        item["status"] = status
        self.response["output"].append(item)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"output_index": len(self.response["output"]), "item_id": item["id"]}

    def _with_text(self, item: dict[str, Any]) -> dict[str, Any]:
        text = "".join(self._text)
        if item["type"] == "function_call":
            item["arguments"] = text
        else:
            item["content"] = [{**item["content"][0], "text": text}]
        return item


def _part(kind: str) -> dict[str, Any]:
    """The one part of an item's content, empty."""
    if kind == "message":
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": ""}
