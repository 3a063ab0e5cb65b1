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
    """In OpenAI's terms, and in Anthropic's, whose clients ask the same path. ``root`` is the model's own name, of which
    ``name`` may be an alias."""
    model = server.model(name)
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(server.created, UTC).isoformat(),
        "object": "model",
        "created": server.created,
        "owned_by": "quire",
        "root": model.name,
        "parent": None,
        "max_model_len": model.engine.info.max_model_len,
    }


@router.get("")
async def list_models(server: State) -> Response:
    names = [name for model in server.models for name in model.settings.names]
    page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    return json_response({"object": "list", "data": [_card(server, name) for name in names], **page})


@router.get("/{name:path}")
async def one_model(server: State, name: str) -> Response:
    return json_response(_card(server, name))
