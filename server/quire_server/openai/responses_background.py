"""Responses at work without a client that waits: they can be looked at, followed and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any

from quire_server.errors import ApiError
from quire_server.lifecycle import Lifecycle

if TYPE_CHECKING:
    from quire_server.openai.responses_events import Answer


class Run:
    """One of them. ``events`` are kept when it was created as a stream; event n has the sequence number n."""

    def __init__(self, answer: Answer, owner: str | None, streams: bool) -> None:
        self.answer, self.owner = answer, owner
        self.events: list[bytes] | None = [] if streams else None
        self.cancelled = False
        self.ending = False  # its end is being stored, and nothing can change it now
        self.done = False
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def tell(self, event: bytes) -> None:
        if self.events is not None:
            self.events.append(event)
            self._wake()

    def end(self) -> None:
        self.done = True
        self._wake()

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """The events behind number ``after``, to the end."""
        assert self.events is not None
        at = after + 1
        while True:
            news = self._news
            while at < len(self.events):
                yield self.events[at]
                at += 1
            if self.done:
                return
            if news is self._news:
                await news.wait()

    async def cancel(self) -> None:
        """Returns when it has ended."""
        self.cancelled = True
        self.stop()
        if self.task is not None:
            await asyncio.wait({self.task})

    def stop(self) -> None:
        if self.task is not None and not self.ending:
            self.ending = True
            self.task.cancel()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Background:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._runs: dict[str, Run] = {}

    def get(self, response_id: str, owner: str | None) -> Run | None:
        run = self._runs.get(response_id)
        return run if run is not None and run.owner == owner else None

    def of(self, owner: str) -> int:
        """How many are at work in this name."""
        return sum(run.owner == owner for run in self._runs.values())

    def check(self) -> None:
        """Raises 429 when there are too many."""
        if len(self._runs) >= self.limit:
            message = f"{self.limit} responses are at work in the background already (--max-background-responses)"
            raise ApiError(429, message, param="background", code="queue_full", headers={"Retry-After": "5"})

    async def start(self, run: Run, work: Coroutine[Any, Any, None], lifecycle: Lifecycle) -> None:
        """``work`` counts as a request in flight, and is cancelled when those must end."""
        response_id = run.answer.response["id"]
        self._runs[response_id] = run
        lifecycle.begin()
        run.task = asyncio.create_task(work)

        def stopped(_: asyncio.Future[None]) -> None:
            run.stop()

        def ended(_: asyncio.Task[None]) -> None:
            lifecycle.stopped.remove_done_callback(stopped)
            lifecycle.end()
            del self._runs[response_id]
            run.end()

        run.task.add_done_callback(ended)
        lifecycle.stopped.add_done_callback(stopped)
        await asyncio.sleep(0)  # a task that is cancelled before it has begun would store nothing
