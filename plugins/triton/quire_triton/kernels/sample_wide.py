"""Tokens of the rows whose likeliest tokens are too many, or too much alike, to be looked at together: a flat
distribution under top-p, a large k, many equal logits. What is cut is found by reading the row 16 times."""

from __future__ import annotations

import triton
import triton.language as tl

from quire_triton.kernels.logit_peaks import goal_of, ordered, share_of, weigh


@triton.jit
def _kept(logits_ptr, start, columns, bound, best, temperature, least, BLOCK: tl.constexpr):
    """(ids, order, weights) of a block of logits; the weight of what is below the bound is 0."""
    i = start + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + i, mask=i < columns, other=float("-inf"))
    order = ordered(x)
    weight = weigh(x, best, temperature, least)
    return i, order, tl.where((i < columns) & (order >= bound), weight, 0)


@triton.jit
def _search(logits_ptr, columns, need, bound, best, temperature, least, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest int32, in the order of logits, that logits of weight ``need`` reach (COUNT: so many logits), two bits
    of it at a time."""
    threshold = tl.full((), -2147483648, tl.int64)
    for digit in range(16):
        step = tl.full((), 1, tl.int64) << (30 - 2 * digit)
        pivots = threshold + tl.arange(0, 4).to(tl.int64) * step
        have = tl.zeros((4,), dtype=tl.int64)
        for start in range(0, columns, BLOCK):
            i, order, amount = _kept(logits_ptr, start, columns, bound, best, temperature, least, BLOCK)
            if COUNT:
                amount = (i < columns).to(tl.int64)
            have += tl.sum(tl.where(order.to(tl.int64)[None, :] >= pivots[:, None], amount[None, :], 0), 1)
        threshold += (tl.sum((have >= need).to(tl.int64)) - 1) * step
    return threshold.to(tl.int32)


@triton.jit
def _total(logits_ptr, columns, bound, best, temperature, least, BLOCK: tl.constexpr):
    """The weight of all logits that reach the bound."""
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(0, columns, BLOCK):
        _, _, weight = _kept(logits_ptr, start, columns, bound, best, temperature, least, BLOCK)
        total += weight
    return tl.sum(total)


@triton.jit(do_not_specialize=["columns"])
def sample_wide_kernel(
    logits_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, out_ptr, stride, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the token of each row whose out is -2; see sample_kernel."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(out_ptr + row) == -2:
        logits_ptr += row * stride
        best, temperature = tl.load(best_ptr + row), tl.load(temperature_ptr + row)
        least = tl.load(min_p_ptr + row) * 17179869184.0
        k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        bound = tl.full((), -2147483648, tl.int32)
        if (k > 0) & (k < columns):
            bound = _search(logits_ptr, columns, k.to(tl.int64), bound, best, temperature, least, True, BLOCK)
        total = _total(logits_ptr, columns, bound, best, temperature, least, BLOCK)
        if p < 1:
            need = share_of(total, p.to(tl.float64))
            nucleus = _search(logits_ptr, columns, need, bound, best, temperature, least, False, BLOCK)
            bound = tl.maximum(bound, nucleus)
            total = _total(logits_ptr, columns, bound, best, temperature, least, BLOCK)
        goal = goal_of(tl.load(uniform_ptr + row), total)
        token = columns - 1
        before = tl.full((), 0, tl.int64)
        for start in range(0, columns, BLOCK):
            i, _, weight = _kept(logits_ptr, start, columns, bound, best, temperature, least, BLOCK)
            passed = before + tl.cumsum(weight, 0) > goal
            token = tl.minimum(token, tl.min(tl.where(passed, i, columns - 1), 0))
            before += tl.sum(weight)
        tl.store(out_ptr + row, token.to(tl.int64))
