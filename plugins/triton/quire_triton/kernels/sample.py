"""One token per row of logits. The reference is ``quire.reference.sampling.sample``; logit_peaks.py says how."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.hardware import SamplingBatch
from quire_triton.kernels.logit_groups import logit_groups_kernel
from quire_triton.kernels.logit_peaks import (
    BLOCK,
    CHUNK,
    GROUP,
    MOST,
    goal_of,
    logit_peaks_kernel,
    ordered,
    reach,
    share_of,
    weigh,
)
from quire_triton.kernels.logit_sums import logit_sums_kernel
from quire_triton.kernels.sample_wide import sample_wide_kernel


@triton.jit
def _anywhere(logits_ptr, sums, best, temperature, least, uniform, columns, BLOCK: tl.constexpr):
    """The token of a row that nothing cuts: sums [blocks] say in which block it is."""
    goal = goal_of(uniform, tl.sum(sums))
    passed = tl.cumsum(sums, 0) <= goal
    block = tl.sum(passed.to(tl.int32))
    before = tl.sum(tl.where(passed, sums, 0))
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + at, mask=at < columns, other=float("-inf"))
    beyond = before + tl.cumsum(weigh(x, best, temperature, least), 0) > goal
    return tl.min(tl.where(beyond, at, columns - 1), 0)


@triton.jit
def _among_groups(
    logits_ptr, groups_ptr, found, bound, sums, best, temperature, least, k, p, uniform, columns, GROUP: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """The token of a row that top-k or top-p cuts, or -2 when more is kept than its groups hold for certain."""
    j = tl.arange(0, MOST)
    group = tl.load(groups_ptr + j, mask=j < found, other=0)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (j < found)[:, None] & (at < columns)
    x = tl.load(logits_ptr + at, mask=inside, other=float("-inf"))
    order = ordered(x)
    inside = inside & (order >= bound)  # all logits that reach the bound are here, and others
    weight = tl.where(inside, weigh(x, best, temperature, least), 0)
    if (k > 0) & (k < columns):
        weight = tl.where(order >= reach(order, inside.to(tl.int32), k), weight, 0)
        total = tl.sum(weight)
    else:
        total = tl.sum(sums)
    token = tl.full((), -2, tl.int32)
    need = tl.where(p < 1, share_of(total, p.to(tl.float64)), 0)
    if tl.sum(weight) >= need:
        if p < 1:
            weight = tl.where(order >= reach(order, weight, need), weight, 0)
        row = tl.reshape(weight, (MOST * GROUP,))
        beyond = (tl.cumsum(row, 0) > goal_of(uniform, tl.sum(weight))) & (row > 0)
        token = tl.min(tl.where(beyond, tl.reshape(at, (MOST * GROUP,)), columns - 1), 0)
    return token


@triton.jit(do_not_specialize=["columns", "n_blocks"])
def sample_kernel(
    logits_ptr, best_ptr, groups_ptr, found_ptr, bound_ptr, sums_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    uniform_ptr, out_ptr, stride, columns, n_blocks, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
    MOST: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the token of each row that is drawn, -2 (see sample_wide.py) where its groups do not settle it.

    logits float32 [rows, columns]; best, groups, found, bound: see logit_groups.py; sums: see logit_sums.py; the rest is
    a :class:`quire.hardware.SamplingBatch`; out int64 [rows]. CUT: some row has top-k or top-p.
    """
    row = tl.program_id(0).to(tl.int64)
    best, temperature = tl.load(best_ptr + row), tl.load(temperature_ptr + row)
    if (temperature != 0) & (best > float("-inf")) & (best < float("inf")):
        least, uniform = tl.load(min_p_ptr + row) * 17179869184.0, tl.load(uniform_ptr + row)
        logits_ptr += row * stride
        b = tl.arange(0, BLOCK_B)
        sums = tl.load(sums_ptr + row * n_blocks + b, mask=b < n_blocks, other=0)
        if CUT:
            k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
            token = tl.full((), -2, tl.int32)
            if (p < 1) | ((k > 0) & (k < columns)):
                found = tl.load(found_ptr + row)
                if found <= MOST:
                    token = _among_groups(
                        logits_ptr, groups_ptr + row * MOST, found, tl.load(bound_ptr + row), sums, best, temperature,
                        least, k, p, uniform, columns, GROUP, MOST,
                    )  # fmt: skip
            else:
                token = _anywhere(logits_ptr, sums, best, temperature, least, uniform, columns, BLOCK)
        else:
            token = _anywhere(logits_ptr, sums, best, temperature, least, uniform, columns, BLOCK)
        tl.store(out_ptr + row, token.to(tl.int64))


def sample(logits: Tensor, settings: SamplingBatch) -> Tensor:
    """One token per row of logits float32 [N, V], V at most 2**19 -> int64 [N]; -1 for a row that has none."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    device = logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    cut = not settings.all_greedy and (settings.any_top_k or settings.any_top_p)
    peaks, best, groups, found, bound = prepare(logits, MOST if cut else 1)
    stride, n_peaks, n_blocks = logits.stride(0), peaks.shape[1], triton.cdiv(columns, BLOCK)
    temperature, top_k, top_p, min_p = settings.temperature, settings.top_k, settings.top_p, settings.min_p
    logit_groups_kernel[(rows,)](
        logits, peaks, temperature, top_k, top_p, best, groups, found, bound, out, stride, columns, n_peaks, 0,
        GROUP=GROUP, BLOCK_P=triton.next_power_of_2(n_peaks), MOST=MOST, GREEDY=settings.all_greedy, CUT=cut,
        LOGPROBS=False, num_warps=8,
    )  # fmt: skip
    if settings.all_greedy:
        return out
    sums = torch.empty((rows, n_blocks), dtype=torch.int64, device=device)
    logit_sums_kernel[(rows, triton.cdiv(columns, CHUNK))](
        logits, best, temperature, top_k, min_p, out, sums, found, stride, columns, n_blocks, BLOCK=BLOCK,
        BLOCKS=CHUNK // BLOCK, LOGPROBS=False, num_warps=4,
    )  # fmt: skip
    sample_kernel[(rows,)](
        logits, best, groups, found, bound, sums, temperature, top_k, top_p, min_p, settings.uniform, out, stride,
        columns, n_blocks, GROUP=GROUP, BLOCK=BLOCK, BLOCK_B=triton.next_power_of_2(n_blocks), MOST=MOST, CUT=cut,
        num_warps=8,
    )  # fmt: skip
    if cut:
        sample_wide_kernel[(rows,)](
            logits, best, temperature, top_k, top_p, min_p, settings.uniform, out, stride, columns, BLOCK=2 * BLOCK,
            num_warps=8,
        )  # fmt: skip
    return out


def prepare(logits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(peaks of logits [N, V], and room for best, groups of at most ``most`` a row, found and bound: logit_groups.py)."""
    rows, columns = logits.shape
    n_peaks = triton.cdiv(columns, GROUP)
    peaks = torch.empty((rows, n_peaks), dtype=torch.float32, device=logits.device)
    logit_peaks_kernel[(rows, triton.cdiv(columns, CHUNK))](
        logits, peaks, logits.stride(0), columns, n_peaks, GROUP=GROUP, GROUPS=CHUNK // GROUP, num_warps=4
    )
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    room = torch.empty((most + 2) * rows, dtype=torch.int32, device=logits.device)
    groups, found, bound = room.split((most * rows, rows, rows))
    return peaks, best, groups, found, bound
