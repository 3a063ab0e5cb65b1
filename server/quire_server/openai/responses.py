"""/v1/responses: a chat whose answer is a list of items, which the server may keep and go on from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.responses import Response

from quire_server.auth import owner_of
from quire_server.errors import from_engine, json_response, path_of, refuse
from quire_server.lifecycle import shutting_down
from quire_server.model import Model
from quire_server.openai import generation
from quire_server.openai.chat import ChatRun, prepare, token_logprobs
from quire_server.openai.chat_schema import ChatRequest
from quire_server.openai.responses_background import Run
from quire_server.openai.responses_events import Answer, sse
from quire_server.openai.responses_items import ITEMS, Items, new_id
from quire_server.openai.responses_schema import ResponsesRequest, in_our_names
from quire_server.openai.responses_tokens import Ledger
from quire_server.record import current
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of
from quire_server.streaming import EventStream, answer

router = APIRouter(prefix="/v1/responses", tags=["responses"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]


@router.post("")
async def create_response(request: Request, body: ResponsesRequest, server: State) -> Response:
    """Answer a conversation."""
    request.state.user = body.user or body.safety_identifier
    current().metadata = body.metadata
    plan = await _plan(server, body, owner_of(request))
    if body.background:
        return await _begin(server, plan)
    if body.stream:
        return EventStream(_stream(server, plan), server.lifecycle)
    return await answer(request, server.lifecycle, _whole(server, plan))


@router.post("/input_tokens")
async def count_input_tokens(request: Request, body: ResponsesRequest, server: State) -> Response:
    """How many tokens the same request would have as its input."""
    body.background = False
    plan = await _plan(server, body, owner_of(request))
    return json_response({"object": "response.input_tokens", "input_tokens": len(plan.run.job.prompt_token_ids)})


@dataclass
class _Plan:
    """A request ready for the engine, with the answer that it will be."""

    model: Model
    body: ResponsesRequest
    chat: ChatRequest
    run: ChatRun
    answer: Answer
    owner: str | None
    items: list[dict[str, Any]]  # the conversation, as it is stored


async def _plan(server: Server, body: ResponsesRequest, owner: str | None) -> _Plan:
    model, created = server.model(body.model), time.time()
    named = body.model or model.name
    body.check_own()
    if body.background:
        server.background.check()
    before = await _before(server, body.previous_response_id, owner)
    own = body.items()
    response_id = new_id("resp")
    with in_our_names():
        chat = await server.run(body.size, lambda: body.chat([*_items(before), *own]))
        if not before:
            chat._size = body.size
        chat.check(server.limits)
        chat.check_prompt(server.limits, False)
        run = await prepare(model, chat, response_id)
    response = {"id": response_id, "object": "response", "created_at": created, "model": named}
    response |= _echo(body) | {"temperature": run.job.sampling.temperature, "top_p": run.job.sampling.top_p}
    made = Answer(
        response,
        run.parser(chat),
        Ledger(model.text.token_bytes),
        len(run.job.prompt_token_ids),
        partial(token_logprobs, model, chat) if chat.logprobs else None,
    )
    items = before + [item.stored() for item in own] if body.store else []
    return _Plan(model, body, chat, run, made, owner, items)


async def _before(server: Server, previous: str | None, owner: str | None) -> list[dict[str, Any]]:
    """The conversation that is gone on with. Raises 400."""
    if previous is None:
        return []
    stored = await server.responses.get(previous, owner)
    if stored is None:
        message = f"previous_response_id: no response {previous[:100]!r} is stored"
        raise refuse("previous_response_id", message, "previous_response_not_found")
    response = stored.body()
    if response["status"] in ("queued", "in_progress"):
        raise refuse("previous_response_id", "previous_response_id: this response is still at work")
    return [*stored.conversation(), *response["output"]]


def _items(stored: list[dict[str, Any]]) -> Items:
    try:
        return ITEMS.validate_python(stored)
    except ValidationError as error:  # a model may have called what no tool can be named
        where = path_of(error.errors()[0]["loc"])
        message = f"previous_response_id: its conversation cannot be gone on with ({where}): send what you need of it as input"
        raise refuse("previous_response_id", message) from None


def _echo(body: ResponsesRequest) -> dict[str, Any]:
    """What a response says of its request."""
    text = body.text.format if body.text is not None else None
    return {
        "status": "in_progress",
        "background": body.background,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store,
        "text": {"format": text or {"type": "text"}},
        "tool_choice": _plain(body.tool_choice) or "auto",
        "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _plain(choice: Any) -> Any:
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()


# -- the three ways to the answer -------------------------------------------------------------------------------------
async def _events(plan: _Plan) -> AsyncGenerator[dict[str, Any], None]:
    """All but the last events. Raises ApiError, before the first one if the engine refuses the request."""
    begun = False
    with in_our_names():
        async with aclosing(generation.outputs(plan.model, plan.chat, [plan.run.job])) as items:
            async for _, item in items:
                if not begun:
                    begun = True
                    for event in plan.answer.start():
                        yield event
                for event in plan.answer.add(item):
                    yield event


async def _store(server: Server, plan: _Plan, stream: list[bytes] | None = None) -> None:
    if plan.body.store:
        await server.responses.put(plan.answer.response, plan.owner, plan.items, stream)


async def _last(server: Server, plan: _Plan, events: Iterator[dict[str, Any]], run: Run | None = None) -> list[bytes]:
    """The last events, which tell of a response that is stored by then, or of why it is not."""
    encoded = [sse(event) for event in events]
    try:
        await _store(server, plan, [*run.events, *encoded] if run is not None and run.events is not None else None)
    except Exception as error:
        failed = plan.answer.fail(from_engine(error), untold=1)
        return [*encoded[:-1], *map(sse, failed)]
    return encoded


async def _whole(server: Server, plan: _Plan) -> Response:
    async with aclosing(_events(plan)) as events:
        async for _ in events:
            pass
    for _ in plan.answer.end():
        pass
    await _store(server, plan)
    return json_response(plan.answer.response)


async def _stream(server: Server, plan: _Plan) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async with aclosing(_events(plan)) as events:
            async for event in events:
                begun = True
                yield sse(event)
        end = plan.answer.end()
    except Exception as error:
        if not begun:
            raise
        end = plan.answer.fail(from_engine(error))
    for encoded in await _last(server, plan, end):
        yield encoded


async def _begin(server: Server, plan: _Plan) -> Response:
    """In the background: the answer is the response that waits, or the stream of its events."""
    server.background.check()
    run = Run(plan.answer, plan.owner, plan.body.stream)
    for event in plan.answer.queue():
        run.tell(sse(event))
    queued = json_response(plan.answer.response)
    await server.background.start(run, _work(server, plan, run), server.lifecycle)
    return EventStream(run.follow(-1), server.lifecycle) if plan.body.stream else queued


async def _work(server: Server, plan: _Plan, run: Run) -> None:
    made = plan.answer
    try:
        await server.responses.put(made.response, plan.owner, plan.items)
        async with aclosing(_events(plan)) as events:
            async for event in events:
                run.tell(sse(event))
        end = made.end()
    except (Exception, asyncio.CancelledError) as error:  # a cancelled task has its end to store too
        if run.cancelled:
            end = made.cancel()
        else:
            end = made.fail(from_engine(error) if isinstance(error, Exception) else shutting_down())
    run.ending = True
    for encoded in await _last(server, plan, end, run):
        run.tell(encoded)
