"""A peer's process: started, asked, stopped while others are measured, and weighed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from model_cost import Workload

HERE = Path(__file__).resolve().parent


@dataclass
class Peer:
    """One engine. ``failed`` is why it is no longer asked; ``options`` are its driver's own."""

    name: str
    python: str
    model: str
    driver: str = ""
    env: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    log: BinaryIO | None = None
    ready: dict[str, Any] = field(default_factory=dict)
    start_s: float = 0.0
    failed: str | None = None
    seconds: dict[Any, list[float]] = field(default_factory=dict)  # by workload, a value for each round
    memory: dict[str, int] = field(default_factory=dict)

    def script(self) -> Path:
        driver = self.driver or self.name.partition("-")[0]
        path = Path(driver) if driver.endswith(".py") else HERE / "peers" / f"drive_{driver}.py"
        if not path.is_file():
            known = ", ".join(sorted(each.stem.removeprefix("drive_") for each in (HERE / "peers").glob("drive_*.py")))
            raise SystemExit(f"peer {self.name}: no driver {driver!r}; there are {known}")
        return path

    def start(self, settings: dict[str, Any], wait: bool = True) -> None:
        """Start the driver and wait until its engine is there; it is stopped from then on, except while it is asked.

        ``wait`` False leaves it running, for first_token().
        """
        begin = time.perf_counter()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [self.python, str(self.script())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                env={**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), **self.env}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.failed = str(error)
            return
        self.ready = self._exchange({**settings, "model": self.model, "options": self.options})
        self.start_s = time.perf_counter() - begin
        if wait:
            self._signal(signal.SIGSTOP)

    def ask(self, work: Workload, prompts: list[list[int]]) -> float | None:
        """Seconds of one workload; None once the peer has failed."""
        return self._timed({"prompts": prompts, "output_len": work.output}, work.requests * work.output, str(work))

    def open(self, prompts: list[list[int]], output_len: int) -> float | None:
        """Seconds to compute the prompts, each up to its first token at least."""
        return self._timed({"open": prompts, "output_len": output_len}, len(prompts), "the prompts", exact=False)

    def more(self, tokens: int, requests: int) -> float | None:
        """Seconds for ``tokens`` further tokens of each open request."""
        return self._timed({"more": tokens}, tokens * requests, f"{tokens} more tokens", exact=False)

    def close(self) -> None:
        """End what is open."""
        self._timed({"close": True}, 0, "the end")

    def _timed(self, message: dict[str, Any], tokens: int, what: str, exact: bool = True) -> float | None:
        if self.failed:
            return None
        self._signal(signal.SIGCONT)
        answer = self._exchange(message)
        self._signal(signal.SIGSTOP)
        if self.failed is None and (answer["tokens"] != tokens if exact else answer["tokens"] < tokens):
            self.failed = f"it produced {answer['tokens']} tokens on {what}"
        return None if self.failed else float(answer["seconds"])

    def weigh(self) -> None:
        """What the peer's processes have taken so far at most, in bytes, and what of it are stored weights.

        The peak is the sum of each process's highest resident set (VmHWM), less what several share now: files that are
        mapped count as far as they were read, as memory that the peer made the system hold.
        """
        if self.failed or self.process is None:
            return
        peak = shared = 0
        for pid in session(self.process.pid):
            peak += proc_kib(pid, "status", "VmHWM")
            shared += max(0, proc_kib(pid, "smaps_rollup", "Rss") - proc_kib(pid, "smaps_rollup", "Pss"))
        self.memory = {
            "peak": (peak - (shared if len(session(self.process.pid)) > 1 else 0)) * 1024,
            "weights": self.ready.get("weights") or stored_bytes(Path(self.model)),
        }

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None  # noqa: PT018
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            self.failed = f"{answer['error']}\n{self._last_words()}".strip()
        return answer

    def _last_words(self) -> str:
        assert self.log is not None
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 2000))
        return self.log.read().decode("utf-8", "replace")

    def _signal(self, number: int) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def session(leader: int) -> list[int]:
    """The processes of a session, a peer's own and those that it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(path.parent.name))
    return sorted(found)


def proc_kib(pid: int, file: str, key: str) -> int:
    """A value in KiB of /proc/PID/FILE; 0 where there is none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return 0


def stored_bytes(model: Path) -> int:
    """Bytes of a model's weights: a GGUF file, OpenVINO's binary, or the safetensors of a checkpoint."""
    if model.is_file():
        return model.stat().st_size
    files = [model / "openvino_model.bin"] if (model / "openvino_model.bin").exists() else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


@contextmanager
def running(peers: Sequence[Peer], settings: dict[str, Any]) -> Iterator[None]:
    """All peers started, one after another; ended with the block, also when this process is asked to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    try:
        for peer in peers:
            peer.start(settings)
            state = peer.failed or f"{peer.ready['version']}, ready in {peer.start_s:.1f} s"
            print(f"{peer.name}: {state}", file=sys.stderr)
        yield
    finally:
        for peer in peers:
            peer.stop()
        signal.signal(signal.SIGTERM, before)


def first_token(peer: Peer, settings: dict[str, Any], prompt: list[int]) -> float | None:
    """Seconds from starting the peer's process to its first token; the process is ended."""
    begin = time.perf_counter()
    try:
        peer.start(settings, wait=False)
        if peer.failed or peer.ask(Workload(1, len(prompt), 1), [prompt]) is None:
            return None
        return time.perf_counter() - begin
    finally:
        peer.stop()
