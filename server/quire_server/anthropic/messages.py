"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from quire_server.anthropic.events import PING, Answer, sse
from quire_server.anthropic.schema import CountRequest, MessagesRequest
from quire_server.anthropic.shape import PREFIX, failed
from quire_server.errors import json_response
from quire_server.model import Model
from quire_server.openai import generation
from quire_server.openai.chat import prepare
from quire_server.openai.chat_schema import ChatRequest
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of
from quire_server.streaming import EventStream, answer

router = APIRouter(prefix=PREFIX, tags=["messages"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]
Steps = AsyncGenerator[tuple[Answer, dict[str, Any] | None], None]
PING_SECONDS = 10.0
"""A stream that has nothing to tell for so long, since a call is read to its end first, says that it lives."""


@router.post("")
async def create_message(request: Request, body: MessagesRequest, server: State) -> Response:
    """Answer a conversation."""
    model = server.model(body.model)
    head = {"id": f"msg_{uuid.uuid4().hex}", "model": body.model}
    chat = _chat(model, body, body.max_tokens)
    request.state.user = chat.user
    events = _events(model, body, chat, head)
    if body.stream:
        request_id = getattr(request.state, "request_id", None)
        return EventStream(_encoded(events), server.lifecycle, lambda error: sse(failed(error, request_id)))
    return await answer(request, server.lifecycle, _whole(events))


@router.post("/count_tokens")
async def count_tokens(body: CountRequest, server: State) -> Response:
    """How many tokens the prompt of the same request has."""
    model = server.model(body.model)
    prompt = await model.text.chat_prompt(_chat(model, body, None))
    return json_response({"input_tokens": len(prompt.token_ids)})


def _chat(model: Model, body: CountRequest, max_tokens: int | None) -> ChatRequest:
    if body.thinking is not None:
        body.thinking.check(max_tokens)
    chat = body.chat()
    chat.check(model.server.limits)
    chat.check_prompt(model.server.limits, trust_template=False)
    template = model.text.template(chat) or ""
    thinks = model.parsers.choice(template).reasoning is not None
    chat.chat_template_kwargs = body.template_variables(template, thinks) or None
    return chat


async def _events(model: Model, body: MessagesRequest, chat: ChatRequest, head: dict[str, Any]) -> Steps:
    """The answer so far and what has happened to it; None: nothing that can be told."""
    run = await prepare(model, chat, head["id"])
    room = run.job.sampling.max_tokens or 0
    run.job.sampling.max_tokens = min(room, body.max_tokens)
    shown = body.thinking is None or body.thinking.display != "omitted"
    thoughts, prompt = run.reasoning_tokens(model, chat), len(run.job.prompt_token_ids)
    made = Answer(head, run.parser(chat), thoughts, prompt, cut=room < body.max_tokens, show_thinking=shown)
    begun = False
    async with aclosing(generation.outputs(model, chat, [run.job])) as items:
        async for _, item in items:
            if not begun:
                begun = True
                for event in made.start(item):
                    yield made, event
            quiet = True
            for event in made.add(item):
                quiet = False
                yield made, event
            if quiet:
                yield made, None


async def _encoded(steps: Steps) -> AsyncGenerator[bytes, None]:
    told = time.monotonic()
    async with aclosing(steps):
        async for _, event in steps:
            if event is None and time.monotonic() - told < PING_SECONDS:
                continue
            told = time.monotonic()
            yield sse(event or PING)


async def _whole(steps: Steps) -> Response:
    message: dict[str, Any] = {}
    async with aclosing(steps):
        async for made, _ in steps:
            message = made.message
    return json_response(message)
