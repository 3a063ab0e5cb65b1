"""Many steps of random batches: memory must not grow and every page must be accounted for.

    python bench/soak.py [--steps 200000] [--model demo] [--json FILE]

Requests of random length, sampling, penalties, grammars, log-probabilities, shared prefixes and `n` come and go, and some
are aborted, over a pool small enough to preempt, by recomputing or by swapping to host memory. Every hundredth of the
run the pages are proved to balance (`Scheduler.check`) and the resident memory is read; at the end all requests are
drained and every page must be free or cached.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from quire.bench.environment import describe
from quire.config import make_config
from quire.engine.build import build_engine
from quire.message import AddRequest
from quire.sampling.params import SamplingParams, StructuredOutputs

WARM = 0.1  # of the run, before memory is compared: caches and allocators fill first


GRAMMARS = (
    StructuredOutputs(regex="[0-9]{2,40}"),
    StructuredOutputs(choice=["yes", "no", "perhaps"]),
    StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
)


def request(rng: random.Random, number: int, vocab: int) -> AddRequest:
    """One of many shapes: a fifth begin with a shared prefix, a quarter sample, some are doubled, a few are held to a
    grammar, a few penalized."""
    prefix = [7] * 48 if rng.random() < 0.2 else []
    prompt = prefix + [rng.randrange(3, vocab) for _ in range(rng.randint(1, 96))]
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.0, 0.8]), top_p=rng.choice([1.0, 0.9]), n=rng.choice([1, 1, 1, 2]),
        max_tokens=rng.randint(1, 96), logprobs=rng.choice([None, None, None, 3]),
        structured_outputs=(grammar := rng.choice(GRAMMARS) if rng.random() < 0.05 else None), ignore_eos=grammar is None,
        repetition_penalty=rng.choice([1.0] * 9 + [1.2]), top_k=rng.choice([0, 0, 20]),
        prompt_logprobs=2 if rng.random() < 0.02 else None,
    )  # fmt: skip
    return AddRequest(request_id=str(number), prompt_token_ids=prompt, sampling=params, seed=number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument(
        "--pages", type=int, default=64, help="fewer than the requests want, so that some are preempted"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = make_config(
        args.model, device=args.device, max_model_len=512, max_num_seqs=args.concurrency, num_pages=(args.pages,),
        num_host_pages=(args.pages // 4,), threads=args.threads,
    )  # fmt: skip
    engine = build_engine(config)
    scheduler, rng = engine.core.scheduler, random.Random(args.seed)
    process, begin = psutil.Process(), time.monotonic()
    open_ids: set[str] = set()
    number = tokens = errors = aborted = 0
    memory: list[dict[str, Any]] = []

    def look() -> None:
        scheduler.check()
        memory.append({"step": engine.core.stats().steps, "mib": round(process.memory_info().rss / 2**20, 1)})

    every = max(args.steps // 100, 1)
    for step in range(args.steps):
        while len(open_ids) < 2 * args.concurrency:
            open_ids.add(str(number))
            engine.core.add(request(rng, number, engine.spec.vocab_size))
            number += 1
        if rng.random() < 0.01:
            victim = rng.choice(sorted(open_ids))
            engine.core.abort([victim])
            open_ids.discard(victim)
            aborted += 1
        open_ids -= take(engine.core.step(), counts := [0, 0])
        tokens, errors = tokens + counts[0], errors + counts[1]
        if step % every == 0:
            look()
            print(f"\r{step:>8} steps, {tokens:>9} tokens, {memory[-1]['mib']:.0f} MiB", end="", file=sys.stderr)
    engine.core.abort(sorted(open_ids))
    while engine.core.has_work() or engine.core.in_flight:
        engine.core.step()
    look()
    stats = engine.core.stats()
    engine.close()
    warm = [row["mib"] for row in memory[int(len(memory) * WARM) :]]
    growth = max(warm[len(warm) // 2 :]) - max(warm[: len(warm) // 2])
    summary = {
        "steps": stats.steps, "requests": number, "tokens": tokens, "aborted": aborted, "errors": errors,
        "preemptions": stats.preemptions, "prefix_hits": stats.prefix_hits, "pages_total": stats.pages_total,
        "pages_free_or_cached_at_end": stats.pages_free, "growth_mib_second_half": round(growth, 1),
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    print("\n" + json.dumps(summary, indent=2))
    if args.json:
        content = {"kind": "soak", "environment": describe(), "summary": summary, "memory": memory}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    balanced = stats.pages_free == stats.pages_total
    return 0 if balanced and not errors and growth < 4 else 1


def take(outputs: list, counts: list[int]) -> set[str]:
    """The ids of requests of which a sample ended; tokens and errors are added to ``counts``."""
    ended = set()
    for output in outputs:
        counts[0] += len(output.token_ids)
        counts[1] += output.error is not None
        if output.finish_reason is not None:
            ended.add(output.request_id)
    return ended


if __name__ == "__main__":
    sys.exit(main())
