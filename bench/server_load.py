"""Many streams at once on the server: what it holds, what a streamed token costs it, and whether its memory stays flat.

    python bench/server_load.py [--streams 500] [--model demo] [--vllm VENV/bin/vllm] [--json FILE]

Each round opens all the streams at once and reads them to the end. CPU time is read from the operating system, apart
for the process that holds the port (HTTP, tokens to text, events) and for those below it (the engine). With --vllm the
same load goes to vLLM's server in alternating rounds; whoever waits is stopped with SIGSTOP. The load generator shares
the machine: compare the columns, not these throughputs with those of `quire bench serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
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
from quire.bench.records import results
from quire.bench.serve import model_name, send_all, warm_up
from quire.bench.workload import Lengths, random_requests

VOCAB = 1000


class Contender:
    """A server of its own session, alive over all rounds and stopped while another is measured."""

    def __init__(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name, self.rounds = name, []  # type: ignore[var-annotated]
        self.port = free_port()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **env}, start_new_session=True,
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
        cpu = [sum(process.cpu_times()[:2]) for process in (front, *others)]
        return {"front_s": cpu[0], "rest_s": sum(cpu[1:]), "front_bytes": front.memory_info().rss}


async def measure(contender: Contender, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One round: all streams opened at once."""
    rng = np.random.default_rng([args.seed, seed])
    inputs, outputs = Lengths(args.input_len, args.input_len), Lengths(args.output_len, args.output_len)
    requests = random_requests(args.streams, inputs, outputs, VOCAB, rng)
    client = HttpClient(contender.url, {})
    try:
        target = Target(client, await model_name(client), continuous_usage=True, timeout=args.timeout)
        await warm_up(target, requests[:2])
        before = contender.usage()
        records, duration = await send_all(target, requests, [0.0] * len(requests))
        after = contender.usage()
    finally:
        client.close()
    figures = results(records, duration, (50.0, 99.0))
    tokens = max(figures["output_tokens"], 1)
    return {
        "completed": figures["completed"],
        "failed": figures["failed"],
        "tokens_s": tokens / duration,
        "ttft_ms": figures["ttft_ms"],
        "itl_ms": figures["itl_ms"],
        "front_us_per_token": (after["front_s"] - before["front_s"]) / tokens * 1e6,
        "rest_us_per_token": (after["rest_s"] - before["rest_s"]) / tokens * 1e6,
        "front_mib": after["front_bytes"] / 2**20,
    }


async def loop_delay(url: str, share: float) -> float | None:
    """Upper edge (ms) of the bucket in which this share of the delays lies; None where the server does not tell."""
    client = HttpClient(url, {})
    try:
        text = (await client.request("GET", "/metrics")).body.decode()
    finally:
        client.close()
    rows = re.findall(r'quire:event_loop_delay_seconds_bucket\{le="([^"]+)"[^}]*\} (\S+)', text)
    counts = [(float(edge), float(count)) for edge, count in rows]
    if not counts:
        return None
    return next(edge for edge, count in counts if count >= share * counts[-1][1]) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what Quire serves (demo); with --vllm a checkpoint's folder")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default="--max-num-seqs 512", help="of quire serve (%(default)s)")
    parser.add_argument("--vllm", help="the vllm command of an environment that has it")
    parser.add_argument("--vllm-flags", default="--max-num-seqs 512 --max-model-len 2048")
    parser.add_argument("--vllm-env", default="", help="for example 'LD_PRELOAD=... VLLM_CPU_OMP_THREADS_BIND=0-1'")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    quire = [sys.executable, "-m", "quire.cli.main", "serve", args.model, "--disable-access-log"]
    contenders = [Contender("quire", [*quire, *shlex.split(args.flags)], {})]
    if args.vllm:
        env = dict(pair.split("=", 1) for pair in shlex.split(args.vllm_env))
        flags = ["--disable-log-requests", "--no-enable-prefix-caching", *shlex.split(args.vllm_flags)]
        contenders.append(Contender("vllm", [args.vllm, "serve", args.model, *flags], env))
    try:
        for contender in contenders:
            contender.wait()
            contender.signal(signal.SIGSTOP)
        for i in range(args.rounds + 1):  # the first does not count
            for contender in contenders:
                contender.signal(signal.SIGCONT)
                figures = asyncio.run(measure(contender, args, i))
                if i == args.rounds:
                    figures["event_loop_delay_p99_ms"] = asyncio.run(loop_delay(contender.url, 0.99))
                contender.signal(signal.SIGSTOP)
                if i:
                    contender.rounds.append(figures)
    finally:
        for contender in contenders:
            for process in contender.family():
                process.kill()
    return report(contenders, args)


def report(contenders: list[Contender], args: argparse.Namespace) -> int:
    """The table, and the JSON file."""
    print(f"\n{args.streams} streams at once, {args.input_len} -> {args.output_len}, {args.rounds} rounds, medians\n")
    columns = "tokens/s|TTFT p50|TTFT p99|ITL p50|ITL p99|server, us a token|engine, us a token|server's memory, first -> last"
    print(f"| | {columns.replace('|', ' | ')} | loop delay p99 |\n" + "|---" * 10 + "|")
    for contender in contenders:
        rounds = contender.rounds

        def median(*path: str, rounds: list[dict[str, Any]] = rounds) -> float:
            values: list[Any] = rounds
            for key in path:
                values = [value[key] for value in values]
            return statistics.median(values)

        delay = rounds[-1]["event_loop_delay_p99_ms"]
        cells = [
            f"{median('tokens_s'):,.0f}",
            *(f"{median(kind, rank):,.1f} ms" for kind in ("ttft_ms", "itl_ms") for rank in ("p50", "p99")),
            f"{median('front_us_per_token'):.1f}",
            f"{median('rest_us_per_token'):.1f}",
            f"{rounds[0]['front_mib']:.0f} -> {rounds[-1]['front_mib']:.0f} MiB",
            "not told" if delay is None else f"<= {delay:g} ms",
        ]
        print(f"| {contender.name} | {' | '.join(cells)} |")
    failed = sum(figures["failed"] for contender in contenders for figures in contender.rounds)
    print(f"\nfailed requests: {failed}")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "vllm", "vllm_env")}
        rows = {contender.name: contender.rounds for contender in contenders}
        content = {"kind": "server load", "environment": describe(), "settings": settings, "rounds": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
