"""Reasoning told from the answer, in every form, however the text is cut, and from where the prompt ends."""

from __future__ import annotations

import pytest
from fake import TEMPLATE, FakeLLM
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tool_parsers import HOSTILE, TOOLS, merged

from quire_server.model import ModelSettings
from quire_server.parsers import REASONING_MARKS, Parsers, chosen
from quire_server.reasoning_parsers import BUILT_IN, load
from quire_server.state import Settings
from quire_server.tool_parsers import BUILT_IN as TOOL_PARSERS

HARMONY = (
    "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
)
# name -> (whether the prompt ends inside, text, content, reasoning)
TEXTS = {
    "deepseek_r1": {
        "both marks": (None, "<think>\nTwo and two.\n</think>\n\nFour.", "Four.", "Two and two."),
        "opened by the prompt": (True, "Two and two.\n</think>\n\nFour.", "Four.", "Two and two."),
        "nobody says it is opened": (None, "Two and two.</think>Four.", "Four.", "Two and two."),
        "cut off": (None, "<think>Two and two. ", "", "Two and two."),
        "closed by the prompt": (False, "Four.", "Four.", ""),
    },
    "qwen3": {
        "both marks": (None, "<think>\nTwo < three.\n</think>\n\nFour.\n", "Four.\n", "Two < three."),
        "none": (None, " Four </think>", " Four </think>", ""),
        "opened by the prompt": (True, "\nTwo and two.\n</think>\n\nFour.", "Four.", "Two and two."),
        "opened by both": (True, "<think>a</think>b", "b", "a"),
        "empty": (None, "<think>\n\n</think>\n\nFour.", "Four.", ""),
        "later": (None, "So <think>a</think>", "So <think>a</think>", ""),
        "twice": (None, "<think>a</think>b<think>c</think>", "b<think>c</think>", "a"),
        "half a mark": (None, "<thin", "<thin", ""),
        "nothing": (True, "", "", ""),
    },
    "mistral": {
        "both marks": (None, "[THINK]Two and two.[/THINK]Four.", "Four.", "Two and two."),
        "none": (None, "[Four]", "[Four]", ""),
    },
    "granite": {
        "both marks": (None, "Here is my thought process: 2+2.\n\nHere is my response:\nFour.", "Four.", "2+2."),
        "short": (None, "Here's my thought process: 2+2. Here's my response: Four.", "Four.", "2+2."),
        "none": (None, "Here is my answer.", "Here is my answer.", ""),
    },
    "openai_gptoss": {
        "two messages": (None, HARMONY, "Four.", "Two and two."),
        "final": (None, "<|channel|>final<|message|>Four.", "Four.", ""),
        "a call that nobody offered": (None, "<|channel|>commentary to=functions.f<|message|>{}<|call|>", "{}", ""),
    },
}
SAME = {"deepseek_v3": "qwen3", "glm45": "qwen3"}
CASES = [(name, case) for name in TEXTS for case in TEXTS[name]]


def parse(name, inside, pieces):
    parser = load(BUILT_IN[name])(inside)
    content, reasoning, calls = merged([e for piece in pieces for e in parser.push(piece)] + parser.finish())
    assert not calls
    return content, reasoning


def test_every_built_in_parser_has_texts():
    assert set(BUILT_IN) == set(TEXTS) | set(SAME)
    assert all(BUILT_IN[name] == BUILT_IN[other] for name, other in SAME.items())


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}: {c}" for n, c in CASES])
def test_wherever_the_text_is_cut(name, case):
    inside, text, *expected = TEXTS[name][case]
    assert parse(name, inside, [text]) == tuple(expected)
    assert parse(name, inside, list(text)) == tuple(expected)
    for i in range(len(text)):
        assert parse(name, inside, [text[:i], text[i:]]) == tuple(expected)


MARKS = ["<think>", "</think>", "[THINK]", "[/THINK]", "Here is my thought process:", "Here's my response:", "<", "Here", " ",
         "\n", "a", "é", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "<|start|>"]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(MARKS), max_size=12), st.sampled_from([None, True, False]), st.data())
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_never_matter(name, parts, inside, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(name, inside, [text])
    assert parse(name, inside, pieces) == parse(name, inside, list(text)) == whole


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["beginnings", "spaces", "headers"])
def test_little_is_held(name, kind):
    text = (HOSTILE[kind] * 2**16)[: 2**17]
    parser = load(BUILT_IN[name])(True)
    given_out = 0
    for start in range(0, len(text), 512):
        given_out += sum(len(e.text) for e in parser.push(text[start : start + 512]))
        assert parser.reader.held <= 64
    assert kind != "beginnings" or given_out > len(text) - 1024


TEMPLATES = {
    "openai_gptoss": "<|channel|>analysis<|message|>",
    "mistral": "[THINK]...[/THINK]",
    "granite": "Write your thoughts after 'Here is my thought process:'",
    "deepseek_v3": "{% if thinking %}<｜Assistant｜><think>{% else %}</think>",  # noqa: RUF001
    "deepseek_r1": "{{ content.split('</think>')[-1] }}<｜Assistant｜><think>\\n",  # noqa: RUF001
    "glm45": "</think><arg_key>",
    "qwen3": "<think>\n\n</think>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells(name):
    assert chosen(REASONING_MARKS, TEMPLATES[name]) == name
    assert set(TEMPLATES) == set(BUILT_IN)


def test_where_the_prompt_ends():
    choice = Parsers().choice("<think></think>")
    assert choice.inside("user: <think>\nassistant:") is None
    assert choice.inside("assistant:<think>\n") is True
    assert choice.inside("assistant:<think>\n\n</think>\n\n") is False
    assert choice.inside("<think>so", "<think>so") is True
    assert choice.inside("<think>so</think>b", "<think>so</think>b") is False
    assert choice.inside("text", "text") is False
    assert Parsers(reasoning="none").choice("<think>").inside("<think>") is None


# As the demo model's: the prompt opens the reasoning when asked to.
THINKING = (
    TEMPLATE.replace("{% if enable_thinking %}<think>{% endif %}", "") + "{% if enable_thinking %}<think>\n{% endif %}"
)
ANSWER = "Two and two.\n</think>\n\nI ask.\n<tool_call>\n" + '{"name": "now", "arguments": {}}' + "\n</tool_call>"


def ask(live, text, **options):
    """(reasoning, content, calls), streamed and whole alike, under both names of the field."""
    live.engine.script = text
    options = {"model": "demo", "messages": [{"role": "user", "content": "x"}], **options}
    client = live.openai()
    message = client.chat.completions.create(**options).choices[0].message
    parts = {"reasoning": "", "reasoning_content": "", "content": ""}
    calls = []
    for chunk in client.chat.completions.create(**options, stream=True):
        delta = chunk.choices[0].delta
        for field in parts:
            parts[field] += getattr(delta, field, None) or ""
        calls += [call.function.name for call in delta.tool_calls or ()]
    for field in parts:
        assert parts[field] == (getattr(message, field, None) or "")
    assert parts["reasoning"] == parts["reasoning_content"]
    assert calls == [call.function.name for call in message.tool_calls or ()]
    return parts["reasoning"], parts["content"], calls


def test_openai_client(make_live):
    live = make_live(FakeLLM(), Settings(models=(ModelSettings(chat_template=THINKING),)))
    think = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    assert ask(live, ANSWER, **think, tools=TOOLS) == ("Two and two.", "I ask.", ["now"])
    assert ask(live, "Two and two.\n</think>\n\nFour.", **think) == ("Two and two.", "Four.", [])
    assert ask(live, "Two and two.", reasoning_effort="high") == ("Two and two.", "", [])
    assert ask(live, "Two and two.") == ("", "Two and two.", [])
    # A call in the reasoning is only thought of.
    assert ask(live, "<think>" + ANSWER.split("\n\n")[1] + "</think>Hm.", tools=TOOLS)[1:] == ("Hm.", [])
    hidden = {"extra_body": {"include_reasoning": False, "chat_template_kwargs": {"enable_thinking": True}}}
    assert ask(live, ANSWER, **hidden, tools=TOOLS) == ("", "I ask.", ["now"])
    off = make_live(
        FakeLLM(), Settings(models=(ModelSettings(chat_template=THINKING, parsers=Parsers(reasoning="none")),))
    )
    assert ask(off, "Two.</think>Four.", **think) == ("", "Two.</think>Four.", [])


def test_reasoning_goes_back(make_live):
    live = make_live(
        FakeLLM(), Settings(models=(ModelSettings(chat_template=THINKING + "{{ messages[1].reasoning_content }}"),))
    )
    live.engine.script = "<think>Two and two.</think>Four."
    client = live.openai()
    user = {"role": "user", "content": "x"}
    message = client.chat.completions.create(model="demo", messages=[user, user]).choices[0].message
    for known in (message.model_dump(), {"role": "assistant", "content": "Four.", "reasoning": "Two and two."}):
        again = client.chat.completions.create(
            model="demo", messages=[user, known], extra_body={"return_token_ids": True}
        )
        assert bytes(again.prompt_token_ids).decode().endswith("Two and two.")


def test_harmony(make_live):
    """One parser reads reasoning, answer and calls; without tools its marks are no content either."""
    live = make_live(
        FakeLLM(), Settings(models=(ModelSettings(chat_template=TEMPLATE + "{# <|channel|><|message|> #}"),))
    )
    assert ask(live, HARMONY) == ("Two and two.", "Four.", [])
    call = HARMONY.replace(
        "final<|message|>Four.<|return|>", "commentary to=functions.now <|constrain|>json<|message|>{}"
    )
    assert ask(live, call, tools=TOOLS) == ("Two and two.", "", ["now"])
    assert live.engine.opened[-1][1].skip_special_tokens is False
    only = make_live(FakeLLM(), Settings(models=(ModelSettings(parsers=Parsers(tool="openai", reasoning="none")),)))
    assert ask(only, call, tools=TOOLS) == ("Two and two.", "", ["now"])
    assert "openai" in TOOL_PARSERS
