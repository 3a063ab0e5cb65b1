"""Anthropic's Messages API, seen by Anthropic's own client."""

from __future__ import annotations

import json

import anthropic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from demo_server import ADD_PARAMETERS, DemoServer
from fake import FakeLLM

from quire_server.anthropic import messages
from quire_server.anthropic.schema import CountRequest, MessagesRequest
from quire_server.limits import Limits
from quire_server.state import Settings

ASK = [{"role": "user", "content": "Hello?"}]
NOW = {"name": "now", "description": "The time.", "input_schema": {"type": "object", "properties": {}}}
CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "春"}}\n</tool_call>'
THOUGHT = "<think>\nTwo and two.\n</think>\n\nI ask. " + CALL
USE = {"type": "tool_use", "id": "call_1", "name": "now", "input": {"zone": "x"}}
RESULT = {"type": "tool_result", "tool_use_id": "call_1", "content": "noon"}


SAMPLING = ("temperature", "top_p", "top_k")  # fields of the API that the newest clients no longer name


def anthropics(live, **options):
    return anthropic.Anthropic(base_url=live.base, **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})


def fields_of(fields):
    extra = {name: fields.pop(name) for name in SAMPLING if name in fields}
    extra |= fields.pop("extra_body", {})
    return {"model": "demo", "max_tokens": 200, "messages": ASK, **fields, "extra_body": extra}


@pytest.fixture(scope="module")
def client(live):
    return anthropics(live)


def create(client, **fields):
    return client.messages.create(**fields_of(fields))


def streamed(client, **fields):
    """The client's own accumulation of the events, and the events."""
    with client.messages.stream(**fields_of(fields)) as stream:
        events = list(stream)
        return stream.get_final_message(), events


def comparable(message):
    """Without what differs from request to request, and what the stream helper adds."""
    content = [b.model_dump(exclude={"id", "parsed_output", "citations"}) for b in message.content]
    return content, message.stop_reason, message.stop_sequence, message.usage.model_dump(), message.model, message.role


def test_text(client):
    message = create(client, max_tokens=20)
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert message.id.startswith("msg_")
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == len("<user>Hello?</user><assistant>")
    assert message.usage.cache_read_input_tokens == 3
    assert message.usage.output_tokens == 20
    assert message._request_id


@pytest.mark.parametrize(
    "script", [None, THOUGHT, CALL + "\nand " + CALL, "<think>only", CALL[:-20], "<think>a</think>"]
)
@pytest.mark.parametrize("fields", [{}, {"max_tokens": 30}, {"stop_sequences": ["wo", "日"]}])
def test_streamed_equals_whole(make_live, script, fields):
    engine = FakeLLM()
    engine.script = script
    client = anthropics(make_live(engine))
    fields = {"tools": [NOW], **fields}
    whole = create(client, **fields)
    final, events = streamed(client, **fields)
    assert comparable(final) == comparable(whole)
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(whole.content)
    if script == THOUGHT and not fields.keys() & {"max_tokens", "stop_sequences"}:
        thought, text, use = whole.content
        assert (thought.type, thought.thinking) == ("thinking", "Two and two.")
        assert (text.type, text.text) == ("text", "I ask.")
        assert (use.type, use.name, use.input) == ("tool_use", "now", {"zone": "春"})
        assert whole.stop_reason == "tool_use"
        assert whole.usage.output_tokens_details.thinking_tokens == len("<think>\nTwo and two.")
        assert "input_json" in kinds


def test_order_of_blocks_is_the_models(make_live):
    engine = FakeLLM()
    engine.script = CALL + " Then " + CALL
    live = make_live(engine)
    assert [b.type for b in create(anthropics(live), tools=[NOW]).content] == ["tool_use", "text", "tool_use"]
    one = {"type": "auto", "disable_parallel_tool_use": True}
    assert [b.type for b in create(anthropics(live), tools=[NOW], tool_choice=one).content] == ["tool_use", "text"]
    assert [b.type for b in create(anthropics(live)).content] == ["text"]  # no tools are offered: it is text


def test_stop_sequence(client):
    message = create(client, stop_sequences=["word", "日"])
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence in ("word", "日")
    assert message.stop_sequence not in message.content[0].text


def test_an_answer_that_ends_by_itself(client):
    assert create(client).stop_reason == "end_turn"


def test_max_tokens_beyond_the_context(make_live):
    engine = FakeLLM(max_model_len=60)
    message = create(anthropics(make_live(engine)), max_tokens=10**6)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens == 30


def test_wire_format_and_pings(live, monkeypatch):
    monkeypatch.setattr(messages, "PING_SECONDS", 0.0)  # whatever has nothing to tell tells that it lives
    engine_script, live.engine.script = live.engine.script, CALL
    try:
        body = {"model": "demo", "max_tokens": 200, "messages": ASK, "tools": [NOW], "stream": True}
        with live.http() as http:
            text = http.post("/v1/messages", json=body).text
    finally:
        live.engine.script = engine_script
    pairs = [block.split("\n") for block in text.strip().split("\n\n")]
    kinds = []
    for name, data in pairs:
        kind = json.loads(data.removeprefix("data: "))["type"]
        assert name == f"event: {kind}"
        kinds.append(kind)
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds.count("ping") > 10
    assert [k for k in kinds if k != "ping"] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip


def test_sampling_reaches_the_engine(live, client):
    create(client, temperature=0.5, top_p=0.25, top_k=7, stop_sequences=["zzz"], max_tokens=9)
    params = live.engine.opened[-1][1]
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (0.5, 0.25, 7, ["zzz"])
    assert params.max_tokens == 9


def rendered(live, **fields):
    """The prompt, as count_tokens counts it, must be as long as this one of chat's."""
    return anthropics(live).messages.count_tokens(**{"model": "demo", "messages": ASK, **fields}).input_tokens


def test_count_tokens_counts_chats_prompt(live):
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    conversation = [
        {"role": "user", "content": "1"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, USE]},
        {"role": "user", "content": [{**RESULT, "is_error": True}, {"type": "text", "text": "So?"}]},
    ]
    count = rendered(live, system=blocks, messages=conversation, tools=[NOW])
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "x"}'}}
    function = {"name": "now", "description": "The time.", "parameters": NOW["input_schema"]}
    chat = [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "1\n2"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Error: noon"},
        {"role": "user", "content": "So?"},
    ]
    body = {"messages": chat, "tools": [{"type": "function", "function": function}],
            "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    with live.http() as http:
        assert count == http.post("/tokenize", json=body).json()["count"]
    assert count == len(
        "<system>a\nb</system><user>1\n2</user><assistant>"
        '[{"name": "now", "arguments": {"zone": "x"}}]</assistant><tool>Error: noon</tool><user>So?</user>'
        f"TOOLS{json.dumps([{'type': 'function', 'function': function}])}<tool_call><assistant>"
    )


def test_thinking_is_switched_in_the_templates_terms(live):
    def thinking(**value):
        return rendered(live, thinking=value) - rendered(live)

    assert thinking(type="enabled", budget_tokens=1024) == len("<think>")
    assert thinking(type="disabled") == thinking(type="adaptive") == 0


def test_thinking_can_be_hidden(make_live):
    engine = FakeLLM()
    engine.script = "<think>Two and two.</think>Four."
    client = anthropics(make_live(engine))
    options = {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}, "max_tokens": 2000}
    thought, text = create(client, **options).content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "", "Four.")
    assert comparable(streamed(client, **options)[0]) == comparable(create(client, **options))


def test_the_answers_own_beginning(live, client):
    prefilled = [*ASK, {"role": "assistant", "content": "It is"}]
    assert rendered(live, messages=prefilled) == len("<user>Hello?</user><assistant>It is")
    assert rendered(live, messages=[*ASK, {"role": "assistant", "content": ""}]) == rendered(live)
    assert not create(client, messages=prefilled).content[0].text.startswith("It is")


def test_answers_can_be_sent_back(make_live):
    engine = FakeLLM()
    engine.script = THOUGHT
    client = anthropics(make_live(engine))
    first = create(client, tools=[NOW])
    use = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "noon"}]}
    turns = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert create(client, messages=turns, tools=[NOW]).content


@pytest.mark.parametrize(
    ("choice", "grammar"),
    [({"type": "auto"}, False), ({"type": "none"}, False), ({"type": "any"}, True),
     ({"type": "tool", "name": "now"}, True), ({"type": "any", "disable_parallel_tool_use": True}, True)],
)  # fmt: skip
def test_tool_choice(live, client, choice, grammar):
    create(client, tools=[NOW], tool_choice=choice)
    structure = live.engine.opened[-1][1].structured_outputs
    assert (structure is not None) == grammar
    if grammar:
        many = choice["type"] == "any" and "disable_parallel_tool_use" not in choice
        assert (")*" in structure.grammar.splitlines()[0]) == many


def test_output_format(live, client):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    create(client, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(live.engine.opened[-1][1].structured_outputs.json) == schema


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
REFUSED = [
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]", "'image'"),
    ({"messages": [{"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]}, "content[0].content[0]", "'image'"),
    ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0]", "'tool_use'"),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content", "call_1"),
    ({"messages": [*ASK, {"role": "assistant", "content": [USE]}]}, "messages", "tool_result"),
    ({"messages": [*ASK, {"role": "assistant", "content": [USE]}, *ASK]}, "messages[2].content", "call_1"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "user"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "web_search_20250305"),
    ({"tools": [{**NOW, "input_schema": {"type": "array"}}]}, "tools[0].input_schema", "object"),
    ({"tools": [{**NOW, "defer_loading": True}]}, "tools[0].defer_loading", "prompt"),
    ({"tool_choice": {"type": "any"}}, "tool_choice", "tools"),
    ({"tools": [NOW], "tool_choice": {"type": "tool", "name": "then"}}, "tool_choice", "then"),
    ({"tools": [NOW], "tool_choice": {"type": "tool"}}, "tool_choice.name", "tool"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens", "max_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens", "1024"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "enabled"),
    ({"thinking": {"type": "adaptive", "display": "summarized"}}, "thinking.display", "omitted"),
    ({"output_config": {"effort": "low"}}, "output_config.effort", "template"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format", "json_schema"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"temperature": 1.5}, "temperature", "1"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences", "16"),
    ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, "cache_control.ttl", "memory"),
    ({"service_tier": "priority"}, "service_tier", "one tier"),
    ({"inference_geo": "eu"}, "inference_geo", "server"),
    ({"container": "c"}, "container", "code"),
    ({"nonsense": 1}, "nonsense", "unrecognized"),
]


@pytest.mark.parametrize(("fields", "name", "says"), REFUSED, ids=[f"{r[1]} {i}" for i, r in enumerate(REFUSED)])
@pytest.mark.parametrize("stream", [False, True])
def test_refused_by_name(live, client, fields, name, says, stream):
    opened = len(live.engine.opened)
    known = {k: v for k, v in fields.items() if k not in ("nonsense", "service_tier", "thinking", "tools")}
    extra = {k: v for k, v in fields.items() if k not in known}
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(client, stream=stream, extra_body=extra, **known)
    body = caught.value.body
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["request_id"] == caught.value.request_id == caught.value.response.headers["request-id"]
    assert name in body["error"]["message"]
    assert says in body["error"]["message"]
    assert len(live.engine.opened) == opened


def test_every_field_of_the_client_is_known():
    """A field that the client can send acts or has a reason; none is merely unrecognized."""
    for params, schema in (
        (message_create_params.MessageCreateParamsNonStreaming, MessagesRequest),
        (message_create_params.MessageCreateParamsStreaming, MessagesRequest),
        (message_count_tokens_params.MessageCountTokensParams, CountRequest),
    ):
        fields = set(params.__required_keys__ | params.__optional_keys__)
        assert fields - set(schema.model_fields) - set(schema.refused) == set()


def test_statuses_and_types(make_live):
    engine = FakeLLM()
    live = make_live(engine, Settings(api_keys=("secret",), limits=Limits(max_body_bytes=5000)))
    client = anthropics(live, api_key="secret")
    assert create(client).content
    assert anthropics(live, api_key=None, auth_token="secret").messages.count_tokens(model="demo", messages=ASK)

    def failure(client=client, **fields):
        with pytest.raises(anthropic.APIStatusError) as caught:
            create(client, **fields)
        error = caught.value
        assert error.body["type"] == "error"
        assert error.body["request_id"] == error.response.headers["request-id"]
        return error.status_code, error.body["error"]["type"]

    assert failure(anthropics(live, api_key="wrong")) == (401, "authentication_error")
    assert failure(model="other") == (404, "not_found_error")
    assert failure(system="x" * 6000) == (413, "request_too_large")
    engine.full = True
    assert failure() == (529, "overloaded_error")
    engine.full = False
    engine.breaks_after = 0
    assert failure() == (500, "api_error")
    engine.breaks_after = None
    engine.dead = "it fell"
    assert failure() == (529, "overloaded_error")
    with live.http(headers={"x-api-key": "secret"}) as http:
        assert http.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
        assert http.get("/v1/messages").status_code == 405
        assert http.post("/v1/messages/batches").json()["error"]["type"] == "not_found_error"
        assert http.post("/v1/messages", content=b"{").json()["error"]["type"] == "invalid_request_error"
        assert "param" in http.get("/v1/messagesx").json()["error"]  # elsewhere errors are OpenAI's


@pytest.mark.parametrize("kind", ["fails_after", "breaks_after"])
def test_an_error_within_a_stream(make_live, kind):
    engine = FakeLLM()
    setattr(engine, kind, 5)
    with pytest.raises(anthropic.APIStatusError) as caught:
        streamed(anthropics(make_live(engine)))
    assert caught.value.body["error"]["type"] == "api_error"


# -- the demo model, for sense rather than form --------------------------------------------------------------------
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": ADD_PARAMETERS,
}


@pytest.fixture(scope="module")
def demo():
    server = DemoServer()
    yield anthropic.Anthropic(base_url=server.base, api_key="none", max_retries=0, timeout=60)
    assert server.close() == 0, server.log


def test_the_demo_model_calls_a_tool_and_reads_its_result(demo):
    turns = [{"role": "user", "content": "What is 12 + 30?"}]
    options = {"tools": [ADD], "temperature": 0, "max_tokens": 100}
    message = create(demo, messages=turns, **options)
    (use,) = message.content
    assert (message.stop_reason, use.name, use.input) == ("tool_use", "add", {"a": 12, "b": 30})
    final, _ = streamed(demo, messages=turns, **options)
    assert final.content[0].input == use.input
    turns += [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": '{"result": 42}'}]},
    ]
    assert "42" in create(demo, messages=turns, **options).content[0].text


def test_the_demo_model_thinks_when_asked(demo):
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"messages": turns, "temperature": 0, "max_tokens": 1100}
    message = create(demo, thinking={"type": "enabled", "budget_tokens": 1024}, **options)
    thought, text = message.content
    assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens
    final, _ = streamed(demo, thinking={"type": "enabled", "budget_tokens": 1024}, **options)
    assert final.usage.output_tokens_details == message.usage.output_tokens_details
    assert (thought.type, text.type) == ("thinking", "text")
    assert thought.thinking
    assert "Paris" in text.text
    (text,) = create(demo, **options).content
    assert "Paris" in text.text


def test_what_only_the_engines_client_refuses_is_named_as_sent(demo):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(demo, output_config={"format": {"type": "json_schema", "schema": {"type": "no"}}})
    assert caught.value.body["error"]["message"].startswith("output_config.format")
