"""The sampler over runner rows: edits as Transformers makes them, logprobs, and that bits do not depend on company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from quire.reference.sampling import likeliest
from quire.sampling import noise, processors
from quire.sampling.params import SamplingParams
from quire.sampling.sampler import Sampler
from tests.torch_only.sampling_helpers import HostBackend, settings

V = 200


def rows_of(count, seed=0, vocabulary=V):
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def ints(*values):
    return np.asarray(values, dtype=np.int64)


class Recorder(HostBackend):
    """Keeps the logits that reach the device's ``sample`` and counts copies to the device."""

    def __init__(self):
        self.seen, self.copies = None, 0

    def sample(self, logits, settings):
        self.seen, self.settings = logits.clone(), settings
        return super().sample(logits, settings)

    def to_device(self, array):
        self.copies += 1
        return super().to_device(array)


def processed(params, logits, prompt=(), output=(), eos=()):
    """What one row's logits become."""
    sampler = Sampler(Recorder(), len(logits))
    sampler.admit(3, params, 1, list(prompt), list(output), list(eos))
    sampler.sample(logits[None].clone(), ints(3), ints(len(prompt) + len(output)))
    return sampler.backend.seen[0]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_transformers(penalty):
    row, prompt, output = rows_of(1)[0], [5, 9, 9, 3], [7, 5]
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), row[None].clone())[0]
    mine = processed(SamplingParams(repetition_penalty=penalty), row, prompt, output)
    assert torch.allclose(mine, expected, rtol=1e-6, atol=0)
    assert not torch.equal(mine, row)


def test_frequency_and_presence_count_the_output_alone():
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    row, output = rows_of(1)[0], [7, 5, 7, 7]
    expected = row.clone()
    expected[7] -= 3 * 0.5 + 0.25
    expected[5] -= 0.5 + 0.25
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    assert torch.allclose(processed(params, row, [5, 9], output), expected, rtol=1e-6, atol=1e-7)


def test_all_penalties_together_in_vllms_order():
    row = rows_of(1)[0]
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=-0.25, repetition_penalty=1.5, logit_bias={9: 4.0})
    expected = row.clone()
    expected[9] += 4.0
    for token in (5, 7, 9):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[7] -= 2 * 0.5 - 0.25
    assert torch.allclose(processed(params, row, [5, 9], [7, 7]), expected, rtol=1e-6, atol=1e-7)


@given(
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    output=st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_bad_words_are_transformers(words, output):
    """Transformers searches prompt and output alike; with an empty prompt the two must agree."""
    row = rows_of(1, vocabulary=6)[0]
    processor = hf.NoBadWordsLogitsProcessor([list(w) for w in words], eos_token_id=None)
    expected = processor(torch.tensor([output]), row[None].clone())[0]
    assert torch.equal(processed(SamplingParams(bad_words_token_ids=words), row, [], output), expected)


def test_allowed_tokens_bias_and_minimum_length():
    row = rows_of(1)[0]
    mine = processed(SamplingParams(allowed_token_ids=[4, 8, 4], logit_bias={8: 2.0, 9: 5.0}), row)
    assert torch.isfinite(mine).nonzero().flatten().tolist() == [4, 8]
    assert mine[4] == row[4]
    assert mine[8] == row[8] + 2.0
    params = SamplingParams(min_tokens=2, stop_token_ids=[6], ignore_eos=True)
    for output, masked in (([], [2, 6]), ([1], [2, 6]), ([1, 1], [])):
        mine = processed(params, row, [1, 2, 3], output, eos=[2])
        assert torch.isneginf(mine).nonzero().flatten().tolist() == masked


def random_params(rng, index):
    """Parameters that between them use every feature."""
    some = {
        "temperature": float(rng.choice([0.0, 0.6, 1.0])),
        "top_k": int(rng.choice([0, 5, 50])),
        "top_p": float(rng.choice([1.0, 0.8])),
        "min_p": float(rng.choice([0.0, 0.05])),
    }
    extras = [
        {"presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.2},
        {"logit_bias": {int(t): float(b) for t, b in zip(rng.integers(0, V, 3), rng.normal(size=3), strict=True)}},
        {"allowed_token_ids": rng.integers(0, V, 50).tolist()},
        {"bad_words_token_ids": [[int(t)] for t in rng.integers(0, V, 20)] + rng.integers(0, V, (20, 2)).tolist()},
        {"min_tokens": 5, "stop_token_ids": [1, 2]},
        {"logprobs": int(rng.integers(0, 6))},
        {},
    ]
    for extra in (extras[index % 8], extras[int(rng.integers(0, 8))]):
        some.update(extra)
    return SamplingParams(**some)


def test_tokens_and_logprobs_do_not_depend_on_company():
    """24 rows of every kind, 12 steps: all together, alone, and in changing company that comes and goes."""
    rng, count, steps = np.random.default_rng(2), 24, 12
    params = [random_params(rng, i) for i in range(count)]
    prompts = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(count)]
    logits = [rows_of(count, seed=s) for s in range(steps)]

    def run(groups_of_step):
        sampler = Sampler(HostBackend(), V)
        for i in range(count):
            sampler.admit(i, params[i], 100 + i, prompts[i], [], [0])
        seen = [[] for _ in range(count)]
        for step in range(steps):
            for group in groups_of_step(step):
                at = ints(*[len(prompts[i]) + step for i in group])
                result = sampler.sample(logits[step][list(group)].clone(), ints(*group), at)
                assert result.errors == []
                sampler.append(ints(*group), ints(*result.token_ids))
                for i, token, entry in zip(group, result.token_ids, result.logprobs, strict=True):
                    assert (entry is None) == (params[i].logprobs is None)
                    seen[i].append((token, entry))
        return seen

    together = run(lambda step: [range(count)])
    assert run(lambda step: [[i] for i in range(count)]) == together
    orders = [np.random.default_rng(s).permutation(count).tolist() for s in range(steps)]
    assert run(lambda step: [orders[step][:step], orders[step][step:]]) == together


def test_resumed_and_forked_rows_go_on_as_if_nothing_had_happened():
    params = SamplingParams(
        frequency_penalty=1.0, repetition_penalty=1.1, bad_words_token_ids=[[1, 2], [3]], min_tokens=3, temperature=0.9
    )
    prompt, output = [1, 2, 3], [4, 1, 9]
    whole, resumed = Sampler(HostBackend(), 12), Sampler(HostBackend(), 12)
    whole.admit(0, params, 5, prompt, [], [0])
    for token in output:
        whole.append(ints(0), ints(token))
    resumed.admit(7, params, 5, prompt, output, [0])
    whole.fork(0, 1, noise.child_seed(5, 1))
    resumed.admit(2, params, noise.child_seed(5, 1), prompt, output, [0])
    for step in range(30):
        logits = rows_of(1, step, 12).expand(2, -1)
        at = ints(6 + step, 6 + step)
        first = whole.sample(logits.clone(), ints(0, 1), at)
        second = resumed.sample(logits.clone(), ints(7, 2), at)
        assert first.token_ids == second.token_ids
        whole.append(ints(0, 1), ints(*first.token_ids))
        resumed.append(ints(7, 2), ints(*second.token_ids))
    assert whole.state.rows[0].counts.counts.sum() == 33


def test_noise_is_that_of_seed_and_position():
    sampler, logits = Sampler(HostBackend(), V), rows_of(1)
    sampler.admit(0, SamplingParams(), -3, [1])
    drawn = [sampler.sample(logits.clone(), ints(0), ints(p)).token_ids[0] for p in range(50)]
    u = noise.uniform(np.full(50, (1 << 64) - 3, np.uint64), np.arange(50))
    assert drawn == HostBackend().sample(logits.expand(50, -1), settings(50, u)).tolist()
    assert len(set(drawn)) > 3


def test_logprobs_are_of_the_raw_logits():
    params = SamplingParams(temperature=0.0, logprobs=3, logit_bias={11: 100.0}, repetition_penalty=1.5)
    sampler, logits = Sampler(HostBackend(), V), rows_of(2)
    sampler.admit(0, params, 1, [5, 6])
    sampler.admit(1, SamplingParams(temperature=0.0), 1, [5])
    for rows in (ints(0), ints(1, 0)):  # alone the logits are copied whole, in company the row
        result = sampler.sample(logits[: len(rows)].flip(0).clone(), rows, ints(*[9] * len(rows)))
        assert result.token_ids[-1] == 11
        entry = result.logprobs[-1]
        expected = torch.log_softmax(logits[0], -1)
        best = expected.topk(3)
        assert entry.token_ids == [11, *best.indices.tolist()]
        assert np.allclose(entry.logprobs, [expected[11], *best.values.tolist()], rtol=0, atol=2e-6)
        assert entry.rank == int((expected > expected[11]).sum()) + 1
    assert result.logprobs[0] is None


def test_prompt_logprobs():
    sampler, logits, following = Sampler(HostBackend(), V), rows_of(30), np.arange(30)
    sampler.admit(4, SamplingParams(prompt_logprobs=2), 1, [5, 6])
    entries = sampler.prompt_logprobs(logits, following, 4)
    expected = torch.log_softmax(logits, -1)
    assert [e.token_ids[0] for e in entries] == following.tolist()
    assert np.allclose([e.logprobs[0] for e in entries], expected[following, following], rtol=0, atol=2e-6)
    assert [e.token_ids[1:] for e in entries] == expected.topk(2).indices.tolist()
    assert all(e.rank == 1 for e in entries if e.token_ids[0] == e.token_ids[1])


def test_likeliest_breaks_ties_by_id_whatever_is_asked():
    logits = (rows_of(5, vocabulary=3000) / 2).round() / 2
    logits[0, :7] = torch.tensor([0.0, -0.0, 0.0, -1.0, -torch.inf, torch.finfo().max, torch.finfo().min])
    expected = np.stack([np.lexsort((np.arange(3000), -row)) for row in logits.numpy()])
    for count in (0, 1, 20, 3000):
        assert likeliest(logits, count).tolist() == expected[:, :count].tolist()


def test_a_row_without_tokens_fails_alone():
    sampler, logits = Sampler(HostBackend(), V), rows_of(4)
    sampler.admit(0, SamplingParams(allowed_token_ids=[3], bad_words_token_ids=[[3]], logprobs=1), 1, [1])
    for row in (1, 2, 3):
        sampler.admit(row, SamplingParams(temperature=row % 2), 1, [1])
    alone = sampler.sample(logits[2:3].clone(), ints(2), ints(1)).token_ids
    logits[1, 5], logits[3, 8] = torch.nan, torch.inf
    result = sampler.sample(logits.clone(), ints(0, 1, 2, 3), ints(1, 1, 1, 1))
    assert result.token_ids == [-1, -1, *alone, -1]
    assert [i for i, _ in result.errors] == [0, 1, 3]
    assert [m.split(":")[0] for _, m in result.errors] == [
        "no token is left to choose from", "the model's logits hold NaN", "a logit is infinite",
    ]  # fmt: skip
    assert result.logprobs == [None] * 4


def pack(allowed):
    """Grammar engines' packing: token t is bit t % 32 of word t // 32."""
    words = np.zeros((len(allowed), (V + 31) // 32), dtype=np.uint32)
    for i, tokens in enumerate(allowed):
        for t in tokens:
            words[i, t // 32] |= np.uint32(1 << (t % 32))
    return torch.from_numpy(words.view(np.int32))


def test_bitmask(monkeypatch):
    allowed = [[0, 31, 32, 199], [63, 64], [], list(range(V))]
    for elements in (1, 1 << 22):
        monkeypatch.setattr(processors, "BITMASK_ELEMENTS", elements)
        logits = rows_of(4)
        processors.apply_bitmask(logits, pack(allowed))
        assert [torch.isfinite(row).nonzero().flatten().tolist() for row in logits] == allowed
        logits = rows_of(4)
        processors.apply_bitmask(logits, pack(allowed[1:2]), torch.tensor([2]))
        assert torch.isfinite(logits).sum(1).tolist() == [V, V, 2, V]
        short = rows_of(1)
        processors.apply_bitmask(short, pack([[1, 40]])[:, :2])  # a grammar over fewer tokens than the model's
        assert torch.isfinite(short).nonzero()[:, 1].tolist() == [1, 40]


def test_sampling_under_a_bitmask():
    sampler, logits = Sampler(HostBackend(), V), rows_of(2)
    for row in (0, 1):
        sampler.admit(row, SamplingParams(logprobs=1), row, [1])
    result = sampler.sample(logits.clone(), ints(0, 1), ints(1, 1), pack([[150], []]))
    assert result.token_ids == [150, -1]
    assert result.logprobs[0].logprobs[0] == pytest.approx(torch.log_softmax(logits[0], -1)[150].item(), abs=2e-6)


def test_plain_greedy_rows_cost_one_call_and_no_copy():
    backend = Recorder()
    sampler = Sampler(backend, V)
    for row in range(8):
        sampler.admit(row, SamplingParams(temperature=0.0), row, [1])
    rows, logits = ints(*range(8)), rows_of(8)
    sampler.sample(logits, rows, ints(*[4] * 8))
    before = backend.copies
    result = sampler.sample(logits, rows, ints(*[5] * 8))
    assert result.token_ids == logits.argmax(-1).tolist()
    assert backend.copies == before
    assert backend.settings.all_greedy
    sampler.release(7)
    sampler.admit(7, SamplingParams(temperature=1.0), 3, [1])
    sampler.sample(logits, rows, ints(*[6] * 8))
    assert not backend.settings.all_greedy  # new settings are seen at once
    assert backend.settings.temperature.tolist() == [0.0] * 7 + [1.0]
