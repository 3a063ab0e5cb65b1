"""Structured output: a grammar is compiled once, and says at each step which tokens may come next.

The engine is llguidance: an Earley parser over a lexer of regex derivatives (Moskal et al.,
https://github.com/guidance-ai/llguidance), which follows all tokens at once along a trie of the vocabulary. It never
backtracks and every phase has a budget of steps, so that no grammar takes unbounded time. What it cannot express
exactly it refuses; ARCHITECTURE.md says how it was chosen. It is imported when the first grammar comes, and this module
loads no numpy: a server's process, which is to start quickly, checks grammars too.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from quire.errors import ModelError
from quire.sampling import ecma_regex, json_schema
from quire.sampling.params import InvalidParameter, StructuredOutputs
from quire.sampling.thought import after

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

KEPT = 64  # compiled grammars
WHITESPACE = r"( |\n[ \t]{0,40})?"
"""Between the elements of JSON: what json.dumps writes with and without indentation, and never more."""

COMPILE_FUEL = 1_000_000  # of regex construction: about 20 ms
STEP_FUEL = 200_000  # of the lexer in one step: about 15 ms
STEP_ITEMS = 50_000  # of the parser in one step: about 3 ms
WORDS = [f"{letters}{{1,20}}" for letters in ("[a-z]", " [a-z]", "[a-zA-Z]", " [a-zA-Z]", " ?[a-zA-Z]")]
"""Tokens that are words, with a space before them or without. Where a grammar allows all that match one of these, llguidance
adds them to a mask at once and looks only at the rest, as it does with JSON's strings: a free text's mask takes 10 to 50 us
instead of 150 to 280 (bench/grammar_masks.py). Bounded, so that they also fit into a text whose length is."""


class GrammarError(ValueError):
    """Why a grammar cannot be honoured."""


def source(spec: StructuredOutputs, special: Callable[[str], int | None] = lambda text: None) -> str:
    """``spec`` as a grammar of llguidance, not yet compiled. Raises GrammarError.

    ``special``: the id of a text that is one special token, which no sequence of other tokens can spell.
    """
    answer = _answer(spec, lambda text: special(text) is not None)
    # A tag's free text may be reasoning anyway; a lexer that never goes back could not tell it from one that opens itself.
    if spec.thinking is None or (spec.structural_tag is not None and not spec.thinking.opened):
        return answer
    return after(spec.thinking, answer, special)


def _answer(spec: StructuredOutputs, special: Callable[[str], bool]) -> str:
    from llguidance import LLMatcher

    if spec.json is not None or spec.json_object:
        schema = _schema(spec.json or '{"type":"object"}', spec.disable_additional_properties)
        return LLMatcher.grammar_from_json_schema(schema, overrides=_options(spec))
    if spec.regex is not None:
        return LLMatcher.grammar_from_regex(_regex(spec.regex))
    if spec.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_literal, spec.choice)))
    if spec.structural_tag is not None:
        return LLMatcher.grammar_from_lark(_structural_tag(spec.structural_tag, special))
    assert spec.grammar is not None
    return LLMatcher.grammar_from_lark(_lark(spec.grammar))


def _load(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{what} is not JSON: {str(error) or 'nested too deeply'}") from None


def _schema(text: str, closed: bool) -> str:
    schema = _load(text, "the schema")
    if not isinstance(schema, dict | bool):
        raise GrammarError("a JSON schema is an object, or true or false")
    # A schema that is just true or false is no grammar to llguidance.
    return json.dumps(_prepared(schema, closed) if isinstance(schema, dict) else {"allOf": [schema]})


def _prepared(schema: dict[str, Any], closed: bool = False) -> dict[str, Any]:
    if "x-guidance" in schema:
        raise GrammarError("x-guidance is not a keyword of JSON Schema")
    try:
        made: dict[str, Any] = json_schema.prepare(json_schema.close(schema) if closed else schema)
    except json_schema.SchemaError as error:
        raise GrammarError(str(error)) from None
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    return made


def _options(spec: StructuredOutputs) -> Any:
    if spec.disable_any_whitespace:
        return json_schema.OPTIONS | {"whitespace_flexible": False}
    pattern = WHITESPACE if spec.whitespace_pattern is None else _ecma(spec.whitespace_pattern)
    return json_schema.OPTIONS | {"whitespace_flexible": True, "whitespace_pattern": pattern}


def _regex(regex: str) -> str:
    """The whole output must match in any case, so anchors around the pattern say nothing."""
    if regex.startswith("^"):
        regex = regex[1:]
    backslashes = len(regex[:-1]) - len(regex[:-1].rstrip("\\"))
    return _ecma(regex[:-1] if regex.endswith("$") and backslashes % 2 == 0 else regex)


def _ecma(regex: str) -> str:
    try:
        return ecma_regex.translate(regex)
    except ecma_regex.RegexError as error:
        raise GrammarError(str(error)) from None


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _lark(grammar: str) -> str:
    """Lark as it stands; EBNF in the ``::=`` notation is translated."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except (Exception, RecursionError) as error:
        raise GrammarError(f"the EBNF cannot be read: {error}") from None


def _structural_tag(text: str, special: Callable[[str], bool]) -> str:
    """Free text in which each trigger must go on as one of the structures that begin with it."""
    tag = _load(text, "structural_tag")
    if not isinstance(tag, dict) or not set(tag) <= {"type", "structures", "triggers"}:
        raise GrammarError('structural_tag must have the form {"structures": [...], "triggers": [...]}')
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers) or not triggers:
        raise GrammarError("structural_tag.triggers must be a list of texts")
    if not isinstance(structures, list) or not structures:
        raise GrammarError("structural_tag.structures must be a list of at least one structure")
    rules, names = [], []
    for i, one in enumerate(structures):
        if not isinstance(one, dict) or not {"begin", "schema", "end"} == set(one):
            raise GrammarError(f"structural_tag.structures[{i}] must have begin, schema and end")
        begin, schema, end = one["begin"], one["schema"], one["end"]
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict):
            raise GrammarError(f"structural_tag.structures[{i}]: begin and end are texts, schema is a JSON schema")
        trigger = next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"structural_tag.structures[{i}].begin starts with none of the triggers")
        if special(trigger):
            opening = f"tag_{i}: TEXT {trigger}"
        else:
            rules.append(f"open_{i}[lazy]: TEXT {_literal(trigger)}")
            opening = f"tag_{i}: open_{i}"
        rest = begin[len(trigger) :]
        parts = [_literal(rest) if rest else "", json_rule(schema), closing(end, special)]
        rules.append(" ".join([opening, *filter(None, parts)]))
        names.append(f"tag_{i}")
    head = [f"start: ({' | '.join(names)})* last", "last: TEXT", r"TEXT: /(.|\n)*/"]
    return "\n".join(["%llguidance {}", *head, *rules])


def json_rule(schema: dict[str, Any]) -> str:
    """A schema inside a Lark grammar, with the bounded white space of every other."""
    options = json_schema.OPTIONS | {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    return "%json " + json.dumps({"x-guidance": options, **_prepared(schema)}, ensure_ascii=False)


def closing(end: str, special: Callable[[str], bool]) -> str:
    """A text, which may end with a special token."""
    if not end:
        return ""
    at = end.rfind("<")
    if at >= 0 and special(end[at:]):
        return (_literal(end[:at]) + " " if at else "") + end[at:]
    return _literal(end)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Any thread may call it; nothing is loaded before the first grammar comes."""

    def __init__(
        self, open_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Sequence[int] = ()
    ) -> None:
        """``vocab_size``: of the logits; ``eos_token_ids``: the model's, in addition to the tokenizer's own."""
        self._open, self._vocab_size, self._eos = open_tokenizer, vocab_size, eos_token_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._tokenizer: Tokenizer | None = None
        self._compiled: OrderedDict[bytes, Any] = OrderedDict()

    def check(self, spec: StructuredOutputs) -> None:
        """Compile it and its first step, or raise InvalidParameter with the reason."""
        try:
            self.matcher(spec)
        except GrammarError as error:
            raise refusal(spec, str(error)) from None

    def has(self, spec: StructuredOutputs) -> bool:
        """Whether ``matcher`` would return at once."""
        return msgspec.msgpack.encode(spec) in self._compiled

    def matcher(self, spec: StructuredOutputs) -> Any:
        """A fresh LLMatcher. Raises GrammarError."""
        key = msgspec.msgpack.encode(spec)
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found.deep_copy()
            vocabulary = self._vocabulary = self._vocabulary or self._load_vocabulary()
        compiled = self._compile(spec, vocabulary)
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return compiled.deep_copy()

    @property
    def words(self) -> int:
        """32-bit words of a mask; known once a grammar has been compiled."""
        return -(-self._vocabulary.vocab_size // 32)

    def _compile(self, spec: StructuredOutputs, vocabulary: Any) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=COMPILE_FUEL, step_lexer_fuel=STEP_FUEL, step_max_items=STEP_ITEMS, verbose_errors=False
        )
        try:
            grammar = source(spec, self._special)
        except GrammarError:
            raise
        except ValueError as error:
            raise GrammarError(str(error)) from None
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary, limits=limits)
        if messages:  # warnings are of what it would not honour
            raise GrammarError(brief(messages[0]))
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        first = matcher.deep_copy()
        allowed = b"" if failed or first.is_error() else first.compute_bitmask()
        if first.is_error() or not any(allowed):
            message = first.get_error()
            raise GrammarError(brief(message) if message and "NoExtension" not in message else "no output can match it")
        return matcher

    def _special(self, text: str) -> int | None:
        assert self._tokenizer is not None
        token = self._tokenizer.token_to_id(text)
        return token if token is not None and self._tokenizer.is_special(token) else None

    def _load_vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        tokenizer = self._tokenizer = self._open()
        eos = list(dict.fromkeys([*self._eos, *tokenizer.eos_token_ids]))
        if not eos:
            raise GrammarError("the model names no end-of-sequence token, so an output could not end")
        slices = [*LLTokenizer.json_slices(), *WORDS]
        return LLTokenizer(_Vocabulary(tokenizer, self._vocab_size, eos), eos_token=eos, slices=slices)  # type: ignore[arg-type]


class _Vocabulary:
    """Our tokenizer in the terms of llguidance: the bytes of each token. A token without bytes is never allowed."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: list[int]) -> None:
        size = max(vocab_size, tokenizer.vocab_size)
        self.eos_token_id, self.bos_token_id = eos[0], tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted({*tokenizer.special_ids, *eos})
        if max(eos) >= size:
            raise ModelError(f"the end-of-sequence token {max(eos)} is beyond the vocabulary of {size}")
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)


def refusal(spec: StructuredOutputs, reason: str) -> InvalidParameter:
    """What a caller is told of a grammar that cannot be honoured."""
    kinds = (spec.json, spec.regex, spec.choice, spec.grammar, spec.structural_tag, spec.json_object)
    given = next(value for value in kinds if value is not None)
    return InvalidParameter("structured_outputs", given, f"cannot be honoured: {reason}")


def brief(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:297] + "..."
