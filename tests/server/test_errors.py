"""Every refusal has OpenAI's shape, the right status and the name of the field; nothing a client sends makes a 500."""

from __future__ import annotations

import json
import logging
import socket

import httpx
import openai
import pytest
from conftest import eventually
from fake import FakeLLM

from quire_server.limits import Limits
from quire_server.model import ModelSettings
from quire_server.state import Settings

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TEXT = {"prompt": "x"}


def error_of(response: httpx.Response, status: int) -> dict:
    """The error, after checking that its shape is OpenAI's."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


REFUSED_BOTH = {
    "temperatur": 1,
    "temperature": "hot",
    "top_p": [],
    "n": 0,
    "seed": 2**70,
    "stop": [1],
    "logit_bias": {"1": 101},
    "stop_token_ids": [-1],
    "response_format": {"type": "yaml"},
    "structured_outputs": {"jsn": {}},
    "guided_json": {},
    "use_beam_search": True,
    "service_tier": "flex",
    "stream_options": {"include_usage": True},
    "prompt_logprobs": -1,
    "truncate_prompt_tokens": 0,
    "priority": 2**40,
    "cache_salt": "",
    "deadline": 0,
    "min_tokens": -1,
    "min_p": 1.5,
    "presence_penalty": 3,
    "repetition_penalty": 0,
    "bad_words": [""],
    "kv_transfer_params": {},
}
REFUSED_COMPLETIONS = {
    "prompt": [],
    "suffix": "y",
    "best_of": 3,
    "logprobs": 21,
    "max_tokens": 0,
    "messages": CHAT["messages"],
    "tools": [],
}
REFUSED_CHAT = {
    "messages": [],
    "prompt": "x",
    "top_logprobs": 2,
    "logprobs": 3,
    "max_tokens": 0,
    "max_completion_tokens": 10**9,
    "tool_choice": "required",  # without tools
    "store": True,
    "metadata": {"a": "b" * 513},
    "modalities": ["audio"],
    "audio": {},
    "functions": [],
    "web_search_options": {},
    "prediction": {},
    "chat_template": "{{ 1 }}",
    "chat_template_kwargs": {"no_such_variable": 1},
    "documents": [{"text": "d"}],
    "continue_final_message": True,
    "verbosity": "high",
    "tools": [{"type": "function", "function": {"name": "no spaces"}}],
}


@pytest.mark.parametrize(("field", "value"), [*REFUSED_BOTH.items(), *REFUSED_COMPLETIONS.items()], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_completions_refuses_by_name(http, field, value, stream):
    if field == "stream_options" and stream:
        pytest.skip("allowed when streaming")
    body = {**TEXT, "stream": stream, field: value}
    error = error_of(http.post("/v1/completions", json=body), 400)
    assert error["param"].startswith(field)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("field", "value"), [*REFUSED_BOTH.items(), *REFUSED_CHAT.items()], ids=str)
def test_chat_refuses_by_name(http, field, value):
    error = error_of(http.post("/v1/chat/completions", json={**CHAT, field: value}), 400)
    named = {"max_completion_tokens": "max_tokens"}.get(field, field)
    assert error["param"].startswith(named)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "messages[0].content[0].image_url",
        ),
        ({"role": "user", "content": [{"type": "image_file"}]}, "messages[0].content[0].type"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_message_at_fault_is_named(http, message, param):
    error = error_of(http.post("/v1/chat/completions", json={"messages": [message]}), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {
            "store": False,
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "service_tier": "auto",
            "metadata": None,
        },
        {"functions": None, "tools": None, "stop": None, "max_tokens": None, "logit_bias": None, "temperature": None},
        {"parallel_tool_calls": True, "tool_choice": "none", "user": "me", "safety_identifier": "me", "n": 1},
    ],
)
def test_what_asks_for_nothing_is_taken(http, fields):
    assert http.post("/v1/chat/completions", json={**CHAT, **fields}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "temperature": 1e999}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400),
        (b'{"a": ' * 30_000 + b"1" + b"}" * 30_000, 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 30_000 + b"}", 400),
        (json.dumps({"prompt": ["x", 1] * 30_000}).encode(), 400),
        (json.dumps({"prompt": "x", "logit_bias": {str(i): "a" for i in range(30_000)}}).encode(), 400),
        (json.dumps({"prompt": "x", **{f"field{i}": 1 for i in range(30_000)}}).encode(), 400),
    ],
    ids=lambda v: str(v)[:40],
)
def test_hostile_bodies(http, body, status):
    error_of(http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), status)


def test_deep_tool_schema(http):
    parameters = inner = {}
    for _ in range(150):
        inner["properties"] = {"x": {}}
        inner = inner["properties"]["x"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert http.post("/v1/chat/completions", json={**CHAT, "tools": tools}).status_code in (200, 400)


def test_template_that_refuses(make_live):
    live = make_live(
        settings=Settings(models=(ModelSettings(chat_template="{{ raise_exception('roles must alternate') }}"),))
    )
    with live.http() as http:
        error = error_of(http.post("/v1/chat/completions", json=CHAT), 400)
        assert "roles must alternate" in error["message"]
        assert error["param"] == "messages"
        assert error_of(http.post("/tokenize", json=CHAT), 400)["param"] == "messages"


def test_template_of_the_request(make_live):
    live = make_live(settings=Settings(trust_request_chat_template=True))

    def prompt(template):
        body = {**CHAT, "chat_template": template, "return_token_ids": True}
        return http.post("/v1/chat/completions", json=body)

    with live.http() as http:
        assert bytes(prompt("<{{ messages[0].content }}>").json()["prompt_token_ids"]) == b"<x>"
        for hostile in (
            "{{ ''.__class__.__mro__ }}",
            "{% for i in range(10**9) %}x{% endfor %}",
            "{{ 'x' * 10**10 }}",
            "{% if",
        ):
            error_of(prompt(hostile), 400)


def test_model_without_a_template(make_live):
    live = make_live()
    live.engine.text.tokenizer.chat_templates = {}
    with live.http() as http:
        assert "chat template" in error_of(http.post("/v1/chat/completions", json=CHAT), 400)["message"]


def test_content_type(http):
    error_of(http.post("/v1/completions", content=json.dumps(TEXT), headers={"Content-Type": "text/plain"}), 415)


def test_no_such_route_and_wrong_method(http):
    error_of(http.get("/v1/nothing"), 404)
    response = http.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(http.options("/v1/completions"), 405)
    error_of(http.post("/v1/completions/"), 404)  # not a redirect built from the Host header


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as failed:
        client.completions.create(model="gpt-5", prompt="x")
    assert failed.value.code == "model_not_found"
    assert failed.value.param == "model"


def test_context_length(client):
    with pytest.raises(openai.BadRequestError) as failed:
        client.completions.create(model="demo", prompt="x" * 5000)
    assert failed.value.code == "context_length_exceeded"
    assert "5000" in failed.value.message
    with pytest.raises(openai.BadRequestError) as failed:
        client.completions.create(model="demo", prompt="x" * 90, max_tokens=4090, stream=True)
    assert failed.value.param == "max_tokens"


def test_the_engines_refusal_names_the_field(client):
    with pytest.raises(openai.BadRequestError) as failed:
        client.completions.create(model="demo", prompt=[299, 300])
    assert failed.value.param == "prompt"


def test_limits_are_refused_by_name_and_flag(make_live):
    limits = Limits(
        max_prompts=2, max_n=3, max_sequences=4, max_stop=1, max_stop_chars=5, max_logit_bias=1, max_messages=1
    )
    with make_live(settings=Settings(limits=limits)).http() as http:
        for fields, flag in [
            ({"prompt": ["a", "b", "c"]}, "max-prompts"),
            ({"n": 4}, "max-n"),
            ({"prompt": ["a", "b"], "n": 3}, "max-sequences"),
            ({"stop": ["a", "b"]}, "max-stop"),
            ({"logit_bias": {"1": 1, "2": 1}}, "max-logit-bias"),
        ]:
            error = error_of(http.post("/v1/completions", json={**TEXT, **fields}), 400)
            assert f"--{flag}" in error["message"]
        error_of(http.post("/v1/completions", json={**TEXT, "stop": "toolong"}), 400)
        error_of(http.post("/v1/chat/completions", json={"messages": CHAT["messages"] * 2}), 400)


def test_body_limit_with_and_without_a_length(make_live):
    live = make_live(settings=Settings(limits=Limits(max_body_bytes=10_000)))

    def pieces():
        for _ in range(100):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    with live.http() as http:
        error_of(http.post("/v1/completions", content=b" " * 10_001, headers=headers), 413)
        error_of(http.post("/v1/completions", content=pieces(), headers=headers), 413)
        # A false length is either a broken request or counted: never a way around the limit.
        assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_body_that_does_not_arrive(make_live):
    live = make_live(settings=Settings(limits=Limits(body_timeout=0.2)))
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        connection.sendall(head.encode())
        connection.settimeout(5)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 408")


def test_full_queue(make_live):
    live = make_live(FakeLLM())
    live.engine.full = True
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as failed:
            live.openai().completions.create(model="demo", prompt="x", stream=stream)
        assert failed.value.response.headers["retry-after"] == "1"


def test_dead_engine(make_live):
    live = make_live(FakeLLM())
    live.engine.dead = "killed by signal 9"
    with pytest.raises(openai.InternalServerError) as failed:
        live.openai().completions.create(model="demo", prompt="x")
    assert failed.value.status_code == 503
    with live.http() as http:
        assert "killed by signal 9" in error_of(http.get("/health"), 503)["message"]
        assert 'quire:engine_up{model_name="demo"} 0.0' in http.get("/metrics").text


def test_hung_engine_is_not_healthy(make_live):
    live = make_live(FakeLLM(), Settings(health_timeout=0.1))
    live.engine.hangs = True
    with live.http() as http:
        assert error_of(http.get("/health"), 503)["code"] == "engine_unresponsive"
        live.engine.hangs = False
        assert http.get("/health").status_code == 200


def test_restarting_engine_is_not_healthy_and_then_is(make_live):
    live = make_live(FakeLLM())
    live.engine.restarting = True
    with live.http() as http:
        response = http.get("/health")
        assert error_of(response, 503)["code"] == "engine_restarting"
        assert "engine restarting" in response.json()["error"]["message"]
        assert response.headers["retry-after"] == "1"
        live.engine.restarting = False
        assert http.get("/health").status_code == 200


def test_failure_in_the_middle_of_a_stream_is_an_event(make_live):
    live = make_live(FakeLLM())
    live.engine.fails_after = 5
    with live.http() as http, http.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
        events = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert len(events) > 1
    assert "a kernel failed" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
    client = live.openai()
    with pytest.raises(openai.APIError, match="a kernel failed"):
        list(client.chat.completions.create(model="demo", messages=CHAT["messages"], stream=True))
    with pytest.raises(openai.InternalServerError, match="a kernel failed"):
        client.completions.create(model="demo", prompt=["x", "y"])
    assert eventually(lambda: not live.engine.running)


def test_unforeseen_errors_are_500_and_no_log_holds_the_prompt(make_live, caplog):
    caplog.set_level(logging.DEBUG)
    live = make_live(FakeLLM())
    live.engine.breaks_after = 0
    with live.http() as http:
        for stream in (False, True):
            body = {"prompt": "SECRET PROMPT TEXT", "stream": stream}
            error = error_of(http.post("/v1/completions", json=body), 500)
            assert "SECRET" not in error["message"]
        live.engine.breaks_after = None
        assert http.post("/v1/completions", json={"prompt": "SECRET PROMPT TEXT"}).status_code == 200
        http.post("/v1/completions", json={"prompt": "SECRET PROMPT TEXT", "seed": "SECRET PROMPT TEXT"})
    assert "RuntimeError" in caplog.text
    assert "/v1/completions 500" in caplog.text
    assert "SECRET" not in caplog.text


def test_request_ids(http):
    assert http.get("/ping", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    first, second = (http.get("/ping").headers["x-request-id"] for _ in range(2))
    assert first != second
    for bad in ("a b", "x" * 129, "<script>"):
        assert error_of(http.get("/ping", headers={"X-Request-Id": bad}), 400)["param"] == "X-Request-Id"


def test_log_lines_cannot_be_forged(live, http, caplog):
    caplog.set_level(logging.INFO)
    http.get("/nothing%0aINFO forged")
    assert eventually(lambda: "GET /nothing\\nINFO forged 404" in caplog.text)
    http.post("/v1/completions", json={"prompt": "x", "user": "me\nINFO forged"})
    assert eventually(lambda: "user=me\\nINFO forged" in caplog.text)
    assert "\nINFO forged" not in caplog.text
