"""Planning and launching ragged attention: which tokens go to which kernel, and into how many parts.

Sequences of a step whose queries fit one small tile (a decode step's single token, a draft's few) are cut along the
keys; longer ones (prompts and chunks) run in large tiles. Which of the two a sequence takes is told by its own number
of queries, not by what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.hardware import AttentionBatch, AttentionSpec, KVSpec
from quire_triton import configs
from quire_triton.kernels.attention import attention_kernel
from quire_triton.kernels.attention_merge import attention_merge_kernel
from quire_triton.kernels.linear import factors

LOG2_E = math.log2(math.e)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and at least 16, a product's smallest side)."""
    return max(16, 1 << (n - 1).bit_length())


@dataclass
class Plan:
    """A step's batch and the lists of tiles made of it, by queries a tile; they are made when a layer first asks.

    A step of one query for each sequence needs no list and reads every length on the device, so that its launches can
    be captured and replayed over other lengths.
    """

    batch: AttentionBatch
    spec: KVSpec
    to_device: Callable[[np.ndarray], Tensor]
    tiles: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def update(self, batch: AttentionBatch, spec: KVSpec) -> Plan:
        self.batch, self.spec = batch, spec
        self.tiles.clear()
        return self

    @property
    def decode(self) -> bool:
        """Whether every sequence has exactly one query."""
        counts = np.diff(self.batch.query_start_host)
        return len(counts) > 0 and bool((counts == 1).all())

    def lists(self, short: int, long: int) -> tuple[Tensor | None, Tensor | None]:
        """Tiles int32 [n, 2] (sequence, first query) of ``short`` queries for sequences of no more, of ``long`` for the
        others; None where there are none."""
        if (short, long) not in self.tiles:
            counts = np.diff(self.batch.query_start_host)
            few = np.flatnonzero((counts > 0) & (counts <= short))
            short_tiles = np.stack((few, np.zeros_like(few)), axis=1)
            many = np.flatnonzero(counts > short)
            parts = -(-counts[many] // long)
            sequence = np.repeat(many, parts)
            first = (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)) * long
            # The longest work first, so that the device does not wait for it at the end.
            keys = self.batch.context_lens_host[sequence] - counts[sequence] + first
            long_tiles = np.stack((sequence, first), axis=1)[np.argsort(-keys, kind="stable")]
            self.tiles[short, long] = (self._upload(short_tiles), self._upload(long_tiles))
        return self.tiles[short, long]

    def _upload(self, tiles: np.ndarray) -> Tensor | None:
        return self.to_device(np.ascontiguousarray(tiles, dtype=np.int32)) if len(tiles) else None


def attention(
    q: Tensor,
    pool: Tensor,
    group: int,
    plan: Plan,
    spec: AttentionSpec,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Causal attention of q [T, Hq, D] over one layer's pool [2, pages, page_size, Hkv, D] -> [T, Hq, D] in q's dtype.

    ``group`` is the KV group whose block table the layer reads. See ``quire.reference.paged.attention``.
    """
    batch, q = plan.batch, q.contiguous()
    ratio = spec.heads // spec.kv_heads
    arch = configs.architecture(q.device)
    sizes = (arch, q.element_size(), spec.head_dim)
    few, many = configs.attention(*sizes, True, ratio), configs.attention(*sizes, False, ratio)
    # Tokens that belong to no sequence get zeros, and no tile holds them.
    whole = int(batch.query_start_host[-1]) == len(q)
    out = torch.empty_like(q) if whole else torch.zeros_like(q)
    if plan.decode:
        _launch(few, 1, None, len(batch.context_lens), True, q, pool, group, batch, spec, sinks, out, batch_invariant)
        return out
    short, long = few.rows // ratio, many.rows // ratio
    short_tiles, long_tiles = plan.lists(short, long)
    for tile, queries, tiles, cut in ((many, long, long_tiles, False), (few, short, short_tiles, True)):
        if tiles is not None:
            count = len(tiles)
            _launch(tile, queries, tiles, count, cut, q, pool, group, batch, spec, sinks, out, batch_invariant)
    return out


def _launch(
    tile: configs.Tile, queries: int, tiles: Tensor | None, count: int, cut: bool, q: Tensor, pool: Tensor, group: int,
    batch: AttentionBatch, spec: AttentionSpec, sinks: Tensor | None, out: Tensor, batch_invariant: bool,
) -> None:  # fmt: skip
    """Launch ``count`` tiles of ``queries`` queries; ``cut``: along the keys too, where that helps."""
    table = batch.block_tables[group]
    kv_heads, head_dim, ratio = spec.kv_heads, spec.head_dim, spec.heads // spec.kv_heads
    splits, split_len = 1, 0
    if cut and batch_invariant:
        # The boundaries are what must not depend on the batch; parts past a sequence's end do nothing.
        split_len = configs.INVARIANT_SPLIT
        splits = max(1, -(-batch.max_context_len // split_len))
    elif cut:
        splits = configs.splits(configs.processors(q.device), count * kv_heads)
        splits = min(splits, max(1, batch.max_context_len // configs.SHORTEST_SPLIT))
    split = splits > 1 or split_len > 0
    rows = queries * ratio
    part = stats = out
    if split:
        part = torch.empty((count, kv_heads, rows, splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((count, kv_heads, rows, splits, 2), dtype=torch.float32, device=q.device)
    if spec.soft_cap is None:
        factor, cap_in = spec.scale * LOG2_E, 0.0
    else:
        factor, cap_in = spec.soft_cap * LOG2_E, 2 * LOG2_E * spec.scale / spec.soft_cap
    shared: dict[str, Any] = dict(
        HQ=spec.heads, GROUP=ratio, D=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=queries,
        SINKS=sinks is not None, TILES=tiles is not None,
    )  # fmt: skip
    pointers = (batch.query_start, out if tiles is None else tiles, out if sinks is None else sinks)
    attention_kernel[(count, kv_heads, splits)](
        q, pool[0], pool[1], out, part, stats, table, pointers[0], batch.context_lens, *pointers[1:], factor, cap_in,
        spec.window or 0, splits, split_len, configs.SHORTEST_SPLIT, table.stride(0), pool.stride(1), pool.stride(2),
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, PAGE=pool.shape[2], WINDOW=spec.window is not None,
        CAP=spec.soft_cap is not None, SPLIT=split, DOT=factors(q),
        num_warps=tile.warps, num_stages=tile.stages, **shared,
    )  # fmt: skip
    if split:
        attention_merge_kernel[(count, kv_heads, rows)](
            part, stats, out, *pointers, splits, num_warps=1 if head_dim <= 64 else 2, **shared
        )
