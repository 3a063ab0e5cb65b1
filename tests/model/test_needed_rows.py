"""A step of which few tokens are needed computes the last layer's MLP for these alone."""

from __future__ import annotations

import pytest
import torch

from quire.conformance.model import Tiny
from quire.conformance.world import Row
from quire_cpu import make
from tests.model.model_helpers import Host


@pytest.mark.parametrize("backend", [Host, make], ids=["reference", "cpu"])
@pytest.mark.parametrize("needed", [[8, 9, 22], [22], [3, 0, 3], []])
def test_needed_rows(backend, needed):
    sequences = [Row(9, 9), Row(20, 1), Row(13, 13)]

    def run(rows):
        tiny = Tiny(backend(), "float32", "float32", 16, 64)
        tokens, batch = tiny.step(sequences)
        plan = tiny.backend.plan_attention(batch, tiny.kv_spec)
        return tiny, tiny.decoder.forward(tokens, batch, tiny.kv, plan, rows)

    rows = torch.tensor(needed, dtype=torch.int64)
    (tiny, every), (other, few) = run(None), run(rows)
    assert [len(part) for part in few] == [len(needed)] * 2
    exact = tiny.backend.capabilities.batch_invariant
    assert exact == (backend is make)
    if backend is Host:  # whose pages can be looked at: all tokens are in the cache
        for theirs, ours in zip(tiny.kv.pools, other.kv.pools, strict=True):
            assert torch.equal(theirs.nan_to_num(9e9), ours.nan_to_num(9e9))
    if needed:
        logits, expected = other.decoder.logits(few, torch.arange(len(needed))), tiny.decoder.logits(every, rows)
        torch.testing.assert_close(logits, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
