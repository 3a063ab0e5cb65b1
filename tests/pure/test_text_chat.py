"""Chat templates render as Transformers renders them, and a hostile one is stopped."""

from __future__ import annotations

import enum
import json
import time
import tracemalloc

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from quire.text import chat, sandbox
from quire.text.chat import ChatTemplate, ChatTemplateError, prepare_messages
from quire.text.checkpoint import TextFiles
from quire.text.sandbox import Limits
from tests.pure.chat_templates import ALL, CHATML, LLAMA3, MISTRAL, QWEN3
from tests.pure.text_helpers import CONFIG, byte_level

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Say "how" <warm> & wet it is; für 2°',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}]
CONVERSATIONS = {
    "question": [{"role": "user", "content": "  What is a quire? <b>&amp;</b>\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi 😀"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb", "tool_calls": None},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "because"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": '{"warm": true}', "tool_call_id": "1"},
        {"role": "tool", "content": "more"},
    ],
    "many": [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i} banana"} for i in range(7)],
}
OPTIONS = [
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"tools": TOOLS, "add_generation_prompt": True},
    {"documents": [{"title": "t", "text": "x"}], "date_string": "1 May"},
    {"continue_final_message": True},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    library = byte_level()
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    return TextFiles(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ALL)
def test_renders_as_transformers_does(template, conversation, options, pair):
    mine, theirs = pair
    messages = CONVERSATIONS[conversation]
    options = {"add_generation_prompt": False} | options
    try:
        expected = theirs.apply_chat_template(messages, chat_template=ALL[template], tokenize=False, **options)
    except Exception:  # it refuses: so must we
        with pytest.raises(ChatTemplateError):
            mine.render_chat(messages, template=ALL[template], **options)
        return
    if template == "macros" and "continue_final_message" in options:
        return  # shows a message many times over: where it continues is anyone's guess
    assert mine.render_chat(messages, template=ALL[template], **options) == expected


def test_templates_refuse_in_their_own_words():
    with pytest.raises(ChatTemplateError, match="roles must alternate") as caught:
        ChatTemplate(MISTRAL).render([{"role": "assistant", "content": "x"}], bos_token="", eos_token="")
    assert caught.value.field == "messages"
    with pytest.raises(ChatTemplateError, match="one tool call"):
        ChatTemplate(LLAMA3).render([{"role": "assistant", "tool_calls": CALL * 2}], tools=TOOLS)


def test_continues_the_final_message(folder):
    template = ChatTemplate(CHATML)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is "}]
    expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nThe answer is "
    assert template.render(messages, continue_final_message=True) == expected
    trimming = ChatTemplate(LLAMA3).render(messages, continue_final_message=True)
    assert trimming.endswith("The answer is")
    assert messages[-1]["content"] == "The answer is "
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}]}]
    flat = ChatTemplate("{% for part in messages[0].content %}{{ part.text }}{% endfor %}!")
    assert flat.render(parts, continue_final_message=True) == "a b "
    for bad in ([{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(ChatTemplateError, match="no text to continue"):
            template.render(bad, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="leaves the last message out"):
        ChatTemplate("x").render(messages, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="exclude each other"):
        template.render(messages, continue_final_message=True, add_generation_prompt=True)


def test_named_templates(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    templates = {"default": "plain {{ bos_token }}", "tool_use": "tools {{ tools|length }}"}
    named = [{"name": name, "template": source} for name, source in templates.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    files, messages = TextFiles(tmp_path), CONVERSATIONS["question"]
    assert files.chat_template == "plain {{ bos_token }}"
    assert files.render_chat(messages) == "plain <s>"
    assert files.render_chat(messages, tools=TOOLS) == "tools 1"
    assert files.render_chat(messages, template="default", tools=TOOLS) == "plain <s>"
    assert files.render_chat(messages, template="own {{ x }}", x=3) == "own 3"
    with pytest.raises(ChatTemplateError, match="no chat template"):
        TextFiles(folder).render_chat(messages)


def test_recommended_sampling(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    recommended = {"temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 99, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    params = TextFiles(tmp_path).default_sampling()
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 20, 1.0, 99)


def test_messages_become_plain_data():
    class Role(enum.StrEnum):
        USER = "user"

    (message,) = prepare_messages([{"role": Role.USER, "content": ({"a": True},), "name": None}])
    assert message == {"role": "user", "content": [{"a": True}]}
    assert type(message["role"]) is str
    for bad in ([], ["x"], [{"role": "user", "content": object()}]):
        with pytest.raises(ChatTemplateError):
            prepare_messages(bad)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0]|attr('__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_is_in_reach(source):
    messages = [{"role": "user", "content": "x"}]
    try:
        text = ChatTemplate(source).render(messages)
    except ChatTemplateError:
        text = ""
    assert text == ""
    assert messages == [{"role": "user", "content": "x"}]


LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}BODY{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x='ab') %}{% for i in range(90) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x|length }}"
NEST = GROW.replace("'ab'", "[1]").replace("BODY", "[ns.x, ns.x]")
TWINS = (
    "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}"
    "{% set b.x = [b.x, b.x] %}{% endfor %}{{ BODY }}"
)
TUPLES = "{% set a = namespace(x=(1, 2)) %}{% for i in range(60) %}{% set a.x = (a.x, a.x) %}{% endfor %}{{ BODY }}"
HOSTILE = {
    "nested loops": LOOP.replace("BODY", "{% set x = i %}"),
    "nested loops with output": LOOP.replace("BODY", "x"),
    "a loop that filters": "{% for i in range(90000) %}{% for j in range(90000) if j < 0 %}{% endfor %}{% endfor %}",
    "an endless range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[1]] * 9 recursive %}{{ loop([[1]] * 9) }}{% endfor %}",
    "multiplication": "{{ 'x' * 1000000000 }}",
    "multiplication of lists": "{{ ([0] * 1000000000)|length }}",
    "multiplication by name": "{% set n = 10 ** 9 %}{{ ('x' * n)|length }}",
    "powers": "{{ 10 ** (10 ** 9) }}",
    "powers of powers": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling by +": GROW.replace("BODY", "ns.x + ns.x"),
    "doubling by ~": GROW.replace("BODY", "ns.x ~ ns.x"),
    "doubling by join": GROW.replace("BODY", "[ns.x, ns.x]|join"),
    "doubling by joining": GROW.replace("BODY", "''.join([ns.x, ns.x])"),
    "doubling by %": GROW.replace("BODY", "'%s%s' % (ns.x, ns.x)"),
    "doubling by format": GROW.replace("BODY", "'{0}{0}'.format(ns.x)"),
    "doubling by the format filter": GROW.replace("BODY", "'%s%s'|format(ns.x, ns.x)"),
    "doubling by replace": GROW.replace("BODY", "ns.x.replace('a', ns.x)"),
    "doubling by the replace filter": GROW.replace("BODY", "ns.x|replace('b', ns.x)"),
    "doubling by set": GROW.replace(
        "{% set ns.x = BODY %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ),
    "doubling by macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW.replace("BODY", "d(ns.x)"),
    "doubling lists": GROW.replace("'ab'", "[1]").replace("BODY", "ns.x + ns.x"),
    "doubling by translate": GROW.replace("BODY", "ns.x.translate({97: ns.x, 98: ns.x})"),
    "lists of lists as text": NEST.replace("|length", ""),
    "lists of lists as JSON": NEST.replace("length", "tojson"),
    "lists of lists by ~": NEST.replace("ns.x|length", "'' ~ ns.x"),
    "lists of lists upper": NEST.replace("length", "upper"),
    "center": "{{ 'x'|center(1000000000) }}",
    "center by map": "{{ ['x']|map('center', 1000000000)|list }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill by attr": "{{ ('x'|attr('zfill'))(1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'x\\ny'|indent(1000000000) }}",
    "indent of JSON": "{{ [[1]]|tojson(indent=1000000000) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format width by filter": "{{ '%1000000000d'|format(1) }}",
    "format width from an argument": "{{ '%*d' % (1000000000, 1) }}",
    "format field width": "{{ '{:1000000000}'.format(1) }}",
    "format field width from an argument": "{{ '{:{}}'.format(1, 1000000000) }}",
    "slices": "{{ [1]|slice(1000000000)|list|length }}",
    "lorem ipsum": "{{ lipsum(1000000)|length }}",
    "output": "{% for i in range(90000) %}{{ 'x' * 90000 }}{% endfor %}",
    "output of a macro": "{% macro f() %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endmacro %}{{ f() }}",
    "a list of long strings": GROW.replace("range(90)", "range(90000)")
    .replace("'ab'", "[]")
    .replace("BODY", "ns.x + ['x' * 90000 ~ i]"),
    "a search from the right": "{{ ('a' * 400000).rfind('a' * 90000 ~ 'b' ~ 'a' * 90000) }}",
    "a split from the right": "{{ ('a' * 400000).rsplit('a' * 90000 ~ 'b' ~ 'a' * 90000) }}",
    "strip": "{{ ('b' * 900000).strip('a' * 900000 ~ 'b') }}",
    "trim": "{{ ('b' * 900000)|trim('a' * 900000 ~ 'b') }}",
    "lists of lists ==": TWINS.replace("BODY", "a.x == b.x"),
    "lists of lists in": TWINS.replace("BODY", "a.x in [b.x]"),
    "lists of lists, chained": TWINS.replace("BODY", "[] < a.x < b.x"),
    "lists of lists by a test": TWINS.replace("BODY", "a.x is eq(b.x)"),
    "lists of lists by select": TWINS.replace("BODY", "[a.x]|select('in', [b.x])|list"),
    "lists of lists sorted": TWINS.replace("BODY", "[a.x, b.x]|sort|length"),
    "lists of lists sorted by map": TWINS.replace("BODY", "[[a.x], [b.x]]|map('first')|max|length"),
    "lists of lists index": TWINS.replace("BODY", "[a.x].index(b.x)"),
    "tuples of tuples as a key": TUPLES.replace("BODY", "{a.x: 1}|length"),
    "tuples of tuples looked up": TUPLES.replace("BODY", "{}[a.x]"),
    "tuples of tuples got": TUPLES.replace("BODY", "{}.get(a.x)"),
    "tuples of tuples unique": TUPLES.replace("BODY", "[a.x]|unique|list|length"),
    "adding up lists": "{{ ([[1] * 900] * 900)|sum(start=[])|length }}",
    "bytes of a number": "{{ (10).to_bytes(1000000000, 'big')|length }}",
    "bytes of a text": "{{ 'x'.encode().center(1000000000)|length }}",
    "precision": "{{ 1.5|round(100000000, 'ceil') }}",
    "slices that are kept": GROW.replace("range(90)", "range(90000)")
    .replace("'ab'", "[]")
    .replace("BODY", "[ns.x, ('x' * 900000)[1:]]"),
    "reversals that are kept": GROW.replace("range(90)", "range(90000)")
    .replace("'ab'", "[]")
    .replace("BODY", "[ns.x, ('x' * 900000)|reverse]"),
    "nested ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "an unclosed tag": "{% for x in",
    "a division by zero": "{{ 1 // 0 }}",
    "an undefined attribute": "{{ nothing.at.all }}",
    "an unknown filter": "{{ 'x'|urlize }}",
    "too long a template": "x" * (chat.LONGEST_TEMPLATE + 1),
}


def run(name, limits):
    ChatTemplate(HOSTILE[name], limits).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_with_an_error(name):
    begin = time.process_time()
    with pytest.raises(ChatTemplateError):
        run(name, Limits(seconds=0.2, characters=1_000_000))
    assert time.process_time() - begin < 1.5


def test_hostile_templates_take_little_memory():
    for name in HOSTILE:
        tracemalloc.start()
        with pytest.raises(ChatTemplateError):
            run(name, Limits(seconds=0.1, characters=100_000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30_000_000, name


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 < x < 3 }}{{ 1 < x > 2 }}{{ x == 2 != 3 }}{{ 3 >= x <= 1 }}",
        "{{ 'a' in 'abc' }}{{ 'd' not in 'abc' }}{{ 2 in [x] }}{{ 'k' in {'k': 1} }}{{ not x in [1] }}",
        "{{ nothing == 1 }}{{ nothing is defined }}{{ x is eq 2 }}{{ x is divisibleby 2 }}{{ [1, 2]|select('gt', 1)|list }}",
        "{{ 'abcd'[1:3] }}{{ [1, 2, 3][::-1] }}{{ (1, 2, 3)[:-1] }}{{ {(1, 2): 3}[(1, 2)] }}{{ {'a': 1}['a'] }}{{ [5][x - 2] }}",
        "{{ [3, 1]|sort }}{{ [1, 2]|sum }}{{ [[1], [2]]|sum(start=[]) }}{{ [{'a': 2}]|sum('a') }}{{ {'b': 1, 'a': 2}|dictsort }}",
        "{{ [1, 1]|unique|list }}{{ [{'k': 1}, {'k': 2}]|groupby('k')|length }}{{ 2.567|round(1) }}{{ 'xax'|trim('x') }}",
        "{{ 'a b c'.rsplit(' ', 1) }}{{ 'a-b-a'.rfind('a') }}{{ ' x '.strip() }}{{ 'abc'|reverse }}{{ [1, 2]|reverse|list }}",
    ],
)
def test_what_is_guarded_means_what_it_meant(source):
    plain = ImmutableSandboxedEnvironment().from_string(source)
    assert ChatTemplate(source).render([{}], x=2) == plain.render(x=2)


def test_long_conversations_are_no_attack():
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(2001)]
    for template in (CHATML, QWEN3, LLAMA3, MISTRAL):
        text = ChatTemplate(template).render(messages, bos_token="", eos_token="", tools=TOOLS)
        assert len(text) > 2_000_000


def test_budgets_do_not_outlive_a_rendering():
    template = ChatTemplate(HOSTILE["nested loops"], Limits(seconds=0.05))
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match=r"longer than 0.05 s"):
            template.render([{"role": "user", "content": "x"}])
    assert sandbox._budget.get() is None
    assert ChatTemplate("{{ 'ok' }}").render([{}]) == "ok"
