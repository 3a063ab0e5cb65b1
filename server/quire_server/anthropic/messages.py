"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from quire_server.anthropic.events import Answer, sse
from quire_server.anthropic.schema import CountRequest, MessagesRequest, in_our_names
from quire_server.errors import from_engine, json_response
from quire_server.openai import generation
from quire_server.openai.chat import ChatRun, prepare
from quire_server.openai.chat_schema import ChatRequest
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of
from quire_server.streaming import EventStream, answer

router = APIRouter(prefix="/v1/messages", tags=["messages"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]


@router.post("")
async def create_message(request: Request, body: MessagesRequest, server: State) -> Response:
    """Answer a conversation."""
    model = server.model(body.model)
    request.state.user = body.metadata.user_id if body.metadata is not None else None
    message_id = f"msg_{uuid.uuid4().hex}"
    with in_our_names():
        chat = await server.run(body.size, body.chat_request)
        chat._size = body.size
        run = await _prepared(server, chat, message_id)
    room = run.job.sampling.max_tokens or 0
    run.job.sampling.max_tokens = min(room, body.max_tokens)
    made = Answer(message_id, model, run.parser(chat), len(run.job.prompt_token_ids), room < body.max_tokens)
    events = _events(server, chat, run, made)
    if body.stream:
        return EventStream(_encoded(events, getattr(request.state, "request_id", None)), server.lifecycle)
    return await answer(request, server.lifecycle, _whole(events, made))


@router.post("/count_tokens")
async def count_tokens(body: CountRequest, server: State) -> Response:
    """How many tokens the same request would have as its prompt."""
    server.model(body.model)
    with in_our_names():
        run = await _prepared(server, body.chat(), "count")
    return json_response({"input_tokens": len(run.job.prompt_token_ids)})


async def _prepared(server: Server, chat: ChatRequest, message_id: str) -> ChatRun:
    chat.check(server.limits)
    chat.check_prompt(server.limits, False)
    return await prepare(server, chat, message_id)


async def _events(
    server: Server, chat: ChatRequest, run: ChatRun, made: Answer
) -> AsyncGenerator[dict[str, Any], None]:
    """All events. Raises ApiError, before the first one if the engine refuses the request."""
    begun = False
    with in_our_names():
        async with aclosing(generation.outputs(server, chat, [run.job])) as items:
            async for _, item in items:
                if not begun:
                    begun = True
                    for event in made.start(item):
                        yield event
                for event in made.add(item):
                    yield event
    for event in made.end():
        yield event


async def _whole(events: AsyncGenerator[dict[str, Any], None], made: Answer) -> Response:
    async with aclosing(events):
        async for _ in events:
            pass
    return json_response(made.message)


async def _encoded(events: AsyncGenerator[dict[str, Any], None], request_id: str | None) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async with aclosing(events):
            async for event in events:
                begun = True
                yield sse(event)
    except Exception as error:
        if not begun:
            raise
        for event in Answer.fail(from_engine(error), request_id):
            yield sse(event)
