"""Attention on the shape of Llama-3.1-8B over pages in random order, through the plugin.

Decoding is judged by the bytes of keys and values against copy bandwidth, prefill by its operations against the rate of
a large bf16 product.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import torch

from gpu.rows import Recorder, part_parser
from gpu.timing import Clock, open_backend
from quire.hardware import AttentionBatch, UserError
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
FLASH_ATTENTION_3 = "740 TFLOP/s"
"""Forward, bf16, head 128, on an H100 (Shah et al. 2024, https://arxiv.org/abs/2407.08608)."""


class Attention:
    """A step of sequences (context, new tokens); calling it computes one layer."""

    def __init__(self, backend: Any, sequences: list[tuple[int, int]], page: int = 16) -> None:
        self.backend, self.page = backend, page
        self.spec = AttentionSpec(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5)
        self.kv_spec = KVSpec((KVGroupSpec((0,), KV_HEADS, HEAD_DIM, "bfloat16", page),))
        counts = [-(-context // page) for context, _ in sequences]
        order = np.random.default_rng(0).permutation(np.arange(1, 1 + sum(counts), dtype=np.int32))
        self.table = np.zeros((len(sequences), max(counts)), dtype=np.int32)
        for n, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
            self.table[n, :count] = order[end - count : end]
        self.kv = backend.allocate_kv(self.kv_spec, [1 + sum(counts)])
        for n, (context, _) in enumerate(sequences):
            k, v = (self._random(context, KV_HEADS) for _ in range(2))
            backend.write_kv(self.kv, 0, k, v, self._batch([n], [(context, context)]))
        self.q = self._random(sum(new for _, new in sequences), HEADS)
        self.plan = backend.plan_attention(self._batch(range(len(sequences)), sequences), self.kv_spec)
        self.bytes = 2 * sum(context for context, _ in sequences) * KV_HEADS * HEAD_DIM * 2
        pairs = sum(n * (c - n) + n * (n + 1) // 2 for c, n in sequences)
        self.operations = 4 * pairs * HEADS * HEAD_DIM

    def _random(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device=self.backend.device)

    def _batch(self, rows: Any, sequences: list[tuple[int, int]]) -> AttentionBatch:
        """What a step of these rows of the page table looks like."""
        starts = np.cumsum([0, *(new for _, new in sequences)]).astype(np.int32)
        lengths = np.array([context for context, _ in sequences], dtype=np.int32)
        positions = np.concatenate([np.arange(c - n, c, dtype=np.int64) for c, n in sequences])
        table = self.table[list(rows)]
        which = np.repeat(np.arange(len(sequences)), [n for _, n in sequences])
        slots = table[which, positions // self.page].astype(np.int64) * self.page + positions % self.page
        device = self.backend.to_device
        return AttentionBatch(
            device(starts), device(lengths), (device(table),), (device(slots),), device(positions), starts, lengths,
            max(n for _, n in sequences), int(lengths.max()),
        )  # fmt: skip

    def __call__(self) -> torch.Tensor:
        return self.backend.attention(self.q, self.kv, 0, self.plan, self.spec)


def decodes(backend: Any, clock: Clock, out: Recorder, smoke: bool, pages: tuple[int, ...], by: str = "") -> None:
    """Steps of one query a sequence; ``by``: whose, in the rows' names."""
    few = 16 if smoke else 1  # contexts are that much shorter, and so are batches
    for name, count, context in (("64 x 8k", 64, 8192), ("1 x 128k", 1, 131072), ("256 x 1k", 256, 1024)):
        sequences = [(max(1, context // few**2), 1)] * max(1, count // few)
        for page in pages if name == "64 x 8k" else pages[:1]:
            step = Attention(backend, sequences, page)
            seconds = clock(step)
            where = "" if page == pages[0] else f", pages of {page}"
            rate = round(step.bytes / seconds / 1e12, 3)
            out.add(f"attention{by}: decode {name}{where}", seconds, limit=out.least(step.bytes), TBps=rate)
            del step


def prompts(backend: Any, clock: Clock, out: Recorder, smoke: bool, page: int, by: str = "") -> None:
    """Steps with long queries."""
    few = 16 if smoke else 1

    def cut(n: int) -> int:
        return max(1, n // few**2)

    for name, sequences in (
        ("prefill 1 x 8k", [(cut(8192), cut(8192))]),
        ("chunk of 2k after 30k", [(cut(32768), cut(2048))]),
        ("8 prompts of 1k beside 64 decodes of 4k", [(cut(1024), cut(1024))] * 8 + [(cut(4096), 1)] * (64 // few)),
    ):
        step = Attention(backend, sequences, page)
        seconds = clock(step)
        detail: dict[str, Any] = {"TFLOPps": round(step.operations / seconds / 1e12, 1)}
        if name == "prefill 1 x 8k":
            detail["FlashAttention-3 on an H100"] = FLASH_ATTENTION_3
        out.add(f"attention{by}: {name}", seconds, limit=out.least(0.0, step.operations), **detail)
        del step


def others(args: Namespace, backend: Any, out: Recorder) -> None:
    """The same by each other implementation that the device may use: what its table of choices is made from."""
    own = {"TRITON_ATTN"}
    for name in sorted(backend.capabilities.attention_backends - own):
        try:
            other = open_backend(args.device, attention_backend=name)
        except UserError as error:
            out.missing(f"attention, {name}", str(error))
            continue
        page, clock = min(other.capabilities.page_sizes), Clock(other, args.smoke)
        try:
            decodes(other, clock, out, args.smoke, (page,), f", {name}")
            prompts(other, clock, out, args.smoke, page, f", {name}")
        except Exception as error:  # another library's: it ends none but itself
            out.missing(f"attention, {name}", f"{type(error).__name__}: {error}")


def main(argv: list[str] | None = None) -> int:
    parser = part_parser(__doc__)
    parser.add_argument(
        "--others", action="store_true", help="of other libraries, each in turn, instead of our kernels"
    )
    args = parser.parse_args(argv)
    out = Recorder(args.rows)
    try:
        backend = open_backend(args.device)
    except UserError as error:
        print(error)
        return 2
    if args.others:
        others(args, backend, out)
        return 0
    clock = Clock(backend, args.smoke)
    decodes(backend, clock, out, args.smoke, (16, 64))
    prompts(backend, clock, out, args.smoke, 16)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
