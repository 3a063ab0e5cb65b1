"""The engine process seen from its parent: start it, talk to it, notice when it dies or hangs, start it again.

What was open is sent again with the tokens already produced, so that streams go on where they were (DESIGN's
invariant 3). Whom a death is blamed on, and who runs alone for a while because of it, recovery.py decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from quire.config import EngineConfig
from quire.engine.journal import Journal, Record, digest
from quire.engine.process import Launch
from quire.engine.recovery import OpenRequest, Recovery
from quire.engine.spare import Spare, start
from quire.errors import EngineDead, EngineRestarting
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

MAX_RESTARTS_IN_A_ROW = 4  # without an output, and with nobody to blame
NEW_SHAPE_FACTOR = 5  # how much longer the first step of its size may take
SPARE_AFTER = 2.0  # seconds that an engine is left alone before a spare process starts beside it
KILLED = -9  # status after a SIGKILL


class EngineProcess:
    """One engine process and its sockets. All methods belong to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        on_ready: Callable[[EngineReady], None] | None = None,
        spare: Spare | None = None,
    ) -> None:
        """``spare``: that of several engines; None: one of its own."""
        self.config = config
        self._spare = Spare() if spare is None else spare
        self._spare.join()
        self.info: EngineReady | None = None
        self.failure: str | None = None  # why it is gone for good
        self.restarts = 0
        self._on_ready = on_ready
        self._fruitless = 0
        self._recovery = Recovery()
        self._open = self._recovery.open
        self._queries: dict[int, asyncio.Future[EngineStats]] = {}
        self._next_query = 1
        self._folder = tempfile.mkdtemp(prefix="quire-")  # mode 0700: only this user can reach the sockets
        self._context = zmq.asyncio.Context()
        self._sending = zmq.Context()
        self._process: subprocess.Popen[bytes] | None = None
        self._hung: str | None = None  # why this process is being killed here
        self._generation = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._up = asyncio.Event()
        self._closing = False
        self._encoder = msgspec.msgpack.Encoder()
        self._unsent: deque[list[bytes]] = deque()  # while nobody is connected

    # -- life ------------------------------------------------------------------------------------------------------
    def spawn(self) -> None:
        """Start the process; returns at once. ``await started()`` waits for it."""
        self._generation += 1
        self._hung = None
        inbox, outbox = (f"ipc://{self._path(name)}" for name in ("in", "out"))
        self._to, self._from = self._sending.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for end in (self._to, self._from):
            end.set_hwm(0)
        self._to.bind(inbox)
        self._from.bind(outbox)
        self._journal = Journal(self._path("journal"), self.config.scheduler.max_num_seqs, create=True)
        level = logging.getLevelName(logger.getEffectiveLevel())
        launch = msgspec.msgpack.encode(Launch(self.config, inbox, outbox, self._path("journal"), level))
        self._process = self._spare.take() or start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: the watch will tell
            self._process.stdin.write(len(launch).to_bytes(4, "big") + launch)
            self._process.stdin.flush()
        work = (self._receive(), self._watch(self._process), self._guard(self._process))
        self._tasks = [asyncio.create_task(one) for one in work]

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}{self._generation}"

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
        if not self._closing:
            self._spare.leave()
        self._closing = True
        process = self._process
        if process is not None and process.poll() is None:
            if self._to.poll(0, zmq.POLLOUT):  # else it is not yet connected: there is nobody to ask kindly
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
        self._unsent.clear()  # what is open is sent to the next engine, when it is ready
        for end in (self._to, self._from):
            end.close(0)
        self._journal.close()
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        for name in ("in", "out", "journal"):
            with contextlib.suppress(OSError):
                os.unlink(self._path(name))

    # -- requests --------------------------------------------------------------------------------------------------
    def add(self, message: AddRequest, deliver: Callable[[SampleOutput], None]) -> None:
        """Send a request; ``deliver`` is called with each of its outputs until every sample is finished."""
        if self.failure:
            raise EngineDead(self.failure)
        n = message.sampling.n
        request = OpenRequest(message, deliver, [[] for _ in range(n)], [False] * n)
        self._open[message.request_id] = request
        if self._up.is_set() and self._recovery.probe is None:
            self._send(request.resume(probe=False), message.request_id)

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
        self._after_probe()

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
        self._after_probe()

    @property
    def open_requests(self) -> int:
        return len(self._open)

    async def stats(self, pages: bool = False, timeout: float = 5.0) -> EngineStats:
        """Ask the engine. Raises TimeoutError when it does not answer, EngineDead when it is gone, EngineRestarting when
        another one is on its way."""
        if self.failure:
            raise EngineDead(self.failure)
        if not self._up.is_set():
            raise EngineRestarting("engine restarting") if self.restarts else EngineDead("the engine is starting")
        query, self._next_query = self._next_query, self._next_query + 1
        future = asyncio.get_running_loop().create_future()
        self._queries[query] = future
        self._send(StatsQuery(query, pages))
        try:
            return await asyncio.wait_for(future, timeout)
        finally:
            self._queries.pop(query, None)

    def _send(self, message: ToEngine, about: str = "") -> None:
        # PUSH without a high-water mark never blocks; what is queued is bounded by the requests that are open. Whom a
        # message is about goes ahead of it: the engine notes that before it decodes the rest.
        self._unsent.append([about.encode(), self._encoder.encode(message)])
        if len(self._unsent) == 1 and not self._sent():
            self._tasks.append(asyncio.create_task(self._send_later()))

    def _sent(self) -> bool:
        """Send what waits; False: the engine has ended and that is not noticed yet, or is not connected yet."""
        try:
            while self._unsent:
                self._to.send_multipart(self._unsent[0], zmq.NOBLOCK)
                self._unsent.popleft()
        except zmq.Again:
            return False
        return True

    async def _send_later(self) -> None:
        while self.failure is None and not self._sent():
            await asyncio.sleep(0.01)

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
                self._ready(message)
            elif isinstance(message, EngineFailure):
                logger.error("the engine failed: %s", message.message)
                if self.info is None:  # it never came up: starting it again would end the same way
                    self.failure = message.message

    def _deliver(self, output: SampleOutput) -> None:
        request = self._open.get(output.request_id)
        if request is None or request.finished[output.index]:
            return
        if output.token_ids:
            request.produced[output.index] += output.token_ids
            request.kills = 0
        if output.finish_reason == "probe":
            self._recovery.passed.add(output.index)
            output.finish_reason = None
        elif output.finish_reason is not None:
            request.finished[output.index] = True
            if all(request.finished):
                del self._open[output.request_id]
        if output.token_ids or output.finish_reason is not None:
            request.deliver(output)
        self._after_probe()

    # -- recovery --------------------------------------------------------------------------------------------------
    def _ready(self, ready: EngineReady) -> None:
        self.info = ready
        self._up.set()
        if self._on_ready is not None:
            self._on_ready(ready)
        if self.config.spare_process:
            self._tasks.append(asyncio.create_task(self._keep_spare()))
        self._resume()

    def _resume(self) -> None:
        """Send the next request that is to run alone; when there is none, everything that is open."""
        name = self._recovery.next_probe()
        if name is not None:
            logger.info("request %s runs alone for a few tokens, to see whether it ends the engine", name)
            self._send(self._open[name].resume(probe=True), name)
            return
        for name, request in self._open.items():
            self._send(request.resume(probe=False), name)

    def _after_probe(self) -> None:
        if self._recovery.probe is not None and self._up.is_set() and self._recovery.through():
            self._resume()

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        status = await loop.run_in_executor(None, process.wait)
        if self._closing:
            return
        await asyncio.sleep(0.05)  # its last words may still be on the way
        was_up = self._up.is_set()
        self._up.clear()
        for future in self._queries.values():
            if not future.done():
                future.set_exception(EngineRestarting("engine restarting"))
        reason = self._hung or f"the engine process ended with {_status(status)}"
        killed = self._hung is None and status == KILLED
        signalled = self._hung is None and status < 0
        suspects = self._suspects(self._journal.read(), signalled) if was_up else []
        self._fruitless += not suspects and not (was_up and killed)
        if self.info is None or self._fruitless > MAX_RESTARTS_IN_A_ROW:
            self.failure = self.failure or reason
            for request_id in list(self._open):
                self._fail(request_id, self.failure)
            self._up.set()  # wake who waits for a start
            self._up.clear()
            return
        logger.error(
            "%s while it was working on %d of %d open requests; starting it again",
            reason,
            len(suspects),
            len(self._open),
        )
        for request_id in self._recovery.after_death(suspects, killed):
            logger.error(
                "request %s ended the engine again, running alone, and is failed: %s",
                request_id,
                reason,
                extra={"request_id": request_id},
            )
            self._fail(request_id, f"{reason} again while it was working on this request alone")
            self._fruitless = 0
        self.restarts += 1
        self._end_generation()
        await asyncio.sleep(0.25 * self._fruitless)
        if not self._closing:
            self.spawn()

    def _suspects(self, record: Record, signalled: bool) -> list[str]:
        """The open requests that the engine was working on when it died; one that only waited is never among them.

        All that are in the engine when planning failed or did not end. A signal strikes a thread, and planning is Python
        beside the device's step: it is put down to the requests in steps.
        """
        if record.planning and not signalled:
            return list(self._open) if self._recovery.probe is None else [self._recovery.probe]
        return [name for name in self._open if digest(name) in record.requests]

    async def _guard(self, process: subprocess.Popen[bytes]) -> None:
        """Kill an engine that does not come to the end of a step, or whose loop does not come back to its sockets."""
        limit = self.config.step_timeout
        while limit:
            await asyncio.sleep(min(1.0, limit / 4))
            if not self._up.is_set():
                continue  # loading has no limit
            record = self._journal.read()
            allowed = limit * NEW_SHAPE_FACTOR if record.new_shape else limit
            for what, seconds in (("a step", record.step_for), ("the engine's loop", record.busy_for)):
                if seconds > allowed and self._hung is None:
                    self._hung = f"{what} did not end within {allowed:g} s (--step-timeout {limit:g}) and it was killed"
                    process.kill()

    async def _keep_spare(self) -> None:
        """Have a process wait with everything imported: a restart then takes the time to load the model."""
        await asyncio.sleep(SPARE_AFTER)
        self._spare.keep()

    def _fail(self, request_id: str, reason: str) -> None:
        request = self._open.pop(request_id)
        for index, finished in enumerate(request.finished):
            if not finished:
                request.deliver(SampleOutput(request_id, index, [], finish_reason="error", error=reason))


def _status(status: int) -> str:
    return signal.Signals(-status).name if -status in list(signal.Signals) else f"status {status}"
