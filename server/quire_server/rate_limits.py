"""How much one API key may ask: requests a minute, and requests at once. What is kept is two numbers a key."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_server.errors import ApiError
from quire_server.keys import current_key
from quire_server.lifecycle import PROBES
from quire_server.metrics import Metrics


@dataclass
class Bucket:
    """Tokens that come back evenly, as many a minute as it holds: a minute's worth may be asked for at once."""

    size: int
    tokens: float
    at: float  # when ``tokens`` was right

    def take(self, size: int, now: float) -> bool:
        """Take a token, if there is one. ``size`` may have changed since the last time."""
        back = (now - self.at) * size / 60
        self.tokens = min(size, self.tokens + back + max(size - self.size, 0))
        self.size, self.at = size, now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True

    def seconds_to(self, tokens: float) -> float:
        """Until it holds so many."""
        return max(tokens - self.tokens, 0.0) * 60 / self.size

    def headers(self) -> dict[str, str]:
        """What OpenAI's clients read."""
        return {
            "x-ratelimit-limit-requests": str(self.size),
            "x-ratelimit-remaining-requests": str(int(self.tokens)),
            "x-ratelimit-reset-requests": duration(self.seconds_to(self.size)),
        }


def duration(seconds: float) -> str:
    """As Go writes one, which is what OpenAI sends: ``120ms``, ``8.64s``, ``6m0s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 2), 60)
    return f"{int(minutes)}m{rest:.4g}s" if minutes else f"{rest:.4g}s"


class RateLimitMiddleware:
    """Counts what an API key asks and refuses with 429 what is too much. Probes and the page count for nothing.

    A refused request takes no token. Without API keys there is nobody to tell apart, and nothing is limited.
    ``behind`` tells how many responses are at work for a key without a request that waits: with what is open they count
    against what would begin more work, and not against a look at one, or its end.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        per_minute: int | None,
        at_once: int | None,
        behind: Callable[[str], int] = lambda name: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.metrics, self.clock = app, metrics, clock
        self.per_minute, self.at_once, self.behind = per_minute, at_once, behind
        self._buckets: dict[str, Bucket] = {}
        self._running: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = current_key.get()
        if scope["type"] != "http" or key is None or scope["path"] in PROBES:
            await self.app(scope, receive, send)
            return
        running = self._running.get(key.name, 0)
        at_once = key.concurrent_requests or self.at_once
        begins = scope["method"] == "POST" and not scope["path"].endswith("/cancel")
        busy = running + (self.behind(key.name) if begins and at_once is not None else 0)
        if at_once is not None and busy >= at_once:
            message = f"{busy} requests of this API key are open; this server's limit is {at_once} at once"
            await self._refuse(key.name, message, 1.0, {}, scope, receive, send)
            return
        headers: dict[str, str] = {}
        per_minute = key.requests_per_minute or self.per_minute
        if per_minute is not None:
            now = self.clock()
            bucket = self._buckets.setdefault(key.name, Bucket(per_minute, per_minute, now))
            taken = bucket.take(per_minute, now)
            headers = bucket.headers()
            if not taken:
                message = f"this API key has asked {per_minute} requests a minute, this server's limit"
                await self._refuse(key.name, message, bucket.seconds_to(1), headers, scope, receive, send)
                return
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *encoded]
            await send(message)

        self._running[key.name] = running + 1
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self._running[key.name] -= 1
            if not self._running[key.name]:
                del self._running[key.name]

    async def _refuse(
        self, name: str, message: str, wait: float, headers: dict[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.metrics.limited(name)
        # The openai client reads the second one first.
        retry = {"Retry-After": str(math.ceil(wait)), "Retry-After-Ms": str(math.ceil(wait * 1000))}
        error = ApiError(429, message, code="rate_limit_exceeded", headers={**retry, **headers})
        await error.response()(scope, receive, send)
