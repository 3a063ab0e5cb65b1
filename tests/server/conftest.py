"""A real HTTP server on loopback around a fake engine, and the real openai client to talk to it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire_server.model import ModelSettings
from quire_server.serve import bind, serve
from quire_server.state import Server, Settings

sys.path.insert(0, str(Path(__file__).parent))
from fake import FakeLLM


class Live:
    """A server in a thread."""

    def __init__(
        self, engine: Any, settings: Settings, drain_timeout: float = 5.0, wait: bool = True, **options: Any
    ) -> None:
        self.engines = engine if isinstance(engine, list) else [engine]
        self.engine = self.engines[0]
        self.options = {"drain_timeout": drain_timeout, **options}
        self.server: Server | None = None
        self.ready = threading.Event()
        self.status: int | None = None
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run(listener, settings)))
        self.thread.start()
        if wait:
            assert self.ready.wait(10)

    async def _run(self, listener: Any, settings: Settings) -> None:
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        self.stop = asyncio.Event()

        def on_ready(server: Server) -> None:
            self.server = server
            self.ready.set()

        self.status = await serve(self.engines, settings, listener, on_ready=on_ready, asked=self.stop, **self.options)

    def ask_to_stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)

    def close(self) -> None:
        if self.thread.is_alive():
            self.ask_to_stop()
            self.thread.join(20)
        assert not self.thread.is_alive()

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.base, timeout=20, **options)


@pytest.fixture
def make_live() -> Iterator[Callable[..., Live]]:
    """make_live(engine, settings) starts a server (of several models, with a list of engines); all are stopped at the end."""
    made: list[Live] = []

    def make(engine: Any = None, settings: Settings | None = None, **options: Any) -> Live:
        made.append(Live(engine or FakeLLM(), settings or Settings(), **options))
        return made[-1]

    yield make
    for live in made:
        live.close()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One server for tests that leave it as it was."""
    one = Live(FakeLLM(), Settings(models=(ModelSettings(names=("demo", "alias/of-it")),)))
    yield one
    one.close()


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.openai()


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with live.http() as one:
        yield one


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
