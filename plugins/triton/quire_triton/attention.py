"""Planning and launching ragged attention: which tokens go to which kernel, and into how many parts.

Sequences of a step whose queries fit one small tile (a decode step's single token, a draft's few) are cut along the
keys; longer ones (prompts and chunks) run in large tiles. Which of the two a sequence takes is told by its own number
of queries, not by what else is in the batch. Where bits must not depend on that either, one tile and the same cuts serve
both.
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
    scales: Tensor | None,
    group: int,
    plan: Plan,
    spec: AttentionSpec,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Causal attention of q [T, Hq, D] over one layer's pool [sides, pages, page_size, Hkv, D] -> [T, Hq, D or
    value_dim] in q's dtype.

    ``scales`` float32 [sides, pages, Hkv, page_size] of a pool in 8 bits. ``group`` is the KV group whose block table the
    layer reads. See ``quire.reference.paged.attention``.
    """
    batch, q = plan.batch, q.contiguous()
    ratio = spec.heads // spec.kv_heads
    arch = configs.architecture(q.device)
    if batch_invariant:
        # A query's bits are its tile's: one for every number of queries.
        if spec.value_dim is None:
            few = many = configs.attention_of_any(arch, q.element_size(), spec.head_dim, ratio, scales is not None)
        else:
            few = many = configs.latent(arch, q.element_size(), False, ratio)
    elif spec.value_dim is None:
        sizes = (arch, q.element_size(), spec.head_dim)
        few, many = (configs.attention(*sizes, decode, ratio, scales is not None) for decode in (True, False))
    else:
        few, many = (configs.latent(arch, q.element_size(), decode, ratio) for decode in (True, False))
    # Tokens that belong to no sequence get zeros, and no tile holds them.
    shape = (*q.shape[:2], spec.value_dim or spec.head_dim)
    out = q.new_empty(shape) if int(batch.query_start_host[-1]) == len(q) else q.new_zeros(shape)
    launch = _Launch(q, pool, scales, group, batch, spec, sinks, out, batch_invariant)
    if plan.decode:
        launch(few, 1, None, len(batch.context_lens), True)
        return out
    short, long = max(1, few.rows // ratio), max(1, many.rows // ratio)
    short_tiles, long_tiles = plan.lists(short, long)
    for tile, queries, tiles, cut in ((many, long, long_tiles, False), (few, short, short_tiles, True)):
        if tiles is not None:
            launch(tile, queries, tiles, len(tiles), cut)
    return out


@dataclass(frozen=True)
class _Launch:
    """What the launches of one layer's attention share; see :func:`attention`."""

    q: Tensor
    pool: Tensor
    scales: Tensor | None
    group: int
    batch: AttentionBatch
    spec: AttentionSpec
    sinks: Tensor | None
    out: Tensor
    batch_invariant: bool

    def __call__(self, tile: configs.Tile, queries: int, tiles: Tensor | None, count: int, cut: bool) -> None:
        """Launch ``count`` tiles of ``queries`` queries; ``cut``: along the keys too, where that helps."""
        q, pool, scales, batch, spec, out = self.q, self.pool, self.scales, self.batch, self.spec, self.out
        table = batch.block_tables[self.group]
        kv_heads, ratio, value_dim = spec.kv_heads, spec.heads // spec.kv_heads, spec.value_dim or spec.head_dim
        rows, rest = queries * ratio, spec.head_dim - value_dim
        axis = -(-rows // tile.rows) if rest else kv_heads  # the grid's second: see attention_kernel
        splits, split_len = self._parts(count * axis) if cut else (1, 0)
        split = splits > 1 or split_len > 0
        parted = self.batch_invariant and not split
        if parted:
            split_len = configs.INVARIANT_SPLIT
        part = stats = out
        if split:
            part = torch.empty((count, kv_heads, rows, splits, value_dim), dtype=torch.float32, device=q.device)
            stats = torch.empty((count, kv_heads, rows, splits, 2), dtype=torch.float32, device=q.device)
        eight_bits = 0 if scales is None else 1 if pool.dtype == torch.int8 else 2
        if scales is None:
            scales = pool
        else:
            pool = pool.view(torch.int8)  # so that no architecture need know the type
        if spec.soft_cap is None:
            factor, cap_in = spec.scale * LOG2_E, 0.0
        else:
            factor, cap_in = spec.soft_cap * LOG2_E, 2 * LOG2_E * spec.scale / spec.soft_cap
        shared: dict[str, Any] = dict(
            HQ=spec.heads, GROUP=ratio, D=value_dim, BLOCK_D=power_of_two(value_dim), BLOCK_Q=queries,
            SINKS=self.sinks is not None, TILES=tiles is not None,
        )  # fmt: skip
        pointers = (out if tiles is None else tiles, out if self.sinks is None else self.sinks)
        attention_kernel[(count, axis, splits)](
            q, pool[0], pool[-1], scales[0], scales[-1], out, part, stats, table, batch.query_start, batch.context_lens,
            *pointers, factor, cap_in, spec.window or 0, splits, split_len, configs.SHORTEST_SPLIT, table.stride(0),
            pool.stride(1), pool.stride(2), REST=rest, BLOCK_R=power_of_two(rest) if rest else 0, BLOCK_M=tile.rows,
            BLOCK_N=tile.keys, PAGE=pool.shape[2], WINDOW=spec.window is not None, CAP=spec.soft_cap is not None,
            EIGHT_BITS=eight_bits, SPLIT=split, PARTED=parted, STAY=configs.stay(configs.architecture(q.device)),
            DOT=factors(q), num_warps=tile.warps, num_stages=tile.stages, **shared,
        )  # fmt: skip
        if split:
            attention_merge_kernel[(count, kv_heads, rows)](
                part, stats, out, batch.query_start, *pointers, splits, num_warps=1 if value_dim <= 64 else 2, **shared
            )

    def _parts(self, programs: int) -> tuple[int, int]:
        """(parts of each sequence's keys, keys of one or 0: an even division), for ``programs`` without parts."""
        longest = self.batch.max_context_len
        if self.batch_invariant:
            # The boundaries are what must not depend on the batch; parts past a sequence's end do nothing.
            return max(1, -(-longest // configs.INVARIANT_SPLIT)), configs.INVARIANT_SPLIT
        splits = configs.splits(configs.processors(self.q.device), programs)
        return min(splits, max(1, longest // configs.SHORTEST_SPLIT)), 0
