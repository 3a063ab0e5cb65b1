"""Quire and its peers on the same workloads, side by side, with the machine's limits in the same table.

    python bench/peers.py --model CHECKPOINT --peer quire=.venv/bin/python --peer openvino=ov/bin/python:OV_MODEL

Each peer lives in its own interpreter, loads once, and waits while the others are measured: rounds alternate between
them, so that a change of the machine's mood meets all. A waiting peer is stopped (SIGSTOP): its threads cannot spin.
NAME is a driver of bench/peers/ (quire, openvino, llamacpp, vllm, transformers), perhaps with a suffix to tell two
apart (openvino-int8). Medians over the rounds are what the table shows; the JSON file has every time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from limits import measure, usable_cores
from model_cost import ModelCost, Workload, read_cost

HERE = Path(__file__).resolve().parent
WORKLOADS = (Workload(1, 32, 64), Workload(8, 32, 64), Workload(32, 128, 64), Workload(1, 1024, 1))
RATE = {"bfloat16": "bf16_gflop_s", "float32": "float32_gflop_s"}
WEIGHT_BYTES = {None: None, "int8": 1.0, "int4": 0.5625}  # int4: a 16-bit scale for each 32 weights, as in Q4_0
FIRST_ID, LAST_ID = 10, 30_000  # of random prompts


@dataclass
class Peer:
    """One engine. ``failed`` is why it is no longer asked."""

    name: str
    python: str
    model: str
    driver: str = ""
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    log: BinaryIO | None = None
    ready: dict[str, Any] = field(default_factory=dict)
    start_s: float = 0.0
    failed: str | None = None
    seconds: dict[Workload, list[float]] = field(default_factory=dict)

    def script(self) -> Path:
        driver = self.driver or self.name.partition("-")[0]
        path = Path(driver) if driver.endswith(".py") else HERE / "peers" / f"drive_{driver}.py"
        if not path.is_file():
            known = ", ".join(sorted(each.stem.removeprefix("drive_") for each in (HERE / "peers").glob("drive_*.py")))
            raise SystemExit(f"peer {self.name}: no driver {driver!r}; there are {known}")
        return path

    def start(self, settings: dict[str, Any]) -> None:
        """Start the driver and wait until its engine is there; it is stopped from then on, except in ask()."""
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
        self.ready = self._exchange({**settings, "model": self.model})
        self.start_s = time.perf_counter() - begin
        self._signal(signal.SIGSTOP)

    def ask(self, work: Workload, prompts: list[list[int]]) -> float | None:
        """Seconds of one workload; None once the peer has failed."""
        if self.failed:
            return None
        self._signal(signal.SIGCONT)
        answer = self._exchange({"prompts": prompts, "output_len": work.output})
        self._signal(signal.SIGSTOP)
        if self.failed is None and answer["tokens"] != work.requests * work.output:
            self.failed = f"it produced {answer['tokens']} tokens on {work}"
        return None if self.failed else float(answer["seconds"])

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


@contextmanager
def running(peers: Sequence[Peer], settings: dict[str, Any]) -> Iterator[None]:
    """All peers started, one after another; ended with the block."""
    try:
        for peer in peers:
            peer.start(settings)
            state = peer.failed or f"{peer.ready['version']}, ready in {peer.start_s:.1f} s"
            print(f"{peer.name}: {state}", file=sys.stderr)
        yield
    finally:
        for peer in peers:
            peer.stop()


def play(
    peers: Sequence[Peer], workloads: Sequence[Workload], rounds: int, vocab_size: int, threads: int, seed: int = 0
) -> list[dict[str, float]]:
    """Measure every peer on every workload ``rounds`` times, after one round that does not count; the machine's limits
    of each round. The order of the peers turns by one each round."""
    rng = random.Random(seed)
    limits = []
    for i in range(rounds + 1):
        if i:
            limits.append(measure(threads, 0.5))
        for work in workloads:
            prompts = [
                [rng.randint(FIRST_ID, min(LAST_ID, vocab_size - 1)) for _ in range(work.prompt)]
                for _ in range(work.requests)
            ]
            for peer in [*peers[i % len(peers) :], *peers[: i % len(peers)]]:
                before = peer.failed
                seconds = peer.ask(work, prompts)
                if seconds is not None and i:
                    peer.seconds.setdefault(work, []).append(seconds)
                if peer.failed and not before:
                    print(f"{peer.name}: {peer.failed}", file=sys.stderr)
    return limits


def bounds(
    cost: ModelCost, work: Workload, limits: dict[str, float], dtype: str, weights: str | None = None
) -> dict[str, float]:
    """Tokens/s that reading memory, arithmetic, and the two together allow in ``dtype``, with ``weights`` stored as told."""
    read, multiply = limits["read_gb_s"] * 1e9, limits[RATE[dtype]] * 1e9
    size, stored = 4.0 if dtype == "float32" else 2.0, WEIGHT_BYTES[weights]
    return {
        "memory": work.counted_tokens / cost.seconds(work, read, math.inf, size, stored),
        "arithmetic": work.counted_tokens / cost.seconds(work, math.inf, multiply, size, stored),
        "both": work.counted_tokens / cost.seconds(work, read, multiply, size, stored),
    }


def median_limits(limits: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in limits if name in each) for name in limits[0]}


def print_table(
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    cost: ModelCost,
    limits: dict[str, float],
    dtype: str,
    weights: str | None = None,
) -> list[dict[str, Any]]:
    """The table, as Markdown; its rows."""
    rows: list[dict[str, Any]] = []
    for peer in peers:
        version = peer.ready.get("version")
        medians = {work: statistics.median(seconds) for work, seconds in peer.seconds.items()}
        speeds = {str(work): work.counted_tokens / seconds for work, seconds in medians.items()}
        rows.append({"name": peer.name, "version": version, "start_s": peer.start_s, "speeds": speeds})
    allowed = {work: bounds(cost, work, limits, dtype, weights) for work in workloads}
    kind = weights or dtype
    print(f"\n| tokens/s, median | {' | '.join(map(str, workloads))} | start |")
    print("|---" * (len(workloads) + 2) + "|")
    for peer, row in zip(peers, rows, strict=True):
        cells = []
        for work in workloads:
            speed = row["speeds"].get(str(work))
            cells.append(f"{speed:,.0f} ({speed / allowed[work]['both']:.0%})" if speed else "failed")
        print(f"| {peer.name} {row['version'] or ''} | {' | '.join(cells)} | {row['start_s']:.1f} s |")
    for name, text in (
        ("memory", f"reading memory allows, {kind} ({limits['read_gb_s']:.1f} GB/s)"),
        ("arithmetic", f"arithmetic allows, {dtype} ({limits[RATE[dtype]]:,.0f} GFLOP/s)"),
        ("both", "both together allow"),
    ):
        print(f"| {text} | {' | '.join(f'{allowed[work][name]:,.0f}' for work in workloads)} | |")
    for name in ("memory", "arithmetic", "both"):
        rows.append({"name": f"limit: {name}", "speeds": {str(work): allowed[work][name] for work in workloads}})
    return rows


def parse_peer(text: str, default_model: str) -> Peer:
    """``NAME=PYTHON`` or ``NAME=PYTHON:MODEL``."""
    name, equals, rest = text.partition("=")
    python, _, model = rest.partition(":")
    if not equals or not name or not python:
        raise SystemExit(f"--peer {text}: expected NAME=PYTHON or NAME=PYTHON:MODEL")
    return Peer(name, os.path.expanduser(python), os.path.expanduser(model) if model else default_model)


def read_config(path: Path, default_model: str) -> list[Peer]:
    """[[peer]] tables with name, python, and optionally model, driver and env (a table of variables)."""
    peers = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("peer", []):
        unknown = set(entry) - {"name", "python", "model", "driver", "env"}
        if unknown or not {"name", "python"} <= set(entry):
            raise SystemExit(f"{path}: a peer has name and python, perhaps model, driver and env; got {sorted(entry)}")
        entry = {"model": default_model, **entry}
        peers.append(Peer(**{**entry, "python": os.path.expanduser(entry["python"])}))
    return peers


def parse_workload(text: str) -> Workload:
    try:
        requests, prompt, output = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not REQUESTS,PROMPT,OUTPUT") from None
    if min(requests, prompt, output) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each number must be at least 1")
    return Workload(requests, prompt, output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint in the Hugging Face layout")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON[:MODEL]", help="repeatable")
    parser.add_argument("--config", type=Path, help="TOML with [[peer]] tables: name, python, model, driver, env")
    parser.add_argument("--workload", type=parse_workload, action="append", metavar="REQUESTS,PROMPT,OUTPUT")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more comes before them (default: 5)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: the cores this process may use")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(RATE))
    parser.add_argument(
        "--weights", choices=["int8", "int4"], help="Quire quantizes while loading; a peer brings a model that is"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/peers-DATE.json)")
    args = parser.parse_args(argv)
    peers = read_config(args.config, str(args.model)) if args.config else []
    peers += [parse_peer(text, str(args.model)) for text in args.peer]
    if not peers:
        peers = [Peer("quire", sys.executable, str(args.model))]
    for peer in peers:
        peer.script()
    workloads = args.workload or list(WORKLOADS)
    cost = read_cost(args.model)
    settings = {
        "threads": args.threads,
        "dtype": args.dtype,
        "quantization": args.weights,
        "max_model_len": max(2048, *(w.prompt + w.output for w in workloads)),
        "max_num_seqs": max(w.requests for w in workloads),
    }
    now = datetime.datetime.now(datetime.UTC)
    with running(peers, settings):
        rounds = play(peers, workloads, args.rounds, cost.vocab_size, args.threads)
    limits = median_limits(rounds)
    rows = print_table(peers, workloads, cost, limits, args.dtype, args.weights)
    out = args.out or HERE / "results" / f"peers-{now:%Y%m%d-%H%M%S}.json"
    write(out, args, settings, peers, rows, rounds)
    print(f"\n{out}")
    return 1 if any(peer.failed for peer in peers) else 0


def write(
    out: Path, args: argparse.Namespace, settings: dict[str, Any], peers: Sequence[Peer], rows: list[dict[str, Any]],
    limits: Sequence[dict[str, float]],
) -> None:  # fmt: skip
    from quire.bench.environment import describe

    content = {
        "kind": "peers",
        "environment": describe(),
        "settings": {**settings, "model": args.model.name, "rounds": args.rounds},
        "rows": rows,
        "seconds": {peer.name: {str(work): times for work, times in peer.seconds.items()} for peer in peers},
        "failed": {peer.name: peer.failed for peer in peers if peer.failed},
        "limits": limits,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
