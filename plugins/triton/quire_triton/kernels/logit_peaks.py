"""The largest logit of every group of 32, and what the kernels of sampling share.

Sampling sorts nothing. All logits are read once here, at the speed of memory; what is largest in a row is then found
among its peaks (logit_groups.py), for k logits of a row reach the k-th largest of its peaks, and those that reach it lie
in the groups whose peaks do. Only their logits are read again, and the sums that a row needs over all of it
(logit_sums.py). One program has a row, or a fixed part of it, and sums are of whole numbers: the bits of a row are its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 32
"""Logits of a group: a line of memory."""
BLOCK = 512
"""Logits whose weights are summed together."""
CHUNK = 4096
"""Logits of one program."""
MOST = 256
"""Groups of a row that are looked at; where they do not settle it, the row is read as often as it takes."""


@triton.jit
def ordered(x):
    """int32 in the order of float32 x, in which 0 and -0 are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weigh(x, best, temperature, least):
    """exp((x - best) / temperature) in units of 2**-34, int64; 0 for less than ``least``. Whole numbers, so that their
    sums do not depend on order: see ``quire.reference.sampling``."""
    weight = tl.exp((x - best) / temperature) * 17179869184.0
    # To nearest: below 2**23 by an addition after which the last place is 1; above it are whole numbers only.
    weight = tl.where(weight < 8388608.0, (weight + 8388608.0) - 8388608.0, weight)
    return tl.where(weight >= least, weight, 0.0).to(tl.int64)


@triton.jit
def reach(order, amount, need):
    """The largest int32 t for which the sum of ``amount`` where order >= t is at least ``need``; the least where no t is."""
    threshold = tl.where(tl.sum(tl.where(order >= 0, amount, 0)) >= need, 0, -2147483647 - 1)
    for i in range(31):
        higher = threshold + (1 << (30 - i))
        threshold = tl.where(tl.sum(tl.where(order >= higher, amount, 0)) >= need, higher, threshold)
    return threshold


@triton.jit
def share_of(total, fraction):
    """The least whole number that is at least ``fraction`` (float64) of ``total`` (int64), and at least 1."""
    exact = fraction * total.to(tl.float64)
    whole = exact.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < exact).to(tl.int64), 1)


@triton.jit
def goal_of(uniform, total):
    """What the cumulative weight of the drawn token must exceed: the share ``uniform`` (float64, in [0, 1)) of ``total``."""
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit(do_not_specialize=["columns", "n_peaks"])
def logit_peaks_kernel(logits_ptr, peaks_ptr, stride, columns, n_peaks, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Grid (rows, blocks of GROUPS groups). logits float32 [rows, columns] -> peaks [rows, n_peaks]; a NaN makes one inf."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    i = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + row * stride + i, mask=i < columns, other=float("-inf"))
    peak = tl.max(tl.where(x == x, x, float("inf")), 1)
    tl.store(peaks_ptr + row * n_peaks + group, peak, mask=group < n_peaks)
