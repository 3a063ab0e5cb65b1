"""Copying pages from place to place. The reference is ``quire.reference.paged.copy_pages``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def copy_pages_kernel(
    source_ptr, target_ptr, pairs_ptr, source_side, target_side, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (pairs, layers x sides, blocks of a page's PAGE elements); a side is one layer's keys or its values."""
    pair, side = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(pairs_ptr + 2 * pair).to(tl.int64)
    b = tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64)
    values = tl.load(source_ptr + side * source_side + a * PAGE + at, mask=at < PAGE)
    tl.store(target_ptr + side * target_side + b * PAGE + at, values, mask=at < PAGE)


def copy_pages(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """Page a of source to page b of target for each (a, b) of pairs int32 [n, 2], all layers.

    Pools [layers, sides, pages, page_size, Hkv, D] (or their scales) on one device, of one dtype; no page may be both
    read and written.
    """
    if source.element_size() == 1:  # no architecture need know the type
        source, target = source.view(torch.int8), target.view(torch.int8)
    page = source.stride(2)
    block = min(4096, triton.next_power_of_2(page))
    grid = (len(pairs), source.shape[0] * source.shape[1], triton.cdiv(page, block))
    copy_pages_kernel[grid](
        source, target, pairs, source.stride(1), target.stride(1), PAGE=page, BLOCK=block, num_warps=8
    )
