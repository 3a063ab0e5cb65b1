"""Quire and its peers on the same workloads, side by side, with the machine's limits in the same table.

    python bench/peers.py --model CHECKPOINT --peer quire=.venv/bin/python --peer openvino=ov/bin/python:OV_MODEL

Each peer lives in its own interpreter, loads once, and waits while the others are measured: rounds alternate between
them, so that a change of the machine's mood meets all. A waiting peer is stopped (SIGSTOP): its threads cannot spin.
NAME is a driver of bench/peers/ (quire, openvino, llamacpp, vllm, transformers), perhaps with a suffix to tell two
apart (openvino-int8). Medians over the rounds are what the table shows; the JSON file has every time.

``--workload`` measures prompts and answers together, ``--decode`` the steps of requests whose context is there already:
each peer computes the prompts once, untimed, then the rounds alternate between the peers as before. Memory is the most
that a peer's processes have held in the whole run, less its stored weights and the keys and values that the largest
workload needs. ``--first-token`` measures from starting a peer's process to its first token instead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import statistics
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limits import measure, usable_cores
from model_cost import Decode, ModelCost, Workload, read_cost
from peer import Peer, first_token, running

HERE = Path(__file__).resolve().parent
WORKLOADS = (Workload(1, 32, 64), Workload(8, 32, 64), Workload(32, 128, 64), Workload(1, 1024, 1))
RATE = {"bfloat16": "bf16_gflop_s", "float32": "float32_gflop_s"}
WEIGHT_BYTES = {None: None, "int8": 1.0, "int4": 0.5625}  # int4: a 16-bit scale for each 32 weights, as in Q4_0
FIRST_ID, LAST_ID = 10, 30_000  # of random prompts
MIB = 1 << 20


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
            prompts = random_prompts(rng, work.requests, work.prompt, vocab_size)
            for peer in [*peers[i % len(peers) :], *peers[: i % len(peers)]]:
                before = peer.failed
                seconds = peer.ask(work, prompts)
                if seconds is not None and i:
                    peer.seconds.setdefault(work, []).append(seconds)
                _tell(peer, before)
    return limits


def play_decode(
    peers: Sequence[Peer], workloads: Sequence[Decode], rounds: int, vocab_size: int, threads: int, seed: int = 0
) -> list[dict[str, float]]:
    """As :func:`play`, for steps alone: a workload's prompts are computed once by each peer, then each goes on by
    ``tokens`` in every round."""
    rng = random.Random(seed)
    limits = []
    for work in workloads:
        prompts = random_prompts(rng, work.requests, work.context, vocab_size)
        for peer in peers:
            before = peer.failed
            seconds = peer.open(prompts, work.tokens * (rounds + 2))
            if seconds is not None:
                print(f"{peer.name}: {work.requests} x {work.context} computed in {seconds:.1f} s", file=sys.stderr)
            _tell(peer, before)
        for i in range(rounds + 1):
            if i:
                limits.append(measure(threads, 0.5))
            for peer in [*peers[i % len(peers) :], *peers[: i % len(peers)]]:
                before = peer.failed
                seconds = peer.more(work.tokens, work.requests)
                if seconds is not None and i:
                    peer.seconds.setdefault(work, []).append(seconds)
                _tell(peer, before)
        for peer in peers:
            peer.close()
    return limits


def play_first_token(
    peers: Sequence[Peer], settings: dict[str, Any], rounds: int, vocab_size: int, seed: int = 0
) -> None:
    """Start every peer ``rounds`` times, after once that does not count: it may read files from disk."""
    rng = random.Random(seed)
    for i in range(rounds + 1):
        for peer in [*peers[i % len(peers) :], *peers[: i % len(peers)]]:
            if peer.failed:
                continue
            seconds = first_token(peer, settings, random_prompts(rng, 1, 32, vocab_size)[0])
            if seconds is not None and i:
                peer.seconds.setdefault("first token", []).append(seconds)
            _tell(peer, None)


def _tell(peer: Peer, before: str | None) -> None:
    if peer.failed and not before:
        print(f"{peer.name}: {peer.failed}", file=sys.stderr)


def random_prompts(rng: random.Random, requests: int, length: int, vocab_size: int) -> list[list[int]]:
    last = min(LAST_ID, vocab_size - 1)
    return [[rng.randint(FIRST_ID, last) for _ in range(length)] for _ in range(requests)]


def arithmetic_rate(limits: dict[str, float], dtype: str, weights: str | None = None) -> float:
    """GFLOP/s of the best product that is exact enough: in ``dtype``, in float32 (a processor may have none of bfloat16)
    or, with integer weights, of 8-bit integers."""
    return max(limits[RATE[dtype]], limits.get(RATE["float32"], 0.0), limits.get("int8_gop_s", 0.0) if weights else 0.0)


def bounds(
    cost: ModelCost, work: Workload | Decode, limits: dict[str, float], dtype: str, weights: str | None = None
) -> dict[str, float]:
    """Tokens/s that reading memory, arithmetic, and the two together allow in ``dtype``, with ``weights`` stored as told."""
    read, multiply = limits["read_gb_s"] * 1e9, arithmetic_rate(limits, dtype, weights) * 1e9
    size, stored = 4.0 if dtype == "float32" else 2.0, WEIGHT_BYTES[weights]
    return {
        "memory": work.counted_tokens / cost.seconds(work, read, math.inf, size, stored),
        "arithmetic": work.counted_tokens / cost.seconds(work, math.inf, multiply, size, stored),
        "both": work.counted_tokens / cost.seconds(work, read, multiply, size, stored),
    }


def median_limits(limits: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in limits if name in each) for name in limits[0]}


def above_bytes(peer: Peer, workloads: Sequence[Workload | Decode], cost: ModelCost, dtype: str) -> int | None:
    """The peer's peak less its stored weights and the largest workload's keys and values, in bytes."""
    if not peer.memory:
        return None
    value = 4 if dtype == "float32" else 2
    return peer.memory["peak"] - peer.memory["weights"] - value * cost.kv_values * max(map(tokens_of, workloads))


def tokens_of(work: Workload | Decode) -> int:
    """Tokens that a workload's requests have in the cache at its end."""
    if isinstance(work, Decode):
        return work.requests * (work.context + work.tokens)
    return work.requests * (work.prompt + work.output)


def print_table(
    peers: Sequence[Peer],
    workloads: Sequence[Workload | Decode],
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
        above = above_bytes(peer, workloads, cost, dtype)
        memory = {**peer.memory, "above": above} if above is not None else {}
        rows.append(
            {"name": peer.name, "version": version, "start_s": peer.start_s, "speeds": speeds, "memory": memory}
        )
    allowed = {work: bounds(cost, work, limits, dtype, weights) for work in workloads}
    kind = weights or dtype
    print(f"\n| tokens/s, median | {' | '.join(map(str, workloads))} | start | memory, MiB: peak (above) |")
    print("|---" * (len(workloads) + 3) + "|")
    for peer, row in zip(peers, rows, strict=True):
        cells = []
        for work in workloads:
            speed = row["speeds"].get(str(work))
            cells.append(f"{speed:,.0f} ({speed / allowed[work]['both']:.0%})" if speed else "failed")
        held = row["memory"]
        memory = f"{held['peak'] / MIB:,.0f} ({held['above'] / MIB:,.0f})" if held else ""
        print(f"| {peer.name} {row['version'] or ''} | {' | '.join(cells)} | {row['start_s']:.1f} s | {memory} |")
    for name, text in (
        ("memory", f"reading memory allows, {kind} ({limits['read_gb_s']:.1f} GB/s)"),
        ("arithmetic", f"arithmetic allows, {kind} ({arithmetic_rate(limits, dtype, weights):,.0f} GFLOP/s)"),
        ("both", "both together allow"),
    ):
        print(f"| {text} | {' | '.join(f'{allowed[work][name]:,.0f}' for work in workloads)} | | |")
    for name in ("memory", "arithmetic", "both"):
        rows.append({"name": f"limit: {name}", "speeds": {str(work): allowed[work][name] for work in workloads}})
    return rows


def print_first_token(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print("\n| from starting the process to the first token, median | s |\n|---|---|")
    for peer in peers:
        times = peer.seconds.get("first token")
        rows.append({"name": peer.name, "version": peer.ready.get("version"), "speeds": {}})
        if times:
            rows[-1]["first_token_s"] = statistics.median(times)
        print(f"| {peer.name} | {f'{statistics.median(times):.2f}' if times else 'failed'} |")
    return rows


def parse_peer(text: str, default_model: str) -> Peer:
    """``NAME=PYTHON`` or ``NAME=PYTHON:MODEL``."""
    name, equals, rest = text.partition("=")
    python, _, model = rest.partition(":")
    if not equals or not name or not python:
        raise SystemExit(f"--peer {text}: expected NAME=PYTHON or NAME=PYTHON:MODEL")
    return Peer(name, os.path.expanduser(python), os.path.expanduser(model) if model else default_model)


def read_config(path: Path, default_model: str) -> list[Peer]:
    """[[peer]] tables with name, python, and optionally model, driver, env (a table of variables) and options."""
    peers = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("peer", []):
        unknown = set(entry) - {"name", "python", "model", "driver", "env", "options"}
        if unknown or not {"name", "python"} <= set(entry):
            raise SystemExit(
                f"{path}: a peer has name and python, perhaps model, driver, env and options; got {sorted(entry)}"
            )
        entry = {"model": default_model, **entry}
        peers.append(Peer(**{**entry, "python": os.path.expanduser(entry["python"])}))
    return peers


def parse_numbers(text: str, what: str) -> tuple[int, int, int]:
    try:
        first, second, third = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    if min(first, second, third) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each number must be at least 1")
    return first, second, third


def parse_workload(text: str) -> Workload:
    return Workload(*parse_numbers(text, "REQUESTS,PROMPT,OUTPUT"))


def parse_decode(text: str) -> Decode:
    return Decode(*parse_numbers(text, "REQUESTS,CONTEXT,TOKENS"))


def make_settings(args: argparse.Namespace, workloads: Sequence[Workload | Decode]) -> dict[str, Any]:
    """What every driver is told. The cache holds the largest workload, and no peer is made to hold more."""

    def length(work: Workload | Decode) -> int:
        return work.context + work.tokens * (args.rounds + 2) if isinstance(work, Decode) else work.prompt + work.output

    longest = max(2048, *map(length, workloads))
    return {
        "threads": args.threads,
        "dtype": args.dtype,
        "quantization": args.weights,
        "max_model_len": longest,
        "max_num_seqs": max(work.requests for work in workloads),
        # Whole pages of up to 64 tokens for each request.
        "kv_tokens": max(longest, *(work.requests * (length(work) + 64) // 64 * 64 for work in workloads)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint in the Hugging Face layout")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON[:MODEL]", help="repeatable")
    parser.add_argument(
        "--config", type=Path, help="TOML with [[peer]] tables: name, python, model, driver, env, options"
    )
    parser.add_argument("--workload", type=parse_workload, action="append", metavar="REQUESTS,PROMPT,OUTPUT")
    parser.add_argument("--decode", type=parse_decode, action="append", metavar="REQUESTS,CONTEXT,TOKENS")
    parser.add_argument("--first-token", action="store_true", help="measure that, and nothing else")
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
    now = datetime.datetime.now(datetime.UTC)
    out = args.out or HERE / "results" / f"peers-{now:%Y%m%d-%H%M%S}.json"
    return run(args, peers or [Peer("quire", sys.executable, str(args.model))], out)


def run(args: argparse.Namespace, peers: Sequence[Peer], out: Path) -> int:
    """Measure and write; 1 if a peer failed."""
    for peer in peers:
        peer.script()
    steps: list[Decode] = args.decode or []
    whole: list[Workload] = args.workload or ([] if steps else list(WORKLOADS))
    cost = read_cost(args.model)
    settings = make_settings(args, [*whole, *steps])
    limits: list[dict[str, float]] = []
    if args.first_token:
        play_first_token(peers, settings, args.rounds, cost.vocab_size)
        rows = print_first_token(peers)
    else:
        with running(peers, settings):
            if whole:
                limits += play(peers, whole, args.rounds, cost.vocab_size, args.threads)
            if steps:
                limits += play_decode(peers, steps, args.rounds, cost.vocab_size, args.threads)
            for peer in peers:
                peer.weigh()
        rows = print_table(peers, [*whole, *steps], cost, median_limits(limits), args.dtype, args.weights)
    write(out, args, settings, peers, rows, limits)
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
