"""The ASGI application: routes and what surrounds them. The order of the layers is the order of the checks."""

from __future__ import annotations

from fastapi import FastAPI

from quire import __version__
from quire_server import engine_view, errors, health, tokenize
from quire_server.anthropic import messages
from quire_server.anthropic.shape import AnthropicMiddleware
from quire_server.auth import ApiKeys, AuthMiddleware
from quire_server.batch_runner import Batches
from quire_server.lifecycle import GateMiddleware
from quire_server.middleware import BodyLimit, BodyLimitMiddleware, EnvelopeMiddleware
from quire_server.openai import batches, chat, completions, files, models, pooling, responses, responses_stored
from quire_server.state import Server

FORM_BYTES = 2**16  # of an upload beside its file


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
    for module in (health, models, completions, chat, tokenize, files, batches, engine_view):
        app.include_router(module.router)
    for module in (responses, responses_stored, messages, pooling):
        app.include_router(module.router)
    errors.install(app)
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
    app.add_middleware(AuthMiddleware, keys=ApiKeys(server.settings.api_keys))
    app.add_middleware(EnvelopeMiddleware, access_log=server.settings.access_log, tracing=server.tracing)
    app.add_middleware(AnthropicMiddleware)
    return app
