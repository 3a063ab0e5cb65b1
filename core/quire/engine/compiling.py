"""Requests whose grammar is being compiled: they reach the scheduler when that is done, and nobody waits for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from quire.engine.journal import Journal, digest
from quire.message import AddRequest
from quire.sampling.grammar import GrammarCompiler, GrammarError


class Compiling:
    """A thread that compiles ahead, one grammar at a time. ``done`` is called from it after each."""

    def __init__(self, compiler: GrammarCompiler, journal: Journal, done: Callable[[], None]) -> None:
        self._compiler, self._journal, self._done = compiler, journal, done
        self._worker: ThreadPoolExecutor | None = None
        self._queue: dict[str, tuple[AddRequest, Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, message: AddRequest) -> bool:
        """Whether this request has to wait here."""
        spec = message.sampling.structured_outputs
        if spec is None or self._compiler.has(spec) or message.request_id in self._queue:
            return False
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quire-compile")
        future = self._worker.submit(self._compile, message)
        self._queue[message.request_id] = message, future
        future.add_done_callback(lambda _: self._done())
        return True

    def _compile(self, message: AddRequest) -> None:
        assert message.sampling.structured_outputs is not None
        self._journal.compiling(digest(message.request_id))
        with contextlib.suppress(GrammarError):  # the row that has this grammar will tell
            self._compiler.matcher(message.sampling.structured_outputs)
        self._journal.compiling(0)

    def take(self) -> list[AddRequest]:
        """Those that need wait no longer, in the order in which they came."""
        ready = [name for name, (_, future) in self._queue.items() if future.done()]
        taken = []
        for name in ready:
            message, future = self._queue.pop(name)
            future.result()
            taken.append(message)
        return taken

    def abort(self, request_ids: list[str], samples: list[tuple[str, int]]) -> None:
        for name in request_ids:
            entry = self._queue.pop(name, None)
            if entry is not None:
                entry[1].cancel()
        for name, index in samples:
            if name in self._queue:
                self._queue[name][0].finished_samples.append(index)
