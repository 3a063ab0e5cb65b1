"""Errors of Anthropic's routes in Anthropic's shape, whoever refused: a route, a limit, a missing key."""

from __future__ import annotations

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_server.anthropic.events import error_body

PREFIX = "/v1/messages"
LARGEST = 1 << 16  # bytes of an error's body; the server's own are far smaller


class AnthropicMiddleware:
    """On paths below PREFIX: the header ``request-id``, and the JSON of answers with a status of 400 and above rewritten."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == PREFIX or path.startswith(f"{PREFIX}/")):
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        held = b""

        async def shaped(message: Message) -> None:
            nonlocal start, held
            if message["type"] == "http.response.start":
                request_id = str(scope.get("state", {}).get("request_id", "")).encode()
                message["headers"] = [*message.get("headers", ()), (b"request-id", request_id)]
                if message["status"] >= 400:
                    start = message
                    return
            if start is None:
                await send(message)
                return
            held += message.get("body", b"")
            if message.get("more_body", False) and len(held) < LARGEST:
                return
            body = self._body(start["status"], held, scope)
            headers = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-length", b"content-type")]
            headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})

        await self.app(scope, receive, shaped)

    @staticmethod
    def _body(status: int, held: bytes, scope: Scope) -> bytes:
        try:
            message = str(msgspec.json.decode(held)["error"]["message"])
        except (msgspec.DecodeError, KeyError, TypeError):
            message = "the request failed"
        return msgspec.json.encode(error_body(status, message, scope.get("state", {}).get("request_id")))
