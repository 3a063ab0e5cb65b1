"""Who is to blame when the engine dies, and in which order what was open goes on.

Suspects of a death are the requests that the engine was working on (see journal.py). All others are beyond blame: those
that only wait, however many deaths they wait through. After a crash each suspect is *probed*: it runs alone, for a few
tokens more than it had. One that crashes the engine alone, having been there when it crashed before, is condemned; one
that gets through is cleared. Bits do not depend on company, so whoever watches the stream sees no difference.

A SIGKILL comes from outside and says little: its suspects are probed when they were there twice without a token in
between, and condemned after ``MAX_KILLS``, the last of them alone: so ends a request for whose memory the system kills
the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from quire.message import AddRequest, SampleOutput

PROBE_TOKENS = 4  # beyond the known ones: steps that were in flight and results that were lost on the way, and one
MAX_CRASHES = 2  # that a request may be suspected of without being cleared, if it was alone in the last
KILLS_TO_PROBE, MAX_KILLS = 2, 5  # SIGKILLs in a row without a token of the request in between


@dataclass
class OpenRequest:
    """What is needed to go on with a request in another engine process."""

    message: AddRequest
    deliver: Callable[[SampleOutput], None]
    produced: list[list[int]] = field(default_factory=list)  # token ids per sample, so far
    finished: list[bool] = field(default_factory=list)
    sent: bool = False  # an engine has seen it, so that it is too late to refuse it
    crashes: int = 0  # suspected of, since it was last cleared
    kills: int = 0  # while it was worked on, since its last token

    def resume(self, probe: bool) -> AddRequest:
        """The message with which another engine goes on."""
        message = self.message
        if any(self.produced):
            message.output_token_ids = self.produced
        message.resumed, self.sent = self.sent, True
        message.finished_samples = [i for i, done in enumerate(self.finished) if done]
        message.probe = max(map(len, self.produced)) + PROBE_TOKENS if probe else 0
        return message


class Recovery:
    """Decides; it sends nothing. While there is a ``probe``, only that request may be in the engine."""

    def __init__(self) -> None:
        self.open: dict[str, OpenRequest] = {}
        self.probe: str | None = None
        self._queue: deque[str] = deque()
        self.passed: set[int] = set()  # samples of the probe that are through

    def after_death(self, suspects: Iterable[str], killed: bool) -> list[str]:
        """Take in a death; the condemned, for the caller to fail. ``killed``: from outside, by SIGKILL."""
        blamed = [name for name in suspects if name in self.open]
        for name in blamed:
            request = self.open[name]
            request.crashes += not killed
            request.kills += killed
        self.probe = None
        condemned = []
        if len(blamed) == 1:
            request = self.open[blamed[0]]
            if (request.crashes >= MAX_CRASHES and not killed) or request.kills >= MAX_KILLS:
                condemned = blamed
        self._queue = deque(
            name
            for name, request in self.open.items()
            if name not in condemned and (request.crashes or request.kills >= KILLS_TO_PROBE)
        )
        return condemned

    def next_probe(self) -> str | None:
        """The request to run alone now, or None: all may run."""
        self.probe = None
        self.passed.clear()
        while self._queue and self.probe is None:
            name = self._queue.popleft()
            self.probe = name if name in self.open else None
        return self.probe

    def through(self) -> bool:
        """Whether nothing is left to see of the probe: it is cleared, or has ended."""
        request = self.open.get(self.probe or "")
        if request is None:
            return True
        if not all(done or i in self.passed for i, done in enumerate(request.finished)):
            return False
        request.crashes = request.kills = 0
        return True
