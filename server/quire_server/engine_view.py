"""The page at ``/`` and what it sees of the engine: ``/engine`` once, ``/engine/stream`` about twice a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from quire.errors import EngineDead
from quire.kv.accounts import CACHED, FREE, OWNED, SHARED
from quire_server.errors import ApiError, json_response
from quire_server.metrics import Buckets
from quire_server.model import Model
from quire_server.pages import ASSETS, HEADERS
from quire_server.state import Server, server_of
from quire_server.streaming import EventStream, event

if TYPE_CHECKING:
    from quire.message import EngineStats

INTERVAL = 0.5  # seconds between updates of a stream
MAX_CELLS = 4096  # of the page map, all KV groups together
MAX_OWNERS = 8  # named for one cell
MAX_LISTENERS = 16  # streams at once; one question to the engine serves them all
SECONDS_PER_PAGE = 15e-6  # between two page maps: a hundred times what one takes, so that looking costs about 1 %
STATES = {"free": FREE, "cached": CACHED, "owned": OWNED, "shared": SHARED}
GAUGES = (
    "running", "waiting", "swapped", "preemptions", "steps", "pages_total", "pages_free", "pages_cached",
    "prefix_queries", "prefix_hits", "prompt_tokens", "generation_tokens", "kv_waste", "batch_tokens", "batch_requests",
    "step_running_for",
)  # fmt: skip

router = APIRouter(tags=["page"])
State = Annotated[Server, Depends(server_of)]


def _asset(path: str) -> Any:
    content, media_type = ASSETS[path]

    async def send() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send


for _path in ASSETS:
    router.add_api_route(_path, _asset(_path), include_in_schema=False, methods=["GET", "HEAD"])


@router.get("/engine")
async def engine(request: Request, server: State, model: str | None = None) -> Response:
    """Counters, gauges, latency histograms and the KV page map of this moment; 503 when the engine does not answer.

    ``model``: whose engine; the first's, if none is named. ``models`` in the answer are all that can be.
    """
    view = await _watch(request, server, model).view()
    if "error" in view:
        raise ApiError(503, view["error"], code="engine_unresponsive", headers={"Retry-After": "1"})
    return json_response(view)


@router.get("/engine/stream")
async def engine_stream(request: Request, server: State, model: str | None = None) -> Response:
    """The same as server-sent events. While the engine does not answer, an event has ``error`` in place of numbers."""
    return EventStream(_events(_watch(request, server, model)), server.lifecycle)


async def _events(watch: EngineWatch) -> AsyncGenerator[bytes, None]:
    if watch.listeners >= MAX_LISTENERS:
        raise ApiError(
            429,
            f"{MAX_LISTENERS} streams of the engine are open already",
            code="too_many",
            headers={"Retry-After": "5"},
        )
    watch.listeners += 1
    try:
        while True:
            yield event(await watch.view())
            await asyncio.sleep(INTERVAL)
    finally:
        watch.listeners -= 1


def _watch(request: Request, server: Server, name: str | None) -> EngineWatch:
    state = request.app.state
    if not hasattr(state, "watches"):
        state.watches = {}
    model = server.models[0] if name is None else server.model(name)
    if model.name not in state.watches:
        state.watches[model.name] = EngineWatch(model)
    watch: EngineWatch = state.watches[model.name]
    return watch


class EngineWatch:
    """Asks one model's engine at most once an interval, however many look."""

    def __init__(self, model: Model) -> None:
        self.model, self.server = model, model.server
        self.listeners = 0
        self._lock = asyncio.Lock()
        self._view: dict[str, Any] = {}
        self._taken = self._mapped = -float("inf")
        self._groups: list[dict[str, Any]] = []
        self._requests: list[dict[str, Any]] = []

    async def view(self) -> dict[str, Any]:
        """What ``/engine`` shows, at most half an interval old; ``error`` in it when the engine did not answer."""
        async with self._lock:
            if time.monotonic() - self._taken >= INTERVAL / 2:
                self._view = await self._ask()
                self._taken = time.monotonic()
            return self._view

    async def _ask(self) -> dict[str, Any]:
        server, engine, metrics = self.server, self.model.engine, self.model.metrics
        names = [model.name for model in server.models]
        head = {"time": time.time(), "model": self.model.name, "models": names, "state": server.lifecycle.state}
        refusal = server.lifecycle.refusal()
        if refusal is not None and server.lifecycle.state != "draining":
            return {**head, "error": str(refusal.detail)}
        try:
            info = engine.info
            now = time.monotonic()
            due = now - self._mapped >= info.pages * SECONDS_PER_PAGE
            stats = await engine.stats(pages=due, timeout=server.settings.health_timeout)
        except TimeoutError:
            return {**head, "error": f"the engine did not answer within {server.settings.health_timeout:g} s"}
        except EngineDead as error:
            return {**head, "error": f"the engine is not running: {error}"}
        if stats.pages is not None:
            self._mapped = now
            self._groups, self._requests = page_map(stats), requests(stats)
        return {
            **head,
            "monotonic": time.monotonic(),
            "device": info.device,
            "max_model_len": info.max_model_len,
            "page_size": info.page_size,
            **{name: getattr(stats, name) for name in GAUGES},
            "in_flight": server.lifecycle.in_flight,
            "page_map": self._groups,
            "requests": self._requests,
            "ttft": histogram(metrics.ttft),
            "itl": histogram(metrics.itl),
        }


def page_map(stats: EngineStats) -> list[dict[str, Any]]:
    """Per KV group the number of pages in each state, and ``cells``: a digit (quire.kv.accounts) for every
    ``pages_per_cell`` pages, the state that most of them have. Page 0, which holds nothing, is left out. ``owners`` are
    runs of cells with the same holders: [first cell, cells, indices into :func:`requests`, how many more]."""
    groups = stats.pages or []
    room = max(1, MAX_CELLS // max(1, len(groups)))
    result = []
    for g, group in enumerate(groups):
        states = np.frombuffer(group, np.uint8)[1:]
        size = max(1, -(-len(states) // room))
        padded = np.zeros(-(-len(states) // size) * size, np.uint8)
        padded[: len(states)] = states
        rows = padded.reshape(-1, size)
        # From the most used state down: argmax takes the first of equals, so that a tie shows what is in use.
        order = (SHARED, OWNED, CACHED, FREE)
        counts = np.stack([(rows == state).sum(1) for state in order])
        cells = np.array(order, np.uint8)[counts.argmax(0)]
        totals = np.bincount(states, minlength=SHARED + 1)
        result.append(
            {
                "pages": len(states),
                **{name: int(totals[state]) for name, state in STATES.items()},
                "pages_per_cell": size,
                "cells": (cells + ord("0")).tobytes().decode("ascii"),
                "owners": owners([sequence.pages[g] for sequence in stats.sequences or ()], size),
            }
        )
    return result


def owners(holdings: Sequence[Sequence[int]], size: int) -> list[list[Any]]:
    """Who holds what: ``holdings`` are the pages of each sequence, ``size`` is the number of pages in a cell."""
    holders: dict[int, list[int]] = {}
    for i, pages in enumerate(holdings):
        for cell in sorted({(page - 1) // size for page in pages}):
            holders.setdefault(cell, []).append(i)
    runs: list[list[Any]] = []
    for cell in sorted(holders):
        named, more = holders[cell][:MAX_OWNERS], max(0, len(holders[cell]) - MAX_OWNERS)
        if runs and runs[-1][0] + runs[-1][1] == cell and runs[-1][2:] == [named, more]:
            runs[-1][1] += 1
        else:
            runs.append([cell, 1, named, more])
    return runs


def requests(stats: EngineStats) -> list[dict[str, Any]]:
    """Who runs and who waits first, in that order; the owners of the page map are indices into this."""
    return [
        {
            "id": sequence.request_id,
            "index": sequence.index,
            "state": sequence.state,
            "prompt_tokens": sequence.prompt_tokens,
            "output_tokens": sequence.output_tokens,
            "computed_tokens": sequence.computed_tokens,
            "age": sequence.age,
            "pages": sum(map(len, sequence.pages)),
        }
        for sequence in stats.sequences or ()
    ]


def histogram(metric: Buckets) -> dict[str, Any]:
    """Seconds observed since the start: ``count``, ``sum`` and cumulative ``buckets`` as [upper bound, count]; the
    last bucket's bound is null (infinity)."""
    cumulative = metric.cumulative()
    buckets = [list(pair) for pair in zip([*metric.bounds, None], cumulative, strict=True)]
    return {"count": cumulative[-1], "sum": metric.sum, "buckets": buckets}
