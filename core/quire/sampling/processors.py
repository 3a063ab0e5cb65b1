"""Edits of logits: biases and masks (penalties: ``Backend.penalize``). In place, on the device, a few indexed operations for
a whole batch.

Entries are flat: ``rows[j]`` is a row of the logits and ``ids[j]`` a token of it. No (row, token) pair occurs twice in
one call, so every edit is independent of the others and of its place in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITMASK_ELEMENTS = 1 << 22


def add_bias(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    """Add bias float32 [M] to logits[rows, ids]."""
    logits[rows, ids] += bias


def allow_only(logits: Tensor, some: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Mask every token of rows ``some`` int64 [A] except the entries (rows, ids)."""
    kept = logits[rows, ids]
    logits[some] = -torch.inf
    logits[rows, ids] = kept


def forbid(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Mask the entries (rows, ids)."""
    logits[rows, ids] = -torch.inf


def apply_bitmask(logits: Tensor, bitmask: Tensor, some: Tensor | None = None) -> None:
    """Mask every token whose bit is 0. ``bitmask`` int32 [S, ceil(V / 32)], token t at bit t % 32 of word t // 32, as
    grammar engines pack them; a token beyond the bitmask is masked. ``some`` int64 [S]: the rows it is for (all)."""
    vocabulary = logits.shape[1]
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    step = max(1, BITMASK_ELEMENTS // vocabulary)
    for start in range(0, len(bitmask), step):
        words = bitmask[start : start + step]
        bits = (words[:, :, None] >> shifts & 1).flatten(1)[:, :vocabulary].bool()
        bits = torch.nn.functional.pad(bits, (0, vocabulary - bits.shape[1]))
        if some is None:
            logits[start : start + step].masked_fill_(~bits, -torch.inf)
        else:
            at = some[start : start + step]
            logits[at] = logits[at].masked_fill(~bits, -torch.inf)
