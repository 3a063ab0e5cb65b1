"""How bench/peers.py talks to an engine that lives in another interpreter: JSON lines on stdin and stdout.

The first line in is the settings: ``model``, ``threads``, ``dtype``, ``quantization``, ``max_model_len``,
``max_num_seqs``, ``kv_tokens`` (that the cache must hold) and ``options`` (a driver's own). The first line out is
``{"ready": seconds to construct, "version": ..., ...}``. Then each line in is one of

- ``{"prompts": [[token id, ...], ...], "output_len": n}``: generate all, from start to end;
- ``{"open": prompts, "output_len": n}``: compute the prompts up to each one's first token, and wait;
- ``{"more": n}``: n further tokens of every open prompt;
- ``{"close": true}``: end what is open;

and each line out ``{"seconds": s, "tokens": produced}``, or ``{"error": text}``. The end of the input ends the driver.
Only the standard library here: this runs in every peer's own environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Prompts = list[list[int]]


class Engine:
    """What a driver implements."""

    version = "unknown"
    facts: dict[str, Any] = {}  # noqa: RUF012  (``weights``: bytes that the engine keeps of them, where it knows)

    def generate(self, prompts: Prompts, output_len: int) -> int:
        """Greedy, the end of sequence ignored: tokens produced in all."""
        raise NotImplementedError

    def stream(self, prompts: Prompts, output_len: int) -> Iterator[int]:
        """The same, step by step: tokens produced by each. Closing the iterator ends the requests."""
        raise NotImplementedError(f"{type(self).__name__} does not go step by step")


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Run a driver: ``load(settings)`` constructs the engine."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    settings = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    try:
        engine = load(settings)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
    say({"ready": time.perf_counter() - start, "version": engine.version, **engine.facts})
    opened = Opened(engine)
    while line := sys.stdin.readline():
        work = json.loads(line)
        start = time.perf_counter()
        try:
            if "prompts" in work:
                tokens = engine.generate(work["prompts"], work["output_len"])
            elif "open" in work:
                tokens = opened.open(work["open"], work["output_len"])
            elif "more" in work:
                tokens = opened.more(work["more"])
            else:
                tokens = opened.close()
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
            raise
        say({"seconds": time.perf_counter() - start, "tokens": tokens})


class Opened:
    """Requests that wait in the middle of their answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: Iterator[int] = iter(())
        self.requests = 0

    def open(self, prompts: Prompts, output_len: int) -> int:
        self.steps, self.requests = self.engine.stream(prompts, output_len), len(prompts)
        return self._until(len(prompts))

    def more(self, tokens: int) -> int:
        return self._until(tokens * self.requests)

    def _until(self, wanted: int) -> int:
        produced = 0
        while produced < wanted:
            produced += next(self.steps)
        return produced

    def close(self) -> int:
        self.steps.close()  # type: ignore[attr-defined]
        return 0
