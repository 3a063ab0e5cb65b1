"""How close native attention comes to what this machine's memory and arithmetic allow.

    python plugins/cpu/bench_attention.py [--threads N] [--isa NAME] [--seconds S] [--shapes ...] [--kv ...] [--torch]

Decode: sequences of one new token each over as many layers as exceed the caches; GB/s of keys and values, and the share
of the read bandwidth measured in between. Prefill: a whole prompt through one layer; GFLOP/s of the two products (over
the keys that the mask leaves), and the share of the peak of the products in bfloat16. ``--torch`` adds torch's own
scaled_dot_product_attention on contiguous keys and values.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from quire.hardware import AttentionBatch
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec
from quire_cpu import _native, native
from quire_cpu import native_attention as attention

SHAPES = {"14/2x64": (14, 2, 64), "32/8x64": (32, 8, 64), "32/8x128": (32, 8, 128)}  # query heads, KV heads, head size
DECODE = {"1k": [1024], "8k": [8192], "32k": [32768], "8 unequal": [500, 900, 1500, 2500, 4000, 6000, 9000, 14000]}
PREFILL = (1024, 8192)
CACHES = 400 << 20  # bytes of keys and values that a round of decode streams through


class World:
    """Sequences of the given lengths whose last ``new`` tokens are queries, in ``layers`` layers of shuffled pages."""

    def __init__(
        self, shape: str, kv_dtype: str, lengths: list[int], new: int, page: int, layers: int, shuffled: bool
    ) -> None:
        heads, kv_heads, dim = SHAPES[shape]
        self.spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5)
        group = KVGroupSpec(tuple(range(layers)), kv_heads, dim, kv_dtype, page)
        widths = [-(-length // page) for length in lengths]
        self.kv = attention.allocate_kv(KVSpec((group,)), [1 + sum(widths)])
        self.layers = layers
        tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
        order = torch.arange(1, 1 + sum(widths), dtype=torch.int32)
        if shuffled:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
        for n, pages in enumerate(order.split(widths)):
            tables[n, : widths[n]] = pages
        starts = np.arange(0, len(lengths) + 1, dtype=np.int32) * new
        context = np.array(lengths, dtype=np.int32)
        slots = torch.cat([
            tables[n, torch.arange(length) // page].long() * page + torch.arange(length) % page
            for n, length in enumerate(lengths)
        ])  # fmt: skip
        self.batch = AttentionBatch(
            torch.from_numpy(starts), torch.from_numpy(context), (tables,), (slots,),
            torch.zeros(int(starts[-1]), dtype=torch.int64), starts, context, new, max(lengths),
        )  # fmt: skip
        self.k, self.v = (torch.randn(sum(lengths), kv_heads, dim).to(torch.bfloat16) for _ in range(2))
        for layer in range(layers):
            attention.write_kv(self.kv, layer, self.k, self.v, self.batch)
        self.q = torch.randn(int(starts[-1]), heads, dim).to(torch.bfloat16)
        self.plan = attention.Plan(self.batch)

    def run(self) -> None:
        for layer in range(self.layers):
            attention.attention(self.q, self.kv, layer, self.plan, self.spec)


def measure(run, seconds: float) -> float:
    """Median seconds of a call, of as many as fit in ``seconds`` (3 at least)."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def decode(args: argparse.Namespace, shape: str, kv_dtype: str, buffer: _native.Buffer) -> None:
    for name in args.decode:
        lengths = DECODE[name]
        _, kv_heads, dim = SHAPES[shape]
        number = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 4 / dim}[kv_dtype]
        size = sum(lengths) * kv_heads * dim * 2 * number  # of a layer
        world = World(shape, kv_dtype, lengths, 1, args.page, max(2, int(CACHES // size)), args.shuffled)
        world.run()
        read = statistics.median(buffer.size / _native.read_seconds(buffer) for _ in range(5))
        seconds = measure(world.run, args.seconds) / world.layers
        read = max(read, statistics.median(buffer.size / _native.read_seconds(buffer) for _ in range(5)))
        line = f"{shape:>9} {kv_dtype:>9} decode {name:>9} {seconds * 1e6:>9.1f} us {size / seconds / 1e9:>6.1f} GB/s"
        print(f"{line} of {read / 1e9:>5.1f} {size / seconds / read:>5.0%}", flush=True)


def prefill(args: argparse.Namespace, shape: str, kv_dtype: str) -> None:
    heads, _, dim = SHAPES[shape]
    for tokens in args.prefill:
        world = World(shape, kv_dtype, [tokens], tokens, args.page, 1, args.shuffled)
        world.run()
        peak = max(_native.dot_rate(native.DTYPES[torch.bfloat16], 100_000) for _ in range(3))
        seconds = measure(world.run, args.seconds)
        rate = 2 * heads * dim * tokens * (tokens + 1) / seconds
        line = f"{shape:>9} {kv_dtype:>9} prefill {tokens:>8} {seconds * 1e6:>9.1f} us {rate / 1e9:>6.0f} GFLOP/s"
        print(f"{line} of {peak / 1e9:>5.0f} {rate / peak:>5.0%}", flush=True)
        if args.torch and kv_dtype == "bfloat16":
            torch.set_num_threads(args.threads)
            q, k, v = (x.transpose(0, 1)[None] for x in (world.q, world.k, world.v))
            own = measure(
                lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
                args.seconds,
            )
            torch.set_num_threads(1)
            print(f"{'torch':>34} {own * 1e6:>11.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=native.threads())
    parser.add_argument("--isa", default=native.isas()[-1])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kv", nargs="*", default=["bfloat16"], choices=list(attention.KV_DTYPES))
    parser.add_argument("--decode", nargs="*", default=list(DECODE), choices=list(DECODE))
    parser.add_argument("--prefill", nargs="*", type=int, default=PREFILL)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--shuffled", action="store_true", help="pages in random order, as after long use")
    parser.add_argument("--torch", action="store_true")
    args = parser.parse_args()
    native.set_isa(args.isa)
    native.set_threads(args.threads)
    torch.set_num_threads(1)
    buffer = _native.Buffer(256 << 20)
    native.as_tensor(buffer, torch.uint8).zero_()
    pages = "shuffled" if args.shuffled else "ascending"
    print(f"{args.isa}, {args.threads} threads, {pages} pages of {args.page}")
    for shape in args.shapes:
        for kv_dtype in args.kv:
            decode(args, shape, kv_dtype, buffer)
            prefill(args, shape, kv_dtype)


if __name__ == "__main__":
    main()
