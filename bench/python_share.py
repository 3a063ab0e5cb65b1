"""What of a decode step is not the kernels' time: Python's share, on one machine, side by side.

    python bench/python_share.py --model CHECKPOINT [--batch 1 8 32] [--json FILE]

The engine runs decode steps of so many requests; between blocks of them the recorded step of that batch is replayed by
itself, with the choice of tokens, and nothing else running. The share is what a step of the engine takes longer than
that, whoever causes it: scheduling, assembling arrays, the hand-over between threads, or Python taking a core from the
kernels' threads. Blocks alternate, and medians are compared, so that a change of the machine's mood meets both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from quire.bench.environment import describe
from quire.config import make_config
from quire.engine.build import Engine, build_engine
from quire.message import AddRequest
from quire.sampling.params import SamplingParams

BLOCK = 12  # steps


def measure(engine: Engine, batch: int, blocks: int, prompt: int = 32, temperature: float = 0.0) -> dict[str, Any]:
    """Medians in milliseconds of a step of the engine and of its kernels alone, for ``batch`` requests."""
    rng, core = random.Random(batch), engine.core
    params = SamplingParams(temperature=temperature, max_tokens=4 * BLOCK * (blocks + 2), ignore_eos=True)
    for i in range(batch):
        ids = [rng.randrange(10, engine.spec.vocab_size) for _ in range(prompt)]
        core.add(AddRequest(request_id=f"{batch}-{i}", prompt_token_ids=ids, sampling=params, seed=i))
    for _ in range(2 * BLOCK):
        core.step()
    steps: list[float] = []
    kernels: list[float] = []
    for _ in range(blocks):
        core.step()  # what has waited in flight while the kernels ran alone
        core.step()
        for _ in range(BLOCK):
            begin = time.perf_counter()
            core.step()
            steps.append(time.perf_counter() - begin)
        while not core.ready():  # everything in flight has run, and nothing is planned
            time.sleep(0.001)
        time.sleep(2 * statistics.median(steps))
        kernels += alone(engine, batch)
    core.abort([f"{batch}-{i}" for i in range(batch)])
    while core.has_work() or core.in_flight:
        core.step()
    step, kernel = statistics.median(steps) * 1e3, statistics.median(kernels) * 1e3
    return {"batch": batch, "step_ms": step, "kernels_ms": kernel, "share": 1 - kernel / step}


def alone(engine: Engine, batch: int) -> list[float]:
    """Seconds of the recorded step of ``batch`` rows and of choosing their tokens, several times."""
    runner = engine.core._run.__self__  # type: ignore[attr-defined]
    recorded, sampler = runner.graphs.buckets[runner.graphs._size(batch)].step, runner.sampler
    found = []
    for _ in range(BLOCK):
        begin = time.perf_counter()
        engine.backend.sample(recorded.replay()[:batch], sampler._cached)
        found.append(time.perf_counter() - begin)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--blocks", type=int, default=6, help=f"of {BLOCK} steps each (default: 6)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantization")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = make_config(
        args.model, device="cpu", max_model_len=2048, max_num_seqs=max(args.batch), skip_tokenizer_init=True,
        threads=args.threads, quantization=args.quantization, enable_prefix_caching=False,
    )  # fmt: skip
    engine = build_engine(config)
    rows = []
    for batch in args.batch:
        rows.append(measure(engine, batch, args.blocks, temperature=args.temperature))
        row = rows[-1]
        print(
            f"{batch:>3} requests: step {row['step_ms']:.2f} ms, kernels {row['kernels_ms']:.2f} ms, "
            f"not the kernels' {row['share']:.1%}"
        )
    engine.close()
    if args.json:
        content = {
            "kind": "python-share",
            "environment": describe(),
            "settings": vars(args) | {"json": None},
            "rows": rows,
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
