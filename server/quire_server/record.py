"""What is known of one request when it has ended: for its log line and its trace span. Numbers and names, never text."""

from __future__ import annotations

import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.outputs import RequestMetrics
    from quire.sampling.params import SamplingParams

REQUEST_ID = r"^[A-Za-z0-9._:@/+=-]{1,128}$"
"""What a client may give as the id of its request."""


@dataclass
class RequestRecord:
    """Begun by the outermost middleware; the route's jobs (one engine request each) add to it."""

    request_id: str
    given: bool  # by the client, in a header: then it need not be unique
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    response_id: str | None = None
    sampling: SamplingParams | None = None  # of the first job
    metadata: dict[str, str] | None = None  # what the client says of its request
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_token: float | None = None  # time.monotonic(), of any sample
    times: RequestMetrics | None = None  # of the first job, when the engine has told them

    @property
    def ttft(self) -> float | None:
        """Seconds from the request's arrival here to its first token."""
        return None if self.first_token is None else self.first_token - self.began

    def fields(self) -> dict[str, Any]:
        """What a log line shows (quire.logs.FIELDS); None for what is not known."""
        ran = self.sampling is not None
        return {
            "request_id": self.request_id,
            "model": self.model,
            "ttft_ms": None if self.ttft is None else round(self.ttft * 1000, 1),
            "prompt_tokens": self.prompt_tokens if ran else None,
            "completion_tokens": self.completion_tokens if ran else None,
            "cached_tokens": self.cached_tokens if ran else None,
            "finish_reasons": self.finish_reasons or None,
            "metadata": self.metadata or None,
        }


_current: ContextVar[RequestRecord | None] = ContextVar("quire_request", default=None)


def begin(request_id: str, given: bool) -> RequestRecord:
    """The record of the request that this task, and those it starts, answer."""
    record = RequestRecord(request_id, given)
    _current.set(record)
    return record


def current() -> RequestRecord:
    """The record of the request under way; outside of one, a record that nobody reads."""
    return _current.get() or RequestRecord(uuid.uuid4().hex, False)


def response_id(prefix: str, given: str | None = None) -> str:
    """The id of the answer under way. The engine's ids begin with it, so one search finds all lines about a request.

    A client may give the same id twice, in the header X-Request-Id or, where there is none, in the body (``given``); the
    engine's must be its own.
    """
    record = current()
    record.response_id = f"{prefix}-{given if given is not None and not record.given else record.request_id}"
    if record.given or given is not None:
        record.response_id += f"-{uuid.uuid4().hex[:12]}"
    return record.response_id
