"""The ASGI application: routes and what surrounds them. The order of the layers is the order of the checks."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from quire import __version__
from quire_server import document, engine_view, errors, health, tokenize
from quire_server.anthropic import messages
from quire_server.anthropic.shape import ShapeMiddleware
from quire_server.auth import AuthMiddleware
from quire_server.batch_runner import Batches
from quire_server.lifecycle import GateMiddleware
from quire_server.middleware import BodyLimit, BodyLimitMiddleware, EnvelopeMiddleware, HostMiddleware
from quire_server.openai import batches, chat, completions, files, models, pooling, responses, responses_stored
from quire_server.rate_limits import RateLimitMiddleware
from quire_server.state import Server

FORM_BYTES = 2**16  # of an upload beside its file
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
    for module in (health, models, completions, chat, tokenize, files, batches, engine_view):
        app.include_router(module.router)
    for module in (responses, responses_stored, messages, pooling):
        app.include_router(module.router)
    errors.install(app)
    document.install(app, keys=bool(server.keys))
    server.batches = Batches(server, app)
    limits, uploads = server.limits, server.settings.batches
    upload = BodyLimit(uploads.max_file_bytes + FORM_BYTES, uploads.upload_timeout, "--max-file-bytes, and the form")
    # Added from the innermost to the outermost.
    app.add_middleware(
        BodyLimitMiddleware,
        limit=BodyLimit(limits.max_body_bytes, limits.body_timeout),
        others={("POST", "/v1/files"): upload},
    )
    app.add_middleware(GateMiddleware, lifecycle=server.lifecycle)
    app.add_middleware(
        RateLimitMiddleware,
        metrics=server.metrics,
        per_minute=server.settings.max_requests_per_minute_per_key,
        at_once=server.settings.max_concurrent_requests_per_key,
        behind=server.background.of,
    )
    _guard(app, server, server.settings.network.host)
    app.add_middleware(ShapeMiddleware)
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
    app.add_middleware(EnvelopeMiddleware, access_log=server.settings.access_log, tracing=server.tracing)
