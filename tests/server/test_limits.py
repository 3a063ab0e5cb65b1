"""Every limit has a flag, what is over it is refused with that flag's name, and looking at it costs no more than it must."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import fields

import pytest
from fake import TOKENIZER, FakeLLM
from hypothesis import given
from hypothesis import strategies as st
from test_command import parse

from quire.sampling.params import ParamLimits
from quire_server import cli, text
from quire_server.limits import Limits, excess
from quire_server.openai.chat_schema import MOST_PARTS, Message
from quire_server.state import Settings

USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"

# limit: (its value in the test, route, a request at the limit, the same over it)
CASES = {
    "max_prompts": (2, TEXT, {"prompt": ["x"] * 2}, {"prompt": ["x"] * 3}),
    "max_n": (2, TEXT, {"n": 2}, {"n": 3}),
    "max_sequences": (4, TEXT, {"prompt": ["x"] * 2, "n": 2}, {"prompt": ["x"] * 2, "n": 3}),
    "max_logprobs": (2, TEXT, {"logprobs": 2}, {"logprobs": 3}),
    "max_stop": (2, TEXT, {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}),
    "max_stop_chars": (2, TEXT, {"stop": "ab"}, {"stop": "abc"}),
    "max_stop_token_ids": (2, TEXT, {"stop_token_ids": [1, 2]}, {"stop_token_ids": [1, 2, 3]}),
    "max_bad_words": (2, TEXT, {"bad_words": ["a", "b"]}, {"bad_words": ["a", "b", "c"]}),
    "max_allowed_token_ids": (2, TEXT, {"allowed_token_ids": [1, 2]}, {"allowed_token_ids": [1, 2, 3]}),
    "max_logit_bias": (2, TEXT, {"logit_bias": {"1": 1, "2": 1}}, {"logit_bias": {"1": 1, "2": 1, "3": 1}}),
    "max_messages": (2, CHAT, {"messages": [USER] * 2}, {"messages": [USER] * 3}),
    "max_tools": (2, CHAT, {"tools": [TOOL] * 2}, {"tools": [TOOL] * 3}),
    "max_documents": (2, CHAT, {"documents": [{"a": "b"}] * 2}, {"documents": [{"a": "b"}] * 3}),
    "max_template_kwargs": (1, CHAT, {"chat_template_kwargs": {"enable_thinking": True}},
                            {"chat_template_kwargs": {"enable_thinking": True, "x": 1}}),
    "max_template_chars": (20, CHAT, {"chat_template": "{{ 1 }}{{documents}}"}, {"chat_template": "{{ 1 }} {{documents}}"}),
    "max_body_bytes": (100, TEXT, {"prompt": "x" * 50}, {"prompt": "x" * 100}),
    "max_body_values": (5, TEXT, {"prompt": [1, 2, 3, 4, 5]}, {"prompt": [1, 2, 3, 4, 5, 6]}),
    "max_body_parts": (3, TEXT, {}, {"stop": "y"}),
}  # fmt: skip
ELSEWHERE = {
    "body_timeout": "test_broken_clients.py::test_body_in_drops",
    "max_grammar_chars": "test_limits.py::test_limits_of_the_engine",
}


def test_every_limit_has_a_case():
    assert set(CASES) | set(ELSEWHERE) == {item.name for item in fields(Limits)}


@pytest.mark.parametrize("name", CASES)
def test_at_the_limit_and_over_it(make_live, name):
    value, route, allowed, refused = CASES[name]
    settings = Settings(limits=Limits(**{name: value}), trust_request_chat_template=True)
    live = make_live(settings=settings)
    live.engine.text.tokenizer.chat_templates = {
        "default": "{{ messages }}{{ tools }}{{ documents }}{{ enable_thinking }}"
    }
    base = {"messages": [USER]} if route == CHAT else {"prompt": "x"}
    with live.http() as http:
        assert http.post(route, json={**base, **allowed}).status_code == 200
        answer = http.post(route, json={**base, **refused})
    assert answer.status_code == (413 if name.startswith("max_body") else 400)
    assert f"--{name.replace('_', '-')}" in answer.json()["error"]["message"]


def test_every_limit_is_a_flag_with_a_modest_default():
    for item in fields(Limits):
        flag = f"--{item.name.replace('_', '-')}"
        assert getattr(cli._settings(parse("demo", flag, "7")).limits, item.name) == 7
        most = {"max_body_bytes": 8 * 2**20, "max_body_values": 2**20}.get(item.name, 2**17)
        assert 0 < item.default <= most, flag


def test_limits_of_the_engine():
    """The engine's client holds requests against the same numbers, whatever route they took."""
    limits = Limits(**{item.name: 3 for item in fields(Limits)})
    ours = limits.of_engine()
    for item in fields(ParamLimits):
        if item.name not in ("bad_words_tokens", "beam_width"):  # not the server's business
            assert getattr(ours, item.name) == 3, item.name


def test_best_of_is_n(http):
    assert http.post(TEXT, json={"prompt": "x", "best_of": 10**6}).json()["error"]["param"] == "best_of"
    assert http.post(TEXT, json={"prompt": "x", "n": 10**6}).json()["error"]["param"] == "n"
    assert http.post(CHAT, json={"messages": [USER], "best_of": 2}).json()["error"]["param"] == "best_of"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", [{}] * (MOST_PARTS + 1)),
        ("messages", [{"role": "user", "content": [{"type": "text"}] * MOST_PARTS}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"id": "1"}] * 9000}] * 2),
        ("tools", [{"type": "x"}] * (MOST_PARTS + 1)),
        ("documents", [{}] * (MOST_PARTS + 1)),
    ],
)
@pytest.mark.parametrize("route", [CHAT, "/tokenize"])
def test_parts_are_counted_before_they_are_made_into_anything(http, monkeypatch, route, field, value):
    monkeypatch.setattr(Message, "__init__", None)
    error = http.post(route, json={"messages": [USER], field: value}).json()["error"]
    assert (error["param"], error["code"]) == (field, "too_many_parts")
    assert str(MOST_PARTS) in error["message"]


@given(
    st.recursive(
        st.none() | st.integers() | st.text(alphabet=',"\\\\a[]{}:'),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet=',"\\\\a'), inner),
        max_leaves=40,
    ),
    st.integers(1, 30),
    st.booleans(),
)
def test_values_and_parts_are_counted_without_what_is_in_texts(value, most, compact):
    """Every comma outside of a text stands before one more value."""

    def commas(value):
        if isinstance(value, dict):
            return max(len(value) - 1, 0) + sum(map(commas, value.values()))
        return max(len(value) - 1, 0) + sum(map(commas, value)) if isinstance(value, list) else 0

    def parts(value):
        inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        return isinstance(value, str | list | dict) + sum(map(parts, inside))

    body = json.dumps(value, separators=(",", ":") if compact else None, ensure_ascii=False).encode()
    assert bool(excess(body, Limits(max_body_values=most))) == (commas(value) + 1 > most)
    assert bool(excess(body, Limits(max_body_parts=most))) == (parts(value) > most)


@pytest.mark.parametrize("prompt", [[1] * (2**20 + 1), [[]] * 2**16, ["x"] * 2**16])
def test_much_is_refused_before_it_is_read(http, monkeypatch, prompt):
    monkeypatch.setattr("quire_server.routing.from_json", None)
    answer = http.post(TEXT, json={"prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_values")


def test_arguments_of_a_call_are_counted_too(monkeypatch):
    """A text within the body may itself be JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [' + "[]," * 2**16 + "1]}"}}
    monkeypatch.setattr("quire_server.openai.chat_schema.from_json", None)
    message = Message.model_validate({"role": "assistant", "tool_calls": [call]})
    assert message.as_dict()["tool_calls"][0]["function"]["arguments"] == call["function"]["arguments"]


def test_names_for_the_template_are_names(http, monkeypatch):
    """A name becomes a pattern: one of a million characters took seconds to compile."""
    looked = []
    real = text.mentions
    monkeypatch.setattr(text, "mentions", lambda template, name: looked.append(name) or real(template, name))
    for name in ("x" * 100_000, "enable thinking", "m in messages", "(a+)+$", ""):
        answer = http.post(CHAT, json={"messages": [USER], "chat_template_kwargs": {name: 1}})
        assert answer.json()["error"]["param"] == "chat_template_kwargs"
    assert all(name.isidentifier() and len(name) <= 64 for name in looked)
    assert http.post(CHAT, json={"messages": [USER], "chat_template_kwargs": {"enable_thinking": 1}}).status_code == 200


LONG_BODIES = {
    TEXT: {"prompt": "x" * 3000},
    CHAT: {
        "messages": [USER],
        "tools": [{"type": "function", "function": {"name": "f" * 90, "description": "d" * 3000}}],
    },
    "/tokenize": {"messages": [{"role": "user", "content": "x"}] * 100, "return_token_strs": True},
    "/detokenize": {"tokens": [65] * 3000},
}


@pytest.mark.parametrize("route", LONG_BODIES)
def test_long_bodies_are_worked_on_beside_the_event_loop(make_live, monkeypatch, route):
    """Parsing, rendering, tokenizing, making and reading tools: nothing of it where every other client waits."""
    live = make_live()
    live.engine.text.tokenizer.chat_templates = {"default": "{{ messages }}{{ tools }}<tool_call>"}
    threads: dict[str, str] = {}

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            threads[name] = threading.current_thread().name
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    from quire_server import routing
    from quire_server.openai.fields import GenerationFields

    watch(routing, "_parse")
    watch(Message, "as_dict")
    watch(GenerationFields, "sampling")
    watch(TOKENIZER.__class__, "encode")
    watch(TOKENIZER.__class__, "token_text")
    with live.http() as http:
        assert http.post(route, json=LONG_BODIES[route]).status_code == 200
    assert threads["_parse"]
    assert {name for name, thread in threads.items() if not thread.startswith("request")} <= set()
    if route == CHAT:
        assert {"as_dict", "sampling", "encode"} <= set(threads)


# -- what is logged --------------------------------------------------------------------------------------------------
def test_prompts_are_logged_only_when_asked_and_bounded(make_live, caplog):
    caplog.set_level(logging.INFO)
    body = {"prompt": "first line\nsecond \x1b[31m" + "y" * 5000, "stop": ["s" * 1000]}
    for asked in (False, True):
        live = make_live(FakeLLM(max_model_len=10_000), Settings(log_requests=asked, max_log_len=100))
        with live.http() as http:
            http.post(TEXT, json=body, headers={"X-Request-Id": "mine"})
            http.post(TEXT, json={"prompt": [65, 66, 67]})
        lines = [r.getMessage() for r in caplog.records if "prompt tokens" in r.getMessage()]
        if not asked:
            assert not lines
            assert "first line" not in caplog.text
    assert "5023 prompt tokens" in lines[0]
    assert "first line\\nsecond \\x1b[31m" in lines[0]
    assert "[65, 66, 67]" in lines[1]
    assert all(len(line) < 400 and line.isprintable() for line in lines)
    assert cli._settings(parse("demo", "--enable-log-requests", "--max-log-len", "5")).log_requests
