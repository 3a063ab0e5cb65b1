"""Put on PYTHONPATH by server_load.py: the event loop of whatever uvicorn serves tells how late its timers come.

The same probe sits in every server that is measured. One line for each look goes to the file that ``LOOP_PROBE``
names: when the timer was due (time.monotonic()) and by how many seconds it came late. Quantiles of samples are exact.
"""

import os
import sys

INTERVAL = 0.01  # seconds between looks

if os.environ.get("LOOP_PROBE") and "serve" in getattr(sys, "orig_argv", ()):  # not in engines and workers
    import asyncio
    import time

    import uvicorn

    async def _look(path: str) -> None:
        with open(path, "a", buffering=1) as out:
            while True:
                due = time.monotonic() + INTERVAL
                await asyncio.sleep(INTERVAL)
                out.write(f"{due:.6f} {max(time.monotonic() - due, 0.0):.6f}\n")

    _serve = uvicorn.Server.serve

    async def _served(self: uvicorn.Server, *args: object, **kwargs: object) -> None:
        looking = asyncio.ensure_future(_look(os.environ["LOOP_PROBE"]))
        try:
            await _serve(self, *args, **kwargs)  # type: ignore[arg-type]
        finally:
            looking.cancel()

    uvicorn.Server.serve = _served  # type: ignore[method-assign, assignment]
