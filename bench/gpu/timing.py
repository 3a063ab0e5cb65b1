"""The device through its plugin, a clock by the device's own events, and the card's ceilings, which come first.

``python -m gpu.timing`` measures how fast a large copy moves bytes and how fast a large bf16 product computes: what every
other part is compared with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.rows import COPY, MATRIX, Recorder, part_parser
from quire import plugins
from quire.hardware import Backend, DeviceOptions, UserError


def open_backend(device: str, batch_invariant: bool = False, attention_backend: str | None = None) -> Any:
    """The plugin's backend, opened. Raises UserError with the reason in one line."""
    backend: Backend = plugins.load().choose(device)
    backend.open(0, DeviceOptions(batch_invariant=batch_invariant, attention_backend=attention_backend))
    return backend


class Clock:
    """Device time of one call: the median of several, by the device's own events where it has them, with the caches
    written over before each."""

    def __init__(self, backend: Any, smoke: bool = False) -> None:
        self.backend, self.module = backend, getattr(backend, "module", None)
        self.repeats = 2 if smoke else 20
        self.flush = torch.empty(1 << 20 if smoke else 256 << 20, dtype=torch.int8, device=backend.device)

    def __call__(self, fn: Callable[[], Any]) -> float:
        """Seconds."""
        for _ in range(1 if self.repeats < 3 else 3):
            fn()
        return statistics.median(self._once(fn) for _ in range(self.repeats))

    def _once(self, fn: Callable[[], Any]) -> float:
        self.flush.zero_()
        if self.module is None:
            self.backend.synchronize()
            begin = time.perf_counter()
            fn()
            self.backend.synchronize()
            return time.perf_counter() - begin
        start, end = (self.module.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def main(argv: list[str] | None = None) -> int:
    args = part_parser(__doc__).parse_args(argv)
    out = Recorder(args.rows)
    try:
        backend = open_backend(args.device)
    except UserError as error:
        out.missing(COPY, str(error))
        return 2
    clock = Clock(backend, args.smoke)
    source = torch.empty(1 << (20 if args.smoke else 30), dtype=torch.int8, device=backend.device)
    target = torch.empty_like(source)
    # Read and written: twice its size is moved.
    out.add(COPY, 2 * source.nbytes / clock(lambda: target.copy_(source)), "B/s")
    rates = {}
    for n in (128,) if args.smoke else (4096, 8192):
        x, y = (torch.randn(n, n, dtype=torch.bfloat16, device=backend.device) for _ in range(2))
        rates[n] = 2 * n**3 / clock(lambda x=x, y=y: x @ y)
    best = max(rates, key=rates.__getitem__)
    out.add(MATRIX, rates[best], "FLOP/s", size=best)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
