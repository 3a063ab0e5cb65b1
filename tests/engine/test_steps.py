"""How a step is prepared and its result told: what a captured step reads is what the tables say, step after step."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from quire.config import make_config
from quire.engine.batch import RowTables
from quire.engine.core import EngineCore
from quire.engine.graphs import Inputs
from quire.message import AddRequest, NewRow, StepPlan, StepResult
from quire.sampling.params import SamplingParams
from quire.scheduler.scheduler import Scheduler
from quire.spec import KVGroupSpec, KVSpec
from tests.device.broken import Host

SPEC = KVSpec((KVGroupSpec((0,), 2, 16, "bfloat16", 16), KVGroupSpec((1,), 2, 16, "bfloat16", 32, window=64)))
LENGTH, ROWS = 200, 9


def plan_of(pages) -> StepPlan:
    return StepPlan(
        step=0, rows=[], starts=[], counts=[], sample_from=[], sample_rows=[], admitted=[], released=[], pages=pages,
        copies=[], swap_out=[], swap_in=[], prompt_logprobs=[],
    )  # fmt: skip


def test_the_inputs_of_a_captured_step_follow_the_tables():
    """Random decode steps of fewer and more rows, with pages that come and go, against the arrays of an eager step."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    tables, inputs = RowTables(ROWS, LENGTH, SPEC), Inputs(Host(), SPEC, 8, LENGTH)
    for row in range(ROWS):
        ids = numbers.integers(0, 1000, LENGTH).tolist()
        tables.admit(NewRow(row, "r", 0, ids, 1, SamplingParams(), 0, [], -1))
    rows = np.arange(3)
    for _ in range(300):
        if rng.random() < 0.3:
            rows = numbers.permutation(ROWS)[: rng.randint(1, 8)].astype(np.int64)
        if rng.random() < 0.5:
            changes = [(rng.randrange(ROWS), g, rng.randrange(3), [rng.randrange(50)]) for g in (0, 1, 0)]
            tables.write_pages(plan_of(changes))
        starts = numbers.integers(0, LENGTH, len(rows))
        inputs.fill(tables, rows, starts)
        wanted = tables.arrays(rows, starts, np.ones(len(rows), dtype=np.int64))
        count, batch = len(rows), inputs.batch
        token_ids, positions = inputs.tensors[0], batch.positions
        for given, array in (
            (token_ids, wanted.token_ids), (positions, wanted.positions), (batch.context_lens, wanted.context_lens),
            *zip(batch.slots, wanted.slots, strict=True),
        ):  # fmt: skip
            assert torch.equal(given[:count], torch.from_numpy(array))
            assert not given[count:].any(), "padding has context length 0 and writes to page 0"
        for table, array in zip(batch.block_tables, wanted.block_tables, strict=True):
            assert torch.equal(table[:count, : array.shape[1]], torch.from_numpy(array))
            assert not table[count:].any()
        assert batch.query_start.tolist() == list(range(9))
        assert batch.query_start_host.tolist() == list(range(9))
        assert batch.context_lens_host.tolist() == batch.context_lens.tolist()
        assert batch.max_context_len == max(wanted.context_lens)


class Slow:
    """A runner whose steps wait for permission, and tell when all that is left is the device's."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.core: EngineCore | None = None

    def run(self, plan: StepPlan) -> StepResult:
        assert self.core is not None
        self.begun.release()
        self.go.acquire()
        self.core.launched()
        self.begun.release()
        self.go.acquire()
        return StepResult(step=plan.step, token_ids=[5] * len(plan.sample_rows))


def test_a_result_is_told_when_the_next_step_is_launched_or_there_is_none():
    config, slow = make_config("x", max_model_len=64, num_pages=(9,)), Slow()
    spec = KVSpec((KVGroupSpec((0,), 2, 16, "bfloat16", 16),))
    core = slow.core = EngineCore(Scheduler(config.scheduler, config.cache, spec), slow.run)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    core.add(AddRequest(request_id="a", prompt_token_ids=[1, 2, 3], sampling=params, seed=0))
    told: list[int] = []
    core.fill(lambda: told.append(1))
    assert core.in_flight == 2
    for _ in range(2):  # the first step is launched, and ends
        slow.begun.acquire()
        slow.go.release()
    slow.begun.acquire()  # the second prepares
    assert not core.ready()
    assert not told
    slow.go.release()
    slow.begun.acquire()  # it is launched
    assert core.ready()
    assert core.collect()[0].token_ids == [5]
    assert not core.ready()
    slow.go.release()
    outputs = core.collect()  # nothing comes after it: told at its end
    assert outputs[0].finish_reason == "length"
    assert len(told) == 2
    core.close()


def test_a_step_that_raises_is_told_after_the_one_before():
    config = make_config("x", max_model_len=64, num_pages=(9,))
    spec = KVSpec((KVGroupSpec((0,), 2, 16, "bfloat16", 16),))
    number = iter(range(9))

    def run(plan: StepPlan) -> StepResult:
        if next(number):
            raise RuntimeError("the device is gone")
        return StepResult(step=plan.step, token_ids=[5])

    core = EngineCore(Scheduler(config.scheduler, config.cache, spec), run)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False)
    core.add(AddRequest(request_id="a", prompt_token_ids=[1], sampling=params, seed=0))
    assert core.step()[0].token_ids == [5]
    with pytest.raises(RuntimeError, match="the device is gone"):
        core.step()
    core.close()
