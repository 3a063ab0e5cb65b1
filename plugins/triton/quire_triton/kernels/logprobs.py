"""Log-probabilities of chosen tokens and of the likeliest. The reference is ``quire.reference.sampling.logprobs``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_triton.kernels.logit_groups import logit_groups_kernel
from quire_triton.kernels.logit_peaks import BLOCK, CHUNK, GROUP, MOST, ordered
from quire_triton.kernels.logit_sums import logit_sums_kernel
from quire_triton.kernels.sample import prepare

MOST_LOGPROBS = MOST
"""The largest count there is a kernel for."""


@triton.jit(do_not_specialize=["columns", "n_blocks", "count"])
def logprobs_kernel(
    logits_ptr, best_ptr, groups_ptr, found_ptr, sums_ptr, above_ptr, chosen_ptr, ids_ptr, values_ptr, ranks_ptr, stride,
    columns, n_blocks, count, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, MOST: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Grid (rows): ids int64, values float32 [rows, 1 + count], ranks int64 [rows].

    The likeliest are taken one after another out of the row's groups (see logit_groups.py), at most TOP of them; TOP 0:
    only the chosen one is wanted.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    ids_ptr += row * (1 + count)
    values_ptr += row * (1 + count)
    b = tl.arange(0, BLOCK_B)
    sums = tl.load(sums_ptr + row * n_blocks + b, mask=b < n_blocks, other=0)
    above = tl.load(above_ptr + row * n_blocks + b, mask=b < n_blocks, other=0)
    best = tl.load(best_ptr + row)
    finite = (best > float("-inf")) & (best < float("inf"))
    total = tl.where(finite, tl.sum(sums), 1).to(tl.float64) / 17179869184.0
    norm = tl.where(finite, best.to(tl.float64) + tl.log(total), float("nan"))
    token = tl.load(chosen_ptr + row)
    tl.store(ids_ptr, token)
    tl.store(values_ptr, (tl.load(logits_ptr + token).to(tl.float64) - norm).to(tl.float32))
    tl.store(ranks_ptr + row, tl.where(finite, tl.sum(above), 0).to(tl.int64) + 1)
    if TOP > 0:
        j = tl.arange(0, TOP)
        found = tl.load(found_ptr + row)
        group = tl.load(groups_ptr + row * MOST + j, mask=j < found, other=0)
        at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (j < found)[:, None] & (at < columns)
        x = tl.load(logits_ptr + at, mask=inside, other=float("-inf"))
        x = tl.where(x == x, x, float("inf"))
        # One number in which the larger logit is larger, and of equals the lower id.
        key = tl.where(inside, (ordered(x).to(tl.int64) << 32) | (columns - at), -(1 << 63))
        for i in range(count):
            largest = tl.max(key)
            here = key == largest
            tl.store(ids_ptr + 1 + i, columns - (largest & 0xFFFFFFFF))
            value = tl.max(tl.where(here, x, float("-inf")))
            tl.store(values_ptr + 1 + i, (value.to(tl.float64) - norm).to(tl.float32))
            key = tl.where(here, -(1 << 63), key)


def logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits float32 [N, V], V at most 2**19: (ids int64 [N, 1 + count], their log-probabilities float32, the rank
    int64 [N] of chosen int64 [N]). ``count`` is at most MOST_LOGPROBS."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    count = min(count, columns)
    ids = torch.empty((rows, 1 + count), dtype=torch.int64, device=logits.device)
    values = torch.empty((rows, 1 + count), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return ids, values, ranks
    peaks, best, groups, found, bound = prepare(logits, MOST if count else 1)
    stride, n_peaks, n_blocks = logits.stride(0), peaks.shape[1], triton.cdiv(columns, BLOCK)
    logit_groups_kernel[(rows,)](
        logits, peaks, best, found, best, best, groups, found, bound, ids, stride, columns, n_peaks, count, GROUP=GROUP,
        BLOCK_P=triton.next_power_of_2(n_peaks), MOST=MOST, GREEDY=False, CUT=count > 0, LOGPROBS=True, num_warps=8,
    )  # fmt: skip
    sums = torch.empty((rows, n_blocks), dtype=torch.int64, device=logits.device)
    above = torch.empty((rows, n_blocks), dtype=torch.int32, device=logits.device)
    logit_sums_kernel[(rows, triton.cdiv(columns, CHUNK))](
        logits, best, best, found, best, chosen, sums, above, stride, columns, n_blocks, BLOCK=BLOCK,
        BLOCKS=CHUNK // BLOCK, LOGPROBS=True, num_warps=4,
    )  # fmt: skip
    logprobs_kernel[(rows,)](
        logits, best, groups, found, sums, above, chosen, ids, values, ranks, stride, columns, n_blocks, count,
        GROUP=GROUP, BLOCK_B=triton.next_power_of_2(n_blocks), MOST=MOST,
        TOP=triton.next_power_of_2(count) if count else 0, num_warps=4 if count <= 64 else 8,
    )  # fmt: skip
    return ids, values, ranks
