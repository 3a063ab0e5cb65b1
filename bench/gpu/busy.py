"""How much of the time a device computes: the intervals of its kernels and copies, joined, over those of a window.

Torch's profiler asks the driver's own activity records (CUPTI, ROCtracer, Level Zero), so kernels inside a replayed graph
count one by one, and the gaps between them do not. Recording costs a little: the share errs on the low side.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch


def union(intervals: Iterable[tuple[int, int]]) -> int:
    """What intervals (start, end) cover together."""
    covered, reach = 0, None
    for start, end in sorted(intervals):
        if reach is None or start > reach:
            covered += end - start
            reach = end
        elif end > reach:
            covered += end - reach
            reach = end
    return covered


def share(intervals: list[tuple[int, int]]) -> float | None:
    """The covered part of the time from the first start to the last end; None of nothing."""
    if not intervals:
        return None
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return union(intervals) / span if span else None


def watch(device: torch.device, seconds: float) -> tuple[list[tuple[int, int]], str]:
    """Intervals (ns) of what ``device`` did in the next ``seconds`` for any thread, and why there are none."""
    from torch.profiler import ProfilerActivity, profile

    activity: Any = getattr(ProfilerActivity, device.type.upper(), None)
    if device.type == "cpu" or activity is None:
        return [], f"torch's profiler has no record of a device's own activity on {device.type}"
    with profile(activities=[activity]) as profiler:
        time.sleep(seconds)
    found = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() != torch.autograd.DeviceType.CPU
    ]
    return found, "" if found else "the profiler saw nothing run on the device"
