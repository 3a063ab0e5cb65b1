"""Grammars made to do harm: each is accepted or refused by name within its time, and the process that asked lives on."""

from __future__ import annotations

import asyncio
import json
import os
import time

import pytest

from quire import AsyncLLM, SamplingParams
from quire.config import make_config
from quire.engine.compiling import Compiling
from quire.engine.journal import Journal, digest
from quire.message import AddRequest
from quire.sampling.grammar_worker import GrammarChecker
from quire.sampling.params import InvalidParameter, StructuredOutputs

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
CHAIN = "start: R0\n" + "\n".join(f"R{i}: R{i + 1}" for i in range(6000)) + '\nR6000: "a"'  # overflows the stack


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


ACCEPTED = {
    "ordinary": {"json": json.dumps(PERSON)},
    "thousands of values": {"json": json.dumps({"enum": [f"value-{i}" for i in range(4000)]})},
    "nested": {"json": nested(60)},
    "recursive": {
        "json": json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}}}})
    },
    "exponential for a backtracker": {"regex": "(a*)*(a*)*b"},
    "exponential as an automaton": {"regex": "(a|b)*a(a|b){25}"},
    "ambiguous": {"grammar": 'start: start start | "a" | '},
}
REFUSED = {
    "endless nesting": {"json": nested(3000)},
    "refers to itself": {"json": json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})},
    "doubling": {"grammar": "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(60)) + '\nT60: "a"'},
    "parentheses": {"regex": "(" * 50_000 + "a" + ")" * 50_000},
    "chain": {"grammar": CHAIN},
}


@pytest.fixture(scope="module")
def checker():
    one = GrammarChecker(make_config("demo", grammar_timeout=30.0), 4096, [])
    yield one
    one.close()


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_looks_harmful_and_is_not(checker, kind):
    checker.check(StructuredOutputs(**ACCEPTED[kind]))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_harm_is_refused_and_the_next_one_served(checker, kind):
    spec = StructuredOutputs(**REFUSED[kind])
    for _ in range(2):  # the second time from memory
        with pytest.raises(InvalidParameter, match="structured_outputs = .*cannot be honoured"):
            checker.check(spec)
    checker.check(StructuredOutputs(regex=f"after {kind}"))


def test_a_dead_worker_says_so_and_is_replaced(checker):
    with pytest.raises(InvalidParameter, match="needs more memory or stack than it may have"):
        checker.check(StructuredOutputs(grammar=CHAIN + "\n"))
    checker.check(StructuredOutputs(regex="again"))


def test_the_limit_is_named(checker, monkeypatch):
    slow = {"type": "integer", "multipleOf": 999_983, "minimum": -(10**15), "maximum": 10**15}  # seconds
    monkeypatch.setattr(checker, "_timeout", 0.1)
    with pytest.raises(InvalidParameter, match=r"compiling it takes longer than 0.1 s \(--grammar-timeout\)"):
        checker.check(StructuredOutputs(json=json.dumps(slow)))
    monkeypatch.undo()
    checker.check(StructuredOutputs(regex="after the limit"))


class Slow:
    """A compiler that is told when to be done."""

    def __init__(self):
        self.read, self.write = os.pipe()
        self.compiled = set()

    def has(self, spec):
        return spec.regex in self.compiled

    def matcher(self, spec):
        os.read(self.read, 1)
        self.compiled.add(spec.regex)


def test_the_engine_goes_on_while_a_grammar_is_compiled(tmp_path):
    def request(name: str, regex: str | None) -> AddRequest:
        spec = StructuredOutputs(regex=regex) if regex else None
        sampling = SamplingParams(max_tokens=5, structured_outputs=spec)
        return AddRequest(request_id=name, prompt_token_ids=[1], sampling=sampling, seed=1)

    def until(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    journal, compiler, rung = Journal(tmp_path / "journal", 4, create=True), Slow(), []
    waiting = Compiling(compiler, journal, lambda: rung.append(1))
    assert not waiting.put(request("free", None))
    assert waiting.put(request("a", "x"))
    assert waiting.put(request("b", "y"))
    assert waiting.put(request("c", "z"))
    assert waiting.take() == []
    until(lambda: journal.read().requests == {digest("a")})  # whoever finds the engine dead now knows whose it was
    waiting.abort(["b"], [("c", 0)])
    rung.clear()
    os.write(compiler.write, b"..")
    until(lambda: len(rung) == 2)
    assert [(m.request_id, m.finished_samples) for m in waiting.take()] == [("a", []), ("c", [0])]
    assert not waiting
    assert journal.read().requests == frozenset()
    assert not waiting.put(request("d", "x"))


def test_a_server_process_survives_what_would_have_ended_it():
    async def scenario():
        llm = AsyncLLM(make_config("demo", device="cpu", kv_cache_memory_bytes=32 << 20, spare_process=False))
        await llm.start()
        try:
            bad = SamplingParams(max_tokens=5, structured_outputs=StructuredOutputs(grammar=CHAIN))
            with pytest.raises(InvalidParameter, match="cannot be honoured"):
                async for _ in llm.generate("A", bad):
                    pass
            good = SamplingParams(max_tokens=60, structured_outputs=StructuredOutputs(choice=["yes", "no"]))
            text = ""
            async for delta in llm.generate("A", good):
                text += delta.outputs[0].text
            assert llm.engine.restarts == 0
            return text
        finally:
            await llm.shutdown()

    assert asyncio.run(scenario()) in ("yes", "no")
