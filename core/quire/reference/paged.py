"""The paged KV cache and attention over it (Kwon et al. 2023, PagedAttention, https://arxiv.org/abs/2309.06180).

The pool of a group is one tensor [layers in group, sides, pages, page_size, Hkv, D]; the sides are keys and values, or
keys alone where attention is latent. It is not cleared: a page that nobody wrote may hold NaN, and attention must not let
it through. In 8 bits each key and each value of a token and head has a scale of its own (see :func:`to_eight_bits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.hardware import AttentionBatch
from quire.reference import accumulation_dtype, torch_dtype
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec

SCALED = (torch.int8, torch.float8_e4m3fn)
QUERY_BLOCK = 256  # queries of a sequence at once, so that the scores of a long prompt fit in memory


@dataclass
class PagedKV:
    """One pool a group. ``place[layer]`` is (group, index of the layer in the group's pool)."""

    spec: KVSpec
    pools: list[Tensor]  # [layers in group, sides, pages, page_size, Hkv, D]
    scales: list[Tensor | None]  # float32 [layers in group, sides, pages, Hkv, page_size] of a pool in 8 bits
    place: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = {
            layer: (g, index) for g, group in enumerate(self.spec.groups) for index, layer in enumerate(group.layers)
        }


@dataclass
class AttentionPlan:
    """The reference needs no planning: it keeps the batch."""

    batch: AttentionBatch
    spec: KVSpec


def page_bytes(spec: KVGroupSpec) -> int:
    """Bytes of one page over all layers of the group: keys, values and their scales."""
    dtype = torch_dtype(spec.dtype)
    vector = spec.head_dim * dtype.itemsize + (4 if dtype in SCALED else 0)
    return _sides(spec) * len(spec.layers) * spec.page_size * spec.kv_heads * vector


def _sides(spec: KVGroupSpec) -> int:
    return 1 if spec.latent else 2


def allocate_kv(spec: KVSpec, pages: Sequence[int], device: torch.device | str) -> PagedKV:
    """Pools of ``pages[g]`` pages for each group, page 0 included, with whatever was in memory.

    Raises ValueError when ``pages`` does not name every group.
    """
    if len(pages) != len(spec.groups):
        raise ValueError(f"pages has {len(pages)} entries, but there are {len(spec.groups)} KV groups")
    pools: list[Tensor] = []
    scales: list[Tensor | None] = []
    for group, count in zip(spec.groups, pages, strict=True):
        dtype, outer = torch_dtype(group.dtype), (len(group.layers), _sides(group), count)
        inner = (group.page_size, group.kv_heads, group.head_dim)
        pools.append(torch.empty(outer + inner, dtype=dtype, device=device))
        scaled = dtype in SCALED
        shape = (*outer, group.kv_heads, group.page_size)
        scales.append(torch.empty(shape, dtype=torch.float32, device=device) if scaled else None)
    return PagedKV(spec, pools, scales)


def to_eight_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes of ``dtype`` [..., D], scales float32 [...]) of keys or values x [..., D] ~ codes * scales.

    int8: the largest magnitude becomes 127. float8_e4m3fn: the scale is the power of two that brings the largest magnitude
    into (224, 448]. A floating format has one precision over its range, so all that a scale must do is to keep numbers
    inside, whatever a model's keys are (without one, those beyond 448 would be cut off, and a model would need scales found
    beforehand). A power of two does that exactly: what was read and is stored again reads the same. It costs 4 bytes
    for D. A vector that holds a NaN or an infinity gets the scale NaN; a code is never NaN nor -0, so that the bytes mean
    the same, up to a factor of 2, to a device whose own e4m3 is the "fnuz" kind.
    """
    wide = x.float()
    largest = wide.abs().amax(-1)
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 1.0).clamp_min(1e-30)
    if dtype == torch.int8:
        scales = largest / 127
        # Not 127 / largest: torch multiplies a number by the rounded reciprocal, which is another one in the last bit.
        codes = (wide * (torch.full_like(largest, 127) / largest)[..., None]).round()
    else:
        mantissa, exponent = torch.frexp(largest)  # mantissa in [0.5, 1); 448 is 0.875 * 2**9
        exponent = torch.where(mantissa > 0.875, exponent - 8, exponent - 9)
        scales = torch.ldexp(torch.ones_like(largest), exponent)
        codes = wide / scales[..., None]
    codes = torch.where(finite[..., None], codes, 0.0).to(dtype)
    if dtype != torch.int8:
        bits = codes.view(torch.int8)
        codes = torch.where(bits == -128, torch.zeros_like(bits), bits).view(dtype)
    return codes, torch.where(finite, scales, torch.nan)


def from_eight_bits(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes [..., D] and scales [...] stand for, in ``dtype``."""
    return codes.to(dtype) * scales[..., None].to(dtype)


def write_kv(kv: PagedKV, layer: int, k: Tensor, v: Tensor | None, batch: AttentionBatch) -> None:
    """Store k, v [T, Hkv, D] at the slots of the batch (page * page_size + offset), as the pool keeps them.

    ``v`` is None where attention is latent: values are then channels of the keys.
    """
    group, index = kv.place[layer]
    pool, scales, slots = kv.pools[group][index], kv.scales[group], batch.slots[group]
    page_size = pool.shape[2]
    for side, x in enumerate((k,) if v is None else (k, v)):
        if scales is None:
            codes = x.to(pool.dtype)
        else:
            codes, own = to_eight_bits(x, pool.dtype)
            scales[index][side, slots // page_size, :, slots % page_size] = own
        _plain(pool)[side].flatten(0, 1)[slots] = _plain(codes)  # a view


def _plain(x: Tensor) -> Tensor:
    """x, or its bytes when torch cannot index its dtype."""
    return x.view(torch.int8) if x.dtype in SCALED else x


def copy_pages(source: PagedKV, target: PagedKV, group: int, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy page a of ``source`` to page b of ``target`` for each (a, b), all layers; every page is read before any
    is written, so that pairs within one pool do not depend on their order."""
    if not pairs:
        return
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for one, other in ((source.pools, target.pools), (source.scales, target.scales)):
        from_pool, to_pool = one[group], other[group]
        if from_pool is not None and to_pool is not None:
            moved = _plain(from_pool)[:, :, a.to(from_pool.device)]
            to_pool = _plain(to_pool)
            to_pool[:, :, b.to(to_pool.device)] = moved.to(to_pool.device, to_pool.dtype)


def plan_attention(batch: AttentionBatch, spec: KVSpec, reuse: AttentionPlan | None = None) -> AttentionPlan:
    """A plan that holds the batch; ``reuse`` is brought up to date and returned."""
    if reuse is None:
        return AttentionPlan(batch, spec)
    reuse.batch, reuse.spec = batch, spec
    return reuse


def attention(
    q: Tensor, kv: PagedKV, layer: int, plan: AttentionPlan, spec: AttentionSpec, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention of q [T, Hq, D] over the paged keys and values of ``layer`` -> [T, Hq, D], or [T, Hq, value_dim].

    Query head h reads KV head h // (Hq / Hkv) (grouped queries, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
    Query i of a sequence sees key j iff i - window < j <= i. A soft cap turns a score s into cap * tanh(s / cap)
    (Gemma 2, https://arxiv.org/abs/2408.00118); ``sinks`` [Hq] adds one logit a head to the softmax's denominator
    (Xiao et al. 2023, https://arxiv.org/abs/2309.17453, learned in gpt-oss). Scores, softmax and sums are float32
    (float64 for float64). A sequence with context_lens 0, and tokens that belong to none, get zeros.
    """
    batch, (group, index) = plan.batch, kv.place[layer]
    pool, table = kv.pools[group][index], batch.block_tables[group]
    page_size, dtype = pool.shape[2], accumulation_dtype(q.dtype)
    out = q.new_zeros((*q.shape[:2], spec.value_dim or spec.head_dim))
    starts, lengths = batch.query_start_host.tolist(), batch.context_lens_host.tolist()
    for n, length in enumerate(lengths):
        begin, end = starts[n], starts[n + 1]
        if begin == end or length == 0:
            continue
        pages = table[n, : -(-length // page_size)].long()
        k, v = _read(kv, layer, pages, spec, dtype)
        for first in range(begin, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            seen = length - (end - last)
            out[first:last] = _attend(q[first:last].to(dtype), k[:seen], v[:seen], spec, sinks).to(q.dtype)
    return out


def _read(kv: PagedKV, layer: int, pages: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys and values of some pages, [pages * page_size, Hkv, D] in ``dtype``."""
    group, index = kv.place[layer]
    pool, scales = kv.pools[group][index], kv.scales[group]
    stored = _plain(pool)[:, pages].view(pool.dtype)
    if scales is None:
        stored = stored.to(dtype)
    else:
        stored = from_eight_bits(stored, scales[index][:, pages].transpose(2, 3), dtype)
    k = stored[0].flatten(0, 1)
    return k, k[..., : spec.value_dim] if spec.value_dim else stored[1].flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """One sequence: q [t, Hq, D], the last t of the positions of k, v [length, Hkv, D or value_dim]."""
    t, heads, head_dim = q.shape
    length, kv_heads = k.shape[:2]
    key = torch.arange(length, device=q.device)
    query = torch.arange(length - t, length, device=q.device)[:, None]
    visible = key <= query
    if spec.window is not None:
        visible &= key > query - spec.window
    grouped = q.view(t, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("tkgd,lkd->kgtl", grouped, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    # Keys that a window has passed may lie in a page of another or of nobody: 0 * NaN is NaN, so they are cut from
    # the values as well as from the scores.
    scores = torch.where(visible, scores, -torch.inf)
    v = torch.where(visible.any(0)[:, None, None], v, 0.0)
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(kv_heads, -1, 1, 1).expand(-1, -1, t, 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("kgtl,lkd->tkgd", weights, v).reshape(t, heads, v.shape[-1])
