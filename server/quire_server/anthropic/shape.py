"""Anthropic's shape of errors on its routes, whoever refuses: a route, a limit, a missing key, a server that drains."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_server.errors import ApiError

PREFIX = "/v1/messages"
OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}
# Chat's refusals name its own fields; a client must read of those that it has sent.
_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "chat_template_kwargs": "thinking",
}


def status_of(status: int, code: str | None) -> int:
    """A full queue and an engine that is not there are what Anthropic answers with 529."""
    return OVERLOADED if status == 503 or code == "queue_full" else status


def shaped(status: int, error: dict[str, Any], request_id: str | None) -> dict[str, Any]:
    """OpenAI's ``error`` as Anthropic's body: https://docs.claude.com/en/api/errors"""
    param, message = error.get("param"), str(error.get("message"))
    if param in _NAMES:
        message = message.replace(param, _NAMES[param], 1)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def failed(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """The event that ends a stream."""
    inner = error.body()["error"]
    return shaped(status_of(error.status_code, error.code), inner, request_id)


class ShapeMiddleware:
    """Outermost. On Anthropic's paths it adds the header ``request-id`` and rewrites the errors of all other layers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == PREFIX or path.startswith(PREFIX + "/")):
            await self.app(scope, receive, send)
            return
        start: Message = {}
        held = b""

        async def reshape(message: Message) -> None:
            nonlocal start, held
            if message["type"] == "http.response.start":
                request_id = str(scope.get("state", {}).get("request_id", ""))
                start = {**message, "headers": [*message.get("headers", ()), (b"request-id", request_id.encode())]}
                if message["status"] < 400:
                    await send(start)
                return
            if start["status"] < 400:
                await send(message)
                return
            held += message.get("body", b"")  # the server's own words, a few lines at most
            if not message.get("more_body", False):
                await self._send_error(start, held, scope, send)

        await self.app(scope, receive, reshape)

    async def _send_error(self, start: Message, held: bytes, scope: Scope, send: Send) -> None:
        try:
            error = msgspec.json.decode(held)["error"]
        except (msgspec.DecodeError, KeyError, TypeError):
            error = {"message": "the request failed"}
        status = status_of(start["status"], error.get("code"))
        body = msgspec.json.encode(shaped(status, error, scope.get("state", {}).get("request_id")))
        replaced = (b"content-length", b"content-type")
        headers = [(name, value) for name, value in start["headers"] if name.lower() not in replaced]
        headers += [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        await send({**start, "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
