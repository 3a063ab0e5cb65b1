"""API keys: on every route but those that a load balancer asks, and the page, which holds no data."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from quire_server.errors import ApiError
from quire_server.keys import ApiKeys, current_key
from quire_server.metrics import Metrics
from quire_server.pages import ASSETS

OPEN_PATHS = frozenset({"/health", "/live", "/ready", "/ping", *ASSETS})


def owner_of(request: Request) -> str | None:
    """Who may see what this request stores: the name of its API key; None where there are no keys: then everybody."""
    owner: str | None = getattr(request.state, "key_name", None)
    return owner


class AuthMiddleware:
    """Refuses what carries no known key, whatever the path or method, known route or not.

    The name of the key goes to ``request.state.key_name``.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN_PATHS:
            given = _given(Headers(scope=scope))
            key = self.keys.find(given.encode("latin-1")) if given else None
            if key is None:
                message = (
                    "the API key is not known here"
                    if given
                    else "an API key is needed: Authorization: Bearer KEY, or X-Api-Key: KEY"
                )
                error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
            scope.setdefault("state", {})["key_name"] = key.name
            self.metrics.by_key(key.name)
            current_key.set(key)
        await self.app(scope, receive, send)


def _given(headers: Headers) -> str:
    """The key that a request carries, as OpenAI's clients or as Anthropic's send it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
