"""Log-probabilities of tokens under raw logits: before penalties, masks and temperature, as in vLLM."""

from __future__ import annotations

from torch import Tensor

from quire.hardware import Backend
from quire.message import TokenLogprobs


def token_logprobs(backend: Backend, logits: Tensor, chosen: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """For each row of logits float32 [N, V]: its chosen token (int64 [N]), its counts[i] likeliest ones and its rank."""
    most = min(max(counts, default=0), logits.shape[1])
    ids, values, ranks = backend.logprobs(logits, chosen, most)
    columns = zip(counts, ids.tolist(), values.tolist(), ranks.tolist(), strict=True)
    return [TokenLogprobs(tokens[: k + 1], numbers[: k + 1], rank) for k, tokens, numbers, rank in columns]
