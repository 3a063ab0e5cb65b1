"""Paged attention over the ragged batch, in fixed tiles, so that a token's bits depend on nothing but its own sequence.

Queries go in tiles of tokens, keys and values in tiles of ``KV_TILE`` positions counted from position zero. Every pair
(query tile, KV tile) with something to see is one entry of a batched matrix product of fixed shape; its sums have a
fixed order, and the tiles of one query are added up in order of position. The softmax's maximum is that of all visible
scores, and a maximum does not depend on order. Hidden keys weigh exactly zero, so tiles that add only those change
nothing. Hence chunking, company and the cache leave the bits alone, provided that the product's bits do not depend on
how many matrices are in the batch or how many rows a matrix has: :func:`tiles_agree` checks that on this processor.

The pool of a group is [layers, 2, Hkv, pages, page size, D]: one gather by slot gives the operands of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quire.hardware import AttentionBatch, AttentionSpec, KVGroupSpec, KVSpec, UnsupportedOnDevice

KV_TILE = 64  # positions
ROWS = 8  # a matrix's rows are a multiple of this
PREFILL_ROWS = 128  # rows of a prefill tile: that many (token, query head of one KV head) pairs
SHORT = 4  # sequences with at most this many new tokens take a tile a token
CHUNK_BYTES = 64 << 20  # scores held at once, unless one query tile alone needs more


@dataclass
class PagedKV:
    """One pool a group: [layers in group, 2 (key, value), Hkv, pages, page size, D]."""

    spec: KVSpec
    pools: list[Tensor]
    place: dict[int, tuple[int, int]]  # layer: (group, index in the group's pool)

    def flat(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each a view [Hkv, pages * page size, D]."""
        group, index = self.place[layer]
        pool = self.pools[group][index].flatten(2, 3)
        return pool[0], pool[1]


def allocate_kv(spec: KVSpec, pages: Sequence[int]) -> PagedKV:
    if len(pages) != len(spec.groups):
        raise ValueError(f"pages has {len(pages)} entries, but there are {len(spec.groups)} KV groups")
    pools = [_pool(group, count) for group, count in zip(spec.groups, pages, strict=True)]
    place = {layer: (g, i) for g, group in enumerate(spec.groups) for i, layer in enumerate(group.layers)}
    return PagedKV(spec, pools, place)


def _pool(group: KVGroupSpec, pages: int) -> Tensor:
    if group.latent:
        raise UnsupportedOnDevice("cpu-torch", "latent attention", "keys and values are stored apart here")
    shape = (len(group.layers), 2, group.kv_heads, pages, group.page_size, group.head_dim)
    return torch.empty(shape, dtype=getattr(torch, group.dtype))


def write_kv(kv: PagedKV, layer: int, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
    keys, values = kv.flat(layer)
    slots = batch.slots[kv.place[layer][0]]
    keys.index_copy_(1, slots, k.transpose(0, 1).to(keys.dtype))
    values.index_copy_(1, slots, v.transpose(0, 1).to(values.dtype))


def copy_pages(source: PagedKV, target: PagedKV, group: int, pairs: Sequence[tuple[int, int]]) -> None:
    if not pairs:
        return
    a, b = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    moved = source.pools[group].index_select(3, a)
    target.pools[group].index_copy_(3, b, moved.to(target.pools[group].dtype))


@dataclass
class Chunk:
    """Query tiles that are computed together, those with the most KV tiles first, and their pairs with KV tiles.

    Pairs are ordered by (j, tile), j counting a query tile's KV tiles from its first; ``segments[j]`` = (offset,
    count) of the pairs with that j. They are those of query tiles 0 .. count-1, so that adding up needs no index.
    """

    tokens: Tensor  # int64 [tiles * tokens a tile]; places that hold no token repeat one
    real: Tensor  # int64: which of these places hold a token
    tile: Tensor  # int64 [pairs]
    slots: Tensor  # int64 [pairs * KV_TILE], a slot of the same sequence wherever the key is hidden from all
    hidden: Tensor  # bool [pairs, rows, KV_TILE]
    segments: list[tuple[int, int]]
    tiles: int
    width: int  # tokens a tile
    rows: int


@dataclass
class Plan:
    """What a step needs, made when a layer first asks: layers of one group and shape share it."""

    batch: AttentionBatch
    spec: KVSpec
    exact: Callable[[int, int], bool]  # (rows, head size): whether prefill tiles give the bits of tiles of ``rows``
    chunks: dict[tuple[int, int | None, int, int, int], list[Chunk]] = field(default_factory=dict)

    def update(self, batch: AttentionBatch, spec: KVSpec) -> Plan:
        self.batch, self.spec = batch, spec
        self.chunks.clear()
        return self

    def chunks_for(self, group: int, spec: AttentionSpec) -> list[Chunk]:
        key = (group, spec.window, spec.heads // spec.kv_heads, spec.kv_heads, spec.head_dim)
        if key not in self.chunks:
            self.chunks[key] = self._build(*key)
        return self.chunks[key]

    def _build(self, group: int, window: int | None, queries: int, kv_heads: int, dim: int) -> list[Chunk]:
        lengths = self.batch.context_lens_host.astype(np.int64)
        counts = np.where(lengths > 0, np.diff(self.batch.query_start_host.astype(np.int64)), 0)
        rows = -(-queries // ROWS) * ROWS  # of a tile of one token
        wide = counts > SHORT if rows < PREFILL_ROWS and self.exact(rows, dim) else np.zeros_like(counts, dtype=bool)
        chunks = []
        for counted, width, height in ((~wide, 1, rows), (wide, PREFILL_ROWS // queries, PREFILL_ROWS)):
            if (counts * counted).any():
                chunks += self._cut(group, window, queries, kv_heads, counts * counted, width, height)
        return chunks

    def _cut(
        self, group: int, window: int | None, queries: int, kv_heads: int, counts: np.ndarray, width: int, rows: int
    ) -> list[Chunk]:
        """Chunks of bounded size for ``counts`` new tokens of each sequence, in tiles of ``width`` tokens."""
        tiles = _tiles(self.batch, counts, self.batch.context_lens_host.astype(np.int64), width, window)
        limit = max(1, CHUNK_BYTES // (4 * kv_heads * rows * KV_TILE))
        chunks, begin = [], 0
        while begin < len(tiles.kv_count):
            fit = int(np.searchsorted(np.cumsum(tiles.kv_count[begin:]), limit, side="right"))
            end = begin + max(1, fit)
            chunks.append(self._chunk(group, window, tiles.take(slice(begin, end)), width, queries, rows))
            begin = end
        return chunks

    def _chunk(self, group: int, window: int | None, tiles: Tiles, width: int, queries: int, rows: int) -> Chunk:
        order = np.argsort(-tiles.kv_count, kind="stable")
        tiles = tiles.take(order)
        n_tiles = len(order)
        most = int(tiles.kv_count[0])
        per_j = np.searchsorted(-tiles.kv_count, -np.arange(most), side="left")  # tiles with more than j KV tiles
        offsets = np.concatenate(([0], np.cumsum(per_j)[:-1]))
        j = np.repeat(np.arange(most), per_j)
        tile = np.arange(len(j)) - np.repeat(offsets, per_j)
        place = np.arange(width)
        real = place < tiles.count[:, None]  # [tiles, width]
        token = tiles.token[:, None] + np.where(real, place, 0)
        position = np.where(real, tiles.position[:, None] + place, -1)
        first, last = tiles.position[tile], tiles.position[tile] + tiles.count[tile] - 1
        low = np.maximum(0, first - window + 1) if window is not None else np.zeros_like(first)
        key = (tiles.kv_first[tile] + j)[:, None] * KV_TILE + np.arange(KV_TILE)  # [pairs, KV_TILE]
        # Slots past the end, or before the window, may hold anything: read a key of this very sequence instead.
        known = np.where((key >= low[:, None]) & (key <= last[:, None]), key, last[:, None])
        table, page_size = self.batch.block_tables[group], self.spec.groups[group].page_size
        known_t = torch.from_numpy(known)
        pages = table[torch.from_numpy(tiles.sequence[tile])[:, None], known_t // page_size].long()
        slots = pages * page_size + known_t % page_size
        query = torch.from_numpy(position[tile])[:, :, None]  # [pairs, width, 1]
        seen = torch.from_numpy(key)[:, None] <= query
        if window is not None:
            seen &= torch.from_numpy(key)[:, None] > query - window
        hidden = torch.ones(len(j), rows, KV_TILE, dtype=torch.bool)
        hidden[:, : width * queries] = ~seen.repeat_interleave(queries, dim=1)
        return Chunk(
            tokens=torch.from_numpy(token.reshape(-1)),
            real=torch.from_numpy(np.flatnonzero(real.reshape(-1))),
            tile=torch.from_numpy(tile),
            slots=slots.reshape(-1),
            hidden=hidden,
            segments=list(zip(offsets.tolist(), per_j.tolist(), strict=True)),
            tiles=n_tiles,
            width=width,
            rows=rows,
        )


@dataclass
class Tiles:
    """Query tiles, one array entry each."""

    sequence: np.ndarray
    token: np.ndarray  # the first token's index in the step
    position: np.ndarray  # and in the sequence
    count: np.ndarray  # tokens
    kv_first: np.ndarray  # the first KV tile it sees
    kv_count: np.ndarray

    def take(self, index: np.ndarray | slice) -> Tiles:
        return Tiles(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def _tiles(batch: AttentionBatch, counts: np.ndarray, lengths: np.ndarray, width: int, window: int | None) -> Tiles:
    """Cut each sequence's ``counts`` new tokens into tiles of ``width``."""
    per = -(-counts // width)
    sequence = np.repeat(np.arange(len(counts)), per)
    offset = (np.arange(len(sequence)) - np.repeat(np.cumsum(per) - per, per)) * width
    count = np.minimum(width, counts[sequence] - offset)
    position = lengths[sequence] - counts[sequence] + offset
    low = np.maximum(0, position - window + 1) if window is not None else np.zeros_like(position)
    first, last = low // KV_TILE, (position + count - 1) // KV_TILE
    token = batch.query_start_host.astype(np.int64)[sequence] + offset
    return Tiles(sequence, token, position, count, first, last - first + 1)


def attention(q: Tensor, kv: PagedKV, layer: int, plan: Plan, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """q [T, Hq, D] -> [T, Hq, D] in q's dtype; everything between is float32."""
    keys, values = kv.flat(layer)
    out = torch.zeros(q.shape, dtype=q.dtype)
    for chunk in plan.chunks_for(kv.place[layer][0], spec):
        rows = _attend(q, keys, values, chunk, spec, sinks)  # [tiles * width, Hq, D]
        out[chunk.tokens[chunk.real]] = rows[chunk.real].to(q.dtype)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    heads, queries, dim = spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim
    tiles, rows, pairs = chunk.tiles, chunk.rows, len(chunk.tile)
    used = chunk.width * queries
    tiled = torch.zeros(heads, tiles, rows, dim)
    tiled[:, :, :used] = (
        q[chunk.tokens]
        .view(tiles, chunk.width, heads, queries, dim)
        .permute(2, 0, 1, 3, 4)
        .reshape(heads, tiles, used, dim)
    )
    k = keys.index_select(1, chunk.slots).float().view(heads * pairs, KV_TILE, dim)
    scores = torch.bmm(tiled.index_select(1, chunk.tile).view(heads * pairs, rows, dim), k.transpose(1, 2))
    scores = scores.view(heads, pairs, rows, KV_TILE).mul_(spec.scale)
    if spec.soft_cap is not None:
        scores.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    scores.masked_fill_(chunk.hidden, -torch.inf)
    highest = _highest(scores.amax(-1), chunk, queries, sinks)  # [heads, tiles, rows]
    weights = scores.sub_(highest.index_select(1, chunk.tile)[..., None]).exp_()
    v = values.index_select(1, chunk.slots).float().view(heads * pairs, KV_TILE, dim)
    parts = torch.bmm(weights.view(heads * pairs, rows, KV_TILE), v).view(heads, pairs, rows, dim)
    part_totals = weights.sum(-1)
    result, total = torch.zeros(heads, tiles, rows, dim), torch.zeros(heads, tiles, rows)
    for offset, count in chunk.segments:  # in order of position, whatever else is in the batch
        result[:, :count] += parts[:, offset : offset + count]
        total[:, :count] += part_totals[:, offset : offset + count]
    if sinks is not None:
        total += (_per_row(sinks, chunk, heads, queries) - highest).exp()
    result /= total.clamp_min_(torch.finfo(torch.float32).tiny)[..., None]  # rows that hold no token are 0 / 0
    return result[:, :, :used].reshape(heads, tiles * chunk.width, queries, dim).transpose(0, 1).flatten(1, 2)


def _highest(part: Tensor, chunk: Chunk, queries: int, sinks: Tensor | None) -> Tensor:
    """The highest visible score of each row, of part [heads, pairs, rows]; 0 for a row that sees nothing."""
    heads = part.shape[0]
    highest = torch.full((heads, chunk.tiles, chunk.rows), -torch.inf)
    for offset, count in chunk.segments:
        torch.maximum(highest[:, :count], part[:, offset : offset + count], out=highest[:, :count])
    if sinks is not None:
        highest = torch.maximum(highest, _per_row(sinks, chunk, heads, queries))
    return highest.masked_fill_(highest == -torch.inf, 0.0)


def _per_row(sinks: Tensor, chunk: Chunk, heads: int, queries: int) -> Tensor:
    """sinks [Hq] for each row of a tile: [heads, 1, rows]."""
    rows = sinks.float().view(heads, 1, queries).repeat(1, chunk.width, 1).view(heads, 1, chunk.width * queries)
    return torch.nn.functional.pad(rows, (0, chunk.rows - rows.shape[-1]))


def tiles_agree(rows: int, other: int, dim: int) -> bool:
    """Whether the products' bits are the same with ``rows`` and ``other`` rows, in batches of any size and at any place
    in a matrix, with this process's threads: tried on random numbers, which the order of a sum does not depend on."""
    generator = torch.Generator().manual_seed(dim)
    most = max(rows, other)
    q = torch.randn(9, most, dim, generator=generator)
    k = torch.randn(9, KV_TILE, dim, generator=generator)

    def products(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.bmm(q.contiguous(), k.transpose(1, 2))
        return scores, torch.bmm(scores, k)

    base = [torch.cat(parts, dim=1) for parts in zip(*(products(p, k) for p in q.split(rows, 1)), strict=True)]
    for n in (rows, other):
        for batch in (1, 2, 3, 5, 9):
            for shift in (0, 1, 3):
                moved = products(q[:batch, :n].roll(shift, 1), k[:batch].contiguous())
                if not all(torch.equal(a.roll(-shift, 1), b[:batch, :n]) for a, b in zip(moved, base, strict=True)):
                    return False
    return True
