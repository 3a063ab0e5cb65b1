"""The engine is killed again and again under load, and nobody notices.

    python bench/kills.py [--kills 100] [--streams 32] [--json FILE] [--model demo]

Streams of all kinds (greedy and seeded sampling, stop strings, several samples, a JSON schema) run without pause, while
the engine process gets a SIGKILL at random moments, some while it is still loading. Every answer must be, token for
token, that of an engine left alone. Also said: how long it took from a death to the next engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire import AsyncLLM, SamplingParams
from quire.bench.environment import describe
from quire.config import make_config
from quire.engine.outputs import merge
from quire.outputs import RequestOutput
from quire.sampling.params import StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPTS = ("The capital of France is", "Once upon a time", "Ten words that rhyme with light:", "A recipe for soup.")


def request(i: int, tokens: int) -> tuple[str, SamplingParams]:
    """The i-th stream's prompt and parameters, always the same ones."""
    options: dict[str, Any] = {"max_tokens": tokens + i % 7, "seed": i, "temperature": float(i % 2), "ignore_eos": True}
    kind = i % 8
    if kind == 2:
        options |= {"stop": ["e "], "min_tokens": 20}
    elif kind == 3:
        options |= {"n": 3}
    elif kind == 5:
        options |= {"structured_outputs": StructuredOutputs(json=SCHEMA), "ignore_eos": False, "max_tokens": 120}
    elif kind == 7:
        options |= {"top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 2}
    return f"{PROMPTS[i % len(PROMPTS)]} ({i})", SamplingParams(**options)


@dataclass
class Tally:
    answers: int = 0
    failed: int = 0
    different: int = 0
    kills: int = 0
    ready: list[float] = field(default_factory=list)  # seconds from a death to the next engine
    last: float = 0.0  # time of the latest token


def seen(output: RequestOutput) -> list[Any]:
    return [(o.token_ids, o.text, o.finish_reason) for o in output.outputs]


async def answer(llm: AsyncLLM, i: int, tokens: int, tally: Tally | None = None) -> list[Any]:
    prompt, sampling = request(i, tokens)
    total: RequestOutput | None = None
    async for delta in llm.generate(prompt, sampling):
        total = merge(total, delta)
        if tally is not None:
            tally.last = time.monotonic()
    assert total is not None
    return seen(total)


async def stream(llm: AsyncLLM, i: int, tokens: int, expected: list[Any], tally: Tally, end: asyncio.Event) -> None:
    while not end.is_set():
        try:
            got = await answer(llm, i, tokens, tally)
        except Exception as error:
            print(f"stream {i}: {error!r}", file=sys.stderr)
            got = []
        tally.answers += 1
        tally.failed += not got or any(reason == "error" for _, _, reason in got)
        tally.different += got != expected


async def kill(llm: AsyncLLM, chance: random.Random, tally: Tally, loading: bool) -> None:
    """One SIGKILL: after a few tokens, or while the engine loads."""
    engine = llm.engine
    assert engine is not None
    if not loading:
        mark = tally.last
        while not engine._up.is_set() or tally.last == mark:
            await asyncio.sleep(0.002)
        await asyncio.sleep(chance.random() * 0.5)
    process, restarts = engine._process, engine.restarts
    assert process is not None
    if process.poll() is not None:
        return
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    tally.kills += 1
    while engine.restarts == restarts and engine.failure is None:
        await asyncio.sleep(0.002)
    if loading or engine.failure is not None:
        return
    if chance.random() < 0.1:
        await asyncio.sleep(chance.random() * 0.2)
        await kill(llm, chance, tally, loading=True)
        return
    await engine.started()
    tally.ready.append(time.monotonic() - began)


async def measure(model: str, kills: int, streams: int, tokens: int, seed: int = 0) -> Tally:
    """Two engines one after the other: one left alone, one killed."""
    tally, chance = Tally(), random.Random(seed)
    for disturbed in (False, True):
        llm = AsyncLLM(make_config(model, device="cpu", kv_cache_memory_bytes=256 << 20))
        await llm.start()
        try:
            if not disturbed:
                expected = await asyncio.gather(*(answer(llm, i, tokens) for i in range(streams)))
                continue
            end = asyncio.Event()
            running = [asyncio.create_task(stream(llm, i, tokens, expected[i], tally, end)) for i in range(streams)]
            while tally.kills < kills and llm.engine is not None and llm.engine.failure is None:
                await kill(llm, chance, tally, loading=False)
            end.set()
            await asyncio.gather(*running)
        finally:
            await llm.shutdown()
    return tally


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "max": max(seconds), "min": min(seconds)} if seconds else {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of a stream (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.CRITICAL)
    load = os.getloadavg()[0]
    tally = asyncio.run(measure(args.model, args.kills, args.streams, args.tokens))
    result = {
        "kind": "kills",
        "environment": describe(),
        "settings": {"model": args.model, "streams": args.streams, "tokens": args.tokens},
        "kills": tally.kills,
        "answers": tally.answers,
        "failed": tally.failed,
        "different": tally.different,
        "seconds to the next engine": spread(tally.ready),
        "load": load,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))
    return 0 if tally.kills >= args.kills and not tally.failed and not tally.different else 1


if __name__ == "__main__":
    sys.exit(main())
