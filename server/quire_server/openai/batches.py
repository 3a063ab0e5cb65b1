"""/v1/batches: many requests in a file, run when there is room for them."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from quire_server.batch_runner import Batches
from quire_server.errors import ApiError, json_response, refuse
from quire_server.openai.batches_schema import BatchList, BatchRequest, page
from quire_server.openai.files import Owner, Shared
from quire_server.routing import StrictRoute

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=StrictRoute)
MOMENTS = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
)  # fmt: skip


@router.post("")
async def create(batches: Shared, owner: Owner, body: BatchRequest) -> Response:
    """Begin a batch over an uploaded file."""
    if body.endpoint not in batches.caller.endpoints:
        offered = ", ".join(batches.caller.endpoints)
        raise refuse("endpoint", f"endpoint: must be one of {offered}", "unsupported_value")
    now = int(time.time())
    batch: dict[str, Any] = {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": int(now + batches.settings.window),
        **dict.fromkeys(MOMENTS),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
        "output_expires_after": body.output_expires_after and body.output_expires_after.model_dump(),
    }
    await asyncio.to_thread(batches.store.add_batch, owner, batch)
    batches.start((owner, batch))
    return json_response(batch)


@router.get("")
async def list_batches(batches: Shared, owner: Owner, query: Annotated[BatchList, Query()]) -> Response:
    if query.after is not None:
        await _known(batches, query.after, owner, "after")
    found = await asyncio.to_thread(batches.store.batches, owner, query.limit + 1, query.after)
    return json_response(page(found, query.limit))


@router.get("/{batch_id}")
async def retrieve(batches: Shared, owner: Owner, batch_id: str) -> Response:
    return json_response(await _known(batches, batch_id, owner))


@router.post("/{batch_id}/cancel")
async def cancel(batches: Shared, owner: Owner, batch_id: str) -> Response:
    """End it; what has been answered becomes its output."""
    batch = await _known(batches, batch_id, owner)
    now = {"status": "cancelling", "cancelling_at": int(time.time())}
    changed = await asyncio.to_thread(batches.store.update_batch, batch["id"], ("validating", "in_progress"), **now)
    if changed is None or changed["status"] != "cancelling":
        status = (changed or await _known(batches, batch_id, owner))["status"]
        raise ApiError(409, f"a batch that is {status} cannot be cancelled", code="not_cancellable")
    batches.cancel(batch["id"])
    return json_response(changed)


async def _known(batches: Batches, batch_id: str, owner: str | None, param: str = "batch_id") -> dict[str, Any]:
    batch = await asyncio.to_thread(batches.store.batch, batch_id, owner)
    if batch is None:
        raise ApiError(404, f"no such batch: {batch_id[:64]!r}", param=param, code="batch_not_found")
    return batch
