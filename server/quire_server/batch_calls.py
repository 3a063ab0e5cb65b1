"""How a line of a batch is run: through the routes of live requests, so that every check of theirs applies."""

from __future__ import annotations

import asyncio
import copy
import uuid
from dataclasses import dataclass
from functools import cached_property

import msgspec
from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import Message, Scope

from quire.errors import EngineDead
from quire_server.batch_lines import Line
from quire_server.errors import ApiError, refuse, unforeseen
from quire_server.keys import current_key
from quire_server.openai import generation
from quire_server.state import Server

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PRIORITY = 1000  # the engine runs lower numbers first; live requests are 0 unless they say otherwise
NOT_NOW = frozenset({429, 503})  # the queue is full, the engine is being restarted, the server ends: ask again


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes  # JSON
    request_id: str

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300


class _Asks(msgspec.Struct):
    model: str | None = None


class Caller:
    """The application without what guards it from outside: keys, rate limits, limits of a body, draining."""

    def __init__(self, server: Server, app: FastAPI) -> None:
        self.server = server
        self._app = copy.copy(app)
        self._app.user_middleware = []
        self._app.middleware_stack = None

    @cached_property
    def endpoints(self) -> tuple[str, ...]:
        """Those of ENDPOINTS that this application has."""
        scope = {"type": "http", "method": "POST", "root_path": "", "headers": []}
        routes = self._app.routes
        return tuple(
            path
            for path in ENDPOINTS
            if any(route.matches({**scope, "path": path})[0] is Match.FULL for route in routes)
        )

    async def run(self, line: Line, owner: str | None) -> Answer:
        """The answer to a line, in the name of ``owner``; asks again until the engine takes it.

        Raises EngineDead when the engine is gone for good.
        """
        if line.streams:
            refusal = refuse("stream", "stream: the answers of a batch are whole", "unsupported_parameter")
            return Answer(refusal.status_code, msgspec.json.encode(refusal.body()), uuid.uuid4().hex)
        pause = 0.25
        while True:
            answer = await self._call(line, owner)
            if answer.status not in NOT_NOW:
                return answer
            if self._gone(line):
                raise EngineDead("the engine is gone for good")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 10.0)

    def _gone(self, line: Line) -> bool:
        """Whether the engine that the line asks for will not come back."""
        try:
            name = msgspec.json.decode(line.body, type=_Asks).model
            return bool(getattr(self.server.model(name).engine, "errored", False))
        except (msgspec.MsgspecError, ApiError):  # its route says what is wrong with it
            return False

    async def _call(self, line: Line, owner: str | None) -> Answer:
        request_id = uuid.uuid4().hex
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": line.url,
            "raw_path": line.url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(line.body)).encode())],
            "client": None,
            "server": None,
            "state": {"request_id": request_id, "key_name": owner},
        }
        status, parts = 500, []
        unread = [line.body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.Future()  # this client never goes away: it is cancelled
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        generation.least_priority.set(PRIORITY)  # of this task, which runs one line
        if owner is not None:
            current_key.set(self.server.keys.named(owner))
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            failure = unforeseen(error)
            status, parts = failure.status_code, [msgspec.json.encode(failure.body())]
        return Answer(status, b"".join(parts), request_id)


class Room:
    """A semaphore that counts sequences. ``turn`` is held while one waits, so that nobody overtakes a large line."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self.turn = asyncio.Lock()
        self._given = asyncio.Event()

    async def take(self, count: int) -> int:
        """Wait for ``count``, or for the whole room if it is more; how many were taken."""
        count = min(count, self.size)
        while self.free < count:
            self._given.clear()
            await self._given.wait()
        self.free -= count
        return count

    def give(self, count: int) -> None:
        self.free += count
        self._given.set()
