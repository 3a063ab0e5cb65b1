"""From loading to serving to draining to stopped, and what each state answers."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from quire_server.errors import ApiError
from quire_server.pages import ASSETS

State = Literal["loading", "serving", "draining", "stopped", "failed"]
PROBES = frozenset(
    {"/health", "/live", "/ready", "/ping", "/metrics", "/version", "/load", "/engine", "/engine/stream", *ASSETS}
)


class Lifecycle:
    """``in_flight`` counts requests other than probes; ``stopped`` becomes done when they must end at once."""

    def __init__(self, state: State = "serving") -> None:
        self.state: State = state
        self.reason = ""
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped: asyncio.Future[None] | None = None

    @property
    def stopped(self) -> asyncio.Future[None]:
        if self._stopped is None:
            self._stopped = asyncio.get_running_loop().create_future()
        return self._stopped

    def begin(self) -> None:
        self.in_flight += 1
        self._idle.clear()

    def end(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    def stop(self) -> None:
        """End every request in flight with an error."""
        self.state = "stopped"
        if not self.stopped.done():
            self.stopped.set_result(None)

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those in flight; after ``seconds`` end them. True: none was cut off."""
        if self.state != "stopped":
            self.state = "draining"
        idle = asyncio.ensure_future(self._idle.wait())
        ends: set[asyncio.Future[Any]] = {idle, self.stopped}
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        clean = idle.done()
        self.stop()
        if not clean:
            await asyncio.wait({idle}, timeout=5.0)
        idle.cancel()
        return clean

    def refusal(self) -> ApiError | None:
        """Why no new request is taken now."""
        if self.state == "serving":
            return None
        if self.state == "loading":
            return ApiError(503, "the model is loading", code="loading", headers={"Retry-After": "1"})
        if self.state == "failed":
            return ApiError(
                503, f"the engine did not start: {self.reason}", code="engine_dead", headers={"Retry-After": "5"}
            )
        return shutting_down()


def shutting_down() -> ApiError:
    return ApiError(
        503, "the server is shutting down", code="shutting_down", headers={"Connection": "close", "Retry-After": "5"}
    )


class GateMiddleware:
    """Lets requests in while the server serves, and counts them."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app, self.lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self.app(scope, receive, send)
            return
        refusal = self.lifecycle.refusal()
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        self.lifecycle.begin()
        try:
            await self.app(scope, receive, send)
        finally:
            self.lifecycle.end()
