"""The ASGI application: routes and what surrounds them. The order of the layers is the order of the checks."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from quire import __version__
from quire_server import engine_view, errors, health, tokenize
from quire_server.auth import AuthMiddleware
from quire_server.lifecycle import GateMiddleware
from quire_server.middleware import BodyLimitMiddleware, EnvelopeMiddleware, HostMiddleware
from quire_server.openai import chat, completions, models
from quire_server.rate_limits import RateLimitMiddleware
from quire_server.state import Server

EXPOSED = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    *(f"x-ratelimit-{kind}-requests" for kind in ("limit", "remaining", "reset")),
)
"""Headers of answers that pages of other origins may read."""


def create_app(server: Server) -> FastAPI:
    """The application over one engine client. It neither starts nor stops the engine."""
    app = FastAPI(
        title="Quire",
        version=__version__,
        description="OpenAI-compatible serving of large language models.",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be built from the Host header
    )
    app.state.server = server
    if server.settings.network.metrics_port is None:
        app.include_router(health.metrics_router)
    for router in (health.router, models.router, completions.router, chat.router, tokenize.router, engine_view.router):
        app.include_router(router)
    errors.install(app)
    limits = server.limits
    # Added from the innermost to the outermost.
    app.add_middleware(BodyLimitMiddleware, max_bytes=limits.max_body_bytes, timeout=limits.body_timeout)
    app.add_middleware(GateMiddleware, lifecycle=server.lifecycle)
    app.add_middleware(
        RateLimitMiddleware,
        metrics=server.metrics,
        per_minute=server.settings.max_requests_per_minute_per_key,
        at_once=server.settings.max_concurrent_requests_per_key,
    )
    _guard(app, server, server.settings.network.host)
    return app


def create_metrics_app(server: Server) -> FastAPI:
    """/metrics for a port of its own, behind the same keys."""
    app = FastAPI(title="Quire metrics", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.server = server
    app.include_router(health.metrics_router)
    errors.install(app)
    _guard(app, server, server.settings.network.metrics_host)
    return app


def _guard(app: FastAPI, server: Server, host: str) -> None:
    """What surrounds an application that listens on ``host``."""
    network = server.settings.network
    app.add_middleware(AuthMiddleware, keys=server.keys, metrics=server.metrics)
    if network.allowed_origins:  # outside of the keys: what a browser asks beforehand carries none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=network.allowed_origins,
            allow_methods=network.allowed_methods,
            allow_headers=network.allowed_headers,
            allow_credentials=network.allow_credentials,
            expose_headers=EXPOSED,
        )
    app.add_middleware(HostMiddleware, allowed=network.hosts(host))
    app.add_middleware(EnvelopeMiddleware, access_log=server.settings.access_log)
