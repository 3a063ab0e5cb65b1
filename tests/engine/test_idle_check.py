"""The engine's loop checks its books when it has been idle for a while, once, and no request waits for that."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import msgspec
import zmq

from quire.engine import process
from quire.engine.journal import Journal
from quire.message import AbortRequest, EngineStats, Shutdown, StatsQuery, ToClient


class Idle:
    """A core with nothing to do."""

    in_flight = 0

    def __init__(self):
        self.checks = 0
        self.scheduler = SimpleNamespace(check=self._check)

    def _check(self):
        self.checks += 1

    def fill(self, done):
        pass

    def has_work(self):
        return False

    def ready(self):
        return False

    def collect(self):
        return []

    def abort(self, request_ids, samples):
        pass

    def stats(self, pages):
        return EngineStats(running=self.checks)


def test_once_after_a_while_of_idleness(tmp_path, monkeypatch):
    context = zmq.Context()
    ends = [context.socket(kind) for kind in (zmq.PUSH, zmq.PULL, zmq.PUSH, zmq.PULL)]
    to, inbox, outbox, back = ends
    for bound, connected, name in ((inbox, to, "inproc://in"), (back, outbox, "inproc://out")):
        bound.bind(name)
        connected.connect(name)
    core = Idle()
    journal = Journal(tmp_path / "journal", 4, create=True)

    def send(message):
        to.send_multipart([b"", msgspec.msgpack.encode(message)])

    def checks() -> int:
        send(StatsQuery(1, False))
        return msgspec.msgpack.decode(back.recv(), type=ToClient).running

    def run():
        server = process.EngineServer(SimpleNamespace(core=core, compiler=None), inbox, outbox, journal)
        server.run()

    loop = threading.Thread(target=run)
    monkeypatch.setattr(process, "CHECK_AFTER_MS", 3_600_000)
    loop.start()
    try:
        send(AbortRequest(["x"]))
        assert checks() == 0  # what comes at once finds the loop at its sockets
        monkeypatch.setattr(process, "CHECK_AFTER_MS", 10)
        checks()  # wakes the loop, which then waits anew
        deadline = time.monotonic() + 20
        while core.checks < 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert checks() == 1
        time.sleep(0.1)  # a question is no reason to look again
        assert checks() == 1
        send(AbortRequest(["x"]))
        while core.checks < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert checks() == 2
    finally:
        send(Shutdown(False))
        loop.join(20)
        for end in ends:
            end.close(0)
        context.term()
        journal.close()
