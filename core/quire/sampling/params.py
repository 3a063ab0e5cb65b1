"""What a caller may ask of sampling and stopping, validated before anything else sees it.

Two steps. Constructing a :class:`SamplingParams` (decoding one from a message too) checks types and ranges;
:meth:`SamplingParams.resolve` then holds it against one engine: its vocabulary, its context length, its limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import msgspec

from quire.errors import RequestRefused

SMALLEST_TEMPERATURE = 0.01
"""A temperature between greedy and this one is raised to it, as vLLM does: float32 logits overflow below."""

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy, as in vLLM."""

VOCABULARY_LIMIT = 1 << 31
"""Token ids are below this whatever the model."""


class InvalidParameter(RequestRefused):
    """A parameter outside what is allowed: ``field``, ``value`` and ``limit`` (what would be allowed, in words)."""

    def __init__(self, field: str, value: Any, limit: str) -> None:
        shown = repr(value)
        if len(shown) > 100:
            shown = shown[:97] + "..."
        super().__init__(f"{field} = {shown}: {limit}", field)
        self.value, self.limit = value, limit


@dataclass(frozen=True)
class ParamLimits:
    """How much one request may ask for. An engine's owner may widen them."""

    n: int = 128
    logprobs: int = 20  # -1: any number up to the vocabulary, which -1 in the request then means
    stop: int = 32  # strings, ...
    stop_length: int = 256  # ... characters of each
    stop_token_ids: int = 1024
    bad_words: int = 1024
    bad_words_tokens: int = 32  # tokens of one bad word
    logit_bias: int = 1024
    allowed_token_ids: int = VOCABULARY_LIMIT  # never more than the vocabulary holds, once resolved
    beam_width: int = 64
    grammar_length: int = 1 << 17  # characters of a JSON schema, regex, grammar or of all choices together


DEFAULT_LIMITS = ParamLimits()


STRUCTURES = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class Thinking(msgspec.Struct, omit_defaults=True):
    """The marks of a model's reasoning, which stands before its answer.

    ``opened``: the prompt has opened it; if not, the output may begin with one of ``starts``, or with the answer.
    """

    ends: list[str]
    starts: list[str] = []
    opened: bool = False

    def __post_init__(self) -> None:
        needed = [self.ends] if self.opened else [self.ends, self.starts]
        if not all(isinstance(m, list) and m and all(isinstance(text, str) and text for text in m) for m in needed):
            raise InvalidParameter("structured_outputs", "thinking", "ends (and starts) must be lists of texts")


class StructuredOutputs(msgspec.Struct, omit_defaults=True):
    """What form the output must have: exactly one of the first six, with vLLM's names. Raises InvalidParameter.

    ``json``: a JSON schema, as an object or as text; it is text once constructed. ``json_object`` True: any JSON object.
    ``regex`` matches the whole output, without look-around or back-references. ``choice``: the output is one of these.
    ``grammar``: Lark, or EBNF with ``::=`` (its rule ``root``). ``structural_tag``: vLLM's
    ``{"structures": [{"begin", "schema", "end"}], "triggers": [...]}``: free text in which a trigger opens a structure.

    White space between the elements of JSON is bounded: nothing, a space, or a new line and its indentation;
    ``disable_any_whitespace`` allows none, ``whitespace_pattern`` (a regex) says what is allowed instead. With
    ``disable_additional_properties`` objects have the properties that ``json`` names, where it does not say otherwise.

    With ``thinking``, the form begins behind the model's reasoning, which is free.
    """

    json: Any = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(given) != 1:
            raise self._invalid(given or None, f"must have exactly one of {', '.join(STRUCTURES)}")
        kind = given[0]
        value = getattr(self, kind)
        if kind in ("json", "structural_tag"):
            if isinstance(value, dict) or (kind == "json" and isinstance(value, bool)):
                try:
                    setattr(self, kind, msgspec.json.encode(value).decode())
                except (TypeError, ValueError, RecursionError) as error:
                    raise self._invalid(kind, f"{kind} cannot be written as JSON: {error}") from None
            elif not isinstance(value, str):
                raise self._invalid(value, f"{kind} must be an object or its text")
        elif kind == "json_object" and value is not True:
            raise self._invalid(value, "json_object must be true when given")
        elif kind == "choice":
            if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
                raise self._invalid(value, "choice must be a list of at least one text, none empty")
        elif kind in ("regex", "grammar") and (not isinstance(value, str) or not value):
            raise self._invalid(value, f"{kind} must be a text that is not empty")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise self._invalid(getattr(self, name), f"{name} must be true or false")
        if self.disable_additional_properties and kind != "json":
            raise self._invalid(kind, "disable_additional_properties is for json only")
        if self.whitespace_pattern is not None and not isinstance(self.whitespace_pattern, str):
            raise self._invalid(self.whitespace_pattern, "whitespace_pattern must be a regex")
        if (self.disable_any_whitespace or self.whitespace_pattern is not None) and kind not in ("json", "json_object"):
            raise self._invalid(kind, "disable_any_whitespace and whitespace_pattern are for JSON only")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise self._invalid(self.whitespace_pattern, "whitespace_pattern contradicts disable_any_whitespace")

    @staticmethod
    def _invalid(value: Any, limit: str) -> InvalidParameter:
        return InvalidParameter("structured_outputs", value, limit)

    @property
    def length(self) -> int:
        """Characters of what was given."""
        texts = (
            self.json,
            self.regex,
            self.grammar,
            self.structural_tag,
            self.whitespace_pattern,
            *(self.choice or ()),
        )
        return sum(len(text) for text in texts if text)


class SamplingParams(msgspec.Struct, omit_defaults=True):
    """vLLM's sampling parameters, with the same names and meanings. Raises InvalidParameter.

    ``temperature`` 0 is greedy; ``top_k`` 0 or -1, ``top_p`` 1 and ``min_p`` 0 are off. ``max_tokens`` None means as
    many as the context holds. ``logprobs`` k gives, of each token, its log-probability under the unmodified
    logits and the k most likely tokens; ``prompt_logprobs`` the same of the prompt. ``stop`` is always a list (or
    None) once constructed. ``n`` greedy samples are allowed (vLLM refuses them); they are equal.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None  # filled by resolve()
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_distribution()
        self._check_lists()
        self._check_structure()
        for field in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
                      "include_stop_str_in_output"):  # fmt: skip
            if not isinstance(getattr(self, field), bool):
                raise InvalidParameter(field, getattr(self, field), "must be true or false")
        if self.stop and not self.detokenize:
            raise InvalidParameter("detokenize", False, "stop strings are found in text: give stop_token_ids instead")

    def _check_counts(self) -> None:
        self.n = integer("n", self.n, 1)
        if self.seed is not None:
            self.seed = integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
            if self.seed == -1:  # vLLM's way to say none
                self.seed = None
        self.min_tokens = integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            self.max_tokens = integer("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidParameter("min_tokens", self.min_tokens, f"must be at most max_tokens = {self.max_tokens}")
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                setattr(self, field, integer(field, getattr(self, field), -1))

    def _check_distribution(self) -> None:
        self.temperature = number("temperature", self.temperature, 0.0)
        self.top_p = number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self.top_k = integer("top_k", self.top_k, -1, VOCABULARY_LIMIT)
        self.min_p = number("min_p", self.min_p, 0.0, 1.0)
        self.presence_penalty = number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self.frequency_penalty = number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self.repetition_penalty = number("repetition_penalty", self.repetition_penalty, 0.0, open_low=True)
        if self.temperature < GREEDY_BELOW:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
        self.temperature = max(self.temperature, SMALLEST_TEMPERATURE) if self.temperature else 0.0
        self.top_k = max(self.top_k, 0)

    def _check_lists(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = _strings("stop", self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids == []:
            raise InvalidParameter("allowed_token_ids", [], "must hold at least one token id (or be left out)")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise InvalidParameter("logit_bias", self.logit_bias, "must map token ids to numbers")
            self.logit_bias = {
                integer("logit_bias", token, 0, VOCABULARY_LIMIT - 1): number(
                    f"logit_bias[{token}]", bias, -100.0, 100.0
                )
                for token, bias in self.logit_bias.items()
            }
        if self.bad_words_token_ids is not None:
            if not isinstance(self.bad_words_token_ids, list):
                raise InvalidParameter("bad_words_token_ids", self.bad_words_token_ids, "must be a list of lists")
            self.bad_words_token_ids = [
                _token_ids("bad_words_token_ids", ids) or [] for ids in self.bad_words_token_ids
            ]
            if [] in self.bad_words_token_ids:
                raise InvalidParameter("bad_words_token_ids", [], "a bad word must have at least one token")

    def _check_structure(self) -> None:
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputs):
            raise InvalidParameter("structured_outputs", self.structured_outputs, "must be a StructuredOutputs")
        for field in ("min_tokens", "bad_words", "bad_words_token_ids", "allowed_token_ids"):
            if getattr(self, field):
                limit = "cannot be combined with structured_outputs: together they may leave no token to choose from"
                raise InvalidParameter(field, getattr(self, field), limit)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def clone(self) -> SamplingParams:
        """A copy that shares nothing that can change."""
        return msgspec.convert(msgspec.to_builtins(self), SamplingParams, strict=False)

    def resolve(
        self,
        vocab_size: int,
        max_model_len: int,
        prompt_len: int = 0,
        encode: Callable[[str], list[int]] | None = None,
        limits: ParamLimits = DEFAULT_LIMITS,
    ) -> SamplingParams:
        """These parameters as one engine will obey them, or InvalidParameter.

        ``encode`` turns text into token ids without special tokens; only bad words need it. In the result
        ``max_tokens`` is set (at most what the context still holds) and ``bad_words_token_ids`` filled.
        """
        resolved = self.clone()
        resolved._check_sizes(limits, vocab_size)
        for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            _check_vocabulary(field, getattr(self, field) or (), vocab_size)
        if self.bad_words:
            if encode is None:
                raise InvalidParameter(
                    "bad_words", self.bad_words, "needs a tokenizer; give bad_words_token_ids instead"
                )
            resolved.bad_words_token_ids = [ids for word in self.bad_words for ids in _spellings(word, encode)]
        for ids in resolved.bad_words_token_ids or ():
            _check_vocabulary("bad_words", ids, vocab_size)
            if len(ids) > limits.bad_words_tokens:
                limit = f"must be at most {limits.bad_words_tokens} tokens long, this one has {len(ids)}"
                raise InvalidParameter("bad_words", self.bad_words or ids, limit)
        room = max_model_len - prompt_len
        if room < 1:
            raise InvalidParameter(
                "prompt", f"{prompt_len} tokens", f"must leave room for output: max_model_len is {max_model_len}"
            )
        resolved.max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        if self.min_tokens > resolved.max_tokens:
            limit = f"must be at most {room}: max_model_len is {max_model_len} and the prompt has {prompt_len} tokens"
            raise InvalidParameter("min_tokens", self.min_tokens, limit)
        return resolved

    def _check_sizes(self, limits: ParamLimits, vocab_size: int) -> None:
        if self.n > limits.n:
            raise InvalidParameter("n", self.n, f"must be at most {limits.n}")
        for field in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, field)
            if asked is None:
                continue
            if limits.logprobs >= 0 and not 0 <= asked <= limits.logprobs:
                raise InvalidParameter(field, asked, f"must be between 0 and {limits.logprobs}, this engine's maximum")
            if asked > vocab_size:
                raise InvalidParameter(field, asked, f"must be at most {vocab_size}, the size of the vocabulary")
            setattr(self, field, vocab_size if asked == -1 else asked)
        for field in ("stop", "stop_token_ids", "bad_words", "logit_bias"):
            size = len(getattr(self, field) or ())
            if size > getattr(limits, field):
                raise InvalidParameter(field, f"{size} entries", f"must have at most {getattr(limits, field)} entries")
        most = min(limits.allowed_token_ids, vocab_size)
        if len(self.allowed_token_ids or ()) > most:
            raise InvalidParameter("allowed_token_ids", self.allowed_token_ids, f"must have at most {most} entries")
        structure = self.structured_outputs
        if structure is not None and structure.length > limits.grammar_length:
            limit = f"must have at most {limits.grammar_length} characters"
            raise InvalidParameter("structured_outputs", f"{structure.length} characters", limit)
        for stop in self.stop or ():
            if len(stop) > limits.stop_length:
                raise InvalidParameter("stop", stop, f"a stop string has at most {limits.stop_length} characters")


class BeamSearchParams(msgspec.Struct):
    """vLLM's beam search parameters. Raises InvalidParameter.

    ``temperature`` may be 0 or 1 and makes no difference: beams are ranked by the model's own probabilities.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self.beam_width = integer("beam_width", self.beam_width, 1)
        self.max_tokens = integer("max_tokens", self.max_tokens, 1)
        self.temperature = number("temperature", self.temperature, 0.0)
        if self.temperature not in (0.0, 1.0):
            limit = "must be 0 or 1: beams are ranked by the model's own probabilities"
            raise InvalidParameter("temperature", self.temperature, limit)
        self.length_penalty = number("length_penalty", self.length_penalty, -100.0, 100.0)
        for field in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, field), bool):
                raise InvalidParameter(field, getattr(self, field), "must be true or false")

    def check(self, limits: ParamLimits = DEFAULT_LIMITS) -> None:
        """Hold the beam width against an engine's limits."""
        if self.beam_width > limits.beam_width:
            raise InvalidParameter("beam_width", self.beam_width, f"must be at most {limits.beam_width}")


def integer(field: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an int within [low, high], or InvalidParameter. True and 1.0 are no integers."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidParameter(field, value, "must be an integer")
    result = int(value)
    if result < low or (high is not None and result > high):
        raise InvalidParameter(
            field, value, f"must be at least {low}" + ("" if high is None else f" and at most {high}")
        )
    return result


def number(field: str, value: Any, low: float, high: float | None = None, open_low: bool = False) -> float:
    """``value`` as a finite float within [low, high] (above ``low`` when ``open_low``), or InvalidParameter."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidParameter(field, value, "must be a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise InvalidParameter(field, value, "must be finite")
    if result < low or (open_low and result == low) or (high is not None and result > high):
        bound = f"must be {'above' if open_low else 'at least'} {low:g}"
        raise InvalidParameter(field, value, bound if high is None else f"{bound} and at most {high:g}")
    return result


def _strings(field: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(s, str) for s in value):
        raise InvalidParameter(field, value, "must be a list of strings")
    if "" in value:
        raise InvalidParameter(field, value, "must not hold an empty string")
    return list(value) or None


def _token_ids(field: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise InvalidParameter(field, value, "must be a list of token ids")
    return [integer(field, token, 0, VOCABULARY_LIMIT - 1) for token in value]


def _check_vocabulary(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidParameter(field, token, f"token ids of this model are in [0, {vocab_size - 1}]")


def _spellings(word: str, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """A bad word's token sequences, at the start of a text and after a space.

    vLLM drops the second when its length differs from the first's; both are kept here, since either spells the word.
    """
    bare = word.lstrip() or word
    spellings: list[list[int]] = []
    for text in (bare, " " + bare):
        ids = encode(text)
        if not ids:
            raise InvalidParameter("bad_words", word, "the tokenizer gives no token for it")
        if ids not in spellings:
            spellings.append(ids)
    return spellings
