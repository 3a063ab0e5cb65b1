"""The experts of each token: scores of the router's logits, the largest few, and their gates.

The reference is ``quire.reference.ops.route``. One program has a token; of equal scores the first is chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SCORES = {"softmax": 0, "sigmoid": 1}


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, gates_ptr, experts_ptr, stride, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Grid (tokens). logits [tokens, EXPERTS], bias [EXPERTS]; gates float32 and experts int64 [tokens, CHOSEN]."""
    token = tl.program_id(0).to(tl.int64)
    e, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + token * stride + e, mask=e < EXPERTS, other=float("-inf")).to(tl.float32)
    if SCORE == 0:
        score = tl.exp(logits - tl.max(logits, 0))
        score = score / tl.sum(score, 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-logits))
    wanted = score
    if BIAS:
        wanted += tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0).to(tl.float32)
    wanted = tl.where((e < EXPERTS) & (wanted == wanted), wanted, float("-inf"))  # what is no number comes last
    gates, experts = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int64)
    left = e < EXPERTS
    for i in range(CHOSEN):
        best = tl.argmax(tl.where(left, wanted, float("-inf")), 0, tie_break_left=True)
        gates = tl.where(j == i, tl.sum(tl.where(e == best, score, 0.0), 0), gates)
        experts = tl.where(j == i, best.to(tl.int64), experts)
        left = left & (e != best)
    if NORMALIZE:
        gates = gates / tl.sum(gates, 0)
    at = token * CHOSEN + j
    tl.store(gates_ptr + at, gates, mask=j < CHOSEN)
    tl.store(experts_ptr + at, experts, mask=j < CHOSEN)


def route(
    logits: Tensor, chosen: int, score: str, normalize: bool = True, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> (gates float32 [T, chosen], experts int64 [T, chosen]), largest first."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tokens, count = logits.shape
    gates = torch.empty((tokens, chosen), dtype=torch.float32, device=logits.device)
    experts = torch.empty((tokens, chosen), dtype=torch.int64, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits, logits if bias is None else bias, gates, experts, logits.stride(0), EXPERTS=count, CHOSEN=chosen,
            BLOCK=max(16, triton.next_power_of_2(count)), BLOCK_K=triton.next_power_of_2(chosen),
            SCORE=SCORES[score], BIAS=bias is not None, NORMALIZE=normalize, num_warps=1,
        )  # fmt: skip
    return gates, experts
