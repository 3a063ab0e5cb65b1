"""How late the event loop is: what every open stream waits besides the engine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Histogram

INTERVAL = 0.05  # seconds between looks; twenty wake-ups a second cost nothing that can be measured
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


async def watch(histogram: Histogram) -> None:
    """Observe by how many seconds a timer comes late, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL
        await asyncio.sleep(INTERVAL)
        histogram.observe(max(loop.time() - due, 0.0))
