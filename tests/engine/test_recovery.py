"""Who is blamed for a death: the one request that ends the engine, wherever it does, and nobody else."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path

import pytest

import quire.engine.client as client
import quire.engine.spare as spare
from quire import SamplingParams
from quire.engine.journal import Journal, digest
from quire.engine.recovery import MAX_KILLS, PROBE_TOKENS, OpenRequest, Recovery
from quire.message import AddRequest
from tests.engine import poisoned
from tests.engine.test_process import tokens, whole, with_engine

PROMPTS = [[5 + i, 17, 300, 42, 8, 99] * (1 + i % 3) for i in range(6)]


def params(i: int) -> SamplingParams:
    return SamplingParams(
        temperature=i % 2, seed=i, max_tokens=40, ignore_eos=True, detokenize=False, n=2 if i == 3 else 1
    )


async def innocents(llm) -> list:
    return [tokens(o) for o in await asyncio.gather(*(whole(llm, p, params(i)) for i, p in enumerate(PROMPTS)))]


@pytest.fixture(scope="module")
def undisturbed(tiny) -> list:
    return with_engine(tiny, innocents)


@pytest.mark.parametrize(
    ("poisons", "options"),
    [
        ([poisoned.ADMISSION], {}),
        ([poisoned.PLANNING], {}),
        ([poisoned.PREFILL, poisoned.DECODE], {}),
        ([poisoned.HANG], {"step_timeout": 6.0}),
    ],
    ids=["admission", "planning", "prefill and decode", "hang"],
)
def test_poison_is_failed_by_itself(tiny, undisturbed, monkeypatch, caplog, poisons, options):
    monkeypatch.setattr(client, "NEW_SHAPE_FACTOR", 1)
    monkeypatch.setattr(spare, "COMMAND", (sys.executable, str(Path(poisoned.__file__))))
    caplog.set_level(logging.INFO, "quire.client")

    async def scenario(llm):
        bad = [whole(llm, [token, 5, 6], params(0), request_id=f"poison-{token}") for token in poisons]
        good, *failed = await asyncio.gather(innocents(llm), *bad)
        stats = await llm.stats()
        assert stats.running == stats.waiting == 0
        assert stats.pages_free == stats.pages_total
        return good, failed, llm.engine.restarts

    good, failed, restarts = with_engine(tiny, scenario, spare_process=False, **options)
    assert good == undisturbed
    for token, output in zip(poisons, failed, strict=True):
        assert output.outputs[0].finish_reason == "error"
        assert "working on this request alone" in output.error
        assert f"request poison-{token} ended the engine again, running alone" in caplog.text
    assert caplog.text.count("and is failed") == len(poisons)
    assert restarts <= 1 + 2 * len(poisons)
    if "step_timeout" in options:
        assert "did not end within 6 s (--step-timeout 6)" in caplog.text


def test_requests_that_come_before_a_death_is_noticed_are_answered(tiny, undisturbed):
    async def scenario(llm):
        process = llm.engine._process
        process.kill()
        process.wait()  # the event loop, too: it cannot notice
        time.sleep(0.3)  # the socket has lost its other end
        return await innocents(llm), llm.engine.restarts

    assert with_engine(tiny, scenario) == (undisturbed, 1)


def test_a_request_that_was_not_taken_in_is_not_to_blame(tiny, undisturbed, monkeypatch, caplog, tmp_path):
    counter = tmp_path / "deaths"
    counter.write_text("3")
    monkeypatch.setattr(spare, "COMMAND", (sys.executable, str(Path(poisoned.__file__)), str(counter)))
    caplog.set_level(logging.INFO, "quire.client")

    async def scenario(llm):
        return tokens(await whole(llm, PROMPTS[0], params(0))), llm.engine.restarts

    assert with_engine(tiny, scenario, spare_process=False) == (undisturbed[0], 3)
    assert "runs alone" not in caplog.text


def test_a_request_that_only_waits_is_not_to_blame(tiny, undisturbed, monkeypatch, caplog):
    """It has never been in a step while others end the engine four times."""
    monkeypatch.setattr(spare, "COMMAND", (sys.executable, str(Path(poisoned.__file__))))
    caplog.set_level(logging.INFO, "quire.client")

    async def scenario(llm):
        poisons = [whole(llm, [token, 5, 6], params(0)) for token in (poisoned.DECODE, poisoned.PREFILL)]
        *bad, good = await asyncio.gather(*poisons, whole(llm, PROMPTS[0], params(0), request_id="waits"))
        return [one.outputs[0].finish_reason for one in bad], tokens(good), llm.engine.restarts

    reasons, good, restarts = with_engine(tiny, scenario, spare_process=False, max_num_seqs=1)
    assert (reasons, good, restarts) == (["error", "error"], undisturbed[0], 4)
    assert "request waits" not in caplog.text


def recovery(*names: str) -> Recovery:
    one = Recovery()
    for name in names:
        message = AddRequest(request_id=name, prompt_token_ids=[1], sampling=SamplingParams(max_tokens=50), seed=1)
        one.open[name] = OpenRequest(message, lambda output: None, [[]], [False])
    return one


def pass_probe(one: Recovery) -> None:
    one.passed.add(0)
    assert one.through()


def test_a_crash_in_company_condemns_nobody():
    one = recovery("a", "b", "c")
    for _ in range(5):
        assert one.after_death(["a", "b"], killed=False) == []
        assert one.next_probe() == "a"
        pass_probe(one)
        assert one.next_probe() == "b"
        pass_probe(one)
        assert one.next_probe() is None


def test_a_crash_alone_condemns_after_a_crash_in_company():
    one = recovery("a", "b", "c")
    one.after_death(["a", "b", "c"], killed=False)
    assert one.next_probe() == "a"
    pass_probe(one)
    assert one.next_probe() == "b"
    assert one.after_death(["b"], killed=False) == ["b"]
    del one.open["b"]
    assert one.next_probe() == "c"
    pass_probe(one)
    assert one.next_probe() is None


def test_a_first_crash_condemns_nobody():
    one = recovery("a")
    assert one.after_death(["a"], killed=False) == []


def test_kills_condemn_nobody_who_makes_progress():
    one = recovery("a", "b")
    for _ in range(50):
        assert one.after_death(["a", "b"], killed=True) == []
        assert one.next_probe() is None
        for request in one.open.values():
            request.kills = 0  # what a token does


def test_kills_without_a_token_end_in_probes_and_alone_in_a_verdict():
    one = recovery("a", "b")
    for _ in range(MAX_KILLS + 3):
        assert one.after_death(["a", "b"], killed=True) == []  # in company, however often
    assert one.next_probe() == "a"
    assert one.after_death(["a"], killed=True) == ["a"]


def test_a_request_that_has_left_is_not_probed():
    one = recovery("a", "b")
    one.after_death(["a", "b"], killed=False)
    del one.open["a"]
    assert one.next_probe() == "b"
    del one.open["b"]
    assert one.through()
    assert one.next_probe() is None


def test_what_is_sent_again():
    one = recovery("a").open["a"]
    first = one.resume(probe=False)
    assert (first.probe, first.resumed, first.output_token_ids) == (0, False, [])
    one.produced = [[4, 5]]
    again = one.resume(probe=True)
    assert (again.probe, again.resumed, again.output_token_ids) == (2 + PROBE_TOKENS, True, [[4, 5]])


def test_the_journal_says_what_is_in_flight(tmp_path):
    reader = Journal(tmp_path / "journal", 4, create=True)
    writer = Journal(tmp_path / "journal", 4)
    assert reader.read().requests == frozenset()
    assert reader.read().step_for == reader.read().busy_for == 0
    writer.begin(6, map(digest, ["a", "b", "b", "c"]))
    writer.begin(7, map(digest, ["d"]))
    assert reader.read().requests == {digest(name) for name in "abcd"}
    writer.end(6)
    writer.taking(digest("e"))
    writer.compiling(digest("f"))
    assert reader.read().requests == {digest(name) for name in "def"}
    writer.end(7)
    writer.taking(0)
    writer.compiling(0)
    assert reader.read().requests == frozenset()
    assert not reader.read().planning
    writer.planning(True)
    assert reader.read().planning
    writer.planning(False)
    assert not reader.read().planning
    writer.stepping(1e-9, True)
    record = reader.read()
    assert record.new_shape
    assert record.step_for > 0
    writer.stepping(0.0, False)
    assert reader.read().step_for == 0
