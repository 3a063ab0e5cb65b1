"""A process that waits with everything imported: one of the engines that share it becomes it, should its own die."""

from __future__ import annotations

import subprocess
import sys

COMMAND = (sys.executable, "-m", "quire.engine.process")


def start() -> subprocess.Popen[bytes]:
    """A process that imports what an engine needs and waits for its Launch."""
    return subprocess.Popen(COMMAND, stdin=subprocess.PIPE)


class Spare:
    """At most one process, which knows nothing of any model. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._users = 0

    def join(self) -> None:
        """One engine more may take it."""
        self._users += 1

    def leave(self) -> None:
        """One less; with the last one the process ends."""
        self._users -= 1
        process = None if self._users else self.take()
        if process is not None:
            process.kill()
            process.communicate()

    def keep(self) -> None:
        """Have one wait."""
        if self._users and (self._process is None or self._process.poll() is not None):
            self._process = start()

    def take(self) -> subprocess.Popen[bytes] | None:
        """The process, which is the caller's now, if there is one."""
        process, self._process = self._process, None
        return process if process is not None and process.poll() is None else None
