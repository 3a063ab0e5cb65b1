"""What surrounds every request: its id, its log line, the bound on its body, and the last catch for errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_server import record
from quire_server.errors import ApiError, unforeseen
from quire_server.network import host_allowed
from quire_server.tracing import Tracing

access_logger = logging.getLogger("quire.access")

_REQUEST_ID = re.compile(record.REQUEST_ID)


_ALWAYS = ((b"x-content-type-options", b"nosniff"),)


class EnvelopeMiddleware:
    """Outermost. Gives the request an id (the client's own, if it has a safe form), returns it, tells of it
    when it has ended: a log line and, with tracing, a span.

    Whatever no handler foresaw ends here as a 500.
    """

    def __init__(self, app: ASGIApp, access_log: bool = True, tracing: Tracing | None = None) -> None:
        self.app, self.access_log, self.tracing = app, access_log, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0
        given = Headers(scope=scope).get("x-request-id")
        valid = given is not None and _REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and valid else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        seen = record.begin(request_id, given is not None)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *_ALWAYS]
            await send(message)

        try:
            if given is not None and not valid:
                error = ApiError(400, "X-Request-Id: 1 to 128 letters, digits or ._:@/+=-", param="X-Request-Id")
                await error.response()(scope, receive, send_with_id)
            else:
                await self.app(scope, receive, send_with_id)
        except Exception as error:
            failure = unforeseen(error)
            if status == 0:
                await failure.response()(scope, receive, send_with_id)
            else:
                raise ConnectionError("the response could not be completed") from None
        finally:
            if self.access_log:
                _log(scope, status or 499, seen)
            if self.tracing is not None:
                self.tracing.finished(seen, scope["method"], scope["path"], Headers(scope=scope), status or 499)


def _log(scope: Scope, status: int, seen: record.RequestRecord) -> None:
    """The request's line; the json format has the same and more as fields."""
    milliseconds = (time.monotonic() - seen.began) * 1000
    method, path, state = scope["method"], _printable(scope["path"]), scope["state"]
    named = {name: _printable(state[name]) for name in ("key_name", "user") if state.get(name)}
    who = "".join(f" {name.removesuffix('_name')}={value}" for name, value in named.items())
    access_logger.info(
        "%s %s %d %.1fms %s%s", method, path, status, milliseconds, seen.request_id, who,
        extra={
            **seen.fields(), **named, "method": method, "path": path, "status": status,
            "duration_ms": round(milliseconds, 1),
        },
    )  # fmt: skip


def _printable(text: str) -> str:
    """Bounded, and without line breaks that would forge a line of the log."""
    return text[:256].encode("unicode_escape").decode()


class HostMiddleware:
    """Answers only to the names it is known by, so that a web page whose own name was made to point here gets nothing."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = Headers(scope=scope).getlist("host")  # none: no browser asks so, but old probes do
            if len(hosts) > 1 or not all(host_allowed(host, self.allowed) for host in hosts):
                message = "this server does not answer to the name in the Host header (--allowed-hosts)"
                await ApiError(421, message, code="host_not_allowed").response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


@dataclass(frozen=True)
class BodyLimit:
    max_bytes: int
    timeout: float  # seconds in which it must have arrived
    flag: str = "--max-body-bytes"

    def too_large(self) -> ApiError:
        message = f"the body is larger than this server's limit of {self.max_bytes} bytes ({self.flag})"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


class BodyLimitMiddleware:
    """Counts a body while it arrives, so that a missing or false Content-Length changes nothing.

    ``others`` are the limits of routes, as (method, path), that ``limit`` does not fit.
    """

    def __init__(
        self, app: ASGIApp, limit: BodyLimit, others: Mapping[tuple[str, str], BodyLimit] | None = None
    ) -> None:
        self.app, self.limit, self.others = app, limit, others or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.others.get((scope["method"], scope["path"]), self.limit)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit.max_bytes:
            await limit.too_large().response()(scope, receive, send)
            return
        seen, complete = 0, False
        deadline = asyncio.get_running_loop().time() + limit.timeout

        async def counted() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {limit.timeout:g} s", headers={"Connection": "close"}
                ) from None
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if seen > limit.max_bytes:
                    raise limit.too_large()
            return message

        await self.app(scope, counted, send)
