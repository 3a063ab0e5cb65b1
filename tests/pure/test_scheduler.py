"""The scheduler, case by case. Page size 4; the runner's tokens are made up by the test."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from quire.config import CacheConfig, ConfigError, SchedulerConfig
from quire.errors import QueueFull, RequestRefused
from quire.kv import check
from quire.kv.accounts import OWNED, SHARED
from quire.message import AddRequest, RowError, StepPlan, StepResult, TokenLogprobs
from quire.sampling.noise import child_seed
from quire.sampling.params import SamplingParams
from quire.scheduler import Scheduler
from quire.spec import KVGroupSpec, KVSpec

SPEC = KVSpec((KVGroupSpec((0,), 1, 8, "float32", 4),))


class Rig:
    def __init__(self, pages: int = 65, host: int = 0, spec: KVSpec = SPEC, caching: bool = True, **settings) -> None:
        defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 128, "async_scheduling": False}
        count = len(spec.groups)
        cache = CacheConfig(
            num_pages=(pages,) * count, num_host_pages=(host,) * count, enable_prefix_caching=caching
        )  # fmt: skip
        self.now = 100.0
        self.scheduler = Scheduler(SchedulerConfig(**(defaults | settings)), cache, spec, clock=lambda: self.now)
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}

    def add(self, name: str, prompt: int | list[int] = 5, **fields) -> None:
        extra = {key: fields.pop(key) for key in AddRequest.__struct_fields__ if key in fields}
        tokens = [ord(name[0]) * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        self.now += 0.001
        message = {"arrival": self.now, "seed": 1} | extra
        fields = {"max_tokens": 20} | fields
        self.scheduler.add(
            AddRequest(request_id=name, prompt_token_ids=tokens, sampling=SamplingParams(**fields), **message)
        )

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan

    def done(self, plan: StepPlan, token: int | list[int] = 7, **fields) -> list:
        tokens = [token] * len(plan.sample_rows) if isinstance(token, int) else token
        return self.take(self.scheduler.update(plan, StepResult(step=plan.step, token_ids=tokens, **fields)))

    def take(self, outputs: list) -> list:
        check(self.scheduler.blocks)
        for output in outputs:
            key = output.request_id, output.index
            self.outputs.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason:
                assert key not in self.reasons
                self.reasons[key] = output.finish_reason
        return outputs

    def step(self, token: int | list[int] = 7) -> StepPlan:
        plan = self.plan()
        self.done(plan, token)
        return plan

    def drain(self, visit: Callable[[StepPlan], None] = lambda plan: None) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work():
                return
            plan = self.scheduler.schedule()
            if plan is None:
                self.take(self.scheduler.take_outputs())
            else:
                visit(plan)
                self.done(plan)
        raise AssertionError("does not end")

    def names(self) -> list[str]:
        return [sequence.id for sequence in self.scheduler.running]


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks():
    rig = Rig(max_num_batched_tokens=16)
    rig.add("a")
    rig.add("b")
    rig.step()
    rig.add("c", 60)
    chunks = []
    while len(chunks) < 5:
        plan = rig.step()
        assert plan.num_tokens <= 16
        assert plan.counts[:2] == [1, 1], "the running ones come first"
        chunks.append(plan.counts[2])
    assert chunks == [14, 14, 14, 14, 4]
    assert [len(rig.outputs[name, 0]) for name in "abc"] == [6, 6, 1]


def test_an_early_long_prompt_leaves_later_decodes_their_tokens():
    rig = Rig(max_num_batched_tokens=16, long_prefill_token_threshold=6)
    rig.add("a", 60)
    rig.add("b")
    rig.step()
    assert [rig.step().counts for _ in range(2)] == [[6, 1], [6, 1]]


def test_a_steady_decode_step_carries_nothing_but_its_rows():
    rig = Rig()
    for name in "abc":
        rig.add(name, 5)
    rig.step()
    plan = rig.step()
    assert (plan.rows, plan.starts, plan.counts) == ([0, 1, 2], [5, 5, 5], [1, 1, 1])
    assert (plan.sample_from, plan.sample_rows) == ([0, 1, 2], [0, 1, 2])
    assert not any((plan.admitted, plan.released, plan.pages, plan.copies, plan.swap_in, plan.swap_out))
    rig.step()
    rig.step()
    assert [(row, group, first, len(pages)) for row, group, first, pages in rig.plan().pages] == [
        (0, 0, 2, 1), (1, 0, 2, 1), (2, 0, 2, 1),
    ]  # fmt: skip


def test_without_chunked_prefill_a_prompt_is_computed_whole_or_not_yet():
    rig = Rig(max_num_batched_tokens=16, enable_chunked_prefill=False)
    rig.add("a", 10)
    rig.add("b", 10)
    rig.add("c", 2)
    assert rig.step().counts == [10], "b does not fit, and c does not overtake it"
    assert rig.step().counts == [1, 10, 2]
    with pytest.raises(RequestRefused, match=r"17 tokens exceeds max_num_batched_tokens=16"):
        rig.add("d", 17)


def test_the_next_step_is_planned_before_the_result_is_in():
    rig = Rig(async_scheduling=True)
    rig.add("a", max_tokens=3)
    first, second = rig.plan(), rig.plan()
    assert (second.starts, second.counts) == ([5], [1])
    with pytest.raises(RuntimeError, match="2 steps are in flight"):
        rig.scheduler.schedule()
    rig.done(first)
    third = rig.plan()
    rig.done(second)
    assert rig.scheduler.schedule() is None, "max_tokens is known ahead"
    rig.done(third)
    assert (rig.outputs["a", 0], rig.reasons["a", 0]) == ([7, 7, 7], "length")
    assert not rig.scheduler.has_work()


def test_without_async_scheduling_the_calls_alternate_strictly():
    rig = Rig()
    rig.add("a")
    plan = rig.plan()
    with pytest.raises(RuntimeError, match="1 steps are in flight"):
        rig.scheduler.schedule()
    with pytest.raises(ValueError, match="not the oldest"):
        rig.scheduler.update(plan, StepResult(step=plan.step + 1, token_ids=[1]))
    with pytest.raises(ValueError, match="2 tokens for 1 samples"):
        rig.scheduler.update(plan, StepResult(step=plan.step, token_ids=[1, 2]))
    rig.done(plan)


def test_what_a_stop_token_made_superfluous_is_dropped_and_never_published():
    rig = Rig(async_scheduling=True)
    rig.add("a", 7, eos_token_ids=[2])
    first, second = rig.plan(), rig.plan()
    out = rig.done(first, 2)
    assert (out[0].finish_reason, out[0].stop_token_id, out[0].token_ids) == ("stop", 2, [2])
    assert rig.done(second, 9) == []
    # Position 7, that of the stop token, would have filled the second page: only the first is known.
    assert len(rig.scheduler.blocks.groups[0].pool.by_hash) == 1
    rig.add("b", 3)
    plan = rig.plan()
    assert plan.released == [0]
    assert plan.admitted[0].row == 0


@pytest.mark.parametrize(
    ("fields", "tokens", "reason", "count"),
    [
        ({"eos_token_ids": [2]}, [5, 2], "stop", 2),
        ({"eos_token_ids": [2], "ignore_eos": True, "max_tokens": 3}, [5, 2, 2], "length", 3),
        ({"eos_token_ids": [2], "min_tokens": 3}, [2, 2, 2], "stop", 3),
        ({"stop_token_ids": [8, 9]}, [5, 9], "stop", 2),
        ({"stop_token_ids": [9], "ignore_eos": True, "eos_token_ids": [2]}, [2, 9], "stop", 2),
        ({"max_tokens": 1}, [5], "length", 1),
        ({"max_tokens": None}, [5] * 11, "length", 11),
    ],
)
def test_finish_conditions(fields, tokens, reason, count):
    rig = Rig(max_model_len=16)
    rig.add("a", 5, **fields)
    for token in tokens:
        assert not rig.reasons
        rig.step(token)
    assert rig.reasons == {("a", 0): reason}
    assert len(rig.outputs["a", 0]) == count
    assert not rig.scheduler.requests


def test_samples_share_one_prompt_computation_and_then_live_alone():
    rig = Rig()
    rig.add("a", 10, n=3, seed=5, eos_token_ids=[2])
    plan = rig.plan()
    assert (plan.rows, plan.counts) == ([0], [10])
    assert (plan.sample_from, len(set(plan.sample_rows))) == ([0, 0, 0], 3)
    parent, *children = plan.admitted
    assert [(c.index, c.forked_from, c.token_ids) for c in children] == [(1, 0, []), (2, 0, [])]
    assert [new.seed for new in plan.admitted] == [child_seed(5, i) for i in range(3)]
    assert parent.prompt_len == 10
    rig.done(plan, [4, 2, 6])
    assert rig.reasons == {("a", 1): "stop"}
    plan = rig.plan()
    assert plan.released == [children[0].row]
    # Two of three writers are left: the first copies the shared partial page, the second keeps it.
    assert len(plan.copies) == 1
    assert plan.num_tokens == 2
    rig.done(plan)
    rig.drain()
    assert [len(rig.outputs["a", i]) for i in range(3)] == [20, 1, 20]


def test_a_request_with_samples_waits_until_all_its_rows_are_free():
    rig = Rig(max_num_seqs=3)
    rig.add("a")
    rig.add("b", n=3)
    rig.add("c")
    rig.step()
    assert rig.names() == ["a"], "b needs three rows, and c does not overtake it"
    rig.scheduler.abort(["a"])
    rig.step()
    assert rig.names() == ["b"] * 3


def test_chunked_prompts_reserve_the_rows_of_their_samples():
    rig = Rig(max_num_seqs=3, max_num_batched_tokens=4)
    rig.add("a", 10, n=3)
    rig.add("b", 1)
    for _ in range(3):
        rig.step()
    assert rig.names() == ["a"] * 3


def test_prefix_hits_are_counted_reported_and_leave_a_token_to_compute():
    rig = Rig()
    rig.add("a", 12, max_tokens=1)
    assert rig.step().counts == [12]
    prompt = [ord("a") * 1000 + i for i in range(12)]
    rig.add("b", prompt)
    plan = rig.plan()
    assert (plan.starts, plan.counts) == ([8], [4])
    assert rig.done(plan)[0].num_cached_tokens == 8
    assert rig.step()
    stats = rig.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (24, 8, 24)
    rig.add("c", prompt, cache_salt="x")
    rig.add("d", prompt, adapter="x")
    assert rig.plan().starts[-2:] == [0, 0]


def test_prompt_logprobs_never_read_the_cache_and_come_with_the_first_output():
    rig = Rig(max_num_batched_tokens=5)
    rig.add("a", 12, max_tokens=1)
    rig.drain()
    prompt = [ord("a") * 1000 + i for i in range(12)]
    rig.add("b", prompt, prompt_logprobs=0, n=2, max_tokens=2)
    sent = []
    for start in (0, 5, 10):
        plan = rig.plan()
        assert (plan.starts, plan.prompt_logprobs) == ([start], [0])
        entries = [TokenLogprobs([prompt[p + 1]], [0.0], 1) for p in range(start, min(start + 5, 11))]
        sent += rig.done(plan, prompt_logprobs={0: entries})
    assert [entry and entry.token_ids[0] for entry in sent[0].prompt_logprobs] == [None, *prompt[1:]]
    assert sent[1].prompt_logprobs is None
    assert not rig.plan().prompt_logprobs


@pytest.mark.parametrize(("mode", "host", "kind"), [("recompute", 65, "r"), ("swap", 65, "s"), ("swap", 2, "r")])
def test_preemption_takes_the_latest_and_brings_it_back(mode, host, kind):
    rig = Rig(pages=7, host=host, preemption_mode=mode, caching=False)
    rig.add("a", 11, max_tokens=12)
    rig.add("b", 11, max_tokens=12)
    plans: list[StepPlan] = []
    rig.drain(plans.append)
    assert rig.scheduler.stats().preemptions == 1
    assert [len(rig.outputs[name, 0]) for name in "ab"] == [12, 12]
    assert sum(bool(plan.swap_out) for plan in plans) == (kind == "s") == sum(bool(plan.swap_in) for plan in plans)
    (again,) = [new for plan in plans[1:] for new in plan.admitted]
    assert (again.request_id, again.prompt_len) == ("b", 11)
    assert len(again.token_ids) > 11, "it comes back with what it has produced"


@pytest.mark.parametrize(("cost", "swaps"), [(0.5, True), (3.0, False)])
def test_auto_preempts_by_the_cheaper_way(cost, swaps):
    rig = Rig(pages=7, host=65, swap_page_cost=cost, caching=False)
    rig.add("a", 11, max_tokens=12)
    rig.add("b", 11, max_tokens=12)
    plans: list[StepPlan] = []
    rig.drain(plans.append)
    # 12 tokens in 3 pages: 2 * 3 * cost against 12.
    assert any(plan.swap_out for plan in plans) is swaps


def test_the_preempted_one_comes_before_newcomers():
    rig = Rig(pages=7, preemption_mode="recompute", caching=False)
    rig.add("a", 11, max_tokens=12)
    rig.add("b", 11, max_tokens=12)
    while not rig.scheduler.stats().preemptions:
        rig.step()
    rig.add("c", 1, max_tokens=2)
    order: list[str] = []
    rig.drain(lambda plan: order.extend(new.request_id for new in plan.admitted))
    assert order == ["b", "c"]


def test_priority_order_and_preemption_for_a_higher_priority():
    rig = Rig(max_num_seqs=2, policy="priority", priority_aging=0.0)
    rig.add("x", priority=5)
    rig.add("y", priority=3)
    rig.add("z", priority=4)
    rig.step()
    assert rig.names() == ["y", "z"]
    rig.add("u", priority=4)
    rig.step()
    assert rig.names() == ["y", "z"], "the same priority makes nobody leave"
    rig.add("v", priority=0)
    plan = rig.step()
    assert rig.names() == ["v", "y"]
    assert len(plan.rows) == 2
    order: list[str] = []
    rig.drain(lambda plan: order.extend(new.request_id for new in plan.admitted))
    assert order == ["z", "u", "x"]


def test_nobody_makes_way_for_a_prompt_that_the_budget_keeps_out():
    rig = Rig(policy="priority", enable_chunked_prefill=False, max_num_batched_tokens=8)
    rig.add("a", 2, priority=0)
    rig.add("c", 2, priority=5)
    rig.step()
    rig.add("b", 8, priority=1)
    rig.step()
    assert rig.names() == ["a", "c"]
    order: list[str] = []
    rig.drain(lambda plan: order.extend(new.request_id for new in plan.admitted))
    assert order == ["b"]
    assert rig.scheduler.stats().preemptions == 0


def test_fcfs_ignores_priority():
    rig = Rig(max_num_seqs=1)
    rig.add("x", priority=5)
    rig.add("y", priority=0)
    rig.step()
    assert rig.names() == ["x"]


@pytest.mark.parametrize(("aging", "served"), [(1.0, True), (0.0, False)])
def test_waiting_outweighs_priority_in_time(aging, served):
    rig = Rig(max_num_seqs=1, policy="priority", priority_aging=aging)
    rig.add("z", priority=5, max_tokens=1)
    for number in range(20):
        rig.add(f"u{number}", priority=0, max_tokens=1)
        rig.step()
        rig.now += 1.0
    assert (("z", 0) in rig.reasons) is served


def test_a_prefill_of_higher_priority_leaves_decodes_their_tokens():
    rig = Rig(policy="priority", max_num_batched_tokens=8)
    for name in "abc":
        rig.add(name, 2, priority=1)
    rig.step()
    rig.add("v", 40, priority=0)
    assert rig.step().counts == [5, 1, 1, 1]


def abort_waiting(rig: Rig) -> None:
    rig.add("b")


def abort_running(rig: Rig) -> None:
    rig.add("b", 30)
    rig.step()
    rig.step()


def abort_in_flight(rig: Rig) -> None:
    rig.add("b", n=2)
    rig.in_flight = [rig.plan(), rig.plan()]  # type: ignore[attr-defined]


def abort_between_chunks(rig: Rig) -> None:
    rig.add("b", 60, n=3)
    rig.step()


@pytest.mark.parametrize("when", [abort_waiting, abort_running, abort_in_flight, abort_between_chunks])
@pytest.mark.parametrize("how", ["abort", "deadline"])
def test_abort_and_deadline_at_any_moment(when, how):
    rig = Rig(async_scheduling=True)
    original = rig.add
    rig.add = lambda *args, **fields: original(*args, deadline=10.0, **fields)  # type: ignore[method-assign]
    when(rig)
    if how == "abort":
        rig.scheduler.abort(["b", "nobody"])
    else:
        rig.now += 10.1
        for plan in getattr(rig, "in_flight", [])[:1]:
            rig.done(plan)
        rig.scheduler.schedule()
    assert not rig.scheduler.requests
    assert rig.scheduler.blocks.groups[0].pool.owned == 0, "pages are free at once"
    assert len(rig.scheduler._free_rows) == 8
    for plan in [step.plan for step in rig.scheduler._in_flight]:
        rig.done(plan)
    rig.take(rig.scheduler.take_outputs())
    assert set(rig.reasons.values()) == {how}
    assert not rig.scheduler.has_work()


def test_abort_while_swapped_frees_the_host_pages():
    rig = Rig(pages=7, host=20, preemption_mode="swap", caching=False)
    rig.add("a", 11, max_tokens=12)
    rig.add("b", 11, max_tokens=12)
    while not rig.scheduler.stats().swapped:
        rig.step()
    rig.scheduler.abort(["b"])
    rig.drain()
    assert rig.scheduler.stats().swapped == 0
    assert len(rig.scheduler.blocks.groups[0].host.free) == 19


def test_an_error_ends_one_request_with_all_samples_and_no_other():
    rig = Rig(async_scheduling=True)
    rig.add("a", n=2)
    rig.add("b")
    first, second = rig.plan(), rig.plan()
    out = rig.done(first, errors=[RowError(first.sample_rows[1], "nan in logits")])
    errors = [(o.request_id, o.index, o.finish_reason, o.error, o.token_ids) for o in out if o.error]
    assert errors == [("a", 0, "error", "nan in logits", []), ("a", 1, "error", "nan in logits", [])]
    assert rig.outputs["b", 0] == [7]
    assert [o.request_id for o in rig.done(second)] == ["b"]
    rig.drain()
    assert rig.reasons["b", 0] == "length"


def test_resumed_samples_go_on_where_they_were():
    rig = Rig()
    rig.add("a", 5, n=3, max_tokens=4, eos_token_ids=[2], output_token_ids=[[7], [7, 2], [7, 7, 7]])
    rig.drain()
    assert rig.outputs == {("a", 0): [7, 7, 7], ("a", 1): [], ("a", 2): [7]}
    assert rig.reasons == {("a", 0): "length", ("a", 1): "stop", ("a", 2): "length"}


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        ([], {}, "prompt_token_ids is empty"),
        (128, {}, r"128 tokens.*max_model_len=128"),
        (5, {"n": 9}, r"n=9.*max_num_seqs=8"),
        (40, {"max_tokens": 60}, r"40 prompt tokens and up to 60 output.*25 pages of 4 tokens.*has 10"),
        (5, {"max_tokens": None}, r"up to 123 output tokens need 32 pages"),
        (5, {"n": 2, "output_token_ids": [[1]]}, "output_token_ids has 1 samples, n=2"),
        (5, {"max_tokens": 2, "output_token_ids": [[1, 2, 3]]}, "output_token_ids reaches 8 tokens, the limit is 7"),
    ],
)
def test_what_can_never_run_is_refused_with_numbers(prompt, fields, words):
    rig = Rig(pages=11)
    with pytest.raises(RequestRefused, match=words):
        rig.add("a", prompt, **fields)
    assert not rig.scheduler.has_work()


def test_what_just_fits_is_taken_and_finishes():
    rig = Rig(pages=11)
    rig.add("a", 30, max_tokens=11)  # the last token needs no slot: 40 in 10 pages
    rig.drain()
    assert len(rig.outputs["a", 0]) == 11


def test_the_waiting_queue_is_bounded_and_ids_are_unique():
    rig = Rig(max_waiting=2)
    rig.add("a")
    rig.add("b")
    with pytest.raises(QueueFull, match="max_waiting=2"):
        rig.add("c")
    with pytest.raises(RequestRefused, match="in use"):
        rig.add("b")
    rig.scheduler.abort(["a"])
    rig.add("c")
    rig.drain()
    assert len(rig.reasons) == 3


def test_aborted_requests_leave_nothing_behind_in_a_long_queue():
    rig = Rig(max_num_seqs=1)
    rig.add("x")
    rig.step()
    for number in range(1000):
        rig.add(f"a{number}", deadline=1e6)
        rig.scheduler.abort([f"a{number}"])
    scheduler = rig.scheduler
    assert len(scheduler.waiting._heap) < 100
    assert len(scheduler._deadlines._heap) < 100
    assert len(scheduler.requests) == 1


def test_stats_are_counters_and_gauges():
    rig = Rig(pages=33)
    rig.add("a", 6)
    rig.add("b", 6)
    plan = rig.step()
    stats = rig.scheduler.stats()
    assert (stats.running, stats.waiting, stats.steps) == (2, 0, 1)
    assert (stats.batch_tokens, stats.batch_requests, stats.generation_tokens) == (plan.num_tokens, 2, 2)
    assert (stats.pages_total, stats.pages_free, stats.kv_waste) == (32, 28, 0.25)
    rig.drain()
    after = rig.scheduler.stats()
    assert (after.pages_free, after.kv_waste, after.running) == (32, 0.0, 0)
    assert stats.running == 2, "a snapshot"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 0}, {"max_num_batched_tokens": 0}, {"max_model_len": 0}, {"max_waiting": 0},
        {"long_prefill_token_threshold": -1}, {"priority_aging": -1.0}, {"swap_page_cost": float("nan")},
        {"policy": "lifo"}, {"preemption_mode": "maybe"}, {"preemption_mode": "swap"},
        {"long_prefill_token_threshold": 4, "enable_chunked_prefill": False},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_honoured_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Rig(**settings)


def test_importing_the_scheduler_loads_neither_torch_nor_numpy():
    code = "import sys, quire.scheduler, quire.kv; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_statistics_say_who_holds_each_page_and_who_waits():
    rig = Rig(pages=17, max_num_seqs=3)
    rig.add("a", prompt=9, n=2)  # two samples that share the prompt's full pages
    rig.add("b", prompt=6)
    rig.add("c", prompt=5, priority=0)
    for _ in range(4):
        rig.step()
    stats = rig.scheduler.stats(pages=True)
    known = {(s.request_id, s.index): s for s in stats.sequences}
    assert [s.state for s in stats.sequences] == ["running"] * 3 + ["waiting"]
    assert known["c", 0].pages == [[]]
    assert known["c", 0].age == pytest.approx(rig.now - rig.scheduler.requests["c"].arrival)
    assert (known["a", 1].prompt_tokens, known["a", 1].output_tokens) == (9, len(rig.outputs["a", 1]))
    held = Counter(page for s in stats.sequences for page in s.pages[0])
    owned = {page: min(state - OWNED + 1, 2) for page, state in enumerate(stats.pages[0]) if state in (OWNED, SHARED)}
    assert {page: min(count, 2) for page, count in held.items()} == owned
    assert 2 in owned.values()
    assert rig.scheduler.stats().sequences is None
    rig.drain()
    assert rig.scheduler.stats(pages=True).sequences == []


def test_statistics_count_steps_by_their_size():
    rig = Rig()
    rig.add("a", prompt=9, max_tokens=3)
    rig.drain()
    stats = rig.scheduler.stats()
    assert (stats.step_sizes[:4], sum(stats.step_sizes)) == ([2, 0, 1, 0], stats.steps)  # 9 tokens, then one by one
    assert stats.step_tokens == 11


def test_a_failure_is_logged_with_the_requests_id(caplog):
    rig = Rig()
    rig.add("a")
    plan = rig.plan()
    rig.done(plan, errors=[RowError(plan.rows[0], "a secret of the prompt")])
    (line,) = caplog.records
    assert (line.request_id, line.levelname) == ("a", "ERROR")
    assert "secret" not in line.getMessage()
