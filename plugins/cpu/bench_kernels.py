"""How close the native kernels come to what this machine's memory and arithmetic allow.

    python plugins/cpu/bench_kernels.py [--threads N] [--isa NAME] [--seconds S] [--dtype bfloat16|float32|int8|int4]

For each shape of a 0.5B model's linears and each number of rows: GB/s of weights streamed and GFLOP/s, and as a share
of the limit that binds (the longer of the time to read the weights and the time to multiply at the measured peak). The
weights of a shape are copies enough to exceed the caches, as the layers of a model are; both limits are measured in
between, because on a shared machine they move.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from quire.quantization import FORMATS
from quire_cpu import _native, native

SHAPES = {"896->896": (896, 896), "896->2*4864": (9728, 896), "4864->896": (896, 4864), "896->151936": (151936, 896)}
ROWS = (1, 2, 4, 8, 14, 16, 32, 64, 256, 1024)
QUANTIZED = {name: (FORMATS[name].bits, FORMATS[name].group) for name in ("int8", "int4")}
FETCHES = {0: "far", 1: "near"}  # csrc/trials.h
CACHES = 192 << 20  # bytes of distinct weights that a round streams through


def limits(buffer: _native.Buffer, code: int, repeats: int) -> tuple[float, float]:
    """(bytes/s read, operations/s) at this moment."""
    reads = [buffer.size / _native.read_seconds(buffer) for _ in range(3)]
    return statistics.median(reads), max(_native.dot_rate(code, repeats) for _ in range(2))


def pack(raw: torch.Tensor, bits: int, group: int):
    return native.pack_quantized(raw, bits, group) if bits else native.pack_linear(raw)


def multiply(x: torch.Tensor, weights: list) -> None:
    # Results are dropped one by one, as in a model: memory that was just given back is used again, without page faults.
    for weight in weights:
        native.linear(x, weight)


def measure(run, seconds: float) -> float:
    """Median seconds of a call, of as many as fit in ``seconds`` (3 at least)."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=native.threads())
    parser.add_argument("--isa", default=native.isas()[-1])
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "int8", "int4"))
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    args = parser.parse_args()
    native.set_isa(args.isa)
    native.set_threads(args.threads)
    torch.set_num_threads(1)
    bits, group = QUANTIZED.get(args.dtype, (0, 0))
    dtype = torch.bfloat16 if bits else getattr(torch, args.dtype)
    buffer = _native.Buffer(256 << 20)
    native.as_tensor(buffer, torch.uint8).zero_()
    print(f"{args.isa}, {args.threads} threads, {args.dtype}")
    print(f"{'shape':>12} {'rows':>5} {'us':>9} {'GB/s':>6} {'GFLOP/s':>8} {'limits':>12} {'share':>6}")
    for name, (n, k) in SHAPES.items():
        raw = torch.randn(n, k, dtype=dtype)
        weights = [pack(raw, bits, group)]
        size = weights[0].buffer.size
        weights += [pack(raw, bits, group) for _ in range(CACHES // size)]
        for rows in args.rows:
            if rows > 64 and n > 100000:
                continue  # a head sees the rows that are sampled
            x = torch.randn(rows, k, dtype=dtype)
            read, peak = limits(buffer, native.DTYPES[dtype], 100_000)
            peak *= 2 if bits else 1  # an integer dot product takes four pairs where one of bf16 takes two
            used = weights if rows <= 64 else weights[:4]
            seconds = measure(lambda x=x, used=used: multiply(x, used), args.seconds) / len(used)
            operations = 2 * rows * n * k
            share = max(size / read, operations / peak) / seconds
            rates = f"{size / seconds / 1e9:>6.1f} {operations / seconds / 1e9:>8.0f}"
            line = f"{name:>12} {rows:>5} {seconds * 1e6:>9.1f} {rates}"
            print(f"{line} {read / 1e9:>5.1f} {peak / 1e9:>6.0f} {share:>6.0%}", flush=True)
    kept = {rows: FETCHES.get(_native.near_fetches(rows, bits or 16)) for rows in args.rows}
    if any(kept.values()):
        print("fetches that were kept: " + ", ".join(f"{rows} rows {way}" for rows, way in kept.items() if way))
    raw = torch.randn(*SHAPES["896->2*4864"], dtype=dtype)
    seconds = measure(lambda: pack(raw, bits, group), args.seconds)
    print(f"{'rounded and ' * bool(bits)}packed while loading: {raw.numel() / seconds / 1e6:,.0f} M weights/s")


if __name__ == "__main__":
    main()
