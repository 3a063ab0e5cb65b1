# ruff: noqa: RUF001 - the bars in DeepSeek's marks are full-width
"""Tool calls in every format: parsed alike however the text is cut, never an error, in linear work; and seen alike,
streamed and whole, by the openai client."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fake import FakeLLM
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import plugins
from quire.errors import ConfigError
from quire.hardware import hookimpl
from quire_server import reader, tool_calls
from quire_server.model import ModelSettings
from quire_server.parsers import REASONING_MARKS, TOOL_MARKS, Choice, Parsers, chosen
from quire_server.reader import Reader
from quire_server.state import Settings
from quire_server.tool_calls import AnswerParser, Arguments, CallEnd, CallStart, Content
from quire_server.tool_parsers import BUILT_IN, load

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "hourly": {"type": "boolean"},
                "at": {"type": "object"},
            },
        },
    },
}
TOOLS = [WEATHER, {"type": "function", "function": {"name": "now"}}]
PARIS = ("get_weather", {"city": "Paris", "days": 3})
ZIP = ("get_weather", {"city": "01234", "days": 3, "hourly": True, "at": {"lat": 1.5}, "units": None})
NOW = ("now", {})

# name -> the format's texts, each with the content and the calls it stands for
TEXTS = {
    "hermes": {
        "one": ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>', "", [PARIS]),
        "two": (
            'I ask.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n'
            '<tool_call>{"name": "now"}</tool_call>',
            "I ask.",
            [PARIS, NOW],
        ),
        "text after": ('<tool_call>{"name": "now"}</tool_call> Done.', " Done.", [NOW]),
        "the last mark is missing": ('<tool_call>\n{"name": "now", "arguments": {}}', "", [NOW]),
        "arguments as text": ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [NOW]),
        "no call": ("Just <b>text</b>, <tool_cal", "Just <b>text</b>, <tool_cal", []),
        "not JSON": ("<tool_call>{oops}</tool_call>", "<tool_call>{oops}</tool_call>", []),
        "no name": ('<tool_call>{"arguments": {}}</tool_call>x', '<tool_call>{"arguments": {}}</tool_call>x', []),
        "no object": ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', None, []),
        "no number of JSON": ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', None, []),
        "infinite": ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', None, []),
        "cut off": ('So: <tool_call>{"name": "a', None, []),
        "a mark in a string": (
            '<tool_call>{"name": "f", "arguments": {"x": "<tool_call>"}}</tool_call>',
            "",
            [("f", {"x": "<tool_call>"})],
        ),
        "white space": ("  a \n\n b  \n", None, []),
        "much white space": (" " * 700 + "a" + "\n" * 600, None, []),
    },
    "llama3_json": {
        "one": ('{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}', "", [PARIS]),
        "python tag": ('<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', "", [NOW]),
        "two": (
            '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}; {"name": "now", "parameters": {}}',
            "",
            [PARIS, NOW],
        ),
        "arguments": ('{"name": "f", "arguments": {"x": "}\\"{"}}', "", [("f", {"x": '}"{'})]),
        "a JSON answer": ('{"name": "Bob", "age": 3}', None, []),
        "text": ('The call is {"name": "now", "parameters": {}}', None, []),
        "text after": ('{"name": "now", "parameters": {}} there', " there", [NOW]),
        "cut off": ('{"name": "get_weather", "parameters": {"city": "Par', None, []),
        "the second is none": ('{"name": "now", "parameters": {}}; {"oops"} end', '; {"oops"} end', [NOW]),
    },
    "pythonic": {
        "two": ('[get_weather(city="Paris", days=3), now()]', "", [PARIS, NOW]),
        "marks": ("<|python_start|>[now()]<|python_end|>", "", [NOW]),
        "values": (
            "[a.f(x=[1, -2.5, (3,)], y={'k': None, 'l': True}, z='it\\'s ] \"', w=false)]",
            "",
            [("a.f", {"x": [1, -2.5, [3]], "y": {"k": None, "l": True}, "z": 'it\'s ] "', "w": False})],
        ),
        "a list": ("[1, 2] are numbers", None, []),
        "positional": ("[f(1)]", None, []),
        "code": ("[f(x=__import__('os').system('true'))]", None, []),
        "an operator": ("[f(x=2**99999999)]", None, []),
        "a comprehension": ("[f(x=[y for y in (1, 2)])]", None, []),
        "a lambda": ("[f(x=lambda: 1)]", None, []),
        "a chain": ("[f" + "()" * 3000 + "]", None, []),
        "signs": ("[f(x=" + "-" * 5000 + "1)]", None, []),
        "deep": ("[f(x=" + "[" * 5000 + "]" * 5000 + ")]", None, []),
        "cut off": ('[get_weather(city="Par', None, []),
        "text": ("Hello [now()]", None, []),
    },
    "mistral": {
        "array": (
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}, {"name": "now"}]',
            "",
            [PARIS, NOW],
        ),
        "names": (
            'Let me see.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]now[ARGS]{}',
            "Let me see.",
            [PARIS, NOW],
        ),
        "id": ('[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}', "", [NOW]),
        "no mark": ('[TOOL_CALLS]get_weather{"city": "Paris", "days": 3}', "", [PARIS]),
        "nothing": ("[TOOL_CALLS]", None, []),
        "no JSON": ("[TOOL_CALLS]f[ARGS]{x} then", None, []),
        "not closed": ('[TOOL_CALLS] [{"name": "now"}', None, []),
        "no name": ("[TOOL_CALLS]{}", None, []),
    },
    "deepseek_v3": {
        "two": (
            "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n'
            "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Sure.",
            [PARIS, NOW],
        ),
        "malformed": ("<｜tool▁call▁begin｜>function<｜tool▁call▁end｜>", None, []),
        "marks within JSON": (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
            '{"x": "```<｜tool▁call▁end｜>"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            "",
            [("f", {"x": "```<｜tool▁call▁end｜>"})],
        ),
    },
    "deepseek_v31": {
        "one": (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
            '{"city": "Paris", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            "",
            [PARIS],
        ),
        "no JSON": ("<｜tool▁call▁begin｜>f<｜tool▁sep｜>x<｜tool▁call▁end｜>", None, []),
        "a bracket that does not close": (
            '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>',
            '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"<｜tool▁call▁end｜>',
            [NOW],
        ),
    },
    "kimi_k2": {
        "two": (
            "Ok <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
            '{"city": "Paris", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.now:1'
            "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
            "Ok",
            [PARIS, NOW],
        ),
        "spaces": (
            "Ok. <|tool_calls_section_begin|> <|tool_call_begin|>\nfunctions.get_weather:0 <|tool_call_argument_begin|> {\n"
            '  "city": "Paris",\n  "days": 3\n} <|tool_call_end|> <|tool_call_begin|> now:1 <|tool_call_argument_begin|>{}'
            "<|tool_call_end|> <|tool_calls_section_end|>",
            "Ok.",
            [PARIS, NOW],
        ),
        "no arguments": ("<|tool_call_begin|>functions.now:0<|tool_call_end|>", None, []),
        "marks within JSON": (
            '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": ["<|tool_call_end|>", "{"]}<|tool_call_end|>!',
            "!",
            [("f", {"x": ["<|tool_call_end|>", "{"]})],
        ),
    },
    "glm45": {
        "types": (
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>01234</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>3</arg_value>\n<arg_key>hourly</arg_key>\n<arg_value>true</arg_value>\n<arg_key>at</arg_key>\n"
            '<arg_value>{"lat": 1.5}</arg_value>\n<arg_key>units</arg_key>\n<arg_value>null</arg_value>\n</tool_call>',
            "",
            [ZIP],
        ),
        "indented": (
            "I look.<tool_call>get_weather\n    <arg_key>city</arg_key>\n    <arg_value>Paris</arg_value>\n    "
            "<arg_key>days</arg_key>\n    <arg_value>3</arg_value>\n    </tool_call>",
            "I look.",
            [PARIS],
        ),
        "none": ("x\n<tool_call>now</tool_call>\n<tool_call>now\n</tool_call>", "x", [NOW, NOW]),
        "unknown": ("<tool_call>f<arg_key>a</arg_key><arg_value>x y</arg_value></tool_call>", "", [("f", {"a": "x y"})]),
        "marks within JSON": (
            "<tool_call>get_weather\n<arg_key>at</arg_key>\n<arg_value> "
            '{"a": "</arg_value>\\"}</tool_call>", "b": ["<arg_key>"]} '
            "</arg_value>\n<arg_key>city</arg_key>\n<arg_value>{\"</arg_value></tool_call>\n"
            '<tool_call>f<arg_key>x</arg_key><arg_value>["</tool_call>", 1]</arg_value></tool_call>!',
            "!",
            [
                ("get_weather", {"at": {"a": '</arg_value>"}</tool_call>', "b": ["<arg_key>"]}, "city": '{"'}),
                ("f", {"x": ["</tool_call>", 1]}),
            ],
        ),
        "a bracket that does not close": (
            '<tool_call>f<arg_key>x</arg_key><arg_value>{"</arg_value><arg_key>y</arg_key><arg_value>[1] 2</arg_value>'
            '<arg_key>z</arg_key><arg_value>{"a": 1}</arg_value></tool_call> and so on',
            " and so on",
            [("f", {"x": '{"', "y": "[1] 2", "z": {"a": 1}})],
        ),
        "JSON, cut off": ('<tool_call>f<arg_key>x</arg_key><arg_value>{"</arg_value></tool_call>', "", [("f", {"x": '{"'})]),
        "malformed": ("<tool_call>f<arg_key>a</arg_key>1</tool_call>", None, []),
        "JSON": ('<tool_call>{"name": "now"}</tool_call>', None, []),
    },
    "qwen3_coder": {
        "types": (
            "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n01234\n</parameter>\n<parameter=days>\n3\n"
            "</parameter>\n<parameter=hourly>\nTrue\n</parameter>\n<parameter=at>\n{\"lat\": 1.5}\n</parameter>\n"
            "<parameter=units>\nnull\n</parameter>\n</function>\n</tool_call>",
            "I look.",
            [ZIP],
        ),
        "lines": (
            "<tool_call><function=get_weather><parameter=city>\n<a>\n\n b\n</parameter></function></tool_call>",
            "",
            [("get_weather", {"city": "<a>\n\n b"})],
        ),
        "none": ("<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [NOW]),
        "without the outer marks": (
            "Sure.\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
            "</function>\n<function=now>\n</function>\n</tool_call>",
            "Sure.",
            [PARIS, NOW],
        ),
        "marks within JSON": (
            "<tool_call>\n<function=get_weather>\n<parameter=at>\n"
            "{\"a\": \"</parameter>\\n</function></tool_call>\"}\n</parameter>\n"
            "<parameter=city>\n</parameter>{</function>\n</parameter>\n</function>\n</tool_call>"
            '<function=f><parameter=x>["</function>", "<parameter=y>"]</parameter></function>!',
            "!",
            [
                ("get_weather", {"at": {"a": "</parameter>\n</function></tool_call>"}, "city": "</parameter>{</function>"}),
                ("f", {"x": ["</function>", "<parameter=y>"]}),
            ],
        ),
        "a bracket that does not close": (
            '<tool_call><function=f><parameter=x>{"</parameter><parameter=y>{}</parameter></function></tool_call> and so on',
            " and so on",
            [("f", {"x": '{"', "y": {}})],
        ),
        "bare and cut off": ("<function=now>\n<parameter=x>\n1", None, []),
        "malformed": ("<tool_call>\n<function=now>\n<parameter=x>\n</function></tool_call>", None, []),
        "no function": ("<tool_call>now</tool_call>", None, []),
    },
    "granite": {
        "two": (
            '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}, {"name": "now"}]',
            "",
            [PARIS, NOW],
        ),
        "text": ('First <tool_call> [{"name": "now", "arguments": {}}]', "First", [NOW]),
        "malformed": ("<|tool_call|>now", None, []),
    },
    "openai": {
        "one": (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
            '<|constrain|>json<|message|>{"city": "Paris", "days": 3}<|call|>',
            "I look.",
            [PARIS],
        ),
        "recipient first": ("<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}", "", [NOW]),
        "final": ("<|channel|>final<|message|>Hello  there.<|return|>", "Hello  there.", []),
        "plain": ("Hello there.", None, []),
        "no JSON": ("<|channel|>commentary to=functions.now<|message|>oops<|call|>", "oops", []),
        "no message": ("<|channel|>final", None, []),
    },
}  # fmt: skip
SAME = {"qwen": "hermes", "llama4_json": "llama3_json", "llama4_pythonic": "pythonic"}
CASES = [(name, case) for name in TEXTS for case in TEXTS[name]]


def parse(name, pieces, tools=TOOLS):
    """(content, reasoning, [(name, arguments)]) of pieces of text."""
    parser = load(BUILT_IN[name])(tools)
    events = [e for piece in pieces for e in parser.push(piece)] + parser.finish()
    return merged(events)


def merged(events):
    content, reasoning, calls, open_call = "", "", [], False
    for event in events:
        if isinstance(event, CallStart):
            assert not open_call
            calls.append([event.name, ""])
            open_call = True
        elif isinstance(event, Arguments):
            assert open_call
            calls[-1][1] += event.text
        elif isinstance(event, CallEnd):
            assert open_call
            open_call = False
        elif isinstance(event, Content):
            content += event.text
        else:
            reasoning += event.text
    assert not open_call
    return content, reasoning, [(name, json.loads(arguments)) for name, arguments in calls]


def test_every_built_in_parser_has_texts():
    assert set(BUILT_IN) == set(TEXTS) | set(SAME)
    assert all(BUILT_IN[name] == BUILT_IN[other] for name, other in SAME.items())


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}: {c}" for n, c in CASES])
def test_wherever_the_text_is_cut(name, case):
    text, content, calls = TEXTS[name][case]
    expected = (text if content is None else content, "", calls)
    assert parse(name, [text]) == expected
    assert parse(name, list(text)) == expected
    places = range(len(text)) if len(text) < 600 else random.Random(0).sample(range(len(text)), 25)
    for i in places:
        assert parse(name, [text[:i], text[i:]]) == expected


# Everything that means something to some format.
MARKS = [
    "<tool_call>", "</tool_call>", "<|tool_call|>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "[TOOL_CALLS]",
    "[ARGS]", "[CALL_ID]", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "```json\n", "<|tool_call_begin|>", "functions.f:0", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<arg_key>",
    "</arg_key>",
    "<arg_value>", "</arg_value>", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "<|start|>assistant",
    "<|channel|>", "analysis", "commentary to=functions.f", "<|message|>", "<|end|>", "<|call|>", "{", "}", "[", "]", "(", ")",
    '{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {"a": "\\"}"}}', "f(", "a=", '"', "'", "\\", ",", ";", "-",
    "1", "f", " ", "\n", "<", "|", "[f(a=1)]", "é🙂",
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(MARKS), max_size=14), st.data())
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_never_matter(name, parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(name, [text])
    assert parse(name, pieces) == whole
    assert parse(name, list(text)) == whole


SIZE = 2**17
HOSTILE = {
    "openings": "<tool_call>[TOOL_CALLS]<|tool_call|><｜tool▁call▁begin｜><|tool_call_begin|><|channel|>",
    "beginnings": "<tool_cal<|tool_cal[TOOL_CALL<｜tool▁call▁begin<|chan",
    "spaces": " \n",
    "open brackets": '[TOOL_CALLS][{"name":',
    "brackets": "[",
    "objects": '{"a":',
    "pairs": "{}",
    "string": '{"',
    "backslashes": '["\\\\',
    "calls": '<tool_call>{"name":"f"}</tool_call>',
    "keys": "<arg_key>",
    "words": "[f(a a ",
    "headers": "<|start|>a<|message|>",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_work_and_memory_are_linear(monkeypatch, name, kind):
    """Every character is searched a bounded number of times, and parsed as JSON once."""
    work = 0
    search, read = Reader.search, tool_calls.from_json

    def counted(self, pattern, at, end=2**30):
        nonlocal work
        found = search(self, pattern, at, end)
        work += (found.end() if found else min(len(self._text), end)) - at
        return found

    def counted_read(text, **options):
        nonlocal work
        work += len(text)
        return read(text, **options)

    monkeypatch.setattr(Reader, "search", counted)
    monkeypatch.setattr(tool_calls, "from_json", counted_read)
    prefix = {"pythonic": "[", "llama3_json": '{"'}.get(name, "") if kind in ("brackets", "words", "string") else ""
    text = (prefix + HOSTILE[kind] * (SIZE // len(HOSTILE[kind]) + 1))[:SIZE]
    longest = 0
    for width in (SIZE, 4099, 64):
        work = 0
        parser = load(BUILT_IN[name])(TOOLS)
        for start in range(0, len(text), width):
            parser.push(text[start : start + width])
            longest = max(longest, parser.reader.held)
        parser.finish()
        assert work <= 4 * len(text) + 100 * (len(text) // width + 1)
    assert longest <= 64  # what came is consumed; a call that is read is bounded by MAX_HELD


@pytest.mark.parametrize("name", ["hermes", "mistral", "granite", "openai"])
def test_a_call_that_is_too_long_is_content(monkeypatch, name):
    for function in (Reader.body, Reader.value):
        defaults = tuple(1000 if value == reader.MAX_HELD else value for value in function.__defaults__)
        monkeypatch.setattr(function, "__defaults__", defaults)
    text = TEXTS[name]["two" if name not in ("mistral", "openai") else "array" if name == "mistral" else "one"][0]
    long = text.replace("Paris", "P" * 1000)
    content, _, calls = parse(name, [long])
    assert "P" * 1000 in content
    assert all(call == NOW for call in calls)
    assert parse(name, list(long)) == (content, "", calls)


def test_fragments_of_a_plugins_parser():
    """A plugin may give a call in pieces; the whole answer has it in one."""

    class Slow:
        def push(self, text):
            return [CallStart("f"), Arguments('{"a"')] if text == "1" else [Arguments(": 1}"), CallEnd()]

        def finish(self):
            return [CallStart("g", "id-2"), Arguments("{}"), CallEnd()]

    parser = AnswerParser(None, Slow())
    (first,), (second,) = parser.push("1").calls, parser.push("2").calls
    (third,) = parser.finish().calls
    assert first["function"] == {"name": "f", "arguments": '{"a"'}
    assert second == {"index": 0, "function": {"arguments": ": 1}"}}
    assert (third["index"], third["id"]) == (1, "id-2")
    only = AnswerParser(None, Slow(), parallel=False)
    assert [len(piece.calls) for piece in (only.push("1"), only.push("2"), only.finish())] == [1, 1, 0]


TEMPLATES = {
    "hermes": 'Call:\n<tool_call>\n{"name": ...}\n</tool_call>',
    "mistral": "{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}",
    "deepseek_v3": "{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n' + '```json'}}",
    "deepseek_v31": "{{'<｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜>'}}",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=a>",
    "granite": "respond only with <|tool_call|> followed by a JSON list",
    "openai": "<|start|>assistant<|channel|>commentary to=functions.<|message|>",
    "llama4_pythonic": "[func_name1(params_name1=params_value1), func_name2()]",
    "llama4_json": '<|header_start|> {"name": function name, "parameters": dictionary}',
    "llama3_json": '<|start_header_id|> {"name": function name, "parameters": dictionary}',
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells(name):
    assert chosen(TOOL_MARKS, TEMPLATES[name]) == name
    assert Parsers().choice(TEMPLATES[name]).tools is load(BUILT_IN[name])


def test_names():
    demo = (Path(tool_calls.__file__).parent / "demo" / "chat_template.jinja").read_text()
    assert (chosen(TOOL_MARKS, demo), chosen(REASONING_MARKS, demo)) == ("hermes", "qwen3")
    assert chosen(TOOL_MARKS, "{{ messages }}") is None
    assert {name for _, name in TOOL_MARKS} <= set(BUILT_IN)
    assert Parsers(tool="none").choice(TEMPLATES["hermes"]).tools is None
    assert Parsers(tool="mistral").choice(TEMPLATES["hermes"]).tools is load(BUILT_IN["mistral"])
    with pytest.raises(ConfigError, match=r"--tool-call-parser herms: no such parser; there are auto, none, .*hermes"):
        Parsers(tool="herms")
    with pytest.raises(ConfigError, match="--reasoning-parser r1: no such parser; there are .*deepseek_r1"):
        Parsers(reasoning="r1")


def test_flags():
    import argparse

    from quire_server import cli

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)

    def parsers(*flags):
        args = parser.parse_args(flags)
        args.plugins = None
        return cli._settings(args).models[0].parsers

    assert parsers() == Parsers("auto", "auto")
    assert parsers("--enable-auto-tool-choice", "--tool-call-parser", "hermes") == Parsers("hermes", "auto")
    assert parsers("--no-enable-auto-tool-choice", "--reasoning-parser", "qwen3") == Parsers("none", "qwen3")
    with pytest.raises(ConfigError, match="no such parser"):
        parsers("--tool-call-parser", "x")


def test_a_plugin_registers_parsers():
    class Entry:
        name, value, dist = "mine", "mine:Plugin", None

        def load(self):
            class Plugin:
                @staticmethod
                @hookimpl
                def quire_register_tool_parsers(register):
                    register("mine", lambda: "made")

            return Plugin

    registry = plugins.load(found=[Entry()])
    assert registry.tool_parsers["mine"]() == "made"
    assert registry.plugins[-1].registered["tool_parsers"] == ["mine"]
    assert registry.plugins[-1].error is None


def test_documented():
    page = (Path(__file__).parents[2] / "docs" / "tool-calling.md").read_text()
    registry = plugins.load(("server",))
    for name in [*registry.tool_parsers, *registry.reasoning_parsers]:
        assert f"`{name}`" in page, name


CALLED = [(name, case) for name, case in CASES if TEXTS[name][case][2]]


def ask(live, text, parallel=True, **more):
    """(content, calls, finish_reason) of a whole answer, which the streamed one equals."""
    live.engine.script = text
    options = {"model": "demo", "messages": [{"role": "user", "content": "x"}], **more}
    if more.get("tools"):
        options["parallel_tool_calls"] = parallel
    client = live.openai()
    choice = client.chat.completions.create(**options).choices[0]
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    calls, streamed = (
        [(c.function.name, json.loads(c.function.arguments)) for c in m.tool_calls or ()]
        for m in (choice.message, final.message)
    )
    assert (final.finish_reason, final.message.content or "", streamed) == (
        choice.finish_reason,
        choice.message.content or "",
        calls,
    )
    return choice, calls


@pytest.mark.parametrize("name", TEXTS)
def test_openai_client(make_live, name):
    """Every format as a server that was told its name serves it."""
    live = make_live(FakeLLM(), Settings(models=(ModelSettings(parsers=Parsers(tool=name)),)))
    for case in [case for n, case in CALLED if n == name][:2]:
        text, content, expected = TEXTS[name][case]
        choice, calls = ask(live, text, tools=TOOLS)
        assert calls == expected
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == (content or None)
        _, calls = ask(live, text, parallel=False, tools=TOOLS)
        assert calls == expected[:1]
    special = name in ("hermes", "glm45", "qwen3_coder")
    assert live.engine.opened[-1][1].skip_special_tokens is special


def test_ids_and_what_comes_back(make_live):
    live = make_live(FakeLLM())  # the fake's template has the marks of hermes
    choice, calls = ask(live, TEXTS["hermes"]["two"][0], tools=TOOLS)
    assert calls == [PARIS, NOW]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "3"}
    messages = [{"role": "user", "content": "x"}, choice.message.model_dump(), result]
    assert live.openai().chat.completions.create(model="demo", messages=messages, tools=TOOLS).choices
    kimi = make_live(FakeLLM(), Settings(models=(ModelSettings(parsers=Parsers(tool="kimi_k2")),)))
    choice, _ = ask(kimi, TEXTS["kimi_k2"]["two"][0], tools=TOOLS)
    assert [call.id for call in choice.message.tool_calls] == ["functions.get_weather:0", "functions.now:1"]


def test_tools_are_the_models_business_only_when_offered(make_live):
    live = make_live(FakeLLM())
    text = TEXTS["hermes"]["one"][0]
    plain, _ = ask(live, text)
    forbidden, _ = ask(live, text, tools=TOOLS, tool_choice="none")
    assert plain.message.content == forbidden.message.content == text
    assert forbidden.finish_reason == "stop"
    off = make_live(FakeLLM(), Settings(models=(ModelSettings(parsers=Parsers(tool="none")),)))
    left, calls = ask(off, text, tools=TOOLS)
    assert (left.message.content, calls) == (text, [])
    # A call that the limit cuts off is what the model wrote.
    client = live.openai()
    options = {
        "model": "demo",
        "messages": [{"role": "user", "content": "x"}],
        "extra_body": {"return_token_ids": True},
    }
    cut = client.chat.completions.create(**options, tools=TOOLS, max_tokens=30).choices[0]
    assert (cut.message.content, cut.message.tool_calls, cut.finish_reason) == (text[:30], None, "length")
    chunks = client.chat.completions.create(**options, tools=TOOLS, max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[:30]
    prompts = [
        client.chat.completions.create(**options, **more).prompt_token_ids
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
    ]
    assert prompts[0] == prompts[1]
    assert '"name": "get_weather"' in bytes(prompts[2]).decode()


def test_a_choice_without_marks_reads_nothing():
    assert Choice(None, None).parser(None, TOOLS, True, True).whole("<tool_call>").content == "<tool_call>"
