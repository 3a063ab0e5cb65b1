"""A served engine with nothing to do leaves the machine alone: counted in processor ticks and wake-ups, not in time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from demo_server import DemoServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SECONDS = 4.0
TICK = 1 / os.sysconf("SC_CLK_TCK")


def ticks(pid: int) -> float:
    """Seconds of processor time of a process, all threads, in user and kernel mode: utime and stime of its stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def wakes(pid: int) -> int:
    """How often its threads have given up the processor to wait, and so have been woken."""
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        found = [line for line in status.read_text().splitlines() if line.startswith("voluntary_ctxt_switches")]
        count += int(found[0].split()[1])
    return count


@pytest.fixture(scope="module")
def idle():
    """What SECONDS of idleness cost the server's and the engine's process, after they have worked: (processor seconds,
    wake-ups)."""
    server = DemoServer("--no-spare-process")  # whose start is work
    try:
        server.client().completions.create(model="demo", prompt="Hello", max_tokens=8)
        time.sleep(1.0)  # threads that wait for the next step a while before they sleep
        pids = {"server": server.process.pid, "engine": server.engine.pid}
        before = {name: (ticks(pid), wakes(pid)) for name, pid in pids.items()}
        time.sleep(SECONDS)
        after = {name: (ticks(pid), wakes(pid)) for name, pid in pids.items()}
        yield {name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in pids}
    finally:
        server.close()


def test_an_idle_engine_is_asleep(idle):
    """It waits for a message without a timeout: a poll every 20 ms would be 200 wake-ups."""
    seconds, wakes = idle["engine"]
    assert seconds <= 0.02 * SECONDS
    assert wakes <= 40


def test_an_idle_server_only_looks_at_its_clocks(idle):
    """20 looks a second at the loop's delay and uvicorn's 10; a thread or task that spins is thousands."""
    seconds, wakes = idle["server"]
    assert seconds <= 0.05 * SECONDS
    assert wakes <= 60 * SECONDS
