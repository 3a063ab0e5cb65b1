"""The form of an answer begins behind the reasoning, wherever a row's state is made anew."""

from __future__ import annotations

import numpy as np
import pytest

from quire import plugins
from quire.sampling.grammar import GrammarCompiler
from quire.sampling.grammar_state import GrammarStates
from quire.sampling.params import InvalidParameter, StructuredOutputs, Thinking
from quire.text.tokenizer import Tokenizer

TEXT = Thinking(["</think>"], ["<think>"])
SENTENCES = Thinking(["Here is my response:", "Here's my response:"], ["Here is my thought process:"])
SPECIAL = Thinking(["<|im_start|>final"], ["<|im_start|>a"])  # text beside a special token
OPENED = Thinking(["</think>"], opened=True)


@pytest.fixture(scope="module")
def compiler():
    tokenizer = Tokenizer.load(plugins.load().checkpoints["demo"]())
    return GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)


def takes(compiler, thinking, text, **structure):
    matcher = compiler.matcher(StructuredOutputs(**structure, thinking=thinking))
    ids = compiler._open().encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


STRUCTURES = {
    "json": ({"json": {"type": "integer"}}, "12"),
    "regex": ({"regex": "a+"}, "aa"),
    "choice": ({"choice": ["x", "y z"]}, "y z"),
    "grammar": ({"grammar": 'start: k\nk: "k" TEXT\nTEXT: "t"'}, "kt"),  # names that the frame uses as well
    "structural_tag": (
        {
            "structural_tag": {
                "triggers": ["<f"],
                "structures": [{"begin": "<f>", "schema": {"const": 1}, "end": "</f>"}],
            }
        },
        "so <f>1</f>",
    ),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_structure_begins_behind_the_end(compiler, kind):
    structure, good = STRUCTURES[kind]
    thought = 'Hm, 12 {"a": <f>2</f> or aa?\n'
    for thinking, start, end in (
        (TEXT, "<think>", "</think>\n\n"),
        (OPENED, "", "</think>"),
        (SENTENCES, "Here is my thought process:", "Here's my response: "),
        (SPECIAL, "<|im_start|>a", "<|im_start|>final"),
    ):
        if kind == "structural_tag" and not thinking.opened:
            continue  # free text, in which reasoning may stand: the tags bind everywhere
        assert takes(compiler, thinking, start + thought + end + good, **structure)
        assert not takes(compiler, thinking, start + thought + end + "<f>2</f>", **structure)
        assert takes(compiler, thinking, good, **structure) is (not thinking.opened)
        if kind != "structural_tag":
            assert not takes(compiler, thinking, start + thought, **structure), "reasoning alone is no answer"


def test_a_state_follows_from_the_tokens(compiler):
    """Made anew at any place (preemption, restart) or forked there, it allows the same tokens as the one that went on."""
    spec = StructuredOutputs(regex="[ab]{3}", thinking=OPENED)
    ids = compiler._open().encode("thinking of b</think>\nab", add_special_tokens=False)
    states = GrammarStates(compiler)
    states.admit(0, spec, [])
    differs = set()
    for place, token in enumerate(ids):
        states.admit(1, spec, ids[:place])
        states.fork(0, 2)
        made = states.begin([0, 1, 2]).result()
        assert not made.errors
        assert (made.bits[0] == made.bits[1]).all()
        assert (made.bits[0] == made.bits[2]).all()
        differs.add(int(np.unpackbits(made.bits[0].view(np.uint8)).sum()) > 1000)
        states.append(np.asarray([0]), np.asarray([token]))
    assert differs == {True, False}, "free while thinking, and bound behind it"


def test_marks_are_checked():
    for wrong in (
        dict(ends=[]),
        dict(ends=["</think>"]),
        dict(ends=["a", ""], opened=True),
        dict(ends="a", opened=True),
    ):
        with pytest.raises(InvalidParameter):
            Thinking(**wrong)
