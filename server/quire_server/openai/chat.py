"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from quire.outputs import CompletionOutput, Logprob
from quire.sampling.params import SamplingParams
from quire_server.errors import from_engine, json_response, refuse
from quire_server.model import Model
from quire_server.openai import generation
from quire_server.openai.chat_schema import ChatRequest
from quire_server.openai.generation import Job, Sample, StreamUsage
from quire_server.openai.structure import renamed
from quire_server.parsers import Choice
from quire_server.reasoning_tokens import ReasoningTokens
from quire_server.record import current, response_id
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of
from quire_server.streaming import DONE, EventStream, answer, event
from quire_server.text import mentions
from quire_server.tool_calls import AnswerParser, Piece

router = APIRouter(tags=["chat"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatRequest, server: State) -> Response:
    """Answer a conversation ``n`` times."""
    model = server.model(body.model)
    body.check(server.limits)
    body.check_prompt(server.limits, server.settings.trust_request_chat_template)
    request.state.user = body.user or body.safety_identifier
    current().metadata = body.metadata
    head = {
        "id": response_id("chatcmpl", body.request_id),
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": body.model or model.name,
        "system_fingerprint": server.fingerprint,
    }
    if body.stream:
        return EventStream(_stream(model, body, head), server.lifecycle)
    return await answer(request, server.lifecycle, _complete(model, body, head))


@dataclass
class ChatRun:
    """A request ready for the engine, and how its answers are read."""

    job: Job
    parsers: Choice
    inside: bool | None  # whether the prompt ends within the reasoning
    tools: list[dict[str, Any]]  # that are offered

    def parser(self, body: ChatRequest) -> AnswerParser:
        """A parser for one sample."""
        return self.parsers.parser(self.inside, self.tools, body.parallel_tool_calls, body.include_reasoning)

    def reasoning_tokens(self, model: Model, body: ChatRequest) -> ReasoningTokens:
        """A count of one sample's reasoning, shown or not."""
        shown = body.model_copy(update={"include_reasoning": True})
        parser = self.parser(shown) if self.parsers.reasoning is not None else None
        return ReasoningTokens(parser, model.text.token_bytes)


async def prepare(model: Model, body: ChatRequest, request_id: str) -> ChatRun:
    """Render, tokenize and bound a request that was checked. Raises ApiError."""
    prompt = await model.text.chat_prompt(body, _thinking(model, body))
    ids = generation.truncate(body, prompt.token_ids, model.engine.info.max_model_len)
    if not ids:
        raise refuse("messages", "messages: the chat template makes an empty prompt of them")
    room = model.room(len(ids), body.limit, "messages")
    scored = (body.top_logprobs or 0) if body.logprobs else None
    template = model.text.template(body) or ""
    parsers = model.parsers.choice(template)
    continued = str(body.messages[-1].as_dict()["content"]) if body.continue_final_message else None
    inside = parsers.inside(prompt.text, continued)

    def prepare() -> tuple[SamplingParams, list[dict[str, Any]]]:
        form = body.form(parsers.writer(model.text.special, inside))
        structure = form.outputs
        if structure is not None and form.reasoning != "own":
            # A template that opens the reasoning itself when it is switched on has it switched off if it does not.
            off = inside is None and parsers.inside(model.text.thinking_prompt(template))
            thinking = None if off else parsers.thinking(inside)
            # Free text may be reasoning anyway: only what has begun is told from it.
            structure.thinking = None if form.reasoning == "within" and thinking and not thinking.opened else thinking
        sampling = body.sampling(
            model.text.defaults,
            max_tokens=room,
            logprobs=scored,
            prompt_logprobs=body.prompt_logprobs,
            structure=structure,
        )
        return sampling, [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.offers_tools else []

    try:
        sampling, tools = await model.server.run(body.size, prepare)
    except ValueError as error:
        raise renamed(from_engine(error), body.structure_field) from None
    if parsers.keeps_special(body.offers_tools):
        sampling.skip_special_tokens = False
    job = Job(request_id, prompt.text if ids is prompt.token_ids else None, ids, sampling)
    return ChatRun(job, parsers, inside, tools)


def _thinking(model: Model, body: ChatRequest) -> dict[str, Any]:
    """reasoning_effort in the terms of the chat template: by its own name, or as the switch that templates have."""
    effort, template = body.reasoning_effort, model.text.template(body) or ""
    if effort is None:
        return {}
    if mentions(template, "reasoning_effort"):
        return {"reasoning_effort": effort}
    if mentions(template, "enable_thinking"):
        return {"enable_thinking": effort != "none"}
    raise refuse("reasoning_effort", "reasoning_effort: this model's chat template knows no reasoning")


def _role(model: Model, body: ChatRequest) -> str:
    return model.settings.response_role if body.add_generation_prompt else body.messages[-1].role


def _echoed(model: Model, body: ChatRequest) -> str:
    """The last message, when ``echo`` asks for it and it is the answer's own beginning."""
    last = body.messages[-1]
    return str(last.as_dict()["content"]) if body.echo and last.role == _role(model, body) else ""


def _finish(reason: str | None, stop_reason: int | str | None, called: bool) -> dict[str, Any]:
    """A sample that ended by itself after calling a tool waits for the tool."""
    return generation.finish("tool_calls" if called and reason == "stop" else reason, stop_reason)


async def _complete(model: Model, body: ChatRequest, head: dict[str, Any]) -> Response:
    chat = await prepare(model, body, head["id"])
    job = chat.job
    (result,) = await generation.gather(model, body, [job])
    reasoning = 0
    for sample in result.samples:
        counter = chat.reasoning_tokens(model, body)
        counter.add(sample.token_ids)
        reasoning += counter.count
    choices = [_choice(model, body, chat, j, sample) for j, sample in enumerate(result.samples)]
    answer: dict[str, Any] = {
        **head,
        "choices": choices,
        "usage": generation.total_usage([result], reasoning),
    }
    if body.prompt_logprobs is not None and result.prompt_logprobs is not None:
        answer["prompt_logprobs"] = generation.prompt_logprobs_json(result.prompt_logprobs)
    if body.return_token_ids:
        answer["prompt_token_ids"] = job.prompt_token_ids
    return json_response(answer)


def _choice(model: Model, body: ChatRequest, chat: ChatRun, index: int, sample: Sample) -> dict[str, Any]:
    piece = chat.parser(body).whole(sample.text)
    content, calls = _echoed(model, body) + piece.content, piece.calls
    message: dict[str, Any] = {"role": _role(model, body), "content": content, "refusal": None}
    if piece.reasoning:
        message["content"] = content or None
        message["reasoning"] = message["reasoning_content"] = piece.reasoning
    if calls:
        message["content"], message["tool_calls"] = content or None, calls
    choice: dict[str, Any] = {
        "index": index,
        "message": message,
        "logprobs": _logprobs(model, body, sample.token_ids, sample.logprobs),
        **_finish(sample.finish_reason, sample.stop_reason, bool(calls)),
    }
    if body.return_token_ids:
        choice["token_ids"] = sample.token_ids
    return choice


async def _stream(model: Model, body: ChatRequest, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    chat = await prepare(model, body, head["id"])
    job = chat.job
    counts = StreamUsage(body, [job])
    counts.thoughts = thoughts = [chat.reasoning_tokens(model, body) for _ in range(body.n)]
    begun = False
    samples = [_StreamedChoice(model, body, chat) for _ in range(body.n)]
    async with aclosing(generation.outputs(model, body, [job])) as items:
        async for index, item in items:
            counts.saw(index, item)
            if not begun:
                begun = True
                for j in range(body.n):
                    delta = {"role": _role(model, body), "content": _echoed(model, body)}
                    first = {"index": j, "delta": delta, "logprobs": None, "finish_reason": None}
                    chunk = {**head, "choices": [first]}
                    if body.return_token_ids:
                        chunk["prompt_token_ids"] = job.prompt_token_ids
                    yield event(counts.on(chunk))
            for output in item.outputs:
                counts.completion += len(output.token_ids)
                thoughts[output.index].add(output.token_ids)
                made = samples[output.index].chunk(output)
                if made is not None:
                    yield event(counts.on({**head, "choices": [made]}))
    if body.include_usage:
        yield event({**head, "choices": [], "usage": counts.total()})
    yield DONE


class _StreamedChoice:
    """Turns one sample's deltas into the choices of chunks."""

    def __init__(self, model: Model, body: ChatRequest, chat: ChatRun) -> None:
        self.model, self.body = model, body
        self.parser = chat.parser(body)
        self.called = False

    def chunk(self, output: CompletionOutput) -> dict[str, Any] | None:
        """None: nothing to tell yet."""
        body = self.body
        piece = self.parser.push(output.text)
        if output.finish_reason is not None:
            last = self.parser.finish()
            piece = Piece(piece.content + last.content, piece.reasoning + last.reasoning, piece.calls + last.calls)
        self.called |= bool(piece.calls)
        wanted = body.logprobs or body.return_token_ids
        if not (
            piece.content or piece.reasoning or piece.calls or output.finish_reason or (wanted and output.token_ids)
        ):
            return None
        delta: dict[str, Any] = {"content": piece.content} if piece.content else {}
        if piece.reasoning:
            delta["reasoning"] = delta["reasoning_content"] = piece.reasoning
        if piece.calls:
            delta["tool_calls"] = piece.calls
        choice: dict[str, Any] = {
            "index": output.index,
            "delta": delta,
            "logprobs": _logprobs(self.model, body, output.token_ids, output.logprobs or []),
            **_finish(output.finish_reason, output.stop_reason, self.called),
        }
        if body.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice


def _logprobs(
    model: Model, body: ChatRequest, token_ids: list[int], rows: generation.Logprobs
) -> dict[str, Any] | None:
    if not body.logprobs or not token_ids:
        return None
    content = [token_logprobs(model, body, token, row) for token, row in zip(token_ids, rows, strict=True)]
    return {"content": content, "refusal": None}


def token_logprobs(model: Model, body: ChatRequest, token: int, row: dict[int, Logprob]) -> dict[str, Any]:
    """OpenAI's entry for one generated token."""
    wanted = body.top_logprobs or 0
    # The row has the chosen token first, which may or may not be one of the most likely.
    best = sorted(row.items(), key=lambda entry: entry[1].rank or 0)[:wanted]
    return {
        **_entry(model, body, token, row[token]),
        "top_logprobs": [_entry(model, body, t, lp) for t, lp in best if (lp.rank or 0) <= wanted],
    }


def _entry(model: Model, body: ChatRequest, token: int, logprob: Logprob) -> dict[str, Any]:
    return {
        "token": generation.token_name(body, token, logprob),
        "logprob": generation.finite(logprob.logprob),
        "bytes": list(model.text.token_bytes(token)),
    }
