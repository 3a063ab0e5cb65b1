"""Paged KV and attention by the native kernels (csrc/attention.h has the layout and the order of sums)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.hardware import AttentionBatch, AttentionSpec, AttentionWeights, KVGroupSpec, KVSpec, UnsupportedOnDevice
from quire_cpu import _native
from quire_cpu.native import NOTHING, as_tensor, check_rows, empty, rows_of

KEY_BLOCK = 16  # tokens; a page holds whole blocks
_NO_WINDOW = 1 << 40
KV_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
"""What pages hold. int8: with a float32 scale for each key and value of a token and head, (D + 4) / (2 D) of bfloat16."""


@dataclass
class PagedKV:
    """One pool a group, of extents of pages (csrc/attention.h)."""

    spec: KVSpec
    layouts: list[_native.KVLayout]
    buffers: list[_native.Buffer]
    pages: list[int]
    place: dict[int, tuple[int, int]]  # layer: (group, index in the group's pool)

    def pool(self, group: int) -> Tensor:
        """uint8 [extents, layers in group * KV heads, pages of an extent, bytes]; a view, valid as long as this object."""
        layout, spec = self.layouts[group], self.spec.groups[group]
        extents, heads = -(-self.pages[group] // layout.extent_pages), len(spec.layers) * spec.kv_heads
        flat = as_tensor(self.buffers[group], torch.uint8)[: extents * layout.extent_bytes]
        return flat.view(extents, heads, layout.extent_pages, -1)

    def address(self, layer: int) -> tuple[int, int]:
        """(group, address of the layer in extent 0)."""
        group, index = self.place[layer]
        return group, self.buffers[group].address + index * self.layouts[group].layer_bytes

    def slots(self, group: int) -> int:
        return self.pages[group] * self.spec.groups[group].page_size


def _layout(group: KVGroupSpec) -> _native.KVLayout:
    if group.page_size < KEY_BLOCK or group.page_size % KEY_BLOCK:
        raise ValueError(f"page_size is {group.page_size}, but native pages hold a multiple of {KEY_BLOCK} tokens")
    if group.latent:
        raise UnsupportedOnDevice("cpu", "latent attention", "the native kernels store keys and values apart")
    if not 1 <= group.head_dim <= 256:
        raise ValueError(f"head_dim is {group.head_dim}, but the native kernels take at most 256")
    if group.dtype not in KV_DTYPES:
        raise ValueError(f"the KV dtype is {group.dtype}, but the native kernels take {', '.join(KV_DTYPES)}")
    return _native.KVLayout(KV_DTYPES[group.dtype], len(group.layers), group.kv_heads, group.head_dim, group.page_size)


def page_bytes(group: KVGroupSpec) -> int:
    """Bytes of one page over all layers of the group: channels of values are padded to a multiple of 16."""
    layout = _layout(group)
    return layout.extent_bytes // layout.extent_pages


def allocate_kv(spec: KVSpec, pages: Sequence[int]) -> PagedKV:
    """Pools of ``pages[g]`` pages; memory is taken when a page is first written."""
    if len(pages) != len(spec.groups):
        raise ValueError(f"pages has {len(pages)} entries, but there are {len(spec.groups)} KV groups")
    layouts = [_layout(group) for group in spec.groups]
    extents = [-(-count // layout.extent_pages) for layout, count in zip(layouts, pages, strict=True)]
    buffers = [_native.Buffer(n * layout.extent_bytes, True) for layout, n in zip(layouts, extents, strict=True)]
    place = {layer: (g, i) for g, group in enumerate(spec.groups) for i, layer in enumerate(group.layers)}
    return PagedKV(spec, layouts, buffers, list(pages), place)


def write_kv(kv: PagedKV, layer: int, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
    """Store k, v [T, Hkv, D] at the batch's slots, in the pool's dtype; in int8, rounded with scales of their own."""
    group, address = kv.address(layer)
    spec, slots = kv.spec.groups[group], batch.slots[group]
    shape = (k.shape[0], spec.kv_heads, spec.head_dim)
    k, v = _tokens("k", k, shape), _tokens("v", v, shape)
    if slots.shape != shape[:1]:
        raise ValueError(f"slots has shape {tuple(slots.shape)}, expected {shape[:1]}")
    if k.dtype != v.dtype:
        raise ValueError(f"k has dtype {k.dtype}, but v has {v.dtype}")
    _native.write_kv(
        kv.layouts[group], address, kv.slots(group), slots.data_ptr(), shape[0], rows_of("k", k), rows_of("v", v)
    )


def copy_pages(source: PagedKV, target: PagedKV, group: int, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy page a of ``source`` to page b of ``target`` for each (a, b), all layers; all reads come before writes."""
    if pairs:
        extents, pages = np.divmod(np.array(pairs), source.layouts[group].extent_pages)
        copied = source.pool(group)[extents[:, 0], :, pages[:, 0]]
        target.pool(group)[extents[:, 1], :, pages[:, 1]] = copied


def prepare_qkv(
    qkv: Tensor, kv: PagedKV, layer: int, weights: AttentionWeights, spec: AttentionSpec, batch: AttentionBatch
) -> Tensor:
    """qkv [T, (Hq + 2 Hkv) * D], rows [q; k; v] -> queries [T, Hq, D], a view of qkv, normed and rotated in place.

    Keys (also normed and rotated) and values go to the batch's slots. What the reference does in three operations that
    each round to qkv's dtype is rounded once here.
    """
    group, address = kv.address(layer)
    pages, slots = kv.spec.groups[group], batch.slots[group]
    tokens = qkv.shape[0]
    qkv = check_rows("qkv", qkv, (tokens, (spec.heads + 2 * pages.kv_heads) * pages.head_dim))
    if slots.shape != (tokens,) or batch.positions.shape != (tokens,):
        raise ValueError(f"slots and positions must have shape ({tokens},)")
    q_norm, k_norm, eps, offset = NOTHING, 0, 0.0, 0.0
    if spec.qk_norm is not None:
        if spec.qk_norm.kind != "rms" or weights.q_norm.dtype != weights.k_norm.dtype:
            raise ValueError("the native kernels norm queries and keys by RMS, with weights of one dtype")
        norms = [check_rows(name, getattr(weights, name), (pages.head_dim,)) for name in ("q_norm", "k_norm")]
        q_norm, k_norm = rows_of("q_norm", norms[0]), norms[1].data_ptr()
        eps, offset = spec.qk_norm.eps, spec.qk_norm.offset
    cos_sin, cos_sin_rows, rotary_dim, interleaved = NOTHING, 0, 0, False
    if spec.rotary is not None:
        if weights.cos_sin.dtype != torch.float32:
            raise ValueError(f"cos_sin has dtype {weights.cos_sin.dtype}, expected torch.float32")
        cos_sin, cos_sin_rows = rows_of("cos_sin", weights.cos_sin), weights.cos_sin.shape[0]
        rotary_dim, interleaved = weights.cos_sin.shape[1], spec.rotary.interleaved
    _native.prepare_qkv(
        kv.layouts[group], address, kv.slots(group), slots.data_ptr(), rows_of("qkv", qkv), tokens, spec.heads, q_norm,
        k_norm, eps, offset, batch.positions.data_ptr(), cos_sin, cos_sin_rows, rotary_dim, interleaved,
    )  # fmt: skip
    return qkv[:, : spec.heads * pages.head_dim].view(tokens, spec.heads, pages.head_dim)


class Plan:
    """A step's sequences and, for each shape of layer, the list of tasks that its threads share."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.native = _native.AttentionPlan()
        self.update(batch)

    def update(self, batch: AttentionBatch) -> Plan:
        self.batch = batch
        starts, lengths = batch.query_start_host, batch.context_lens_host
        self.native.update(starts.ctypes.data, lengths.ctypes.data, len(lengths))
        return self


def attention(
    q: Tensor, kv: PagedKV, layer: int, plan: Plan, spec: AttentionSpec, sinks: Tensor | None = None
) -> Tensor:
    """q [T, Hq, D] against the paged KV of ``layer`` -> [T, Hq, D] in q's dtype.

    With bfloat16 queries and pages, the softmax's weights are rounded to bfloat16 for the product with the values, as
    FlashAttention does (Dao et al. 2022, https://arxiv.org/abs/2205.14135); sums are float32 throughout, and so is
    everything else for other pages. A decode step reads each key and value once, and does 4 D operations for each
    query head and key.
    """
    group, address = kv.address(layer)
    pages, tables = kv.spec.groups[group], plan.batch.block_tables[group]
    q = _tokens("q", q, (q.shape[0], spec.heads, pages.head_dim))
    out = empty((q.shape[0], spec.heads * pages.head_dim), q.dtype)
    if sinks is not None:
        sinks = check_rows("sinks", sinks, (spec.heads,)).float()
    heads_per_kv_head = spec.heads // pages.kv_heads
    _native.attention(
        plan.native, kv.layouts[group], address, tables.data_ptr(), tables.stride(0), q.shape[0], rows_of("q", q),
        rows_of("out", out), heads_per_kv_head, spec.window or _NO_WINDOW, spec.scale, spec.soft_cap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
    )  # fmt: skip
    return out.view(q.shape)


def _tokens(name: str, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """x [T, heads, D] with each token's heads in one piece; tokens may lie apart."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    return x if x.stride(2) == 1 and (x.stride(1) == shape[2] or shape[1] == 1) else x.contiguous()
