"""`quire serve` as a user starts it, on the demo model, for the tests that need sense rather than noise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil

ADD_PARAMETERS = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "description": "The first number."},
        "b": {"type": "integer", "description": "The second number."},
    },
    "required": ["a", "b"],
}
"""Of the tool ``add``, as the demo model was taught it."""


class DemoServer:
    """The command in a process of its own. ``first_answer`` is how long it took from the command to a served port."""

    def __init__(self, *flags: str, models: tuple[str, ...] = ("demo",)) -> None:
        command = [sys.executable, "-c", "import sys; from quire.cli.main import main; sys.exit(main())", "serve"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("QUIRE_API_KEY", None)
        began = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *models, "--device", "cpu", "--threads", "1", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self.printed = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            found = re.search(r"Quire serves (.+) on (http\S+)", line)
            if found:
                self.base = found[2]
                break
        else:
            raise AssertionError("quire serve ended: " + "".join(self.errors))
        self.first_answer = time.monotonic() - began

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    @property
    def log(self) -> str:
        return "".join(self.errors)

    @property
    def engine(self) -> psutil.Process:
        """The engine's process: of those that run its code the oldest, the other being a spare."""
        children = psutil.Process(self.process.pid).children()
        return min((p for p in children if "quire.engine" in " ".join(p.cmdline())), key=lambda p: p.create_time())

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base}/v1", api_key="none", max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        """The value of one of the engine's metrics, asked now."""
        text = httpx.get(f"{self.base}/metrics", timeout=20).text
        found = re.search(rf'^quire:{name}{{model_name="demo"}} (\S+)$', text, re.MULTILINE)
        assert found, f"{name} is not in /metrics"
        return float(found[1])

    def close(self) -> int:
        """Ask it to end, as a service manager does. Returns its status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.communicate()
            self._reader.join(5)


def checkpoint() -> Path:
    """The demo model's folder, as the plugin registers it."""
    from quire import plugins

    return Path(plugins.load().checkpoints["demo"]())
