"""Answers that take a while: server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire_server.errors import ApiError, from_engine
from quire_server.lifecycle import Lifecycle, shutting_down

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


class ClientGone(Exception):
    """Nobody is left to answer."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, lifecycle: Lifecycle, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled, and has ended, when this returns otherwise.

    Raises ClientGone when the client disconnects first, and 503 when the server stops first. The body must have been
    read: what ``receive`` still has to say can only be that the client went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        ends: set[asyncio.Future[Any]] = {task, gone, lifecycle.stopped}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else shutting_down()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def answer(request: Request, lifecycle: Lifecycle, work: Coroutine[Any, Any, Response]) -> Response:
    """``work``'s response, unless the client goes away (then nobody reads what this returns)."""
    try:
        return await while_connected(request.receive, lifecycle, work)
    except ClientGone:
        return Response(status_code=499)


class EventStream(Response):
    """Sends ``events`` as they come. The status line waits for the first, so that a refusal has its own status.

    ``events`` yields encoded events. An error after the first is sent as an event of its own and ends the stream. A
    slow reader holds back ``events`` through ``send``; a vanished one closes it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        lifecycle: Lifecycle,
        failed: Callable[[ApiError], bytes] = lambda error: event(error.body()),
    ) -> None:
        """``failed`` encodes the event of an error."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.lifecycle, self.failed, self.started = events, lifecycle, failed, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self.lifecycle, self._send_all(send))
        except ClientGone:
            return
        except Exception as error:
            failure = from_engine(error)
            if not self.started:
                await failure.response()(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": self.failed(failure), "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.events):
            async for chunk in self.events:
                if not self.started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    self.started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merged(iterators: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all iterators as they come, with the index of theirs. The first error ends all; so does closing this."""
    if len(iterators) == 1:
        async with aclosing(iterators[0]) as only:  # type: ignore[type-var]
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T | None, Exception | None]] = asyncio.Queue(maxsize=len(iterators))

    async def pump(index: int, iterator: AsyncIterator[T]) -> None:
        try:
            async with aclosing(iterator):  # type: ignore[type-var]
                async for item in iterator:
                    await queue.put((index, item, None))
        except Exception as error:
            await queue.put((index, None, error))
        else:
            await queue.put((index, None, None))

    tasks = [asyncio.ensure_future(pump(i, iterator)) for i, iterator in enumerate(iterators)]
    try:
        left = len(tasks)
        while left:
            index, news, error = await queue.get()
            if error is not None:
                raise error
            if news is None:
                left -= 1
            else:
                yield index, news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
