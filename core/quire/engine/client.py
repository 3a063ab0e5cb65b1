"""The engine process seen from its parent: start it, talk to it, notice when it dies, start it again.

What was open when it died is sent again with the tokens already produced, so that streams go on where they were
(DESIGN's invariant 3). A request that was open in two deaths is failed by itself: it may be what kills the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from quire.config import EngineConfig
from quire.engine.process import Launch
from quire.errors import EngineDead
from quire.message import (
    AbortRequest,
    AddRequest,
    EngineFailure,
    EngineReady,
    EngineStats,
    SampleOutput,
    Shutdown,
    StatsQuery,
    StepOutputs,
    ToClient,
    ToEngine,
)  # fmt: skip

logger = logging.getLogger("quire.client")

MAX_DEATHS = 2  # engine deaths one request may be open in
MAX_RESTARTS_IN_A_ROW = 3  # without a single output in between


@dataclass
class OpenRequest:
    """What is needed to go on with a request in another engine process."""

    message: AddRequest
    deliver: Callable[[SampleOutput], None]
    produced: list[list[int]] = field(default_factory=list)  # token ids per sample, so far
    finished: list[bool] = field(default_factory=list)
    deaths: int = 0


class EngineProcess:
    """One engine process and its sockets. All methods belong to one event loop."""

    def __init__(self, config: EngineConfig, on_ready: Callable[[EngineReady], None] | None = None) -> None:
        self.config = config
        self.info: EngineReady | None = None
        self.failure: str | None = None  # why it is gone for good
        self.restarts = 0
        self._on_ready = on_ready
        self._fruitless = 0
        self._open: dict[str, OpenRequest] = {}
        self._queries: dict[int, asyncio.Future[EngineStats]] = {}
        self._next_query = 1
        self._folder = tempfile.mkdtemp(prefix="quire-")  # mode 0700: only this user can reach the sockets
        self._context = zmq.asyncio.Context()
        self._sending = zmq.Context()
        self._process: subprocess.Popen[bytes] | None = None
        self._generation = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._up = asyncio.Event()
        self._closing = False
        self._encoder = msgspec.msgpack.Encoder()

    # -- life ------------------------------------------------------------------------------------------------------
    def spawn(self) -> None:
        """Start the process; returns at once. ``await started()`` waits for it."""
        self._generation += 1
        inbox, outbox = (f"ipc://{self._folder}/{name}{self._generation}" for name in ("in", "out"))
        self._to, self._from = self._sending.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for end in (self._to, self._from):
            end.set_hwm(0)
        self._to.bind(inbox)
        self._from.bind(outbox)
        self._process = subprocess.Popen([sys.executable, "-m", "quire.engine.process"], stdin=subprocess.PIPE)
        launch = msgspec.msgpack.encode(
            Launch(self.config, inbox, outbox, logging.getLevelName(logger.getEffectiveLevel()))
        )
        assert self._process.stdin is not None
        self._process.stdin.write(len(launch).to_bytes(4, "big") + launch)
        self._process.stdin.flush()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch(self._process))]

    async def started(self) -> EngineReady:
        """Wait until the engine is ready. Raises EngineDead with its reason if it cannot be."""
        while self.info is None or not self._up.is_set():
            if self.failure:
                raise EngineDead(self.failure)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._up.wait(), 0.5)
        return self.info

    async def close(self, drain: bool = False) -> None:
        """End the process: kindly, then surely."""
        self._closing = True
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(zmq.Again):  # it is not yet connected: there is nobody to ask kindly
                self._send(Shutdown(drain))
                deadline = time.monotonic() + 2
                while process.poll() is None and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)
            if process.poll() is None:
                process.kill()
            process.wait()
        self._end_generation()
        self._context.term()
        self._sending.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end_generation(self) -> None:
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._tasks = []
        for end in (self._to, self._from):
            end.close(0)
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        for name in ("in", "out"):
            with contextlib.suppress(OSError):
                os.unlink(f"{self._folder}/{name}{self._generation}")

    # -- requests --------------------------------------------------------------------------------------------------
    def add(self, message: AddRequest, deliver: Callable[[SampleOutput], None]) -> None:
        """Send a request; ``deliver`` is called with each of its outputs until every sample is finished."""
        if self.failure:
            raise EngineDead(self.failure)
        n = message.sampling.n
        self._open[message.request_id] = OpenRequest(message, deliver, [[] for _ in range(n)], [False] * n)
        if self._up.is_set():
            self._send(message)

    def abort(self, request_id: str, tell: bool = False) -> None:
        """Forget a request and have the engine free what it holds; ``tell`` whoever waits for its outputs."""
        request = self._open.pop(request_id, None)
        if request is None:
            return
        if self._up.is_set():
            self._send(AbortRequest([request_id]))
        for index, finished in enumerate(request.finished):
            if tell and not finished:
                request.deliver(SampleOutput(request_id, index, [], finish_reason="abort"))

    def abort_samples(self, request_id: str, indices: list[int]) -> None:
        """End some samples of a request; the others go on."""
        request = self._open.get(request_id)
        if request is None:
            return
        for index in indices:
            request.finished[index] = True
        if all(request.finished):
            del self._open[request_id]
        if self._up.is_set():
            self._send(AbortRequest([], [(request_id, index) for index in indices]))

    @property
    def open_requests(self) -> int:
        return len(self._open)

    async def stats(self, pages: bool = False, timeout: float = 5.0) -> EngineStats:
        """Ask the engine. Raises TimeoutError when it does not answer, EngineDead when it is gone."""
        if self.failure:
            raise EngineDead(self.failure)
        if not self._up.is_set():
            raise EngineDead("the engine is starting")
        query, self._next_query = self._next_query, self._next_query + 1
        future = asyncio.get_running_loop().create_future()
        self._queries[query] = future
        self._send(StatsQuery(query, pages))
        try:
            return await asyncio.wait_for(future, timeout)
        finally:
            self._queries.pop(query, None)

    def _send(self, message: ToEngine) -> None:
        # PUSH without a high-water mark never blocks; what is queued is bounded by the requests that are open.
        self._to.send(self._encoder.encode(message), zmq.NOBLOCK)

    # -- what comes back -------------------------------------------------------------------------------------------
    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToClient)
        while True:
            message = decoder.decode(await self._from.recv())
            if isinstance(message, StepOutputs):
                self._fruitless = 0
                for output in message.outputs:
                    self._deliver(output)
            elif isinstance(message, EngineStats):
                future = self._queries.get(message.query_id)
                if future is not None and not future.done():
                    future.set_result(message)
            elif isinstance(message, EngineReady):
                self._resume(message)
            elif isinstance(message, EngineFailure):
                logger.error("the engine failed: %s", message.message)
                if self.info is None:  # it never came up: starting it again would end the same way
                    self.failure = message.message

    def _deliver(self, output: SampleOutput) -> None:
        request = self._open.get(output.request_id)
        if request is None or request.finished[output.index]:
            return
        request.produced[output.index] += output.token_ids
        request.deaths = 0  # it makes progress: whatever killed the engine, it was not this request
        if output.finish_reason is not None:
            request.finished[output.index] = True
            if all(request.finished):
                del self._open[output.request_id]
        request.deliver(output)

    def _resume(self, ready: EngineReady) -> None:
        self.info = ready
        self._up.set()
        if self._on_ready is not None:
            self._on_ready(ready)
        for request in self._open.values():
            if any(request.produced):
                request.message.output_token_ids = request.produced
            request.message.finished_samples = [i for i, done in enumerate(request.finished) if done]
            self._send(request.message)

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        status = await loop.run_in_executor(None, process.wait)
        if self._closing:
            return
        await asyncio.sleep(0.05)  # its last words may still be on the way
        self._up.clear()
        for future in self._queries.values():
            if not future.done():
                future.set_exception(EngineDead("the engine process ended"))
        self._fruitless += 1
        reason = f"the engine process ended with status {status}"
        if self.info is None or self._fruitless > MAX_RESTARTS_IN_A_ROW:
            self.failure = self.failure or reason
            for request_id in list(self._open):
                self._fail(request_id, self.failure)
            self._up.set()  # wake who waits for a start
            self._up.clear()
            return
        logger.error("%s; starting it again with %d open requests", reason, len(self._open))
        for request_id, request in list(self._open.items()):
            request.deaths += 1
            if request.deaths >= MAX_DEATHS:
                logger.error(
                    "request %s was open in %d deaths of the engine and is failed",
                    request_id,
                    request.deaths,
                    extra={"request_id": request_id},
                )
                self._fail(request_id, f"{reason}, {request.deaths} times while this request was open")
        self.restarts += 1
        self._end_generation()
        self.spawn()

    def _fail(self, request_id: str, reason: str) -> None:
        request = self._open.pop(request_id)
        for index, finished in enumerate(request.finished):
            if not finished:
                request.deliver(SampleOutput(request_id, index, [], finish_reason="error", error=reason))
