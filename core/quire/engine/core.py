"""The engine: a scheduler that plans step n+1 while a runner executes step n.

One thread owns the scheduler and calls everything here; one worker thread owns the runner and the tensors. They share
nothing but plans and results, and the interpreter: so that the two do not fight for it when a step ends, its result is
told only when the next step, if one is queued, has been launched and the interpreter is free.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from quire.engine.journal import Journal, digest
from quire.message import AddRequest, EngineStats, SampleOutput, StepPlan, StepResult
from quire.scheduler.scheduler import Scheduler

logger = logging.getLogger("quire.engine")


class EngineCore:
    """``fill()`` plans and queues steps, ``collect()`` takes the oldest one's results. Both return at once if there is
    nothing to do; ``step()`` is the two together, waiting."""

    def __init__(self, scheduler: Scheduler, run: Callable[[StepPlan], StepResult], overlap: bool = True) -> None:
        self.scheduler = scheduler
        self.journal: Journal | None = None  # where steps are noted, in a process that somebody watches
        self.depth = 2 if overlap else 1
        self._run = run
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quire-runner")
        self._queued: deque[StepPlan] = deque()  # given to the worker, not begun
        self._untold: Callable[[], None] | None = None  # sets the result of the step before; the worker's
        self._in_flight: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        self._shapes: set[tuple[int, int]] = set()  # of steps that have been run
        self.step_started = 0.0  # time.monotonic() when the oldest step in flight was queued; 0: none
        self.last_step = time.monotonic()

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises ValueError (by name) when it can never run, QueueFull when too many wait."""
        self.scheduler.add(request)

    def abort(self, request_ids: list[str], samples: Sequence[tuple[str, int]] = ()) -> None:
        """End requests, or single samples of them; what is in flight for them is discarded when it comes."""
        self.scheduler.abort(request_ids)
        for request_id, index in samples:
            self.scheduler.abort_sample(request_id, index)

    def fill(self, done: Callable[[], None] | None = None) -> None:
        """Plan steps until enough are in flight. ``done`` is called from the worker thread as each one ends."""
        while len(self._in_flight) < self.depth:
            if self.journal is not None:
                self.journal.planning(self.scheduler.has_work())
            plan = self.scheduler.schedule()
            if self.journal is not None:
                if plan is not None:
                    self.journal.begin(plan.step, map(digest, self.scheduler.newest_step()))
                self.journal.planning(False)
            if plan is None:
                return
            future: Future[StepResult] = Future()
            if done is not None:
                future.add_done_callback(lambda _: done())
            self._in_flight.append((plan, future))
            if len(self._in_flight) == 1:
                self._oldest_began(time.monotonic())
            self._queued.append(plan)
            self._worker.submit(self._execute, future)

    def _execute(self, future: Future[StepResult]) -> None:
        """Run the next plan; on the worker."""
        plan = self._queued.popleft()
        try:
            result = self._run(plan)
        except BaseException as error:
            self.launched()
            future.set_exception(error)
            return
        self.launched()
        self._untold = partial(future.set_result, result)
        if not self._queued:
            self.launched()

    def launched(self) -> None:
        """The runner has handed a step to the device and will wait for it: time to tell the result of the one before."""
        if self._untold is not None:
            tell, self._untold = self._untold, None
            tell()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def ready(self) -> bool:
        """Whether collect() would return without waiting."""
        return bool(self._in_flight) and self._in_flight[0][1].done()

    def collect(self) -> list[SampleOutput]:
        """Results of the oldest step in flight, waiting for it; with none, what ended without a step (aborts)."""
        if not self._in_flight:
            return self.scheduler.take_outputs()
        plan, future = self._in_flight.popleft()
        result = future.result()
        self.last_step = time.monotonic()
        self._shapes.add(_shape(plan))
        self._oldest_began(self.last_step if self._in_flight else 0.0)
        outputs = self.scheduler.update(plan, result)
        if self.journal is not None:
            self.journal.end(plan.step)
        return outputs

    def _oldest_began(self, when: float) -> None:
        self.step_started = when
        if self.journal is not None:
            self.journal.stepping(when, bool(when) and _shape(self._in_flight[0][0]) not in self._shapes)

    def step(self) -> list[SampleOutput]:
        self.fill()
        return self.collect()

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def stats(self, pages: bool = False) -> EngineStats:
        """Counters and gauges; ``pages`` adds the state of every page."""
        stats = self.scheduler.stats(pages=pages)
        stats.last_step = self.last_step
        stats.step_running_for = time.monotonic() - self.step_started if self._in_flight else 0.0
        return stats

    def close(self) -> None:
        self._worker.shutdown(wait=True)


def _shape(plan: StepPlan) -> tuple[int, int]:
    """Steps of one shape run the same kernels, more or less."""
    return plan.num_tokens.bit_length(), len(plan.rows).bit_length()
