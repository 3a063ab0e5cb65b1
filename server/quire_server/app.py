"""The ASGI application: routes and what surrounds them. The order of the layers is the order of the checks."""

from __future__ import annotations

from fastapi import FastAPI

from quire import __version__
from quire_server import document, engine_view, errors, health, tokenize
from quire_server.auth import ApiKeys, AuthMiddleware
from quire_server.lifecycle import GateMiddleware
from quire_server.middleware import BodyLimitMiddleware, EnvelopeMiddleware
from quire_server.openai import chat, completions, models
from quire_server.state import Server


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
    for router in (health.router, models.router, completions.router, chat.router, tokenize.router, engine_view.router):
        app.include_router(router)
    errors.install(app)
    document.install(app, keys=bool(server.settings.api_keys))
    limits = server.limits
    # Added from the innermost to the outermost.
    app.add_middleware(BodyLimitMiddleware, max_bytes=limits.max_body_bytes, timeout=limits.body_timeout)
    app.add_middleware(GateMiddleware, lifecycle=server.lifecycle)
    app.add_middleware(AuthMiddleware, keys=ApiKeys(server.settings.api_keys))
    app.add_middleware(EnvelopeMiddleware, access_log=server.settings.access_log)
    return app
