"""Kernels on real shapes beside the card's own ceilings, measured in the same run.

A decode kernel is judged by the bytes it must read against copy bandwidth, a prefill one by its operations against the
rate of a large bf16 product. Prints what fell short of its goal, and exits 1 if anything did.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quire.hardware import AttentionBatch, DeviceUnavailable
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec, NormSpec


@dataclass
class Row:
    name: str
    milliseconds: float
    reached: float  # bytes or operations a second
    ceiling: float
    goal: float | None  # share of the ceiling that should be reached

    @property
    def share(self) -> float:
        return self.reached / self.ceiling

    @property
    def short(self) -> bool:
        return self.goal is not None and self.share < self.goal


class Clock:
    """Device time of one call: the median of several, by the device's own events, with the caches written over."""

    def __init__(self, backend: Any) -> None:
        self.module = backend.module
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=backend.device)

    def __call__(self, fn: Callable[[], Any], repeats: int = 20) -> float:
        for _ in range(3):
            fn()
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            start, end = (self.module.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return statistics.median(times)


def ceilings(backend: Any, clock: Clock) -> tuple[float, float]:
    """(bytes a second of a large copy, operations a second of a large bf16 product)."""
    a = torch.empty(1 << 30, dtype=torch.int8, device=backend.device)
    b = torch.empty_like(a)
    copy = 2 * a.numel() / clock(lambda: b.copy_(a))
    x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=backend.device) for _ in range(2))
    return copy, 2 * 8192**3 / clock(lambda: x @ y)


class Attention:
    """A step of sequences (context, new tokens) of the shape of Llama-3.1-8B over pages in random order."""

    def __init__(self, backend: Any, sequences: list[tuple[int, int]], page: int = 16) -> None:
        self.backend = backend
        self.spec = AttentionSpec(heads=32, kv_heads=8, head_dim=128, scale=128**-0.5)
        self.kv_spec = KVSpec((KVGroupSpec((0,), 8, 128, "bfloat16", page),))
        counts = [-(-context // page) for context, _ in sequences]
        order = np.random.default_rng(0).permutation(np.arange(1, 1 + sum(counts), dtype=np.int32))
        table = np.zeros((len(sequences), max(counts)), dtype=np.int32)
        for n, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
            table[n, :count] = order[end - count : end]
        self.kv = backend.allocate_kv(self.kv_spec, [1 + sum(counts)])
        self.kv.pools[0].normal_()
        new = np.array([n for _, n in sequences])
        starts = np.concatenate(([0], np.cumsum(new))).astype(np.int32)
        lengths = np.array([context for context, _ in sequences], dtype=np.int32)
        nothing = np.zeros(starts[-1], dtype=np.int64)
        device = backend.to_device
        self.batch = AttentionBatch(
            device(starts), device(lengths), (device(table),), (device(nothing),), device(nothing), starts, lengths,
            int(new.max()), int(lengths.max()),
        )  # fmt: skip
        self.q = torch.randn(int(starts[-1]), 32, 128, dtype=torch.bfloat16, device=backend.device)
        self.plan = backend.plan_attention(self.batch, self.kv_spec)
        self.bytes = 2 * int(lengths.sum()) * 8 * 128 * 2
        pairs = sum(n * (c - n) + n * (n + 1) // 2 for c, n in sequences)
        self.operations = 4 * pairs * 32 * 128

    def __call__(self) -> torch.Tensor:
        return self.backend.attention(self.q, self.kv, 0, self.plan, self.spec)


def rows(backend: Any, clock: Clock) -> Iterator[Row]:
    copy, matrix = ceilings(backend, clock)
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 product {matrix / 1e12:.0f} TFLOP/s")
    for name, sequences in (
        ("decode 64 x 8k", [(8192, 1)] * 64),
        ("decode 1 x 128k", [(131072, 1)]),
        ("decode 256 x 1k", [(1024, 1)] * 256),
        ("decode 64 x 8k, pages of 64", [(8192, 1)] * 64),
    ):
        step = Attention(backend, sequences, 64 if "64" in name.partition(",")[2] else 16)
        seconds = clock(step)
        yield Row(name, seconds * 1e3, step.bytes / seconds, copy, 0.85 if "k" in name and "256" not in name else None)
        del step
    for name, sequences, goal in (
        ("prefill 1 x 8k", [(8192, 8192)], 0.60),
        ("chunk of 2k after 30k", [(32768, 2048)], 0.60),
        ("prefill of 8 x 1k beside 64 decodes of 4k", [(1024, 1024)] * 8 + [(4096, 1)] * 64, None),
    ):
        step = Attention(backend, sequences)
        seconds = clock(step)
        yield Row(name, seconds * 1e3, step.operations / seconds, matrix, goal)
        del step
    yield from products(backend, clock, copy, matrix)
    x = torch.randn(8192, 4096, dtype=torch.bfloat16, device=backend.device)
    weight, gates = x[0].clone(), torch.randn(8192, 28672, dtype=torch.bfloat16, device=backend.device)
    seconds = clock(lambda: backend.rms_norm(x, weight, NormSpec(), x))
    yield Row("residual and RMS norm 8192 x 4096", seconds * 1e3, 4 * x.nbytes / seconds, copy, 0.70)
    seconds = clock(lambda: backend.gated_act(gates, "silu"))
    yield Row("silu gate 8192 x 14336", seconds * 1e3, 1.5 * gates.nbytes / seconds, copy, 0.70)
    q, k = x.view(8192, 32, 128), x[:, :1024].contiguous().view(8192, 8, 128)
    positions = torch.arange(8192, device=backend.device)
    table = torch.randn(8192, 128, device=backend.device)
    seconds = clock(lambda: backend.rotary(q, k, positions, table))
    moved = 2 * (q.nbytes + k.nbytes) + table.nbytes
    yield Row("rotary of 8192 tokens", seconds * 1e3, moved / seconds, copy, 0.60)


def products(backend: Any, clock: Clock, copy: float, matrix: float) -> Iterator[Row]:
    """The largest product of Llama-3.1-8B's layers: torch's, ours with fixed sums, and ours of integers."""
    from quire_triton.kernels.linear import Quantized, linear

    n, k = 28672, 4096
    device = backend.device
    dense = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    weights: dict[str, Any] = {"torch": dense, "fixed sums": dense}
    for bits in (8, 4):
        q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=device)
        weights[f"int{bits}"] = Quantized(q, torch.rand(n, k // 128, device=device) / 100, None, bits, 128)
    sizes = {"torch": 2.0, "fixed sums": 2.0, "int8": 1 + 4 / 128, "int4": 0.5 + 4 / 128}
    for rows in (1, 16, 64, 8192):
        x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
        for name, weight in weights.items():
            if name == "torch":
                seconds = clock(lambda x=x: torch.nn.functional.linear(x, dense))
            else:
                fixed = name == "fixed sums"
                seconds = clock(lambda x=x, w=weight, fixed=fixed: linear(x, w, batch_invariant=fixed))
            least = max(n * k * sizes[name] / copy, 2 * rows * n * k / matrix)
            yield Row(f"product of {rows} rows, {name}", seconds * 1e3, least / seconds, 1.0, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "rocm", "xpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    backend = getattr(importlib.import_module(f"quire_{args.device}.backend"), f"{args.device.capitalize()}Backend")()
    try:
        backend.open(0)
    except DeviceUnavailable as error:
        print(error)
        return 2
    found = []
    for row in rows(backend, Clock(backend)):
        goal = "" if row.goal is None else f", goal {row.goal:.0%}{'  FELL SHORT' if row.short else ''}"
        print(f"{row.name:45} {row.milliseconds:9.3f} ms  {row.share:6.1%} of the ceiling{goal}", flush=True)
        found.append(row)
    if args.json is not None:
        card = backend.devices()[0]
        report = {
            "schema": 1, "card": card.name, "details": card.details, "torch": torch.__version__,
            "rows": [{**asdict(row), "share": row.share} for row in found],
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row.short for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
