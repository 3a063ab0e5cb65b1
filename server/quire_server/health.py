"""Routes for those who run the server: is it alive, does the engine answer, what does it measure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from quire import __version__
from quire.errors import EngineDead, EngineRestarting
from quire_server.errors import ApiError, json_response
from quire_server.metrics import Answer
from quire_server.model import Model
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
async def live(server: State, model: str | None = None) -> Response:
    """The HTTP process serves. It fails only when a restart is what helps: an engine is gone for good."""
    gone = [one.name for one in _chosen(server, model) if one.engine.errored]
    if gone:
        raise ApiError(503, _said(server, [(name, "the engine is gone for good") for name in gone]), code="engine_dead")
    return json_response({"status": "alive"})


@router.get("/ready")
async def ready(server: State, model: str | None = None) -> Response:
    """200 while new requests are taken; 503 with the reason while a model loads, while an engine is gone or does
    not answer, and from the moment of draining on. ``model``: of that one alone."""
    await _asked(server, _chosen(server, model))
    return json_response({"status": "ready"})


@router.get("/health")
async def health(server: State, model: str | None = None) -> Response:
    """200 when the engines (``model``: that one's) have just answered; 503 with the reason otherwise."""
    chosen = _chosen(server, model)
    answers = [(one.name, stats.running, stats.waiting) for one, stats in await _asked(server, chosen)]
    body: dict[str, Any] = {
        "status": "ok",
        "running": sum(running for _, running, _ in answers),
        "waiting": sum(waiting for *_, waiting in answers),
    }
    if len(server.models) > 1:
        body["models"] = {name: {"running": running, "waiting": waiting} for name, running, waiting in answers}
    return json_response(body)


def _chosen(server: Server, name: str | None) -> Sequence[Model]:
    return server.models if name is None else [server.model(name)]


def _said(server: Server, reasons: Sequence[tuple[str, str]]) -> str:
    """Reasons by model, whose names say nothing where there is one."""
    if len(server.models) == 1:
        return reasons[0][1]
    return "; ".join(f"{name}: {reason}" for name, reason in reasons)


async def _asked(server: Server, models: Sequence[Model]) -> list[tuple[Model, EngineStats]]:
    """What the engines answer now. Raises 503 with the reasons why one does not, or why no new request is taken."""
    refusal = server.lifecycle.refusal()
    if refusal is not None:
        raise refusal
    seconds = server.settings.health_timeout
    answers = await asyncio.gather(*(one.engine.stats(timeout=seconds) for one in models), return_exceptions=True)
    failed, code, good = [], "", []
    for one, answer in zip(models, answers, strict=True):
        if isinstance(answer, BaseException):
            reason, its_code = _reason(answer, seconds)
            failed.append((one.name, reason))
            code = code or its_code
        else:
            good.append((one, answer))
    if failed:
        raise ApiError(503, _said(server, failed), code=code, headers={"Retry-After": "1"})
    return good


def _reason(error: BaseException, seconds: float) -> tuple[str, str]:
    """Why an engine gave no answer, for people and for programs."""
    if isinstance(error, TimeoutError):
        return f"the engine did not answer within {seconds:g} s", "engine_unresponsive"
    if isinstance(error, EngineRestarting):
        return "engine restarting; open requests go on when it is back", "engine_restarting"
    if isinstance(error, EngineDead):
        return f"the engine is not running: {error}", "engine_dead"
    raise error


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/load")
async def load(server: State) -> Response:
    """Requests in flight in this HTTP process."""
    return json_response({"server_load": server.lifecycle.in_flight})


@metrics_router.get("/metrics")
async def metrics(server: State) -> Response:
    """Prometheus' text format. It answers without the engines too, and then says which did not."""
    answers = await asyncio.gather(*(_scraped(model, server.settings.health_timeout) for model in server.models))
    by_model = {model.name: answer for model, answer in zip(server.models, answers, strict=True)}
    return Response(server.metrics.render(by_model), media_type=CONTENT_TYPE_LATEST)


async def _scraped(model: Model, seconds: float) -> Answer:
    info = None
    try:
        info = model.engine.info
        return await model.engine.stats(timeout=seconds), info
    except (TimeoutError, EngineDead):
        return None, info
