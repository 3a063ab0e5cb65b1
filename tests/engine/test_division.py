"""Memory and cores of several engines, divided: every byte and core accounted for, by properties that any division has."""

from __future__ import annotations

import random

import pytest

from quire.config import make_config
from quire.engine.build import survey
from quire.engine.division import Need, caches, divide, divide_cores, divided
from quire.errors import ConfigError, DoesNotFit, UserError
from quire.plugins import load

GIB = 1 << 30


@pytest.mark.parametrize("seed", range(50))
def test_caches_fill_the_budget_evenly(seed):
    rng = random.Random(seed)
    needs = []
    for _ in range(rng.randrange(1, 6)):
        least = rng.randrange(1, 1 << 24)
        token = rng.uniform(100, 1e6)
        needs.append(Need(rng.randrange(1 << 30), least, least + rng.choice([0, 1 << 20, 1 << 34]), token))
    fixed, least = sum(one.fixed for one in needs), sum(one.least for one in needs)
    assert caches(needs, fixed + least - 1) is None
    budget = fixed + least + rng.randrange(1 << 34)
    made = caches(needs, budget)
    assert made is not None
    assert all(one.least <= share <= one.most for one, share in zip(needs, made, strict=True))
    used = fixed + sum(made)
    assert used <= budget
    room = [(share / one.token, one) for share, one in zip(made, needs, strict=True) if one.least < share < one.most]
    if room:  # those that are bound by nothing else hold equally many tokens, and nothing is left over
        tokens = [count for count, _ in room]
        assert max(tokens) - min(tokens) <= 1 + max(1 / one.token for _, one in room)
        assert budget - used <= sum(one.token for _, one in room) * 0.01 + len(needs) + 1
    else:
        assert all(share in (one.least, one.most) for one, share in zip(needs, made, strict=True))


@pytest.mark.parametrize(
    ("cores", "usable", "asked", "made"),
    [
        ([0, 1], 2, [None, None], [(1, (0,)), (1, (1,))]),
        ([0, 1, 2, 3, 4], 5, [None, None], [(2, (0, 1)), (2, (2, 3))]),
        ([2, 3, 4, 5], 4, [1, None], [(1, (2,)), (3, (3, 4, 5))]),
        ([0], 1, [None, None, None], [(1, (0,))] * 3),
        ([0, 1], 2, [2, 2], [(2, (0, 1)), (2, (0, 1))]),
        ([0, 1, 2], 3, [2, 2], [(2, (0, 1)), (2, (0, 2))]),
        ([0, 1], 2, [8, None], [(8, (0, 1)), (1, (0,))]),
        (list(range(8)), 4, [None, None], [(2, (0, 1, 2, 3)), (2, (4, 5, 6, 7))]),  # a quota of four cores' time
    ],
)
def test_cores(cores, usable, asked, made):
    assert divide_cores(cores, usable, asked) == made


def surveys(*options):
    registry = load()
    return [survey(make_config("demo", device="cpu", **one), registry) for one in options]


def test_models_on_one_device_share_its_budget():
    found = surveys({"max_num_seqs": 8}, {"max_num_seqs": 4, "max_model_len": 256})
    one = divide(found[:1], ["a"], 0.005)
    both = divide(found, ["a", "b"], 0.005)
    budget = int(found[0].memory.total * 0.005)
    plans = [each.plan(config) for each, config in zip(found, both.configs, strict=True)]
    assert sum(plan.weights + plan.working + plan.kv for plan in plans) <= budget
    assert plans[1].requests == 4  # all that it could ever run
    # A share of two is at most what one has when it is alone (page 0, which holds nothing, comes on top).
    assert both.configs[0].cache.kv_cache_memory_bytes <= one.configs[0].cache.kv_cache_memory_bytes
    assert plans[0].kv <= both.configs[0].cache.kv_cache_memory_bytes + plans[0].page_bytes[0]
    assert "for 2 models" in both.report
    assert both.report.count("weights") == 2


def test_a_models_own_share_is_its_own():
    found = surveys({"gpu_memory_utilization": 0.004}, {})
    made = divide(found, ["a", "b"], None).configs
    own = int(found[0].memory.total * 0.004)
    plan = found[0].plan(made[0])
    assert plan.weights + plan.working + made[0].cache.kv_cache_memory_bytes == pytest.approx(own, abs=1)


def test_what_does_not_fit_is_refused_with_the_numbers():
    total = surveys({})[0].memory.total
    found = surveys({"kv_cache_memory_bytes": int(total * 0.4)}, {"kv_cache_memory_bytes": int(total * 0.4)})
    with pytest.raises(DoesNotFit, match="2 models do not fit together") as refused:
        divide(found, ["first", "second"], 0.5)
    text = str(refused.value)
    assert "first: weights" in text
    assert "second: weights" in text
    assert "budget" in text
    assert "--quantization" in text


def test_over_a_process():
    config = make_config("demo", device="cpu", kv_cache_memory_bytes=8 << 20)
    division = divided([config, config], ["a", "b"])
    assert [one.cache.kv_cache_memory_bytes for one in division.configs] == [8 << 20] * 2
    assert [len(one.cores) >= 1 for one in division.configs] == [True, True]
    with pytest.raises(ConfigError, match="^b: max_model_len"):
        divided([config, make_config("demo", device="cpu", max_model_len=1 << 20)], ["a", "b"])
    with pytest.raises(UserError, match=r"^a: .*no/such"):
        divided([make_config("no/such/folder", device="cpu"), config], ["a", "b"])
