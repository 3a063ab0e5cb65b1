"""Regexes mean what ECMA-262 says: held against V8, where Node.js is installed."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from quire import plugins
from quire.sampling.ecma_regex import RegexError, translate
from quire.sampling.grammar import GrammarCompiler, GrammarError
from quire.sampling.params import StructuredOutputs
from quire.text.tokenizer import Tokenizer

PATTERNS = (
    r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r".", r"[\d]", r"[^\d]", r"[\w-]", r"[^\w\s]", r"[\s\S]", r"[^\S]", r"[^]",
    r"[a&&b]", r"[a\-z]", r"[+--]", r"[--/]", r"[a~~b]", r"[\[]", r"[[]", r"[[a-c]", r"[\]]", r"[\^a]", r"[a^]",
    r"\cC", r"[\cA-\cZ]", r"[\b]", r"\x41", r"\u0041", r"\u{1F600}", r"\p{L}", r"\P{L}", r"[\p{Lu}\d]", r"[^\p{L}]",
    r"\t|\n|\v|\f|\r", r"\/", r"a\.", r"a.", r"(?:a|\d)\w?", r"(?<word>\w)\.?", r"\\", r"[\\]", r"[é-ü]",
    r"\w{2}", r"[a-]", r"[-a]",
)  # fmt: skip
CHARACTERS = [
    *map(chr, range(256)),
    *"٣९日éĀ\u017f\u212a\u1680\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff😀",
]
TEXTS = [*CHARACTERS, "a.", "ab", "a3", "3a", "aé", "a\n", "a\u2028", "日本", "٣٣", "a_"]
NODE = shutil.which("node")


def in_v8(patterns, texts):
    """Whether each of the texts matches, for each of the patterns."""
    script = "([ps, ts]) => ps.map(p => ts.map(t => new RegExp('^(?:' + p + ')$', 'u').test(t)))"
    command = [str(NODE), "-e", f"console.log(JSON.stringify(({script})({json.dumps([patterns, texts])})))"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


@pytest.fixture(scope="module")
def compiler():
    tokenizer = Tokenizer.load(plugins.load().checkpoints["demo"]())
    return GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def single(compiler):
    tokenizer = compiler._open()
    pairs = ((tokenizer.token_bytes(token), token) for token in range(tokenizer.vocab_size))
    return {spelled: token for spelled, token in pairs if len(spelled) == 1}


@pytest.mark.skipif(NODE is None, reason="no Node.js is installed")
def test_the_same_texts_match_as_in_v8(compiler, single):
    told = dict(zip(PATTERNS, in_v8(PATTERNS, TEXTS), strict=True))
    for pattern, expected in told.items():
        fresh = compiler.matcher(StructuredOutputs(regex=pattern))
        for text, wanted in zip(TEXTS, expected, strict=True):
            matcher = fresh.deep_copy()
            ids = [single[bytes([byte])] for byte in text.encode()]
            found = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            assert found == wanted, f"{pattern} {text!r}: {wanted} in V8"


@pytest.mark.parametrize("pattern", ["[a", "[]", r"[\d-z]", r"[a-\w]", "a\\", "[a\\"])
def test_what_is_no_regex_is_refused(compiler, pattern):
    with pytest.raises(RegexError):
        translate(pattern)
    with pytest.raises(GrammarError, match="regex|class|range"):
        compiler.matcher(StructuredOutputs(regex=pattern))
    with pytest.raises(GrammarError, match="pattern: "):
        compiler.matcher(StructuredOutputs(json={"type": "string", "pattern": pattern}))


@pytest.mark.parametrize("pattern", ["a(?=b)", "a(?!b)", r"(a)\1", r"\ba", "(?<=a)b"])
def test_what_needs_backtracking_is_refused(compiler, pattern):
    with pytest.raises(GrammarError):
        compiler.matcher(StructuredOutputs(regex=pattern))


def test_names_and_nested_patterns_are_ecma_too(compiler):
    schema = {
        "type": "object",
        "patternProperties": {r"^\d$": {"type": "array", "items": {"type": "string", "pattern": r"^\S$"}}},
        "additionalProperties": False,
    }

    def takes(text):
        matcher = compiler.matcher(StructuredOutputs(json=schema))
        ids = compiler._open().encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert takes('{"1":["a"]}')
    assert not takes('{"٣":["a"]}')
    assert not takes('{"1":["\ufeff"]}')
