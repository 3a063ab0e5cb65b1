# ruff: noqa: RUF001 - the bars in DeepSeek's marks are full-width
"""Calls that are forced, in every format: random walks through the grammar's masks are read back by the same parser as
calls of the tools that were offered, with arguments that jsonschema finds right, however the text is cut."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pytest
import tokenizers
from demo_server import checkpoint
from fake import FakeLLM
from test_errors import CHAT, error_of

from quire.sampling.grammar import GrammarCompiler, GrammarError
from quire.sampling.params import StructuredOutputs, Thinking
from quire.text.tokenizer import Tokenizer
from quire_server.model import ModelSettings
from quire_server.openai.chat_schema import ChatRequest
from quire_server.parsers import Choice, Parsers
from quire_server.reasoning_parsers.gpt_oss import GptOss
from quire_server.state import Settings
from quire_server.tool_calls import AnswerParser
from quire_server.tool_grammar import CannotWrite, Tool, Writer
from quire_server.tool_parsers import BUILT_IN, load
from quire_server.tool_parsers.typed import value

SPECIAL = {
    "hermes": [],
    "llama3_json": ["<|python_tag|>"],
    "pythonic": ["<|python_start|>", "<|python_end|>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "deepseek_v3": ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
                    "<｜tool▁calls▁end｜>"],
    "kimi_k2": ["<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
                "<|tool_calls_section_end|>"],
    "glm45": [],
    "qwen3_coder": [],
    "openai": ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"],
    "granite": ["<|tool_call|>"],
}  # fmt: skip
"""The special tokens of each format's models."""
SPECIAL["deepseek_v31"] = SPECIAL["deepseek_v3"]
SPECIAL["llama4_json"] = SPECIAL["pythonic"]
FORMATS = sorted(SPECIAL)
PLAIN = [name for name in FORMATS if name != "openai"]

BOOK = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}$"},
        "days": {"type": "integer", "minimum": -3, "maximum": 40},
        "unit": {"enum": ["C", "F", "1 K"]},
        "hourly": {"type": "boolean"},
        "until": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        "at": {
            "type": "object",
            "properties": {"lat": {"type": "number", "minimum": -90, "maximum": 90}, "ok": {"type": "boolean"}},
            "required": ["lat"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "days", "unit", "until"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "maxLength": 4}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"book": BOOK, "now": None, "all_optional": {**BOOK, "required": []}}
TOOLS = [Tool(name, schema) for name, schema in SCHEMAS.items()]
OFFERED = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]


class Vocabulary:
    """The demo model's tokenizer with a format's special tokens, and walks through grammars over it."""

    def __init__(self, special):
        backend = tokenizers.Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
        demo = Tokenizer.load(checkpoint())
        self.tokenizer = Tokenizer(backend, eos_token_ids=demo.eos_token_ids)
        self.ends = self.tokenizer.eos_token_ids
        self.compiler = GrammarCompiler(lambda: self.tokenizer, self.tokenizer.vocab_size, self.ends)

    def special(self, text):
        token = self.tokenizer.token_to_id(text)
        return token if token is not None and self.tokenizer.is_special(token) else None

    def writer(self, name, opened=False):
        return Writer(load(BUILT_IN[name]), self.special, opened)

    def matcher(self, grammar, thinking=None):
        return self.compiler.matcher(StructuredOutputs(grammar=grammar, thinking=thinking))

    def takes(self, matcher, text):
        """Whether the grammar lets the text pass; ``matcher`` is then behind it."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids)

    def walk(self, matcher, rng, prefix="", most=4000):
        """A random text of the grammar that begins with ``prefix``."""
        ids = self.tokenizer.encode(prefix, add_special_tokens=False)
        assert matcher.try_consume_tokens(ids) == len(ids)
        while len(ids) < most:
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            assert len(allowed)
            ends = [token for token in allowed if token in self.ends]
            if ends and (len(ends) == len(allowed) or rng.random() < 0.3):
                return self.tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
            token = int(rng.choice([token for token in allowed if token not in self.ends]))
            assert matcher.consume_token(token)
            ids.append(token)
        raise AssertionError("the walk does not end")


@pytest.fixture(scope="module")
def vocabularies():
    """By format, and "plain": a tokenizer that has none of the marks."""
    made = {}

    def vocabulary(name):
        key = "" if name == "plain" else name
        if key not in made:
            made[key] = Vocabulary(SPECIAL.get(name, []))
        return made[key]

    return vocabulary


def read(name, text, rng=None, tools=OFFERED):
    """(content, reasoning, [(name, arguments)]); with ``rng``, of the text in random pieces."""
    parser_class = load(BUILT_IN[name])
    reasoning, calls = (GptOss(None, tools), None) if name == "openai" else (None, parser_class(tools))
    parser = AnswerParser(reasoning, calls)
    if rng is None:
        piece = parser.whole(text)
        found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in piece.calls]
        return piece.content, piece.reasoning, found
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(9))
    pieces = [parser.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)] + [parser.finish()]
    calls = []
    for delta in (delta for piece in pieces for delta in piece.calls):
        if "id" in delta:
            calls.append([delta["function"]["name"], ""])
        calls[-1][1] += delta["function"]["arguments"]
    content, thought = ("".join(getattr(piece, kind) for piece in pieces) for kind in ("content", "reasoning"))
    return content, thought, [(called, json.loads(arguments)) for called, arguments in calls]


def check(name, text, rng):
    """The calls in a text, each held to its tool's schema."""
    content, reasoning, calls = read(name, text)
    assert read(name, text, rng) == (content, reasoning, calls)
    for called, arguments in calls:
        checker = jsonschema.FormatChecker()
        jsonschema.validate(arguments, SCHEMAS[called] or NOTHING, format_checker=checker)
    return content, reasoning, calls


@pytest.mark.parametrize("plain", [False, True], ids=["special tokens", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_read_back(vocabularies, name, plain):
    words = vocabularies("plain" if plain else name)
    several = set()
    for many in (False, True):
        matcher = words.matcher(words.writer(name).calls(TOOLS, many))
        for seed in range(12):
            rng = random.Random(seed)
            begun = "<|channel|>commentary" if name == "openai" else ""  # else it might think at length
            text = words.walk(matcher.deep_copy(), rng, begun)
            content, _, calls = check(name, text, rng)
            assert content == "", text
            assert calls, text
            assert many or len(calls) == 1, text
            several.add(len(calls))
    assert (max(several) > 1) is (name != "openai")  # a call ends gpt-oss' turn


@pytest.mark.parametrize("name", FORMATS)
def test_one_tool_is_the_one(vocabularies, name):
    words = vocabularies(name)
    matcher = words.matcher(words.writer(name).calls(TOOLS[1:2], False))
    text = words.walk(matcher, random.Random(0), "<|channel|>commentary" if name == "openai" else "")
    assert check(name, text, random.Random(1))[2] == [("now", {})]


# How each format opens a call of ``book``, and the same of a tool that nobody offers.
OPENINGS = {
    "hermes": ['Well.\n<tool_call>\n{"name": "NAME", "arguments": {"'],
    "llama3_json": ['{"name": "NAME", "parameters": {"', '<|python_tag|>{"name": "NAME", "parameters": {"'],
    "llama4_json": ['{"name": "NAME", "parameters": {"', '<|python_start|>{"name": "NAME", "parameters": {"'],
    "pythonic": ["[NAME(", "<|python_start|>[NAME("],
    "mistral": ["Hm.[TOOL_CALLS]NAME[ARGS]{", "[TOOL_CALLS]NAME[CALL_ID]abcdefghi[ARGS]{"],
    "deepseek_v3": ["So<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{",
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{"],
    "deepseek_v31": ["So<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{"],
    "kimi_k2": ["So<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{"],
    "glm45": ["So\n<tool_call>NAME\n"],
    "qwen3_coder": ["So <tool_call>\n<function=NAME>\n", "So <function=NAME>\n"],
    "openai": ["<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.NAME "
               "<|constrain|>json<|message|>{", "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{"],
    "granite": ['So<|tool_call|>[{"name": "NAME", "arguments": {', 'So<tool_call>[{"name": "NAME", "arguments": {'],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_strict_calls_in_free_text(vocabularies, name):
    """Free text passes; a call that begins ends as one of the tools offered, by its schema."""
    words = vocabularies(name)
    matcher = words.matcher(words.writer(name).free(TOOLS))
    for text in ("Just text, with <b>marks</b> (and [brackets]).", "  \n1 {}"):
        said = f"<|channel|>final<|message|>{text}" if name == "openai" else text
        free = matcher.deep_copy()
        assert words.takes(free, said)
        assert free.is_accepting()
        assert check(name, said, random.Random(0)) == (text, "", [])
    for opening in OPENINGS[name]:
        for seed in range(6):
            rng = random.Random(seed)
            text = words.walk(matcher.deep_copy(), rng, opening.replace("NAME", "book"))
            _, _, calls = check(name, text, rng)
            assert calls, text
            assert calls[0][0] == "book"
        assert not words.takes(matcher.deep_copy(), opening.replace("NAME", "other"))


@pytest.mark.parametrize("name", PLAIN)
def test_marks_that_are_text_bind_too(vocabularies, name):
    words = vocabularies("plain")
    matcher = words.matcher(words.writer(name).free(TOOLS))
    for opening in OPENINGS[name]:
        if name == "mistral":  # a tokenizer without the newer marks says that the model writes the array
            opening = 'Hm.[TOOL_CALLS] [{"name": "NAME", "arguments": {'
        assert words.takes(matcher.deep_copy(), opening.replace("NAME", "book")) or "<|python" in opening
        assert not words.takes(matcher.deep_copy(), opening.replace("NAME", "other"))


@pytest.mark.parametrize("name", FORMATS)
def test_tools_that_are_not_strict_take_any_arguments(vocabularies, name):
    words = vocabularies(name)
    loose = [Tool("book", BOOK, held=False), Tool("now", None, held=False)]
    matcher = words.matcher(words.writer(name).free(loose))
    arguments = {
        "glm45": "<arg_key>days</arg_key>\n<arg_value>many</arg_value>\n</tool_call>",
        "qwen3_coder": "<parameter=days>\nmany\n</parameter>\n</function>\n</tool_call>",
        "pythonic": 'days="many")]',
    }.get(name, '"days": "many"}')
    opening = OPENINGS[name][0].replace("NAME", "book").removesuffix('"')
    assert words.takes(matcher, opening + arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_or_an_answer_by_a_schema(vocabularies, name):
    words = vocabularies(name)
    properties = {"n": {"type": "integer", "maximum": 9, "minimum": 0}, "name": {"$ref": "#/$defs/short"}}
    answer = {"type": "object", "properties": properties, "required": ["n"], "additionalProperties": False,
              "$defs": {"short": {"type": "string", "maxLength": 3}}}  # fmt: skip
    matcher = words.matcher(words.writer(name).calls(TOOLS, True, answer))
    kinds = set()
    for seed in range(10):
        rng = random.Random(seed)
        begun = f"<|channel|>{'final' if seed % 2 else 'commentary'}" if name == "openai" else ""
        text = words.walk(matcher.deep_copy(), rng, begun)
        content, _, calls = check(name, text, rng)
        kinds.add(bool(calls))
        if not calls:
            jsonschema.validate(json.loads(content), answer)
    begun = "<|channel|>final<|message|>" if name == "openai" else ""
    assert words.takes(matcher, begun + '{"n": 1, "name": "x"}')
    assert matcher.is_accepting()
    assert True in kinds


def test_an_answer_that_could_be_taken_for_a_call_is_refused(vocabularies):
    words, answer = vocabularies("plain"), {"type": "object"}
    with pytest.raises(CannotWrite, match="taken for a call.*tool_choice 'none'"):
        words.writer("llama3_json").calls(TOOLS, True, answer)
    with pytest.raises(CannotWrite, match="type 'object'"):
        words.writer("pythonic").calls(TOOLS, True, {"type": "array"})


def test_reasoning_stands_before_a_forced_call(vocabularies):
    """What Harmony's own grammar says of the analysis, and the marks of others around theirs."""
    words = vocabularies("openai")
    matcher = words.matcher(words.writer("openai").calls(TOOLS, True))
    thought = "<|channel|>analysis<|message|>The {user} wants <this>.<|end|><|start|>assistant"
    text = words.walk(matcher.deep_copy(), random.Random(2), thought)
    content, reasoning, calls = check("openai", text, random.Random(3))
    assert (content, reasoning, len(calls)) == ("", "The {user} wants <this>.", 1)
    opened = words.matcher(words.writer("openai", opened=True).calls(TOOLS, True))
    rest = words.walk(opened, random.Random(4), "already at it<|end|>")
    assert rest.startswith("already at it<|end|><|start|>assistant<|channel|>commentary to=functions.")
    words = vocabularies("plain")
    matcher = words.matcher(words.writer("qwen3_coder").calls(TOOLS, True), Thinking(["</think>"], opened=True))
    text = words.walk(matcher, random.Random(5), "Hm, <tool_call>?</think>\n\n")
    assert len(check("qwen3_coder", text.split("</think>")[1], random.Random(6))[2]) >= 1


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ["", "a\nb", " <b>", '"x"', "null"], ["</arg_value>", "a<arg_key>b", "</tool_call>"]),
        ({"type": ["string", "null"], "minLength": 2}, ["ab", "null"], ["a", ""]),
        ({"type": "string", "pattern": "b/c"}, ["b/c", "ab/cd"], ["bc"]),
        ({"type": "string", "pattern": "^b+$"}, ["bb"], ["abb", ""]),
        ({"type": "string", "enum": ["a", "ab", ""]}, ["a", "ab", ""], ["b"]),
        ({"const": "x"}, ['"x"'], ["x"]),
        ({"enum": [1, "1"]}, ["1"], ["2"]),
        ({"type": "string", "format": "date", "maxLength": 10}, ["2024-02-29"], ["2023-02-29"]),
        ({"oneOf": [{"type": "string", "maxLength": 1}, {"type": "integer"}]}, ["a", "7"], ["77"]),
        ({"type": "integer", "minimum": 5, "maximum": 7}, ["6"], ["8", "five", "6.5"]),
        ({}, ["1", '"one"', '{"a": []}'], ["one"]),
        (True, ["[1]"], ["x"]),
    ],
)  # fmt: skip
def test_bare_values(vocabularies, schema, good, bad):
    """What GLM 4.5 and Qwen3-Coder write without quotes: the parser's value of it matches the schema."""
    words = vocabularies("plain")
    tool = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    forms = {
        "glm45": "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>",
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>",
    }
    for name, form in forms.items():
        matcher = words.matcher(words.writer(name).calls([Tool("f", tool)], False))
        for text in good:
            once = matcher.deep_copy()
            assert words.takes(once, form.replace("{}", text)), (name, text)
            assert once.is_accepting()
            offered = [{"type": "function", "function": {"name": "f", "parameters": tool}}]
            ((_, arguments),) = read(name, form.replace("{}", text), tools=offered)[2]
            assert arguments == {"x": value(text, schema)}
            jsonschema.validate(arguments, tool)
        for text in bad:
            if name == "glm45" or "arg_" not in text:
                assert not words.takes(matcher.deep_copy(), form.replace("{}", text)), (name, text)


@pytest.mark.parametrize(
    ("name", "tool", "said"),
    [
        ("kimi_k2", Tool("a:b"), "colon"),
        ("pythonic", Tool("a-b"), "no name in Python"),
        ("pythonic", Tool("f", {"properties": {"class": {}}}), "no name in Python"),
        ("pythonic", Tool("f", {"anyOf": [{}]}), "anyOf"),
        ("glm45", Tool("f", {"properties": {"a": {}}, "minProperties": 1}), "minProperties"),
        ("glm45", Tool("f", {"properties": {"a<b": {}}}), "argument's name"),
        ("qwen3_coder", Tool("f", {"properties": {"a": {"type": "string", "format": "email"}}}), "email"),
        ("qwen3_coder", Tool("f", {"properties": {"a": {"type": "string", "allOf": [{}]}}}), "allOf"),
        ("qwen3_coder", Tool("f", {"properties": {"a": {"type": "string", "minLength": "2"}}}), "minLength"),
        ("qwen3_coder", Tool("f", {"properties": {"a": {"type": "string", "enum": [1]}}}), "enum"),
        ("hermes", Tool("f", {"type": "string"}), "type 'object'"),
        ("hermes", Tool("f", {"properties": {"a": {"uniqueItems": True, "type": "array"}}}), "uniqueItems"),
    ],
)
def test_what_a_format_cannot_say_is_refused(vocabularies, name, tool, said):
    words = vocabularies("plain")
    with pytest.raises((CannotWrite, GrammarError), match=re.escape(said)):
        words.matcher(words.writer(name).calls([tool], False))


@pytest.mark.parametrize("schema", [{"type": 5}, {"anyOf": 3}, {"enum": 7}, {"type": [1, {}]}, "x", 5, None])
def test_odd_schemas_never_break_a_parser(schema):
    assert value("text", schema) == "text"


def test_every_built_in_parser_can_be_forced():
    for name, place in BUILT_IN.items():
        assert Choice(None, load(place)).writer(lambda text: None, None) is not None, name


def test_over_http(make_live):
    """The grammar reaches the engine in the parser's own form; what cannot be written is refused with what to do."""
    asked = {**CHAT, "tools": OFFERED, "tool_choice": "required"}
    engine = FakeLLM()
    with make_live(engine, Settings(models=(ModelSettings(parsers=Parsers(tool="glm45")),))).http() as http:
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        assert "<arg_key>city</arg_key>" in engine.opened[-1][1].structured_outputs.grammar
        email = {"type": "object", "properties": {"to": {"type": "string", "format": "email"}}}
        tools = [{"type": "function", "function": {"name": "send", "parameters": email}}]
        error = error_of(http.post("/v1/chat/completions", json={**asked, "tools": tools}), 400)
        assert error["param"] == "tools"
        assert "format: email" in error["message"]
        assert "tool_choice 'auto'" in error["message"]
    with make_live(FakeLLM(), Settings(models=(ModelSettings(parsers=Parsers(tool="none")),))).http() as http:
        error = error_of(http.post("/v1/chat/completions", json=asked), 400)
        assert error["param"] == "tool_choice"
        assert "--tool-call-parser" in error["message"]
        strict = [{"type": "function", "function": {"name": "now", "strict": True}}]
        error = error_of(http.post("/v1/chat/completions", json={**CHAT, "tools": strict}), 400)
        assert error["param"] == "tools"


def test_a_plugins_parser_without_a_grammar_is_refused():
    body = ChatRequest.model_validate({**CHAT, "tools": OFFERED, "tool_choice": "required"})
    assert Choice(None, object).writer(lambda text: None, None) is None
    with pytest.raises(Exception, match="cannot be forced"):
        body.form(None)
