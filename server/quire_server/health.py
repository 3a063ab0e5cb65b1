"""Routes for those who run the server: is it alive, does the engine answer, what does it measure."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from quire import __version__
from quire.errors import EngineDead, EngineRestarting
from quire_server.errors import ApiError, json_response
from quire_server.state import Server, server_of

if TYPE_CHECKING:
    from quire.message import EngineStats

router = APIRouter(tags=["operation"])
metrics_router = APIRouter(tags=["operation"])  # may have a port of its own
State = Annotated[Server, Depends(server_of)]


@router.get("/ping")
async def ping() -> Response:
    """The HTTP process answers. Whether it can serve is what /ready says."""
    return json_response({"status": "alive"})


@router.get("/live")
async def live(server: State) -> Response:
    """The HTTP process serves. It fails only when a restart is what helps: the engine is gone for good."""
    if server.engine.errored:
        raise ApiError(503, "the engine is gone for good", code="engine_dead")
    return json_response({"status": "alive"})


@router.get("/ready")
async def ready(server: State) -> Response:
    """200 while new requests are taken; 503 with the reason while the model loads, while the engine is gone or does
    not answer, and from the moment of draining on."""
    await _asked(server)
    return json_response({"status": "ready"})


@router.get("/health")
async def health(server: State) -> Response:
    """200 when the engine has just answered; 503 with the reason otherwise."""
    stats = await _asked(server)
    return json_response({"status": "ok", "running": stats.running, "waiting": stats.waiting})


async def _asked(server: Server) -> EngineStats:
    """What the engine answers now. Raises 503 with the reason why it does not, or why no new request is taken."""
    refusal = server.lifecycle.refusal()
    if refusal is not None:
        raise refusal
    try:
        return await server.engine.stats(timeout=server.settings.health_timeout)
    except TimeoutError:
        reason, code = f"the engine did not answer within {server.settings.health_timeout:g} s", "engine_unresponsive"
    except EngineRestarting:
        reason, code = "engine restarting; open requests go on when it is back", "engine_restarting"
    except EngineDead as error:
        reason, code = f"the engine is not running: {error}", "engine_dead"
    raise ApiError(503, reason, code=code, headers={"Retry-After": "1"})


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/load")
async def load(server: State) -> Response:
    """Requests in flight in this HTTP process."""
    return json_response({"server_load": server.lifecycle.in_flight})


@metrics_router.get("/metrics")
async def metrics(server: State) -> Response:
    """Prometheus' text format. It answers without the engine too, and then says that the engine did not."""
    stats, info = None, None
    with contextlib.suppress(TimeoutError, EngineDead):
        info = server.engine.info
        stats = await server.engine.stats(timeout=server.settings.health_timeout)
    return Response(server.metrics.render(stats, info), media_type=CONTENT_TYPE_LATEST)
