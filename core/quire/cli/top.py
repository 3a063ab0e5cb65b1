"""``quire top``: a server's queue, batch, pages and tokens per second, live in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from quire.cli.http import API_KEY_VARIABLE, ServerAddress, ServerError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

HELP = "watch a running server: queue, batch, pages, tokens/s"
COLOURS = {"1": "bright_black", "2": "yellow", "3": "blue", "4": "magenta"}  # digits of /engine's cells
NAMES = {"1": "free", "2": "cached", "3": "owned", "4": "shared"}
MAP_CELLS = 640
BARS = " ▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="the server (%(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"its API key (default: the variable {API_KEY_VARIABLE})")
    parser.add_argument("--model", metavar="NAME", help="the one to watch, of several (default: all)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (%(default)s)")
    parser.add_argument("--once", action="store_true", help="look twice, an interval apart, print that, and end")


def run(args: argparse.Namespace) -> int:
    if args.interval < 0.1:
        raise ServerError(f"--interval must be at least 0.1 s, not {args.interval:g}")
    address = ServerAddress(args.url, args.api_key, timeout=10.0)
    from rich.console import Console

    histories = watched(address, args.model)
    console = Console()
    if args.once or not sys.stdout.isatty():
        time.sleep(args.interval)
        for name in histories:
            look(address, name, histories[name])
        console.print(pictures(histories, address.root, console.width))
        return 0
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(pictures(histories, address.root, console.width), refresh=True)
            time.sleep(args.interval)
            for name in histories:
                look(address, name, histories[name])


def watched(address: ServerAddress, model: str | None) -> dict[str, History]:
    """What each model's engine says now. Raises ServerError: an address that does not answer at all is a mistake, not a
    state."""
    first = address.json(_path(model))
    histories = {first["model"]: History()}
    histories[first["model"]].add(first)
    for name in first.get("models", ()) if model is None else ():
        if name not in histories:
            histories[name] = History()
            look(address, name, histories[name])
    return histories


def look(address: ServerAddress, name: str, history: History) -> None:
    try:
        history.add(address.json(_path(name)))
    except ServerError as error:
        history.failed(str(error))


def _path(model: str | None) -> str:
    return "/engine" if model is None else f"/engine?model={quote(model)}"


class History:
    """What came, and the rates between the last two."""

    def __init__(self) -> None:
        self.view: dict[str, Any] = {}
        self.error: str | None = None
        self.generated = self.read = 0.0  # tokens per second
        self.step_generated = self.step_read = 0.0  # tokens per step; read: computed, not cached
        self.rates: deque[float] = deque(maxlen=60)
        self.ttft: float | None = None  # mean seconds over the last interval in which there were any
        self.itl: float | None = None

    def failed(self, error: str) -> None:
        self.error = error

    def add(self, view: dict[str, Any]) -> None:
        old, self.view, self.error = self.view, view, None
        seconds = view["monotonic"] - old["monotonic"] if old else 0.0
        if seconds <= 0 or view["steps"] < old["steps"]:  # the first, or another engine process, which counts from 0
            return
        generated = view["generation_tokens"] - old["generation_tokens"]
        read = view["prompt_tokens"] - old["prompt_tokens"]
        self.generated, self.read = generated / seconds, read / seconds
        self.rates.append(self.generated)
        if steps := view["steps"] - old["steps"]:
            computed = max(0, read - (view["prefix_hits"] - old["prefix_hits"]))
            self.step_generated, self.step_read = generated / steps, computed / steps
        for name in ("ttft", "itl"):
            count = view[name]["count"] - old[name]["count"]
            if count > 0:
                setattr(self, name, (view[name]["sum"] - old[name]["sum"]) / count)


def pictures(histories: dict[str, History], root: str, width: int) -> Group:
    """All engines, one below the other."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for name, history in histories.items():
        parts += [Text()] if parts else []
        if history.view:
            parts.append(picture(history, root, width))
        else:
            parts.append(Text(f"{name} at {root}: {history.error}", style="red"))
    return Group(*parts)


def picture(history: History, root: str, width: int) -> Group:
    """One engine's view, as something that rich prints."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    view = history.view
    head = Text.assemble(
        ("quire top  ", "bold"), f"{view['model']} on {view['device']} at {root}  ", (view["state"], "green")
    )
    lines: list[Any] = [head]
    if history.error is not None:
        lines.append(Text.from_markup(f"[red]{escape(history.error)}[/red]"))
    used = view["pages_total"] - view["pages_free"]
    hits = f"{view['prefix_hits'] / view['prefix_queries']:.0%}" if view["prefix_queries"] else "-"
    table = Table.grid(padding=(0, 3))
    for _ in range(4):
        table.add_column()
    table.add_row(
        f"running {view['running']}",
        f"waiting {view['waiting']}",
        f"swapped {view['swapped']}",
        f"preempted {view['preemptions']}",
    )
    table.add_row(
        f"last step {view['batch_tokens']} tok, {view['batch_requests']} req",
        f"a step {history.step_generated:.1f} generated",
        f"+ {history.step_read:.1f} prompt",
        f"steps {view['steps']:,}",
    )
    table.add_row(
        f"tokens/s {history.generated:,.1f}",
        f"prompt {history.read:,.1f}",
        f"TTFT {_milliseconds(history.ttft)}",
        f"ITL {_milliseconds(history.itl)}",
    )
    table.add_row(
        f"pages {used:,} of {view['pages_total']:,}", f"prefix hits {hits}", f"waste {view['kv_waste']:.0%}", ""
    )
    lines += [table, Text(f"tokens/s  {spark(list(history.rates), max(8, min(60, width - 12)))}", style="blue")]
    for index, group in enumerate(view["page_map"]):
        counts = "  ".join(f"{name} {group[name]:,}" for name in NAMES.values())
        lines += [Text(f"pages, group {index}: {counts}"), page_map(group["cells"], max(16, min(width, 80)))]
    return Group(*lines)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


def spark(values: list[float], width: int) -> str:
    """The last ``width`` values as bars of eight heights; the highest has the full height."""
    values = values[-width:]
    top = max(values, default=0.0)
    return "".join(BARS[round(8 * value / top)] if top > 0 else BARS[0] for value in values)


def page_map(cells: str, width: int) -> Text:
    """Pages as blocks of colour, and of shape where colour does not tell, at most MAP_CELLS: each the most used of
    those it stands for."""
    from rich.text import Text

    size = max(1, -(-len(cells) // MAP_CELLS))
    shown = "".join(max(cells[i : i + size]) for i in range(0, len(cells), size))
    text = Text()
    for start in range(0, len(shown), width):
        if start:
            text.append("\n")
        for cell in shown[start : start + width]:
            text.append(" ·▒█▓"[int(cell)], style=COLOURS.get(cell, ""))
    return text
