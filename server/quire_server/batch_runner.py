"""Runs the batches of one server, each in a task of its own, from wherever the store says that it stands."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextvars import Context
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from quire_server.batch_calls import Caller, Room
from quire_server.batch_lines import Input, Line, answered, unanswered
from quire_server.batch_store import Ending, Row, Store
from quire_server.state import Server

logger = logging.getLogger("quire.batches")

RETRY = 10.0  # seconds until a batch that met an unforeseen error goes on
EXPIRED = "This request could not be executed before the completion window expired."


class Batches:
    """What the routes share. The store is opened by the first who needs it, or by :meth:`resume`."""

    def __init__(self, server: Server, app: FastAPI) -> None:
        self.server, self.settings = server, server.settings.batches
        self.caller = Caller(server, app)
        self._store: Store | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        self._room = Room(self.settings.concurrency)
        self.uploads = 0  # that are under way
        self._checking = asyncio.Lock()  # one input at a time is read whole

    @property
    def store(self) -> Store:
        """To be asked for on the event loop alone. Raises ConfigError when --data-dir cannot be used."""
        if self._store is None:
            folder = self.settings.data_dir
            if folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="quire-batches-")
                folder = self._temporary.name
            self._store = Store(Path(folder), self.settings)
        return self._store

    async def open(self) -> None:
        """Raises ConfigError when --data-dir cannot be used."""
        if self.settings.data_dir is not None:
            assert self.store

    async def resume(self) -> None:
        """Go on with what an earlier server has left in --data-dir."""
        if self._store is not None:
            for row in await asyncio.to_thread(self._store.open_batches):
                self.start(row)

    def start(self, row: Row) -> None:
        owner, batch = row
        id = batch["id"]
        self._cancelled[id] = asyncio.Event()
        if batch["status"] == "cancelling":
            self._cancelled[id].set()
        work = self._to_its_end(id, owner, batch["expires_at"])
        # A context of its own: that of the request which began the batch is another's, and gone after a restart.
        self._tasks[id] = asyncio.create_task(work, context=Context())

    def cancel(self, id: str) -> None:
        """End it with what it has; the store has been told that it is cancelling."""
        if id in self._cancelled:
            self._cancelled[id].set()

    async def close(self) -> None:
        """Leave unfinished batches as they are in the store: :meth:`resume` of the next server goes on with them."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
        if self._temporary is not None:
            await asyncio.to_thread(self._temporary.cleanup)

    async def _to_its_end(self, id: str, owner: str | None, expires_at: int) -> None:
        """Errors of the disk and the like end no batch: it stays as it is in the store, and is tried again."""
        while True:
            try:
                await self._attempt(id, owner, expires_at)
                break
            except Exception as error:
                _interrupted(id, error)
                await asyncio.sleep(RETRY)
        del self._tasks[id], self._cancelled[id]

    async def _attempt(self, id: str, owner: str | None, expires_at: int) -> None:
        batch = await asyncio.to_thread(self.store.update_batch, id)
        if batch is None:
            return
        path = self.store.path(batch["input_file_id"])
        lines = Input(path, (batch["endpoint"],), self.server.limits)
        async with self._checking:
            errors = await asyncio.to_thread(lines.check, self.settings.max_batch_lines)
        keep = (batch.get("output_expires_after") or {}).get("seconds")
        if errors:
            told = {"object": "list", "data": [error.as_dict() for error in errors]}
            await asyncio.to_thread(self.store.end_batch, id, "failed", errors=told)
            return
        if batch["status"] == "validating":
            counts = {"total": len(lines), "completed": 0, "failed": 0}
            began = {"status": "in_progress", "in_progress_at": int(time.time()), "request_counts": counts}
            await asyncio.to_thread(self.store.update_batch, id, ("validating",), **began)
        ended = await self._in_time(id, owner, lines, expires_at)
        done = await asyncio.to_thread(self.store.recorded, id)
        if ended == "expired" and len(done) == len(lines):
            ended = "completed"  # before an earlier server ended, which could not say so
        late: Iterator[bytes] = iter(())
        if ended == "completed":
            now = {"status": "finalizing", "finalizing_at": int(time.time())}
            await asyncio.to_thread(self.store.update_batch, id, ("in_progress",), **now)
        elif ended == "expired":
            left = (lines.line(index).custom_id for index in range(len(lines)) if index not in done)
            late = unanswered(left, "batch_expired", EXPIRED)
        await asyncio.to_thread(self.store.end_batch, id, ended, late, keep)
        logger.info("%s is %s: %d of %d lines answered", id, ended, len(done), len(lines))

    async def _in_time(self, id: str, owner: str | None, lines: Input, expires_at: int) -> Ending:
        """Run what is left of the lines until they are done, the batch is cancelled or its time is over: which."""
        work = asyncio.create_task(self._run(id, owner, lines))
        cancelled = asyncio.create_task(self._cancelled[id].wait())
        try:
            left = max(0.0, expires_at - time.time())
            await asyncio.wait({work, cancelled}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if cancelled.done():
                return "cancelled"
            if work.done():
                work.result()
                return "completed"
            return "expired"
        finally:
            for task in (work, cancelled):
                task.cancel()
            await asyncio.gather(work, cancelled, return_exceptions=True)

    async def _run(self, id: str, owner: str | None, lines: Input) -> None:
        done = await asyncio.to_thread(self.store.recorded, id)
        async with asyncio.TaskGroup() as group:
            for index in range(len(lines)):
                if index in done:
                    continue
                async with self._room.turn:  # batches take turns, and one line at a time waits in memory
                    await self._ready(id)
                    line = await asyncio.to_thread(lines.line, index)
                    taken = await self._room.take(line.sequences)
                task = group.create_task(self._one(id, owner, index, line))
                # Not in the task: one that is cancelled before its first step runs nothing.
                task.add_done_callback(partial(self._give_back, taken))

    async def _ready(self, id: str) -> None:
        """While the server drains nothing is begun, nor while there is no room for answers."""
        warned = False
        while (full := self.store.full) or self.server.lifecycle.state != "serving":
            if full and not warned:
                warned = True
                logger.warning("%s waits: --max-total-file-bytes are used; delete files", id)
            await asyncio.sleep(0.1)

    async def _one(self, id: str, owner: str | None, index: int, line: Line) -> None:
        answer = await self.caller.run(line, owner)
        output = answered(line.custom_id, answer.status, answer.request_id, answer.body)
        await asyncio.to_thread(self.store.record, id, index, answer.good, output)

    def _give_back(self, taken: int, task: asyncio.Task[None]) -> None:
        self._room.give(taken)


def _interrupted(id: str, error: Exception) -> None:
    """Kinds of errors and where they were raised, never their texts: those may hold parts of a prompt."""
    causes = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
    kinds = ", ".join(sorted({type(cause).__name__ for cause in causes}))
    trace = "".join(traceback.format_tb(causes[0].__traceback__))
    logger.error("%s is interrupted by %s and goes on in %g s\n%s", id, kinds, RETRY, trace)
