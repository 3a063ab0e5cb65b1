"""Thousands of clients that leave: what the server still holds of them afterwards.

    python bench/aborts.py [--aborts 10000] [--at-once 32] [--url URL --pid PID] [--json FILE] [-- FLAGS OF quire serve]

Starts `quire serve demo` unless --url names a server (--pid is its HTTP process, for the memory). Each client sends a
request for 2000 tokens and leaves at a random moment: in the middle of the upload, before the answer, in the middle of a
stream, by closing or by a reset. A tenth of them run first, so that memory has settled when it is read. Ends with status 1
when requests or pages are left over, or the server no longer answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from quire.bench.environment import describe
from quire.bench.launch import free_port, stop
from quire.cli.http import ServerAddress, ServerError

RESET = struct.pack("ii", 1, 0)


def request(chance: random.Random) -> bytes:
    """A completion or a chat of 2000 tokens, as it goes over the wire."""
    fields: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True, "stream": chance.random() < 0.7}
    fields["n"] = chance.choice([1, 1, 1, 2, 4])
    words = " ".join(chance.choice(["red", "green", "blue"]) for _ in range(chance.choice([2, 40, 200])))
    if chance.random() < 0.5:
        path, fields["prompt"] = "/v1/completions", words
    else:
        path, fields["messages"] = "/v1/chat/completions", [{"role": "user", "content": words}]
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def abort(host: str, port: int, seed: int) -> None:
    """One client."""
    chance = random.Random(seed)
    sent = request(chance)
    if chance.random() < 0.1:
        sent = sent[: chance.randrange(1, len(sent))]
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(sent)
        await writer.drain()
        try:
            async with asyncio.timeout(chance.expovariate(1 / 0.1)):
                while await reader.read(65536):
                    pass
        except TimeoutError:
            pass
        if chance.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    finally:
        writer.close()


async def storm(host: str, port: int, seeds: range, at_once: int) -> int:
    """Abort once for each seed; returns how many connections failed outright."""
    failed, left = 0, iter(seeds)

    async def leave() -> None:
        nonlocal failed
        for seed in left:
            try:
                await abort(host, port, seed)
            except OSError:
                failed += 1

    await asyncio.gather(*(leave() for _ in range(at_once)))
    return failed


def settled(server: ServerAddress, seconds: float = 30.0) -> dict[str, Any]:
    """What /engine says once nothing is in flight and no page is owned (those of a step under way are, although its
    requests have ended), or when time is up."""
    deadline = time.monotonic() + seconds
    while True:
        view: dict[str, Any] = server.json("/engine")
        if not (view["running"] or view["waiting"] or view["in_flight"] or owned(view)) or time.monotonic() > deadline:
            return view
        time.sleep(0.3)


def owned(view: dict[str, Any]) -> int:
    """Pages that are neither free nor only cached."""
    return sum(group["owned"] + group["shared"] for group in view["page_map"])


def memory(pid: int | None) -> dict[str, float]:
    """MiB of the HTTP process and of its children, and the files that it has open."""
    if pid is None:
        return {}
    process = psutil.Process(pid)
    sizes = {"http": process.memory_info().rss, "engine": sum(c.memory_info().rss for c in process.children())}
    return {**{name: round(size / 2**20, 1) for name, size in sizes.items()}, "files": process.num_fds()}


def measure(url: str, pid: int | None, aborts: int, at_once: int) -> dict[str, Any]:
    parts, server = urlsplit(url), ServerAddress(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    warm = max(aborts // 10, 1)
    failed = asyncio.run(storm(host, port, range(warm), at_once))
    settled(server)
    before = memory(pid)
    began = time.perf_counter()
    failed += asyncio.run(storm(host, port, range(warm, aborts), at_once))
    seconds = time.perf_counter() - began
    view = settled(server)
    return {
        "aborts": aborts,
        "seconds": round(seconds, 1),
        "failed_connections": failed,
        "memory_before": before,
        "memory_after": memory(pid),
        "in_flight": view["in_flight"],
        "running": view["running"],
        "waiting": view["waiting"],
        "pages_owned": owned(view),
        "pages": [
            {name: group[name] for name in ("pages", "free", "cached", "owned", "shared")} for group in view["page_map"]
        ],
        "healthy": server.json("/health")["status"] == "ok",
    }


def clean(result: dict[str, Any]) -> bool:
    left = ("in_flight", "running", "waiting", "pages_owned")
    return result["healthy"] and not any(result[name] for name in left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aborts", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="its HTTP process")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("flags", nargs="*", help="for quire serve, after --")
    args = parser.parse_args()
    process = None
    with tempfile.TemporaryFile() as log:
        try:
            url, pid = args.url, args.pid
            if url is None:
                port = free_port()
                command = [sys.executable, "-m", "quire.cli.main", "serve", "demo", "--port", str(port)]
                environment = {name: value for name, value in os.environ.items() if name != "QUIRE_API_KEY"}
                process = subprocess.Popen(
                    [*command, "--disable-access-log", *args.flags], stdout=log, stderr=log, env=environment
                )
                url, pid = f"http://127.0.0.1:{port}", process.pid
                come_up(ServerAddress(url), process)
            result = {**measure(url, pid, args.aborts, args.at_once), "environment": describe()}
        finally:
            if process is not None:
                stop(process)
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if clean(result) else 1


def come_up(server: ServerAddress, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            server.json("/health")
            return
        except ServerError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("quire serve did not come up") from None
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
