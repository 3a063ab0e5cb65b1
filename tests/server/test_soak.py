"""A thousand requests with random aborts through HTTP: pages balance, memory does not grow, no unexpected error."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import eventually
from demo_server import DemoServer

REQUESTS, AT_ONCE = 1000, 48
BENCH = Path(__file__).resolve().parents[2] / "bench"


def body(random: random.Random) -> tuple[str, dict, int]:
    """(route, request, status it must have): most are fine, some are refused."""
    fields = {
        "max_tokens": random.choice([1, 4, 16, 32]),
        "temperature": random.choice([0, 1]),
        "stream": random.random() < 0.6,
        "n": random.choice([1, 1, 1, 2, 3]),
        "ignore_eos": random.random() < 0.5,
    }
    kind = random.random()
    if kind < 0.1:
        bad = random.choice([{"temperature": -1}, {"n": 0}, {"max_tokens": 10**6}, {"nonsense": 1}, {"prompt": []}])
        return "/v1/completions", {"prompt": "x", **fields, **bad}, 400
    words = " ".join(random.choice(["red", "green", "blue", "one", "two"]) for _ in range(random.choice([2, 20, 100])))
    if kind < 0.5:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": words}], **fields}, 200
    prompts = [words, words + " and on"] if kind < 0.6 else words
    options = random.choice([{}, {"logprobs": 3}, {"echo": True}, {"stop": ["e"]}, {"bad_words": ["red"]}])
    return "/v1/completions", {"prompt": prompts, **fields, **options}, 200


async def one(http: httpx.AsyncClient, seed: int, gate: asyncio.Semaphore, seen: Counter) -> None:
    chance = random.Random(seed)
    route, request, expected = body(chance)
    leaves = chance.random() < 0.35
    async with gate:
        try:
            async with asyncio.timeout(chance.random() * 0.4 if leaves else 60):
                async with http.stream("POST", route, json=request) as response:
                    text = (await response.aread()).decode()
        except TimeoutError:
            assert leaves, "a request hung"
            seen["left"] += 1
            return
    assert response.status_code == expected, text
    if expected == 200:
        assert '"error"' not in text
        assert not request["stream"] or text.endswith("data: [DONE]\n\n")
    seen[expected] += 1


async def storm(base: str, seeds: range) -> Counter:
    seen: Counter = Counter()
    gate = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=base, timeout=None, limits=httpx.Limits(max_connections=AT_ONCE)) as http:
        await asyncio.gather(*(one(http, seed, gate, seen) for seed in seeds))
    return seen


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_thousand_requests_with_random_aborts():
    server = DemoServer("--disable-access-log", "--kv-cache-memory-bytes", "24M", "--max-num-seqs", "32")
    try:
        engine = server.engine
        processes = [psutil.Process(server.process.pid), engine]
        seen = asyncio.run(storm(server.base, range(REQUESTS // 2)))
        settled = [p.memory_info().rss for p in processes]
        seen += asyncio.run(storm(server.base, range(REQUESTS // 2, REQUESTS)))
        grown = [p.memory_info().rss - before for p, before in zip(processes, settled, strict=True)]
        assert sum(seen.values()) == REQUESTS
        assert seen["left"] > 100
        assert seen[200] > 300
        assert seen[400] > 30
        assert eventually(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == 0, 5)
        assert server.metric("kv_cache_usage_perc") == 0  # the engine also checks its books whenever it is idle
        assert server.engine.pid == engine.pid, "the engine was replaced: " + server.log
        assert max(grown) < 24 * 2**20, f"memory grew by {grown} bytes"
        assert httpx.get(f"{server.base}/health").status_code == 200
        assert "ERROR" not in server.log
    finally:
        status = server.close()
    assert status == 0, server.log


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_script_that_aborts(tmp_path):
    """bench/aborts.py, with 200 aborts instead of 10,000; and it notices what is left."""
    sys.path.insert(0, str(BENCH))
    import aborts

    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCH / "aborts.py"), "--aborts", "200", "--at-once", "16", "--json", str(report)]
    done = subprocess.run([*command, "--", "--threads", "1"], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert result["failed_connections"] == 0
    assert aborts.clean(result)
    assert sum(group["free"] + group["cached"] for group in result["pages"]) == sum(g["pages"] for g in result["pages"])
    assert not aborts.clean({**result, "pages_owned": 1})
