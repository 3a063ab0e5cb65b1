"""The scheduler: requests in, step plans out; step results in, outputs out. How a step is filled: planner.py."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from copy import copy

from quire.config import CacheConfig, SchedulerConfig
from quire.errors import QueueFull, RequestRefused
from quire.kv import check, gauges, page_states
from quire.message import STEP_TOKENS, AddRequest, EngineStats, SampleOutput, SequenceState, StepPlan, StepResult
from quire.scheduler.intake import check_config, check_request
from quire.scheduler.planner import Planner, Step
from quire.scheduler.queues import Deadlines
from quire.scheduler.request import Request, Sequence, Status
from quire.spec import KVSpec

logger = logging.getLogger("quire.scheduler")

MAX_RUNNING_LISTED = 512  # in the statistics
MAX_WAITING_LISTED = 32


class Scheduler(Planner):
    """Who runs next, and what came of it. Not thread-safe: one loop calls :meth:`schedule` and :meth:`update` in turn;
    with ``async_scheduling`` a second plan may be made before the first one's result is in.

    ``clock`` gives seconds on the clock of ``AddRequest.arrival``."""

    def __init__(
        self, config: SchedulerConfig, cache: CacheConfig, spec: KVSpec, clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_config(config, cache)
        super().__init__(config, cache, spec, clock)
        self.requests: dict[str, Request] = {}
        self._deadlines = Deadlines()
        self._in_flight: deque[Step] = deque()
        self._outbox: list[SampleOutput] = []
        self._number = 0

    # -- requests come and go --------------------------------------------------------------------------------------
    def add(self, message: AddRequest) -> None:
        """Queue a request. Raises :class:`RequestRefused` (it can never run) or :class:`QueueFull`."""
        if message.request_id in self.requests:
            raise RequestRefused(f"request {message.request_id}: this id is in use")
        limit = check_request(message, self.config, self.blocks)
        if len(self.waiting) >= self.config.max_waiting and not message.resumed:
            raise QueueFull(f"request {message.request_id}: max_waiting={self.config.max_waiting} are waiting already")
        arrival = message.arrival or self._clock()
        level = 0.0
        if self.config.policy == "priority":
            aging = self.config.priority_aging
            level = message.priority + (arrival / aging if aging else 0.0)
        request = Request(message, self._number, arrival, level, limit)
        self._number += 1
        self.requests[request.id] = request
        produced = message.output_token_ids
        if not any(produced):
            self._enqueue(request, 0, message.prompt_token_ids[:], forks=request.sampling.n - 1, message=message)
        for index, tokens in enumerate(produced if any(produced) else ()):
            if index not in request.open:
                continue
            self._enqueue(request, index, message.prompt_token_ids + tokens, forks=0, message=message)
        if request.deadline is not None and request.open:
            self._deadlines.push(request, self.requests)

    def _enqueue(self, request: Request, index: int, tokens: list[int], forks: int, message: AddRequest) -> None:
        reason = request.finish_reason(tokens) if len(tokens) > request.prompt_len else None
        if reason:  # an earlier engine had finished this sample
            self._emit_end(request, index, reason, stop_token_id=tokens[-1] if reason == "stop" else None)
            return
        table = self.blocks.open((("adapter", message.adapter), ("cache_salt", message.cache_salt)))
        sequence = Sequence(request, index, tokens, table, forks)
        request.sequences[index] = sequence
        self.waiting.push(sequence)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests, whatever they are doing; unknown ids are ignored. The next outputs say ``abort``."""
        for request_id in request_ids:
            if request_id in self.requests:
                self._end(self.requests[request_id], "abort")
        self._sweep()

    def abort_sample(self, request_id: str, index: int) -> None:
        """End one sample whose end only the client can see (a stop string); nothing is said of it any more."""
        request = self.requests.get(request_id)
        sequence = request.sequences.get(index) if request is not None else None
        # Before the samples are forked off, none has produced anything that a client could have seen.
        if request is not None and sequence is not None and not sequence.forks:
            self._finish(sequence)
            self._close(request, index)
            self._sweep()

    def _expire(self) -> None:
        late = [] if self._deadlines.empty else self._deadlines.expired(self._clock(), self.requests)
        for request in late:
            self._end(request, "deadline")
        if late:
            self._sweep()

    def _end(self, request: Request, reason: str, error: str | None = None) -> None:
        for sequence in list(request.sequences.values()):
            self._finish(sequence)
        for index in sorted(request.open):
            self._emit_end(request, index, reason, error=error)

    def _emit_end(
        self, request: Request, index: int, reason: str, error: str | None = None, stop_token_id: int | None = None
    ) -> None:
        """Tell that a sample is finished without a new token."""
        output = SampleOutput(
            request.id, index, [], finish_reason=reason, error=error, stop_token_id=stop_token_id
        )  # fmt: skip
        self._outbox.append(output)
        self._close(request, index)

    def _close(self, request: Request, index: int) -> None:
        request.open.discard(index)
        if not request.open:
            del self.requests[request.id]

    def _finish(self, sequence: Sequence) -> None:
        """Drop a sequence's state. Steps in flight may still compute it: they run before anything planned from here."""
        if sequence.status is Status.RUNNING:
            self._release_rows(sequence)
        elif sequence.status is Status.SWAPPED:
            self._swapped -= 1
        queued = sequence.status in (Status.WAITING, Status.SWAPPED)
        sequence.status = Status.FINISHED
        if queued:
            self.waiting.forget()
        self.blocks.free(sequence.table)
        sequence.tokens = []
        del sequence.request.sequences[sequence.index]

    def _sweep(self) -> None:
        self.running[:] = [s for s in self.running if s.status is Status.RUNNING]

    # -- planning --------------------------------------------------------------------------------------------------
    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute before a result is in (or at all)."""
        allowed = 2 if self.config.async_scheduling else 1
        if len(self._in_flight) >= allowed:
            raise RuntimeError(f"{len(self._in_flight)} steps are in flight; update() comes first")
        self._expire()
        step = self.fill(self.config.max_num_batched_tokens)
        if step is None:
            return None
        self._in_flight.append(step)
        return step.plan

    # -- results ---------------------------------------------------------------------------------------------------
    def update(self, plan: StepPlan, result: StepResult) -> list[SampleOutput]:
        """Take in the result of the oldest step in flight; what to tell the clients."""
        if not self._in_flight or self._in_flight[0].plan is not plan or result.step != plan.step:
            raise ValueError(f"step {plan.step} with the result of step {result.step} is not the oldest in flight")
        if len(result.token_ids) != len(plan.sample_rows):
            raise ValueError(f"step {plan.step}: {len(result.token_ids)} tokens for {len(plan.sample_rows)} samples")
        step = self._in_flight.popleft()
        if result.errors:
            self._fail(step, result)
        for sequence, start, count in zip(step.sequences, plan.starts, plan.counts, strict=True):
            if start + count >= sequence.table.next_register:
                self.blocks.register(sequence.table, sequence.tokens, start + count)
        for k in plan.prompt_logprobs:
            self._collect(step.sequences[k].request, plan.starts[k], result.prompt_logprobs.get(k, []))
        self._accept(step, result)
        stats = self._stats
        stats.steps += 1
        stats.batch_tokens, stats.batch_requests = plan.num_tokens, len(plan.rows)
        stats.step_sizes[bisect_left(STEP_TOKENS, stats.batch_tokens)] += 1
        stats.step_tokens += stats.batch_tokens
        stats.last_step = self._clock()
        return self.take_outputs()

    def _accept(self, step: Step, result: StepResult) -> None:
        add, logprobs, finished = self._outbox.append, result.logprobs, Status.FINISHED
        before, ended = len(self._outbox), False
        for j, sequence in enumerate(step.samples):
            if sequence.status is finished:
                continue
            token, tokens = result.token_ids[j], sequence.tokens
            tokens.append(token)
            output = SampleOutput(sequence.id, sequence.index, [token])
            if logprobs and (entry := logprobs[j]) is not None:
                output.logprobs = [entry]
            if not sequence.emitted:
                self._first_output(sequence, output)
            add(output)
            if token in sequence.stops or len(tokens) >= sequence.limit:
                ended |= self._maybe_finish(sequence, output)
        self._stats.generation_tokens += len(self._outbox) - before
        if ended:
            self._sweep()

    def _maybe_finish(self, sequence: Sequence, output: SampleOutput) -> bool:
        request, tokens = sequence.request, sequence.tokens
        reason = request.finish_reason(tokens)
        if reason is None:
            return False
        output.finish_reason = reason
        output.stop_token_id = tokens[-1] if reason == "stop" else None
        self._finish(sequence)
        self._close(request, sequence.index)
        return True

    def _first_output(self, sequence: Sequence, output: SampleOutput) -> None:
        request = sequence.request
        sequence.emitted = True
        output.num_cached_tokens = max(request.cached_tokens, 0)
        output.scheduled = request.scheduled
        if request.prompt_logprobs_due:
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
            request.prompt_logprobs_due = False
        if not sequence.index:
            self._stats.prompt_tokens += request.prompt_len

    def _collect(self, request: Request, start: int, entries: list) -> None:
        """Append prompt logprobs of positions from ``start + 1`` on; after a recompute some are there already."""
        have = request.prompt_logprobs
        if have is not None and start + 1 <= len(have):
            have += entries[len(have) - start - 1 :]

    def _fail(self, step: Step, result: StepResult) -> None:
        who = dict(zip(step.plan.rows, step.sequences, strict=True))
        who.update(zip(step.plan.sample_rows, step.samples, strict=True))
        for error in result.errors:
            if error.row not in who:
                raise ValueError(f"step {step.plan.step}: error for row {error.row}, which is not in it")
            request = who[error.row].request
            if self.requests.get(request.id) is request:
                logger.error(
                    "request %s failed in step %d", request.id, step.plan.step, extra={"request_id": request.id}
                )
                self._end(request, "error", error.message)
        self._sweep()

    # -- what is going on ------------------------------------------------------------------------------------------
    def take_outputs(self) -> list[SampleOutput]:
        """Outputs that wait for nobody: call it when :meth:`schedule` gave None and no step is in flight."""
        outputs, self._outbox = self._outbox, []
        return outputs

    def has_work(self) -> bool:
        """Whether there are unfinished requests, steps in flight or outputs to take."""
        return bool(self.requests or self._in_flight or self._outbox)

    @property
    def in_flight(self) -> int:
        """Steps whose results are awaited."""
        return len(self._in_flight)

    def newest_step(self) -> list[str]:
        """The id of the request of each sequence in the step that was planned last."""
        return [sequence.id for sequence in self._in_flight[-1].sequences]

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, preempted ones included."""
        return len(self.waiting)

    def check(self) -> None:
        """Prove that the pages balance. Raises PagesUnbalanced."""
        check(self.blocks)

    def stats(self, pages: bool = False) -> EngineStats:
        """Counters and gauges, a new object; linear in the number of sequences that were admitted. ``pages`` adds the
        state of every page (quire.kv.accounts) and who holds it."""
        stats = self._stats
        books = gauges(self.blocks)
        slots = sum(g.slots for g in books)
        stats.running = len(self.running)
        stats.swapped = self._swapped
        stats.waiting = len(self.waiting) - self._swapped
        stats.pages_total = sum(g.total for g in books)
        stats.pages_free = sum(g.free + g.cached for g in books)
        stats.pages_cached = sum(g.cached for g in books)
        stats.kv_waste = 1.0 - sum(g.tokens for g in books) / slots if slots else 0.0
        result = copy(stats)
        result.step_sizes = stats.step_sizes[:]
        if pages:
            result.pages = page_states(self.blocks)
            listed = self.running[:MAX_RUNNING_LISTED] + self.waiting.first(MAX_WAITING_LISTED)
            result.sequences = [self._state(sequence) for sequence in listed]
        return result

    def _state(self, sequence: Sequence) -> SequenceState:
        request, table = sequence.request, sequence.table
        return SequenceState(
            request.id,
            sequence.index,
            sequence.status.name.lower(),
            request.prompt_len,
            len(sequence.tokens) - request.prompt_len,
            table.length,
            max(0.0, self._clock() - request.arrival),
            [pages[first:] for pages, first in zip(table.pages, table.first, strict=True)],
        )
