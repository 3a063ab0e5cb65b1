"""Routes for those who run the server: is it alive, does the engine answer, what does it measure."""

from __future__ import annotations

import contextlib
from typing import Annotated

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from quire import __version__
from quire.errors import EngineDead, EngineRestarting
from quire_server.errors import ApiError, json_response
from quire_server.state import Server, server_of

router = APIRouter(tags=["operation"])
State = Annotated[Server, Depends(server_of)]


@router.get("/ping")
async def ping() -> Response:
    """The HTTP process is alive. Whether it can serve is what /health says."""
    return json_response({"status": "alive"})


@router.get("/health")
async def health(server: State) -> Response:
    """200 when the engine has just answered; 503 with the reason otherwise."""
    refusal = server.lifecycle.refusal()
    if refusal is not None:
        raise refusal
    try:
        stats = await server.engine.stats(timeout=server.settings.health_timeout)
    except TimeoutError:
        raise ApiError(
            503, f"the engine did not answer within {server.settings.health_timeout:g} s", code="engine_unresponsive"
        ) from None
    except EngineRestarting:
        message = "engine restarting; open requests go on when it is back"
        raise ApiError(503, message, code="engine_restarting", headers={"Retry-After": "1"}) from None
    except EngineDead as error:
        raise ApiError(503, f"the engine is not running: {error}", code="engine_dead") from None
    return json_response({"status": "ok", "running": stats.running, "waiting": stats.waiting})


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/load")
async def load(server: State) -> Response:
    """Requests in flight in this HTTP process."""
    return json_response({"server_load": server.lifecycle.in_flight})


@router.get("/metrics")
async def metrics(server: State) -> Response:
    """Prometheus' text format. It answers without the engine too, and then says that the engine did not."""
    stats, info = None, None
    with contextlib.suppress(TimeoutError, EngineDead):
        info = server.engine.info
        stats = await server.engine.stats(timeout=server.settings.health_timeout)
    return Response(server.metrics.render(stats, info), media_type=CONTENT_TYPE_LATEST)
