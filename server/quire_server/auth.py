"""API keys: on every route but those that a load balancer asks, and the page, which holds no data."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from quire_server.errors import ApiError
from quire_server.pages import ASSETS

OPEN_PATHS = frozenset({"/health", "/live", "/ready", "/ping", *ASSETS})


class ApiKeys:
    """The SHA-256 of each key; a candidate is compared with all of them, each in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allows(self, candidate: bytes) -> bool:
        given = _hash(candidate)
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(given, known)
        return found


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class AuthMiddleware:
    """Refuses what carries no known key, whatever the path or method, known route or not."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self.keys.allows(key.strip().encode("latin-1")):
                message = (
                    "an API key is needed: Authorization: Bearer KEY" if not key else "the API key is not known here"
                )
                error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)
