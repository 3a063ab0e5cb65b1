"""Progress of long work, on a terminal only: a log file gets no bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quire.outputs import RequestOutput


@contextmanager
def line_progress(total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """A bar over the lines of a file, of which ``done`` are behind us; the yielded function counts one more."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), refresh_per_second=5) as progress:
        task = progress.add_task("requests", total=total, completed=done)
        yield lambda: progress.advance(task)


@contextmanager
def generation_progress(total: int) -> Iterator[Callable[[RequestOutput], None]]:
    """A bar over requests with prompt and output tokens per second; the yielded function takes each delta."""
    if not sys.stderr.isatty():
        yield lambda output: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )  # fmt: skip
    start, produced, read = time.monotonic(), 0, 0
    seen: set[str] = set()
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=5) as progress:
        task = progress.add_task("generating", total=total, speed="")

        def advance(output: RequestOutput) -> None:
            nonlocal produced, read
            if output.request_id not in seen:
                seen.add(output.request_id)
                read += len(output.prompt_token_ids)
            produced += sum(len(sample.token_ids) for sample in output.outputs)
            seconds = max(time.monotonic() - start, 1e-6)
            speed = f"{read / seconds:,.0f} prompt and {produced / seconds:,.0f} output tokens/s"
            progress.update(task, advance=int(output.finished), speed=speed)

        yield advance
