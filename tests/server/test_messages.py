"""Anthropic's Messages API with the real anthropic client: on the demo model for sense, on the fake engine for the rest."""

from __future__ import annotations

import json

import anthropic
import httpx
import pytest
from demo_server import DemoServer
from fake import FakeLLM

from quire_server.limits import Limits
from quire_server.state import Settings

ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first number."},
            "b": {"type": "integer", "description": "The second number."},
        },
        "required": ["a", "b"],
    },
}
GREEDY = {"temperature": 0}  # of the API, though no longer of the client's arguments
ASK = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def demo():
    server = DemoServer()
    yield anthropic.Anthropic(base_url=server.base, api_key="none", max_retries=0)
    assert server.close() == 0, server.log


@pytest.fixture
def live(make_live):
    return make_live()


@pytest.fixture
def client(live):
    return anthropic.Anthropic(base_url=live.base, api_key="none", max_retries=0)


def text(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# -- with the demo model ------------------------------------------------------------------------------------------
def create(demo, content, **options):
    options = {"model": "demo", "max_tokens": 64, "extra_body": GREEDY, **options}
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return demo.messages.create(messages=messages, **options)


def test_a_sum(demo):
    message = create(demo, "What is 17 + 25?")
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert "42" in text(message)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.input_tokens > 5
    assert message.usage.output_tokens > 3
    assert message.id.startswith("msg_")
    assert message._request_id


def test_a_stream_is_the_whole_message(demo):
    ask = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    whole = create(demo, ask)
    assert "Paris" in text(whole)
    kinds = []
    with demo.messages.stream(model="demo", max_tokens=64, extra_body=GREEDY, messages=ask) as stream:
        for event in stream:
            kinds.append(event.type)
        final = stream.get_final_message()
    assert [block.type for block in final.content] == [block.type for block in whole.content]
    assert text(final) == text(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert "content_block_start" in kinds
    assert "message_delta" in kinds


def test_a_tool_is_called_and_its_result_told(demo):
    ask = [{"role": "user", "content": "What is 12 + 30?"}]
    called = create(demo, ask, tools=[ADD])
    (use,) = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use"
    assert (use.name, use.input) == ("add", {"a": 12, "b": 30})
    with demo.messages.stream(model="demo", max_tokens=64, extra_body=GREEDY, messages=ask, tools=[ADD]) as stream:
        streamed = stream.get_final_message()
    assert [(block.name, block.input) for block in streamed.content if block.type == "tool_use"] == [
        (use.name, use.input)
    ]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"result": 42}'}
    turns = [
        *ask,
        {"role": "assistant", "content": [use.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result]},
    ]
    told = create(demo, turns, tools=[ADD])
    assert told.stop_reason == "end_turn"
    assert "42" in text(told)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
def test_a_tool_is_forced(demo, choice):
    message = create(demo, "Hello!", tools=[ADD], tool_choice=choice)
    assert [block.name for block in message.content if block.type == "tool_use"] == ["add"]


def test_no_tool_when_none_is_wanted(demo):
    message = create(demo, "What is 12 + 30?", tools=[ADD], tool_choice={"type": "none"})
    assert all(block.type == "text" for block in message.content)


def test_thinking_is_a_block_of_its_own(demo):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    message = create(demo, "What is 17 + 25?", thinking=thinking, max_tokens=1100)
    kinds = [block.type for block in message.content]
    assert kinds == ["thinking", "text"]
    assert message.content[0].thinking
    assert "42" in text(message)
    assert [block.type for block in create(demo, "What is 17 + 25?", thinking={"type": "disabled"}).content] == ["text"]


def test_json_by_schema(demo):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = create(demo, "Extract as JSON with the key name: Anna lives in Paris.", output_config=config)
    assert set(json.loads(text(message))) == {"name"}


def test_a_begun_answer_goes_on(demo):
    ask = {"role": "user", "content": "What is the capital of France?"}
    message = create(demo, [ask, {"role": "assistant", "content": "The capital of France is"}])
    assert text(message).strip().startswith("Paris")


def test_the_count_is_that_of_the_message(demo):
    options = {"system": "You are Quire.", "messages": [{"role": "user", "content": "Hello!"}], "tools": [ADD]}
    counted = demo.messages.count_tokens(model="demo", **options).input_tokens
    usage = demo.messages.create(model="demo", max_tokens=4, **options).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


# -- with the fake engine -----------------------------------------------------------------------------------------
def test_stop_sequences_and_lengths(client):
    whole = client.messages.create(model="demo", max_tokens=40, messages=ASK)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 40
    part = text(whole)[10:14]
    cut = client.messages.create(model="demo", max_tokens=40, messages=ASK, stop_sequences=[part])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", part)
    assert part not in text(cut)


def test_more_tokens_than_the_context_holds(make_live):
    live = make_live(FakeLLM(max_model_len=64))
    client = anthropic.Anthropic(base_url=live.base, api_key="none", max_retries=0)
    message = client.messages.create(model="demo", max_tokens=4096, messages=ASK)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens < 64


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
            "tool_use",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
            "no tool_use before it",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "other"}}, "other"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "budget_tokens"),
        ({"stop_sequences": ["x"] * 1000}, "stop_sequences"),
        ({"extra_body": {"container": "abc"}}, "container"),
        ({"extra_body": {"frequency_penalty": 1}}, "frequency_penalty"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format"),
        ({"metadata": {"user_id": "x" * 600}}, "metadata.user_id"),
    ],
)
def test_what_is_not_right_is_refused_by_name(client, options, named):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{"model": "demo", "max_tokens": 8, "messages": ASK, **options})
    body = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]
    assert body["request_id"]


def test_another_model(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude", max_tokens=8, messages=ASK)
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_limits_and_keys_speak_the_same_language(make_live):
    live = make_live(settings=Settings(limits=Limits(max_body_bytes=2000), api_keys=("secret",)))
    with pytest.raises(anthropic.AuthenticationError) as refused:
        anthropic.Anthropic(base_url=live.base, auth_token="wrong", max_retries=0).messages.create(
            model="demo", max_tokens=8, messages=ASK
        )
    assert refused.value.body["error"]["type"] == "authentication_error"
    known = anthropic.Anthropic(base_url=live.base, auth_token="secret", max_retries=0)
    assert known.messages.create(model="demo", max_tokens=8, messages=ASK).content
    with pytest.raises(anthropic.APIStatusError) as large:
        known.messages.create(model="demo", max_tokens=8, messages=[{"role": "user", "content": "x" * 3000}])
    assert (large.value.status_code, large.value.body["error"]["type"]) == (413, "request_too_large")


def test_an_error_in_the_middle_is_an_event(make_live):
    engine = FakeLLM()
    engine.fails_after = 3
    live = make_live(engine)
    client = anthropic.Anthropic(base_url=live.base, api_key="none", max_retries=0)
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(model="demo", max_tokens=8, messages=ASK) as stream,
    ):
        stream.get_final_message()
    assert caught.value.body["error"]["type"] in ("api_error", "overloaded_error")


def test_openais_routes_keep_their_shape(live):
    answer = httpx.post(f"{live.base}/v1/chat/completions", json={})
    assert set(answer.json()) == {"error"}
