"""Requests and the sequences (samples) they consist of, as the scheduler sees them."""

from __future__ import annotations

from enum import IntEnum

from quire.kv import PageTable
from quire.message import AddRequest, TokenLogprobs


class Status(IntEnum):
    WAITING = 0  # holds no pages; new, or preempted by recompute
    SWAPPED = 1  # waits with its pages in host memory
    RUNNING = 2  # has a row and pages
    DRAINING = 3  # all its tokens are planned and its pages are given back: only results are awaited
    FINISHED = 4


class Request:
    """What all samples of a request share."""

    __slots__ = (
        "arrival", "cached_tokens", "deadline", "eos_token_ids", "id", "level", "limit", "min_tokens", "number", "open",
        "probing", "prompt_len", "prompt_logprobs", "prompt_logprobs_due", "reserved_rows", "sampling", "scheduled", "seed",
        "sequences", "stops",
    )  # fmt: skip

    def __init__(self, message: AddRequest, number: int, arrival: float, level: float, limit: int) -> None:
        sampling = message.sampling
        self.id = message.request_id
        self.sampling, self.seed = sampling, message.seed
        self.number, self.arrival, self.level = number, arrival, level
        self.deadline = None if message.deadline is None else arrival + message.deadline
        self.prompt_len = len(message.prompt_token_ids)
        self.limit = limit  # tokens at which a sample ends, prompt included
        self.probing = 0 < message.probe < limit - self.prompt_len  # ... or is cut off, to go on later
        if self.probing:
            self.limit = self.prompt_len + message.probe
        stops = set(sampling.stop_token_ids or ())
        if not sampling.ignore_eos:
            stops.update(message.eos_token_ids)
        self.stops = frozenset(stops)
        self.eos_token_ids = message.eos_token_ids
        self.min_tokens = sampling.min_tokens
        self.open = set(range(sampling.n)) - set(message.finished_samples)  # samples that are not finished
        self.sequences: dict[int, Sequence] = {}
        self.reserved_rows: list[int] = []  # for the samples that will be forked off
        self.scheduled: float | None = None  # when it was first admitted
        self.cached_tokens = -1  # prefix hit at the first admission
        resumed = any(message.output_token_ids)  # then an earlier engine has sent them
        wanted = sampling.prompt_logprobs is not None and not resumed
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wanted else None
        self.prompt_logprobs_due = wanted

    @property
    def collecting(self) -> bool:
        """Whether prompt logprobs are still to come, so that every prompt position must be computed."""
        return self.prompt_logprobs_due and len(self.prompt_logprobs or ()) < self.prompt_len

    def finish_reason(self, tokens: list[int]) -> str | None:
        """Why a sample with these tokens (prompt included) ends after the last one, or None if it goes on."""
        produced = len(tokens) - self.prompt_len
        if produced >= self.min_tokens and produced and tokens[-1] in self.stops:
            return "stop"
        if len(tokens) < self.limit:
            return None
        return "probe" if self.probing else "length"


class Sequence:
    """One sample. ``num_tokens - len(tokens)`` of its tokens are planned but not yet known."""

    __slots__ = (
        "blocked", "emitted", "forks", "id", "index", "key", "limit", "num_tokens", "request", "row", "status", "stops",
        "table", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, index: int, tokens: list[int], table: PageTable, forks: int = 0) -> None:
        self.request, self.index = request, index
        self.id, self.stops = request.id, request.stops  # here too, since every step looks at them
        self.key = (request.level, request.arrival, request.number, index)  # who comes first
        self.tokens = tokens
        self.num_tokens = len(tokens)
        self.limit = request.limit
        self.table = table
        self.forks = forks  # samples to fork off when the prompt is computed
        self.row = -1
        self.status = Status.WAITING
        self.emitted = False
        self.blocked = -1  # BlockManager.releases when it was last refused for want of pages
