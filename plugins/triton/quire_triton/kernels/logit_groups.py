"""Of each row of logits: its largest, its token where that is greedy, and the groups in which its likeliest tokens are."""

from __future__ import annotations

import triton
import triton.language as tl

from quire_triton.kernels.logit_peaks import ordered, reach


@triton.jit(do_not_specialize=["columns", "n_peaks", "count"])
def logit_groups_kernel(
    logits_ptr, peaks_ptr, temperature_ptr, top_k_ptr, top_p_ptr, best_ptr, groups_ptr, found_ptr, bound_ptr, out_ptr,
    stride, columns, n_peaks, count, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, MOST: tl.constexpr,
    GREEDY: tl.constexpr, CUT: tl.constexpr, LOGPROBS: tl.constexpr,
):  # fmt: skip
    """Grid (rows). best float32 [rows]: the largest logit.

    Sampling: out int64 [rows] is -1 for a row whose largest logit is not finite, and the lowest of its largest logits
    where its temperature is 0 (GREEDY: everywhere). CUT, for the rows that top-k or top-p cut: bound int32 [rows] is a
    number, in the order of logits, that at least k of them reach (MOST, where top-p alone cuts); found int32 [rows] the
    groups that hold such, groups int32 [rows, MOST] those groups, ascending, when they are no more.
    LOGPROBS, then no token is wanted; CUT: groups are the ``count`` with the largest peaks, the lower first among equals,
    in which the ``count`` likeliest tokens are.
    """
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    peak = tl.load(peaks_ptr + row * n_peaks + p, mask=p < n_peaks, other=float("-inf"))
    best = tl.max(peak, 0)
    tl.store(best_ptr + row, best)
    finite = (best > float("-inf")) & (best < float("inf"))
    if not LOGPROBS:
        temperature = tl.full((), 0.0, tl.float32)
        if not GREEDY:
            temperature = tl.load(temperature_ptr + row)
        if (temperature == 0) | (finite == 0):
            first = tl.min(tl.where(peak == best, p, BLOCK_P), 0)
            i = first * GROUP + tl.arange(0, GROUP)
            x = tl.load(logits_ptr + row * stride + i, mask=i < columns, other=float("-inf"))
            token = tl.min(tl.where((x == best) & (i < columns), i, columns), 0)
            tl.store(out_ptr + row, tl.where(finite, token, -1).to(tl.int64))
    if CUT:
        order = ordered(peak)
        inside = p < n_peaks
        amount = inside.to(tl.int32)
        if LOGPROBS:
            bound = reach(order, amount, count)
            above, equal = inside & (order > bound), inside & (order == bound)
            left = count - tl.sum(above.to(tl.int32), 0)
            chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
        else:
            k = tl.load(top_k_ptr + row)
            k = tl.where((k > 0) & (k < columns), k, columns)
            cut = (k < columns) | (tl.load(top_p_ptr + row) < 1)
            bound = reach(order, amount, tl.where(k < columns, k, MOST))
            chosen = (order >= bound) & (p < tl.where(cut, n_peaks, 0))
            tl.store(bound_ptr + row, bound)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(groups_ptr + row * MOST + place, p, mask=chosen & (place < MOST))
        tl.store(found_ptr + row, tl.sum(chosen.to(tl.int32), 0))
