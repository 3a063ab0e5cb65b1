"""Sampling and log-probabilities in Triton against the definition: fuzzed, and where a row is read as often as it takes.

Run by test_interpreted_cases.py in a process where Triton interprets. A token's weight may differ by a rounding of exp, so that
one draw in ten million could differ; the cases are fixed, and none does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quire.reference import sampling
from quire_triton.kernels import logit_peaks, logprobs, sample
from tests.torch_only.sampling_helpers import settings

FUZZ = dict(deadline=None, derandomize=True)
VOCABULARIES = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 4095, 4097, 8200]))


def logits_of(seed: int, rows: int, columns: int, spread: float, ties: bool, masked: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator) * spread
    if ties:
        logits = (logits * 2).round() / 2
    if masked:
        logits[torch.rand(rows, columns, generator=generator) < 0.5] = -torch.inf
    return logits


@given(
    seed=st.integers(0, 1 << 20), columns=VOCABULARIES, spread=st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0]),
    ties=st.booleans(), masked=st.booleans(), temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    top_k=st.one_of(st.just(0), st.integers(1, 300)), top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)  # fmt: skip
@hypothesis_settings(max_examples=40, **FUZZ)
def test_sample_is_the_definition(seed, columns, spread, ties, masked, temperature, top_k, top_p, min_p):
    logits = logits_of(seed, 3, columns, spread, ties, masked)
    noise = np.random.default_rng(seed).random(3)
    values = settings(3, noise, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert sample.sample(logits, values).tolist() == sampling.sample(logits, values).tolist()


@pytest.fixture
def unsettled(monkeypatch):
    """How many rows of each call the groups did not settle."""
    counts = []
    kernel = sample.sample_wide_kernel

    class Counted:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                counts.append(int((arguments[7] == -2).sum()))
                return kernel[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(sample, "sample_wide_kernel", Counted())
    return counts


WIDE = {
    "a flat row": dict(spread=0.001, values=dict(top_p=0.7)),
    "a large k": dict(spread=2.0, values=dict(top_k=2500)),
    "a large k and top-p": dict(spread=1.0, values=dict(top_k=3000, top_p=0.8, min_p=0.01)),
    "ties beyond k": dict(spread=0.0, values=dict(top_k=7)),
    "ties beyond k, and top-p": dict(spread=0.0, values=dict(top_k=7, top_p=0.3)),
}


@pytest.mark.parametrize("kind", WIDE)
def test_rows_that_the_groups_do_not_settle(kind, unsettled):
    logits = logits_of(11, 3, 8500, WIDE[kind]["spread"], False, False)
    logits[2, 0] = 50.0  # of the first kind, one that they do
    values = settings(3, np.array([0.4, 1 - 2.0**-53, 0.5]), **WIDE[kind]["values"])
    assert sample.sample(logits, values).tolist() == sampling.sample(logits, values).tolist()
    assert unsettled == [2 if kind == "a flat row" else 3]


def test_most_rows_are_settled(unsettled):
    """What people ask for is found among the groups, at the size of a real vocabulary."""
    logits = logits_of(12, 2, 50_000, 4.0, False, False)
    for values in (dict(top_k=50), dict(top_p=0.9, temperature=0.8), dict(top_k=40, top_p=0.95, min_p=0.05)):
        settled = settings(2, np.array([0.3, 0.9]), **values)
        assert sample.sample(logits, settled).tolist() == sampling.sample(logits, settled).tolist()
    assert unsettled == [0, 0, 0]


def test_rows_that_lie_apart():
    wide = logits_of(13, 5, 1000, 2.0, False, False)
    part = wide[:, 100:700]
    values = settings(5, np.linspace(0.1, 0.9, 5), top_k=9)
    assert torch.equal(sample.sample(part, values), sample.sample(part.contiguous(), values))
    chosen = torch.arange(5)
    for one, other in zip(logprobs.logprobs(part, chosen, 3), sampling.logprobs(part, chosen, 3), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.7}])
def test_a_row_has_the_bits_that_it_has_alone(cut):
    logits = logits_of(14, 12, 5000, 3.0, False, False)
    logits[4:6] *= 1e-3
    noise = np.random.default_rng(14).random(12)
    temperature = [1.0, 0.0, 0.7] * 4
    together = sample.sample(logits, settings(12, noise, temperature=temperature, **cut)).tolist()
    scores = logprobs.logprobs(logits, torch.tensor(together), 5)
    for n in range(12):
        one = settings(1, noise[n : n + 1], temperature=temperature[n : n + 1], **cut)
        assert sample.sample(logits[n : n + 1], one).tolist() == together[n : n + 1]
        alone = logprobs.logprobs(logits[n : n + 1], torch.tensor(together[n : n + 1]), 2)
        assert torch.equal(alone[0][0], scores[0][n, :3])
        assert torch.equal(alone[1][0], scores[1][n, :3])
        assert torch.equal(alone[2][0], scores[2][n])


@given(
    seed=st.integers(0, 1 << 20), columns=VOCABULARIES, spread=st.sampled_from([0.0, 1.0, 12.0]), ties=st.booleans(),
    masked=st.booleans(), count=st.one_of(st.integers(0, 6), st.integers(7, logprobs.MOST_LOGPROBS)),
)  # fmt: skip
@hypothesis_settings(max_examples=25, **FUZZ)
def test_logprobs_are_the_definition(seed, columns, spread, ties, masked, count):
    logits = logits_of(seed, 2, columns, spread, ties, masked)
    chosen = torch.randint(columns, (2,), generator=torch.Generator().manual_seed(seed))
    given_, expected = logprobs.logprobs(logits, chosen, count), sampling.logprobs(logits, chosen, count)
    finite = torch.isfinite(logits.amax(1))
    assert torch.equal(given_[0][finite], expected[0][finite])
    torch.testing.assert_close(given_[1], expected[1], rtol=1e-6, atol=2e-5, equal_nan=True)
    assert torch.equal(given_[2][finite], expected[2][finite])


def test_not_finite_rows():
    logits = logits_of(15, 4, 700, 1.0, False, False)
    logits[0, 650], logits[1], logits[2, 3] = torch.nan, -torch.inf, torch.inf
    for values in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        given_ = sample.sample(logits, settings(4, np.full(4, 0.5), **values)).tolist()
        assert given_[:3] == [-1, -1, -1]
        assert given_[3] >= 0
    ids, scores, _ = logprobs.logprobs(logits, torch.zeros(4, dtype=torch.int64), 2)
    assert scores[:3].isnan().all()
    assert scores[3].isfinite().all()
    assert ((ids >= 0) & (ids < 700)).all()


def test_numbers_are_ordered():
    x = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, torch.inf])
    keys = torch.empty(16, dtype=torch.int32)
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, out_ptr, n):
        i = tl.arange(0, 16)
        tl.store(out_ptr + i, logit_peaks.ordered(tl.load(x_ptr + i, mask=i < n, other=0.0)))

    kernel[(1,)](x, keys, len(x))
    order = keys[: len(x)].tolist()
    assert order == sorted(order)
    assert order[4] == order[5]
    assert len(set(order)) == len(x) - 1
