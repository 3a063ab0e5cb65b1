"""The second step of attention cut along the keys: each query's parts are joined, in order of the keys.

The parts' number and bounds come from the sequence alone where the first step's did, and a part that saw nothing is
skipped, so the bits are those of the sequence computed alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_splits"])
def attention_merge_kernel(
    part_ptr, stats_ptr, out_ptr, start_ptr, tiles_ptr, sinks_ptr, n_splits, HQ: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, SINKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads, BLOCK_Q * GROUP). part, stats: see attention_kernel; out [T, HQ, D]."""
    tile, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if TILES:
        sequence, first = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    else:
        sequence, first = tile, 0
    begin = tl.load(start_ptr + sequence)
    queries = tl.load(start_ptr + sequence + 1) - begin
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    if first + token < queries:
        part = ((tile.to(tl.int64) * tl.num_programs(1) + kv_head) * (BLOCK_Q * GROUP) + row) * n_splits
        d = tl.arange(0, BLOCK_D)
        top, total = float("-inf"), 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        if SINKS:
            top = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
            total = 1.0
        for split in range(n_splits):
            highest = tl.load(stats_ptr + 2 * (part + split))
            if highest > float("-inf"):
                new_top = tl.maximum(top, highest)
                decay, weight = tl.exp2(top - new_top), tl.exp2(highest - new_top)
                values = tl.load(part_ptr + (part + split) * D + d, mask=d < D, other=0.0)
                # Said as one operation, so that attention_kernel, which joins parts too, rounds alike.
                acc = tl.fma(values, weight, acc * decay)
                total = tl.fma(tl.load(stats_ptr + 2 * (part + split) + 1), weight, total * decay)
                top = new_top
        acc = acc / tl.where(total == 0.0, 1.0, total)
        at = ((begin + first + token).to(tl.int64) * HQ + head) * D + d
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=d < D)
