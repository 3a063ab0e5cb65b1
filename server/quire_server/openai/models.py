"""/v1/models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from quire_server.errors import json_response
from quire_server.state import Server, server_of

router = APIRouter(prefix="/v1/models", tags=["models"])
State = Annotated[Server, Depends(server_of)]


def _card(server: Server, name: str) -> dict[str, Any]:
    """In OpenAI's terms, and in Anthropic's, whose clients ask the same path."""
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(server.created, UTC).isoformat(),
        "object": "model",
        "created": server.created,
        "owned_by": "quire",
        "root": server.settings.model_names[0],
        "parent": None,
        "max_model_len": server.engine.info.max_model_len,
    }


@router.get("")
async def list_models(server: State) -> Response:
    names = server.settings.model_names
    page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    return json_response({"object": "list", "data": [_card(server, name) for name in names], **page})


@router.get("/{name:path}")
async def one_model(server: State, name: str) -> Response:
    return json_response(_card(server, server.model(name)))
