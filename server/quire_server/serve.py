"""The life of one server process: port first, then the engine; the first signal drains, the second stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI

from quire.errors import EngineDead, UserError
from quire_server import loop_delay
from quire_server.app import create_app, create_metrics_app
from quire_server.connection import connection_for
from quire_server.engine import EngineClient
from quire_server.lifecycle import Lifecycle
from quire_server.model import Model
from quire_server.state import Server, Settings

logger = logging.getLogger("quire.server")


class ServeError(UserError):
    """The server cannot run here: the message says why."""


class _Uvicorn(uvicorn.Server):
    """Leaves signals to :func:`serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening address, before anything slow is begun. Raises ServeError when it is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # there it would let two servers share the port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port} (--host, --port): {error.strerror or error}") from None
    return listener


async def serve(
    engines: Sequence[EngineClient],
    settings: Settings,
    listener: socket.socket,
    *,
    metrics_listener: socket.socket | None = None,
    drain_timeout: float = 60.0,
    log_level: str = "warning",
    on_ready: Callable[[Server], None] | None = None,
    asked: asyncio.Event | None = None,
) -> int:
    """Serve until a signal, or until an engine turns out not to start. Returns the exit status. ``engines``: one for each
    model of ``settings``; requests are taken once all have started.

    ``/health`` answers (503) from the beginning; ``on_ready`` is called once requests are served. ``metrics_listener`` is
    where /metrics is when ``settings`` give it a port of its own. With ``asked``, which
    asks to drain when it is set, signals are left alone: only the main thread can have them.
    """
    server = Server(engines, settings, Lifecycle("loading"))
    http = [_http(create_app(server), settings, log_level)]
    sockets = [listener]
    if metrics_listener is not None:
        http.append(_http(create_metrics_app(server), settings, log_level))
        sockets.append(metrics_listener)
    stop = _Stopper(server, http, asked)
    served = (one.serve(sockets=[each]) for one, each in zip(http, sockets, strict=True))
    serving: asyncio.Future[Any] = asyncio.gather(*served)
    watching = asyncio.create_task(loop_delay.watch(server.metrics.loop_delay))
    starting = asyncio.create_task(start(server.models))
    signalled = asyncio.create_task(stop.asked.wait())
    status = 0
    try:
        await server.batches.open()
        ends: set[asyncio.Future[Any]] = {starting, serving, signalled}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            server.lifecycle.state = "serving"
            await server.batches.resume()
            if on_ready is not None:
                on_ready(server)
            await asyncio.wait(ends - {starting}, return_when=asyncio.FIRST_COMPLETED)
            logger.info("draining: %d requests in flight", server.lifecycle.in_flight)
            if not await server.lifecycle.drain(drain_timeout):
                logger.warning(
                    "requests were cut off after %g s (--drain-timeout) or by a second signal", drain_timeout
                )
    except (EngineDead, UserError) as error:
        server.lifecycle.state, server.lifecycle.reason = "failed", str(error)
        logger.error("quire serve: %s", error)
        status = 1
    finally:
        starting.cancel()
        signalled.cancel()
        watching.cancel()
        for one in http:
            one.should_exit = True
        await asyncio.gather(starting, signalled, watching, serving, return_exceptions=True)
        await server.batches.close()
        await asyncio.gather(*(engine.shutdown() for engine in engines))
        server.responses.close()
        if server.tracing is not None:
            await asyncio.to_thread(server.tracing.close)
        stop.uninstall()
    return status


async def start(models: Sequence[Model]) -> None:
    """All engines at once. The first error ends the others' starts."""

    async def one(model: Model) -> None:
        try:
            await model.engine.start()
        except (EngineDead, UserError) as error:
            raise EngineDead(f"{model.name}: {error}" if len(models) > 1 else str(error)) from None

    try:
        async with asyncio.TaskGroup() as group:
            for model in models:
                group.create_task(one(model))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _http(app: FastAPI, settings: Settings, log_level: str) -> _Uvicorn:
    return _Uvicorn(
        uvicorn.Config(
            app,
            http=connection_for(settings.network),
            ws="none",
            lifespan="off",
            log_level=log_level,
            log_config=None,
            access_log=False,  # EnvelopeMiddleware writes the line, with the request's id
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
            **settings.network.uvicorn(),
        )
    )


class _Stopper:
    """SIGTERM or SIGINT asks to drain; another one ends what is in flight at once. SIGHUP reads the keys again."""

    def __init__(self, server: Server, http: Sequence[uvicorn.Server], asked: asyncio.Event | None) -> None:
        self.lifecycle, self.http = server.lifecycle, http
        self.asked = asked if asked is not None else asyncio.Event()
        handlers: dict[int, Callable[[], None]] = {}
        if asked is None:
            handlers = {signal.SIGTERM: self.signalled, signal.SIGINT: self.signalled}
            if hasattr(signal, "SIGHUP") and server.settings.api_key_file is not None:
                handlers[signal.SIGHUP] = server.keys.reload
        for number, handler in handlers.items():
            asyncio.get_running_loop().add_signal_handler(number, handler)
        self._signals = tuple(handlers)

    def uninstall(self) -> None:
        for number in self._signals:
            asyncio.get_running_loop().remove_signal_handler(number)

    def signalled(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
            return
        for one in self.http:
            one.should_exit = one.force_exit = True
        self.lifecycle.stop()
