"""Many streams at once on the server: what it holds, what a streamed token costs it, and whether its memory stays flat.

    python bench/server_load.py [--streams 500] [--model demo] [--json FILE]
    python bench/server_load.py --model CHECKPOINT --streams 1 32 256 500 --vllm VENV/bin/vllm --json FILE

A round keeps so many streams open and reads all of them to their ends. CPU time is read from the operating system
(/proc/PID/task/*/schedstat), apart for the process that holds the port (HTTP, tokens to text, events) and for those below
it (the engine). How late timers of the server's event loop come is told by a probe inside it (loop_probe/), so its
quantiles are exact. With --vllm the same load goes to vLLM's server in alternating rounds, from the same client; whoever
waits is stopped with SIGSTOP. The load generator shares the machine: compare the columns, not these throughputs with
those of `quire bench serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from quire.bench.environment import describe
from quire.bench.http import HttpClient
from quire.bench.launch import free_port, healthy
from quire.bench.openai import Target
from quire.bench.records import results, summarize
from quire.bench.serve import model_name, send_all, version, warm_up
from quire.bench.workload import Lengths, random_requests

VOCAB = 1000
LEAST_REQUESTS = 16  # of a round: a single stream is asked that often
PROBE = Path(__file__).resolve().parent / "loop_probe"
PERCENTILES = (50.0, 99.0)


class Contender:
    """A server of its own session, alive over all rounds and stopped while another is measured."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], folder: str) -> None:
        self.name, self.version = name, ""
        self.rounds: dict[int, list[dict[str, Any]]] = {}  # by streams
        self.port = free_port()
        self.delays = Path(folder) / f"{name}.delays"
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        env = {**os.environ, **env, "LOOP_PROBE": str(self.delays)}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROBE), env.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, env=env, start_new_session=True,
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, limit: float = 600.0) -> None:
        begin = time.monotonic()
        while not healthy(self.url):
            if self.process.poll() is not None or time.monotonic() - begin > limit:
                self.log.seek(0)
                raise SystemExit(f"{self.name} did not come up:\n{self.log.read().decode(errors='replace')[-3000:]}")
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        for process in self.family():
            process.send_signal(number)

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def usage(self) -> dict[str, float]:
        """CPU seconds of the front and of the rest; resident bytes of the front."""
        front, *others = self.family()
        cpu = [cpu_seconds(process.pid) for process in (front, *others)]
        return {"front_s": cpu[0], "rest_s": sum(cpu[1:]), "front_bytes": front.memory_info().rss}

    def loop_delay_ms(self, since: float, until: float) -> dict[str, float] | None:
        """Of the timers of the event loop that were due between two moments of time.monotonic()."""
        lines = self.delays.read_text().rpartition("\n")[0].splitlines()
        found = [float(late) for due, late in map(str.split, lines) if since <= float(due) <= until]
        return summarize(found, PERCENTILES, 1e3)


def cpu_seconds(pid: int) -> float:
    """What all living threads of a process have run; to the nanosecond, where /proc/PID/stat counts in 10 ms."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


async def measure(contender: Contender, streams: int, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One round: ``streams`` opened at once, and as soon as one ends the next."""
    rng = np.random.default_rng([args.seed, streams, seed])
    inputs, outputs = Lengths(args.input_len, args.input_len), Lengths(args.output_len, args.output_len)
    requests = random_requests(max(streams, LEAST_REQUESTS), inputs, outputs, VOCAB, rng)
    others = random_requests(2, inputs, outputs, VOCAB, rng)
    client = HttpClient(contender.url, {})
    try:
        target = Target(client, await model_name(client), continuous_usage=True, timeout=args.timeout)
        told = await version(client)
        contender.version = told.get("version", "") if isinstance(told, dict) else ""
        await warm_up(target, others)
        begin, before = time.monotonic(), contender.usage()
        records, duration = await send_all(target, requests, [0.0] * len(requests), streams)
        after, end = contender.usage(), time.monotonic()
    finally:
        client.close()
    figures = results(records, duration, PERCENTILES)
    tokens = max(figures["output_tokens"], 1)
    return {
        "completed": figures["completed"],
        "failed": figures["failed"],
        "held_at_once": figures["peak_concurrency"],
        "tokens": tokens,
        "events": figures["output_arrivals"],
        "tokens_s": tokens / duration,
        "ttft_ms": figures["ttft_ms"],
        "itl_ms": figures["itl_ms"],
        "front_us_per_token": (after["front_s"] - before["front_s"]) / tokens * 1e6,
        "rest_us_per_token": (after["rest_s"] - before["rest_s"]) / tokens * 1e6,
        "front_mib": after["front_bytes"] / 2**20,
        "loop_delay_ms": contender.loop_delay_ms(begin, end),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what Quire serves (demo); with --vllm a checkpoint's folder")
    parser.add_argument("--streams", type=int, nargs="+", default=[500], help="open at once; one row each (500)")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--flags", default="--max-num-seqs 512 --max-model-len 2048", help="of both servers (%(default)s)"
    )
    parser.add_argument("--quire-flags", default="", help="of quire serve alone")
    parser.add_argument("--vllm", help="the vllm command of an environment that has it")
    parser.add_argument("--vllm-env", default="", help="for example 'LD_PRELOAD=... VLLM_CPU_OMP_THREADS_BIND=0-1'")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    flags = shlex.split(args.flags)
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            quire = [sys.executable, "-m", "quire.cli.main", "serve", args.model, "--disable-access-log"]
            contenders.append(Contender("quire", [*quire, *flags, *shlex.split(args.quire_flags)], {}, folder))
            contenders[0].wait()
            if args.vllm:
                contenders[0].signal(signal.SIGSTOP)
                env = dict(pair.split("=", 1) for pair in shlex.split(args.vllm_env))
                vllm = [args.vllm, "serve", args.model, "--disable-uvicorn-access-log"]
                contenders.append(Contender("vllm", [*vllm, *flags], env, folder))
                contenders[1].wait()
                contenders[1].signal(signal.SIGSTOP)
            play(contenders, args)
        finally:
            for contender in contenders:
                for process in contender.family() if contender.process.poll() is None else ():
                    process.kill()
    return report(contenders, args)


def play(contenders: list[Contender], args: argparse.Namespace) -> None:
    """All rounds, after one that does not count; who goes first alternates."""
    for i in range(args.rounds + 1):
        for streams in args.streams:
            for contender in contenders if i % 2 else contenders[::-1]:
                contender.signal(signal.SIGCONT)
                figures = asyncio.run(measure(contender, streams, args, i))
                if len(contenders) > 1:
                    contender.signal(signal.SIGSTOP)
                if i:
                    contender.rounds.setdefault(streams, []).append(figures)


COLUMNS = (
    "streams|server|tokens/s|TTFT p50|TTFT p99|ITL p50|ITL p99|server's CPU a token|engine's CPU a token|tokens an event"
    "|loop delay p50|p99|most|server's memory, first -> last"
)


def report(contenders: list[Contender], args: argparse.Namespace) -> int:
    """The table, and the JSON file."""
    print(f"\n{args.input_len} -> {args.output_len} tokens, {args.rounds} rounds, medians\n")
    print(f"| {COLUMNS.replace('|', ' | ')} |\n" + "|---" * (COLUMNS.count("|") + 1) + "|")
    for streams in args.streams:
        for contender in contenders:
            print(
                f"| {streams} | {contender.name} {contender.version} | {' | '.join(cells(contender.rounds[streams]))} |"
            )
    every = [figures for contender in contenders for rounds in contender.rounds.values() for figures in rounds]
    failed = sum(figures["failed"] for figures in every)
    print(
        f"\nfailed requests: {failed}; most streams open at once: {max(figures['held_at_once'] for figures in every)}"
    )
    if args.json:
        kept = ("streams", "input_len", "output_len", "rounds", "seed", "flags", "quire_flags")
        settings = {"model": Path(args.model).name, **{key: getattr(args, key) for key in kept}}
        rows = [
            {"server": one.name, "version": one.version, "streams": streams, "rounds": rounds}
            for streams in args.streams
            for one in contenders
            for rounds in [one.rounds[streams]]
        ]
        environment = describe()
        environment["command"] = ["bench/server_load.py"]  # its arguments are paths of this machine, and the settings
        content = {"kind": "server load", "environment": environment, "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


def cells(rounds: list[dict[str, Any]]) -> list[str]:
    def median(*path: str) -> float:
        values: list[Any] = rounds
        for key in path:
            values = [value[key] for value in values]
        return statistics.median(values)

    return [
        f"{median('tokens_s'):,.0f}",
        *(f"{median(kind, rank):,.1f} ms" for kind in ("ttft_ms", "itl_ms") for rank in ("p50", "p99")),
        f"{median('front_us_per_token'):.0f} us",
        f"{median('rest_us_per_token'):.0f} us",
        f"{median('tokens') / median('events'):.2f}",
        *(f"{median('loop_delay_ms', rank):,.1f} ms" for rank in ("p50", "p99")),
        f"{max(figures['loop_delay_ms']['max'] for figures in rounds):,.0f} ms",
        f"{rounds[0]['front_mib']:.0f} -> {rounds[-1]['front_mib']:.0f} MiB",
    ]


if __name__ == "__main__":
    sys.exit(main())
