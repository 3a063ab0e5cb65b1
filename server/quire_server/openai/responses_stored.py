"""What /v1/responses keeps: looking at it, following it, ending it, forgetting it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from quire_server.auth import owner_of
from quire_server.errors import ApiError, json_response, refuse
from quire_server.openai.responses_store import Stored
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of
from quire_server.streaming import EventStream

router = APIRouter(prefix="/v1/responses", tags=["responses"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]


@router.get("/{response_id}")
async def retrieve_response(request: Request, response_id: str, server: State) -> Response:
    """The response as it is now; with ``stream``, its events (again)."""
    asked = _query(request, "stream", "starting_after", "include_obfuscation")
    streams = _flag(asked, "stream")
    if _flag(asked, "include_obfuscation"):
        raise refuse("include_obfuscation", "include_obfuscation: this server adds no padding to events")
    if "starting_after" in asked and not streams:
        raise refuse("starting_after", "starting_after: only allowed when stream is true")
    after = _number(asked, "starting_after", -1, -1, 2**31)
    owner = owner_of(request)
    run = server.background.get(response_id, owner)
    if run is not None:
        if not streams:
            return json_response(run.answer.snapshot())
        if run.events is None:
            raise _no_events()
        return EventStream(run.follow(after), server.lifecycle)
    stored = await server.responses.get(response_id, owner)
    if stored is None:
        raise _unknown(response_id)
    if not streams:
        return _as_stored(stored)
    if stored.events is None:
        raise _no_events()
    return EventStream(_again(stored.events[after + 1 :]), server.lifecycle)


def _no_events() -> ApiError:
    return refuse("stream", "stream: only a response that was created with background and stream has events to send")


async def _again(events: list[bytes]) -> AsyncGenerator[bytes, None]:
    for event in events:
        yield event


@router.post("/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str, server: State) -> Response:
    """End a response in the background. One that has ended stays as it is."""
    owner = owner_of(request)
    run = server.background.get(response_id, owner)
    if run is not None:
        await run.cancel()
        return json_response(run.answer.response)
    stored = await server.responses.get(response_id, owner)
    if stored is None:
        raise _unknown(response_id)
    if not stored.body()["background"]:
        message = (
            "only a response that was created with background can be cancelled; to end another, close its connection"
        )
        raise ApiError(400, message, param="response_id")
    return _as_stored(stored)


@router.delete("/{response_id}")
async def delete_response(request: Request, response_id: str, server: State) -> Response:
    """Forget it. Responses that went on from it keep the conversation."""
    owner = owner_of(request)
    run = server.background.get(response_id, owner)
    if run is not None:
        await run.cancel()
    if not await server.responses.delete(response_id, owner) and run is None:
        raise _unknown(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.get("/{response_id}/input_items")
async def list_input_items(request: Request, response_id: str, server: State) -> Response:
    """The conversation that it answers, what came before ``previous_response_id`` included."""
    asked = _query(request, "after", "limit", "order")
    limit = _number(asked, "limit", 20, 1, 100)
    if asked.get("order", "desc") not in ("asc", "desc"):
        raise refuse("order", "order: must be 'asc' or 'desc'")
    stored = await server.responses.get(response_id, owner_of(request))
    if stored is None:
        raise _unknown(response_id)
    items = stored.conversation()
    if asked.get("order", "desc") == "desc":
        items.reverse()
    if "after" in asked:
        place = next((i for i, item in enumerate(items) if item["id"] == asked["after"]), None)
        if place is None:
            raise refuse("after", f"after: no item has the id {asked['after'][:64]!r}")
        items = items[place + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return json_response({"object": "list", "data": page, **ends, "has_more": len(items) > limit})


def _unknown(response_id: str) -> ApiError:
    message = f"no response {response_id[:100]!r} is stored here: it was not, was deleted, or made room for newer ones"
    return ApiError(404, message, param="response_id")


def _as_stored(stored: Stored) -> Response:
    return Response(stored.response, media_type="application/json")


def _query(request: Request, *known: str) -> dict[str, str]:
    """The query's parameters. Raises 400 for one that is not known."""
    for name in request.query_params:
        if name not in known:
            raise refuse(name[:64], f"{name[:64]}: unrecognized parameter", "unknown_parameter")
    return dict(request.query_params)


def _flag(asked: dict[str, str], name: str) -> bool:
    value = asked.get(name, "false").lower()
    if value not in ("true", "false"):
        raise refuse(name, f"{name}: must be true or false")
    return value == "true"


def _number(asked: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = asked.get(name, str(default))
    try:
        value = int(text[:12])
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise refuse(name, f"{name}: must be a whole number from {least} to {most}")
    return value
