"""One token per row of logits: the definition of :meth:`quire.hardware.Backend.sample`, and of what goes before and beside
it, in plain PyTorch.

A row's token must not depend on the other rows, nor on how a device orders its sums. Floating-point sums do depend on
order, so every token's weight exp((logit - max) / temperature) is rounded to a multiple of 2**-34: sums of those are
exact in float64 for vocabularies up to 2**19, in any order. A token less likely than the likeliest by a factor
of 2**35 is never chosen; the total shifts by less than 2**-35 of the likeliest token for each token of the vocabulary.

The rest needs no sort of the vocabulary. Top-k and top-p each reduce to a threshold: the smallest logit that is kept.
The 256 largest logits give it for nearly every row; more of them give the same one for the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quire.hardware import SamplingBatch

ONE = 2.0**34
"""The weight of the likeliest token."""

CANDIDATES = 256
"""How many of the largest logits are looked at first, ..."""

WIDEN = 8
"""... and how many times more when they do not settle where a row is cut."""

BLOCK = 512
"""Tokens whose weights are summed together before the one among them is found."""

ELEMENTS = 1 << 20
"""Logits worked on at once: bounds temporary memory, and keeps it in cache."""


def penalize(logits: Tensor, rows: Tensor, ids: Tensor, penalties: Tensor) -> None:
    """Lower, in place, the logits [N, V] of tokens that have occurred: entry j is row rows[j] and token ids[j], int64 [M], no
    two of them the same. ``penalties`` float32 [4, M], for each entry: how often the output holds the token, then the
    row's repetition, frequency and presence penalty.

    Repetition (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1) divides a positive logit and
    multiplies a negative one; frequency is subtracted for each occurrence in the output, presence once.
    """
    count, repetition, frequency, presence = penalties
    old = logits[rows, ids]
    new = torch.where(old > 0, old / repetition, old * repetition)
    logits[rows, ids] = new - frequency * count - presence * (count > 0)


def sample(logits: Tensor, settings: SamplingBatch) -> Tensor:
    """One token per row of logits float32 (or float64) [N, V] -> int64 [N]; -1 for a row that has none.

    In order: temperature, min-p (keep tokens at least min_p times as likely as the likeliest), top-k (ties with the
    k-th kept), top-p (the fewest likeliest tokens of what is left whose mass reaches p, ties kept), then the inverse of
    the cumulative distribution over the kept tokens in vocabulary order, at the row's uniform number. A row of
    temperature 0 takes its largest logit, the lowest id among equals. A token at -inf is never chosen. A
    row gives -1 when its largest logit is not finite: all tokens masked, or a NaN or +inf among them.
    """
    best, tokens = argmax(logits)
    if not settings.all_greedy:
        drawn = torch.nonzero(settings.temperature != 0).flatten()
        for some in drawn.split(max(1, ELEMENTS // logits.shape[1])):
            tokens[some] = _draw(logits[some], best[some], settings, some)
    return torch.where(torch.isfinite(best), tokens, -1)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(largest logit [N], its id int64 [N], the lowest among equals); a NaN counts as the largest.

    In two levels, since a plain maximum over blocks runs at memory speed where an argmax over the row does not.
    """
    vocabulary = logits.shape[1]
    width = min(BLOCK, vocabulary)
    whole = vocabulary - vocabulary % width
    peaks = logits[:, :whole].unflatten(1, (-1, width)).amax(dim=-1)
    if whole < vocabulary:
        peaks = torch.cat((peaks, logits[:, whole:].amax(dim=-1, keepdim=True)), dim=1)
    best, block = peaks.max(dim=-1)
    ids = block[:, None] * width + torch.arange(width, device=logits.device)
    return best, block * width + logits.gather(1, ids.clamp(max=vocabulary - 1)).argmax(dim=-1)


def weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """exp((logits - best) / temperature) as whole multiples of 2**-34, scaled to integers: logits' dtype, [N, V]."""
    scaled = (logits - best[:, None]).div_(temperature[:, None])
    return scaled.exp_().mul_(ONE).round_()


def log_sum_exp(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) float64 [N], the same bits in any company; within 1e-5 of the exact value."""
    best = logits.amax(dim=-1)
    total = weights(logits, best, torch.ones_like(best)).sum(dim=-1, dtype=torch.float64)
    return best.double() + torch.log(total / ONE)


def logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits float32 [N, V]: (ids int64 [N, 1 + count], log-probabilities float32 of them, rank int64 [N] of chosen).

    ids are ``chosen`` (int64 [N]) and then the ``count`` likeliest tokens, the lower id first among equals. A rank counts
    the logits above the chosen one, from 1. The logarithm of the softmax, by :func:`log_sum_exp`: an entry does not
    depend on the other rows, nor on ``count``. A row whose largest logit is not finite gives NaN, and whatever ids.
    """
    parts = []
    step = max(1, ELEMENTS // logits.shape[1])
    for start in range(0, max(len(logits), 1), step):
        some, picks = logits[start : start + step], chosen[start : start + step, None]
        ids = torch.cat((picks, likeliest(some, count)), dim=1)
        values = (some.gather(1, ids).double() - log_sum_exp(some)[:, None]).float()
        parts.append((ids, values, (some > some.gather(1, picks)).sum(dim=1) + 1))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return columns[0], columns[1], columns[2]


def likeliest(logits: Tensor, count: int) -> Tensor:
    """Ids int64 [N, count] of the largest of logits float32 [N, V], best first; the lower id first among equals."""
    if count == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    bits = (logits.float() + 0.0).view(torch.int32)  # adding zero turns -0.0 into 0.0
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()  # an integer order that is the order of the floats
    reversed_ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    keys = (ordered << 32) | reversed_ids
    return keys.topk(min(count, logits.shape[1]), dim=1).indices


def _draw(logits: Tensor, best: Tensor, settings: SamplingBatch, rows: Tensor) -> Tensor:
    """Tokens of a few rows with a temperature; ``rows`` is where their settings stand."""
    weight = weights(logits, best, settings.temperature[rows].to(logits.dtype))
    if settings.any_min_p:
        weight *= weight >= settings.min_p[rows, None].to(logits.dtype) * ONE
    if settings.any_top_k or settings.any_top_p:
        top_k, top_p, vocabulary = settings.top_k[rows].long(), settings.top_p[rows].double(), logits.shape[1]
        top_k = torch.where((top_k <= 0) | (top_k > vocabulary), vocabulary, top_k)
        cut = torch.nonzero((top_k < vocabulary) | (top_p < 1)).flatten()
        kept = logits[cut] >= _threshold(logits[cut], weight[cut], top_k[cut], top_p[cut])[:, None]
        weight[cut] *= kept
    return _inverse_cdf(weight, settings.uniform[rows])


def _threshold(logits: Tensor, weight: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit that top-k and top-p keep, [N]; -inf where both are off."""
    threshold = torch.full_like(logits[:, 0], -torch.inf)
    open_rows = torch.arange(len(logits), device=logits.device)
    count = CANDIDATES
    while len(open_rows):
        count = min(count, logits.shape[1])
        found, done = _threshold_among(logits[open_rows], weight[open_rows], top_k[open_rows], top_p[open_rows], count)
        threshold[open_rows] = found
        open_rows = open_rows[~done]
        count *= WIDEN
    return threshold


def _threshold_among(logits: Tensor, weight: Tensor, top_k: Tensor, top_p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(threshold [N], whether the ``count`` largest logits were enough to know it [N])."""
    vocabulary = logits.shape[1]
    everything = logits.new_full((), -torch.inf)
    largest, ids = logits.topk(count, dim=-1)
    kth = largest.gather(1, (top_k - 1).clamp(max=count - 1)[:, None])[:, 0]
    kth = torch.where(top_k < vocabulary, kth, everything)
    done = (top_k <= count) | (top_k == vocabulary)
    total = (weight * (logits >= kth[:, None])).sum(dim=-1, dtype=torch.float64)
    mass = weight.gather(1, ids).cumsum(dim=-1, dtype=torch.float64)
    short = (mass < top_p[:, None] * total[:, None]).sum(dim=-1)  # candidates before the one that reaches top_p
    nucleus = largest.gather(1, short.clamp(max=count - 1)[:, None])[:, 0]
    nucleus = torch.where(top_p < 1, nucleus, everything)
    done &= (top_p >= 1) | (short < count) | (count == vocabulary)
    return torch.maximum(kth, nucleus), done


def _inverse_cdf(weight: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform * total, int64 [N]. Whole numbers throughout: exact."""
    rows, vocabulary = weight.shape
    width = min(BLOCK, vocabulary)
    padded = torch.nn.functional.pad(weight, (0, -vocabulary % width)).view(rows, -1, width)
    blocks = padded.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # [N, V / width]
    total = blocks[:, -1]
    goal = torch.minimum(torch.floor(uniform * total), total - 1)[:, None]
    block = (blocks <= goal).sum(dim=-1, keepdim=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0)
    inside = padded.gather(1, block[:, :, None].expand(-1, 1, width))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    within = (inside <= goal - before).sum(dim=-1)
    return (block[:, 0] * width + within).clamp_(max=vocabulary - 1)
