"""The weights of each block of a row's logits, and how many of its logits are above a given one."""

from __future__ import annotations

import triton
import triton.language as tl

from quire_triton.kernels.logit_peaks import weigh


@triton.jit(do_not_specialize=["columns", "n_blocks"])
def logit_sums_kernel(
    logits_ptr, best_ptr, temperature_ptr, top_k_ptr, min_p_ptr, chosen_ptr, sums_ptr, above_ptr, stride, columns,
    n_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LOGPROBS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of BLOCKS sums). sums int64 [rows, n_blocks] of the weights of BLOCK logits each.

    Of sampling, the rows that are drawn and not cut by top-k. LOGPROBS: of all rows at temperature 1, with above int32
    [rows, n_blocks], how many are larger than that of chosen int64 [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    best = tl.load(best_ptr + row)
    wanted = (best > float("-inf")) & (best < float("inf"))
    temperature, least = 1.0, 0.0
    if not LOGPROBS:
        k = tl.load(top_k_ptr + row)
        temperature = tl.load(temperature_ptr + row)
        least = tl.load(min_p_ptr + row) * 17179869184.0
        wanted = wanted & (temperature != 0) & ((k <= 0) | (k >= columns))
    if wanted:
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(logits_ptr + row * stride + i, mask=i < columns, other=float("-inf"))
        at = row * n_blocks + block
        tl.store(sums_ptr + at, tl.sum(weigh(x, best, temperature, least), 1), mask=block < n_blocks)
        if LOGPROBS:
            picked = tl.load(logits_ptr + row * stride + tl.load(chosen_ptr + row))
            tl.store(above_ptr + at, tl.sum((x > picked).to(tl.int32), 1), mask=block < n_blocks)
