"""The engine process: sockets on one side, the engine on the other. ``python -m quire.engine.process`` starts it.

Its configuration arrives on standard input, which then stays open: when it closes, the parent is gone and so is the
reason to run. The loop sleeps in one poll over the requests' socket and a wake-up that each finished step rings; it
never spins, and it answers a query for statistics while a step runs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import threading
from typing import Any

import msgspec
import zmq

from quire.config import EngineConfig
from quire.engine.compiling import Compiling
from quire.engine.journal import Journal, digest
from quire.errors import QueueFull, UserError
from quire.logs import set_up
from quire.message import (
    AbortRequest,
    AddRequest,
    EngineFailure,
    EngineReady,
    SampleOutput,
    Shutdown,
    StatsQuery,
    StepOutputs,
    ToClient,
    ToEngine,
)  # fmt: skip

logger = logging.getLogger("quire.engine")

CHECK_AFTER_MS = 1000
"""Idleness after which the books are checked: with many pages that takes tens of ms, for which a request would wait."""

HEAVY = ("quire.engine.build", "quire.engine.runner", "quire.weights.load")
"""What an engine imports whatever its device; none of it touches one."""


class Launch(msgspec.Struct):
    """What the parent writes on standard input: a length (4 bytes, big-endian) and this, as msgpack."""

    config: EngineConfig
    inbox: str  # address the engine receives on
    outbox: str  # address the engine sends to
    journal: str  # file in which it notes what it does
    log_level: str = "INFO"


class EngineServer:
    """Moves messages between the sockets and an EngineCore."""

    def __init__(
        self,
        engine: Any,
        inbox: zmq.Socket,
        outbox: zmq.Socket,
        journal: Journal,
        integrity_check: bool = True,
    ) -> None:
        self.core, self.inbox, self.outbox, self.journal = engine.core, inbox, outbox, journal
        self.compiling = Compiling(engine.compiler, journal, self.ring) if engine.compiler is not None else None
        self.integrity_check = integrity_check
        self.decoder = msgspec.msgpack.Decoder(ToEngine)
        self.encoder = msgspec.msgpack.Encoder()
        self.wake, self._ring = socket.socketpair()
        self.wake.setblocking(False)
        self._ring.setblocking(False)
        self.stopping = False
        self.draining = False

    def send(self, message: ToClient) -> None:
        self.outbox.send(self.encoder.encode(message))

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe is a rung bell
            self._ring.send(b"x")

    def run(self) -> None:
        """Serve until told to stop. Raises what the engine itself raises: the process then ends with a failure."""
        poller = zmq.Poller()
        poller.register(self.inbox, zmq.POLLIN)
        poller.register(self.wake, zmq.POLLIN)
        idle_checked = False
        while not self.stopping:
            self.core.fill(self.ring)
            busy = self.core.has_work() or bool(self.compiling)
            if not busy and self.draining:
                return
            self.journal.idle()
            ready = dict(poller.poll(self._patience(busy, idle_checked)))
            self.journal.busy()
            if not ready and not busy:
                self.core.scheduler.check()
                idle_checked = True
            if self.inbox in ready and self._receive():
                idle_checked = False
            if self.wake.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self.wake.recv(4096)
                if self._take_compiled():
                    idle_checked = False
            while self.core.ready():
                self._send_outputs(self.core.collect())
                self.core.fill(self.ring)
            if not self.core.in_flight:
                self._send_outputs(self.core.collect())

    def _send_outputs(self, outputs: list[SampleOutput]) -> None:
        if outputs:
            self.send(StepOutputs(outputs))

    def _patience(self, busy: bool, idle_checked: bool) -> int | None:
        """Milliseconds to sleep at most; None: until a message or a finished step."""
        if self.core.has_work() and not self.core.in_flight:
            return 20  # work that could not be planned now, e.g. only deadlines to wait for
        return None if busy or idle_checked or not self.integrity_check else CHECK_AFTER_MS

    def _receive(self) -> bool:
        """Take what has come; whether anything of it was more than a question."""
        refused: list[SampleOutput] = []
        acted = False
        while True:
            try:
                about, frame = self.inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            # Noted before the message is so much as decoded: if that ends the process, it is known whose it was.
            self.journal.taking(digest(about.decode()) if about else 0)
            try:
                message = self.decoder.decode(frame)
                acted |= not isinstance(message, StatsQuery)
                refused += self._handle(message)
            except msgspec.DecodeError as error:
                logger.error("dropped a message that does not decode: %s", error)
            self.journal.taking(0)
        if refused:
            self.send(StepOutputs(refused))
        return acted

    def _take_compiled(self) -> bool:
        """Pass on what waits for its grammar no longer; whether there was anything."""
        refused: list[SampleOutput] = []
        messages = self.compiling.take() if self.compiling is not None else []
        for message in messages:
            self.journal.taking(digest(message.request_id))
            refused += self._add(message)
            self.journal.taking(0)
        self._send_outputs(refused)
        return bool(messages)

    def _add(self, message: AddRequest) -> list[SampleOutput]:
        try:
            self.core.add(message)
        except (UserError, ValueError) as error:
            kind = "queue_full" if isinstance(error, QueueFull) else "refused"
            return [
                SampleOutput(message.request_id, index, [], finish_reason="error", error=str(error), error_kind=kind)
                for index in range(message.sampling.n)
            ]
        return []

    def _handle(self, message: ToEngine) -> list[SampleOutput]:
        if isinstance(message, AddRequest):
            if self.compiling is not None and self.compiling.put(message):
                return []
            return self._add(message)
        if isinstance(message, AbortRequest):
            if self.compiling is not None:
                self.compiling.abort(message.request_ids, message.samples)
            self.core.abort(message.request_ids, message.samples)
        elif isinstance(message, StatsQuery):
            stats = self.core.stats(pages=message.pages)
            stats.query_id = message.query_id
            self.send(stats)
        elif isinstance(message, Shutdown):
            self.draining = True
            self.stopping = not message.drain
        return []


def read_launch() -> Launch:
    stream = sys.stdin.buffer
    head = stream.read(4)
    if len(head) < 4:
        raise EOFError
    size = int.from_bytes(head, "big")
    return msgspec.msgpack.decode(stream.read(size), type=Launch)


def watch_parent() -> None:
    """End the process when standard input closes: the parent is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="quire-parent-watch").start()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when the engine ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not select.select([sys.stdin], [], [], 0)[0]:
        for module in HEAVY:  # nothing to do yet: a spare process waits with a second's work done
            importlib.import_module(module)
    try:
        launch = read_launch()
    except (EOFError, msgspec.DecodeError):
        return 0  # the parent ended, or needs no spare
    watch_parent()
    set_up(launch.config.log_format, "engine", launch.log_level)
    if launch.config.cores:  # before any device is opened, whose threads take what they find
        os.sched_setaffinity(0, launch.config.cores)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for end in (inbox, outbox):
        end.set_hwm(0)  # what is open is bounded by the scheduler's queue, not by dropped messages
    inbox.connect(launch.inbox)
    outbox.connect(launch.outbox)
    encode = msgspec.msgpack.encode
    try:
        from quire.engine.build import build_engine

        engine = build_engine(launch.config)
        ready = EngineReady(
            device=engine.device, max_model_len=engine.memory.max_model_len, pages=sum(engine.memory.pages),
            page_size=engine.memory.page_size, vocab_size=engine.spec.vocab_size,
            eos_token_ids=list(engine.spec.eos_token_ids), report=engine.memory.report(),
        )  # fmt: skip
        # What is loaded now stays: the collector need not look at it again while a step waits.
        gc.collect()
        gc.freeze()
        engine.core.journal = journal = Journal(launch.journal, engine.config.scheduler.max_num_seqs)
        server = EngineServer(engine, inbox, outbox, journal)
        server.send(ready)
        server.run()
    except Exception as error:
        if not isinstance(error, UserError):
            logger.exception("the engine ends: %s", type(error).__name__)
        outbox.send(encode(EngineFailure(str(error) or repr(error), type(error).__name__)))
        return 1
    finally:
        inbox.close(0)
        outbox.close(linger=1000)
        context.term()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a step that hangs must not keep the process
