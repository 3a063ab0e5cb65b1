"""Native sampling against the contract's definition, and its bits against themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.reference import sampling as reference
from quire_cpu import native
from tests.torch_only.sampling_helpers import distribution
from tests.torch_only.sampling_helpers import settings as settings_of

FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_the_same_tokens_as_the_definition(isa, data):
    """Weights may differ in the last place, so that a token may differ where the noise hits the border between two: that
    is one case in a million, and the seeds are fixed."""
    rows, vocabulary = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 7, 63, 64, 65, 1000, 20_000]))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * data.draw(st.sampled_from([0.0, 1.0, 5.0, 12.0]))
    if data.draw(st.booleans(), "ties"):
        logits = logits.round()
    if data.draw(st.booleans(), "masked"):
        logits[torch.rand(logits.shape, generator=generator) < 0.9] = -torch.inf
    pick = lambda *values: [data.draw(st.sampled_from(values)) for _ in range(rows)]  # noqa: E731
    batch = settings_of(
        rows, torch.rand(rows, dtype=torch.float64, generator=generator), temperature=pick(0.0, 0.3, 1.0, 2.5),
        top_k=pick(0, 1, 2, 40, 999, vocabulary), top_p=pick(1.0, 0.95, 0.5, 0.01), min_p=pick(0.0, 0.02, 0.5),
    )  # fmt: skip
    assert native.sample(logits, batch).tolist() == reference.sample(logits, batch).tolist()


@pytest.mark.parametrize("top_p", [0.9, 0.999])
def test_a_flat_row_needs_more_than_the_first_candidates(isa, top_p):
    logits = torch.randn(50, 30_000) * 0.01
    batch = settings_of(50, (torch.arange(50) + 0.5) / 50, top_p=top_p)
    assert native.sample(logits, batch).tolist() == reference.sample(logits, batch).tolist()


def test_tokens_come_as_often_as_they_should(isa):
    count, options = 20_000, dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.01)
    row = torch.randn(300) * 2
    batch = settings_of(count, torch.rand(count), **options)
    drawn = native.sample(row.expand(count, 300).contiguous(), batch)
    expected = distribution(row, **options)
    found = torch.bincount(drawn, minlength=300).double() / count
    assert (found - torch.from_numpy(expected)).abs().max() < 0.015
    assert not found[torch.from_numpy(expected) == 0].any()


def test_bits_do_not_depend_on_rows_or_threads(isa):
    logits, uniform = torch.randn(70, 20_011) * 4, torch.rand(70, dtype=torch.float64)
    options = dict(temperature=1.1, top_p=0.97)
    whole = native.sample(logits, settings_of(70, uniform, **options))
    scores = native.logprobs(logits, whole, 20)
    for threads in (1, 2, 5):
        native.set_threads(threads, pin=False, spin_us=0)
        for begin, end in ((0, 1), (3, 5), (11, 70), (0, 70)):
            part = native.sample(logits[begin:end], settings_of(end - begin, uniform[begin:end], **options))
            assert torch.equal(part, whole[begin:end])
            for a, b in zip(native.logprobs(logits[begin:end], part, 20), scores, strict=True):
                assert torch.equal(a, b[begin:end])


def test_rows_without_a_token(isa):
    logits = torch.randn(6, 1000)
    logits[0], logits[1, 999], logits[2, 3], logits[3, 7] = -torch.inf, torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 1.0):
        tokens = native.sample(logits, settings_of(6, 0.5, temperature=temperature)).tolist()
        assert tokens[:3] == [-1, -1, -1]
        assert min(tokens[3:]) >= 0
    _, values, _ = native.logprobs(logits, torch.zeros(6, dtype=torch.int64), 2)
    assert values[:3].isnan().all()
    assert values[3:].isfinite().all()


def test_errors_name_the_field():
    batch = settings_of(3, 0.5)
    with pytest.raises(ValueError, match=r"temperature is torch.float32 \(3,\), expected torch.float32 \(2,\)"):
        native.sample(torch.zeros(2, 5), batch)
    with pytest.raises(ValueError, match="logits must be float32"):
        native.sample(torch.zeros(3, 5, dtype=torch.float64), batch)
    with pytest.raises(IndexError, match="not in a vocabulary of 5"):
        native.logprobs(torch.zeros(1, 5), torch.tensor([5]), 2)
