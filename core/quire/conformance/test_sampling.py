"""Sampling obeys its settings and the noise it is given, and agrees with the definition wherever that is clear-cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.conformance.ops import TRUTH, random
from quire.hardware import Backend, SamplingBatch

INF = float("inf")


def settings(backend: Backend, rows: int, uniform: Tensor, **values) -> SamplingBatch:
    """Settings for ``rows`` rows; each value is a number for all or a list."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        value = torch.as_tensor(values.get(name, default), dtype=torch.float64)
        return value.expand(rows).to(dtype).contiguous().to(backend.device)

    temperature = column("temperature", 1.0, torch.float32)
    return SamplingBatch(
        temperature=temperature,
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        uniform=uniform.double().to(backend.device),
        all_greedy=not bool((temperature != 0).any()),
        any_top_k="top_k" in values,
        any_top_p="top_p" in values,
        any_min_p="min_p" in values,
    )


def draw(backend: Backend, logits: Tensor, uniform: Tensor, **values) -> list[int]:
    tokens = backend.sample(logits.float().to(backend.device), settings(backend, len(logits), uniform, **values))
    assert tokens.dtype == torch.int64
    return tokens.tolist()


def nudged(value, factor: float):
    return [v * factor for v in value] if isinstance(value, list) else value * factor


def clear_cut(logits: Tensor, uniform: Tensor, **values) -> list[int | None]:
    """The definition's tokens; None where a slightly other noise, temperature or threshold would change the token."""
    answers = []
    for du, factor in ((0.0, 1.0), (-1e-3, 1.0), (1e-3, 1.0), (0.0, 0.999), (0.0, 1.001)):
        changed = {name: v if name == "top_k" else nudged(v, factor) for name, v in values.items()}
        near = (uniform + du).clamp(0, 1 - 1e-9)
        answers.append(TRUTH.sample(logits.double(), settings(TRUTH, len(logits), near, **changed)))
    same = torch.stack([a == answers[0] for a in answers]).all(0)
    return [int(t) if ok else None for t, ok in zip(answers[0], same, strict=True)]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": dict(temperature=0.3),
    "hot": dict(temperature=1.7),
    "top-k": dict(top_k=5),
    "top-p": dict(top_p=0.8),
    "min-p": dict(min_p=0.1),
    "all of them": dict(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    "a mix": dict(
        temperature=[1.0, 0.0, 0.5, 2.0] * 16, top_k=[0, 3, 10, 1] * 16, top_p=[0.5, 1.0, 0.9, 1.0] * 16,
        min_p=[0.0, 0.2, 0.0, 0.05] * 16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("vocabulary", "rows", "scale"), [(7, 64, 3.0), (1000, 64, 4.0), (50257, 16, 8.0)])
def test_clear_cut_rows_follow_the_definition(backend, vocabulary, rows, scale, kind):
    logits = random(rows, vocabulary, seed=vocabulary, scale=scale)
    uniform = (torch.arange(rows) + 0.5) / rows
    values = {name: v[:rows] if isinstance(v, list) else v for name, v in SETTINGS[kind].items()}
    expected, given = clear_cut(logits, uniform, **values), draw(backend, logits, uniform, **values)
    clear = [(n, e, g) for n, (e, g) in enumerate(zip(expected, given, strict=True)) if e is not None]
    assert len(clear) >= rows // 4, "the case is not clear enough to judge"
    wrong = [f"row {n}: {g}, should be {e}" for n, e, g in clear if e != g]
    assert not wrong, "; ".join(wrong[:5])


def test_the_noise_decides(backend):
    """Of V equally likely tokens, noise (i + 1/2) / V takes token i, in whatever row it stands."""
    count = 96
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert draw(backend, torch.zeros(count, count), (order + 0.5) / count) == order.tolist()


def test_the_same_noise_gives_the_same_tokens(backend):
    logits, uniform = random(32, 500, scale=2.0), torch.rand(32, generator=torch.Generator().manual_seed(2))
    assert draw(backend, logits, uniform) == draw(backend, logits, uniform)


def test_greedy_takes_the_largest_and_the_lowest_of_equals(backend):
    logits = random(9, 3000)
    logits[0, 17] = logits[0, 2900] = 50.0
    logits[1, :] = 0.0
    logits[2, :] = -INF
    logits[2, 5] = -1e30
    given = draw(backend, logits, torch.rand(9), temperature=0.0)
    assert given[:3] == [17, 0, 5]
    assert given == logits.argmax(-1).tolist()


def test_top_k_of_one_is_greedy(backend):
    logits = random(20, 400)
    assert draw(backend, logits, torch.linspace(0, 0.999, 20), top_k=1) == logits.argmax(-1).tolist()


def test_masked_tokens_are_never_drawn(backend):
    logits = torch.full((6, 700), -INF)
    allowed = [3, 250, 699]
    logits[:, allowed] = 0.0
    uniform = torch.tensor([0.0, 1e-12, 0.34, 0.66, 0.99, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(backend, logits, uniform) == [3, 3, 250, 250, 699, 699]


def test_a_row_without_a_token_gives_minus_one(backend):
    logits = random(4, 50)
    logits[1, :] = -INF
    logits[2, 7] = torch.nan
    for temperature in (0.0, 1.0):
        given = draw(backend, logits, torch.full((4,), 0.5), temperature=temperature)
        assert given[1:3] == [-1, -1]
        assert min(given[0], given[3]) >= 0


@pytest.mark.parametrize("columns", [7, 1000, 50257])
def test_penalties(backend, columns):
    """Of positive, negative, zero and masked logits: those named, by their own row's numbers, and no others."""
    logits = random(5, columns, seed=columns, scale=6.0)
    logits[0, 0], logits[1, 1], logits[2, 2] = 0.0, -INF, 0.0
    generator = torch.Generator().manual_seed(columns)
    named = [
        (row, token) for row in (0, 1, 2, 4) for token in torch.randperm(columns, generator=generator)[:300].tolist()
    ]
    rows, ids = torch.tensor(sorted({*named, (0, 0), (1, 1), (2, 2), (4, columns - 1)})).T.contiguous()
    count = torch.randint(0, 4, rows.shape, generator=generator).float()
    each = torch.tensor([[1.3, 0.5, 0.0], [1.0, -1.5, 0.25], [0.7, 0.0, -2.0], [1.0, 1.0, 1.0], [2.0, 0.1, 1.5]])
    penalties = torch.cat((count[None], each[rows].T))
    expected, given = logits.double(), logits.float().to(backend.device)
    TRUTH.penalize(expected, rows, ids, penalties.double())
    assert backend.penalize(given, *(x.to(backend.device) for x in (rows, ids, penalties.contiguous()))) is None
    given = given.cpu()
    assert torch.allclose(given.double(), expected, rtol=1e-6, atol=1e-5)
    left = torch.ones(5, columns, dtype=torch.bool)
    left[rows, ids] = False
    assert torch.equal(given[left], logits.float()[left]), "a logit that no entry names was changed"


def test_no_rows(backend):
    nothing = torch.zeros(0, dtype=torch.int64, device=backend.device)
    backend.penalize(logits := random(2, 5).float().to(backend.device), nothing, nothing, nothing.float().expand(4, 0))
    assert torch.equal(logits.cpu(), random(2, 5).float())
    assert draw(backend, torch.zeros(0, 10), torch.zeros(0)) == []
    ids, values, ranks = backend.logprobs(torch.zeros(0, 10, device=backend.device), torch.zeros(0).long(), 3)
    assert (ids.shape, values.shape, ranks.shape) == ((0, 4), (0, 4), (0,))


@pytest.mark.parametrize(("vocabulary", "count"), [(7, 7), (1000, 0), (1000, 300), (50257, 5)])
def test_logprobs(backend, vocabulary, count):
    """Against float64: the chosen token and the likeliest ones, with ties among them and masked tokens."""
    logits = (random(9, vocabulary, seed=vocabulary, scale=12.0).round() / 4).float()
    logits[0, vocabulary // 2 :] = -INF
    chosen = torch.arange(9) * 101 % vocabulary
    chosen[0] = 1
    ids, values, ranks = (
        x.cpu() for x in backend.logprobs(logits.to(backend.device), chosen.to(backend.device), count)
    )
    assert (ids.dtype, values.dtype, ranks.dtype) == (torch.int64, torch.float32, torch.int64)
    expected = logits.double().log_softmax(-1)
    best = expected.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(ids, torch.cat((chosen[:, None], best), 1))
    assert torch.allclose(values.double(), expected.gather(1, ids), rtol=1e-6, atol=2e-5)
    assert torch.equal(ranks, (expected > expected.gather(1, chosen[:, None])).sum(1) + 1)
