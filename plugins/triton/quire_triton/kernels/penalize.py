"""Lowering the logits of tokens that have occurred. The reference is ``quire.reference.sampling.penalize``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit(do_not_specialize=["entries"])
def penalize_kernel(logits_ptr, rows_ptr, ids_ptr, penalties_ptr, entries, stride, BLOCK: tl.constexpr):
    """Grid (blocks of entries). logits float32 [rows, columns]; rows, ids int64 [entries], no pair twice; penalties float32
    [4, entries]: count, repetition, frequency, presence."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < entries
    at = logits_ptr + tl.load(rows_ptr + i, mask=inside, other=0) * stride + tl.load(ids_ptr + i, mask=inside, other=0)
    count = tl.load(penalties_ptr + i, mask=inside, other=0.0)
    repetition = tl.load(penalties_ptr + entries + i, mask=inside, other=1.0)
    frequency = tl.load(penalties_ptr + 2 * entries + i, mask=inside, other=0.0)
    presence = tl.load(penalties_ptr + 3 * entries + i, mask=inside, other=0.0)
    x = tl.load(at, mask=inside, other=0.0)
    x = tl.where(x > 0, x / repetition, x * repetition)
    tl.store(at, x - frequency * count - tl.where(count > 0, presence, 0.0), mask=inside)


def penalize(logits: Tensor, rows: Tensor, ids: Tensor, penalties: Tensor) -> None:
    """Change logits float32 [N, V], whose rows are contiguous, in place."""
    entries = len(rows)
    if entries:
        penalize_kernel[(triton.cdiv(entries, BLOCK),)](
            logits, rows.contiguous(), ids.contiguous(), penalties.contiguous(), entries, logits.stride(0), BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
