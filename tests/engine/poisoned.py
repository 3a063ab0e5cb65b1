"""An engine process in which some prompts are poison: a prompt's first token says where they end it.

Given a file that holds a number, so many processes after one another end when a message comes, before they look at it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

ADMISSION, PLANNING, PREFILL, DECODE, HANG = 300, 301, 302, 303, 304
DECODE_AT = 9  # output tokens


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def poison() -> None:
    from quire.engine.core import EngineCore
    from quire.engine.runner import Runner
    from quire.scheduler.scheduler import Scheduler

    add, schedule, apply = EngineCore.add, Scheduler.schedule, Runner._apply

    def poisoned_add(self, request):
        if request.prompt_token_ids[0] == ADMISSION:
            crash()
        add(self, request)

    def poisoned_schedule(self):
        head = self.waiting.peek()
        if head is not None and head.tokens[0] == PLANNING:
            raise RuntimeError("planning fails")
        return schedule(self)

    def poisoned_apply(self, plan):
        apply(self, plan)
        for row, start in zip(plan.rows, plan.starts, strict=True):
            first, prompt = self.tables.tokens[row, 0], self.tables.prompt_len[row]
            if first == PREFILL or (first == DECODE and start >= prompt + DECODE_AT):
                crash()
            if first == HANG:
                time.sleep(3600)

    EngineCore.add, Scheduler.schedule, Runner._apply = poisoned_add, poisoned_schedule, poisoned_apply


def die_before_looking(counter: Path) -> None:
    from quire.engine.process import EngineServer

    receive = EngineServer._receive

    def dies_or_receives(self):
        left = int(counter.read_text())
        if left:
            counter.write_text(str(left - 1))
            crash()
        receive(self)

    EngineServer._receive = dies_or_receives


if __name__ == "__main__":
    from quire.engine.process import main

    poison()
    if len(sys.argv) > 1:
        die_before_looking(Path(sys.argv[1]))
    status = main()
    sys.stdout.flush()
    os._exit(status)
