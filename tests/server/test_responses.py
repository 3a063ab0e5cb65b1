"""/v1/responses with the real openai client: items, typed events and refusals, around the fake engine and the demo model."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import jsonschema
import openai
import pytest
from conftest import eventually
from demo_server import ADD_PARAMETERS, DemoServer
from fake import FakeLLM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response
from pydantic import BaseModel
from test_errors import error_of
from test_fuzz import ANYTHING, bodies

from quire_server.limits import Limits
from quire_server.openai.responses_schema import ResponsesRequest
from quire_server.state import Settings

ADD = {
    "type": "function",
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {**ADD_PARAMETERS, "additionalProperties": False},
}
SUM = "What is 17 + 25?"
LOGPROBS = ["message.output_text.logprobs"]
CALL = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


class SeeingLLM(FakeLLM):
    """Remembers its prompts."""

    def __init__(self, **options):
        super().__init__(**options)
        self.prompts = []

    async def generate(self, prompt, *args, **options):
        self.prompts.append(prompt["prompt"])
        async for item in super().generate(prompt, *args, **options):
            yield item


@pytest.fixture
def talk(make_live):
    """talk(script): a client of a server whose model says that, and its engine."""

    def make(script=None, **options):
        engine = SeeingLLM(**options)
        engine.script = script
        return make_live(engine).openai(), engine

    return make


def valid(response):
    """Held against the client's own types strictly; the client itself takes anything."""
    return Response.model_validate_json(response.to_json())


def create(client, asked="Hello?", **options):
    return valid(client.responses.create(model="demo", input=asked, **options))


def events_of(client, asked="Hello?", **options):
    """The events of a stream, each valid by its own type and numbered from 0."""
    events = list(client.responses.create(model="demo", input=asked, stream=True, **options))
    for event in events:
        type(event).model_validate_json(event.to_json())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def shown(output):
    """What the items say, without their ids."""
    gone = {"id", "call_id"}
    return [{k: v for k, v in item.to_dict().items() if k not in gone} for item in output]


# -- items ----------------------------------------------------------------------------------------------------------
def test_an_answer_is_what_chat_answers(client):
    response = create(client, max_output_tokens=20)
    messages = [{"role": "user", "content": "Hello?"}]
    chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=20)
    assert response.output_text == chat.choices[0].message.content != ""
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat.usage.prompt_tokens, 20)
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.usage.input_tokens_details.cached_tokens == 3
    whole = create(client)
    assert (whole.status, whole.incomplete_details, whole.output[0].status) == ("completed", None, "completed")
    assert whole.completed_at >= whole.created_at


def test_the_response_tells_of_its_request(client):
    options = {
        "instructions": "Be kind.", "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.25, "user": "u",
        "max_output_tokens": 4, "parallel_tool_calls": False, "prompt_cache_key": "k", "safety_identifier": "s",
        "truncation": "disabled", "service_tier": "auto", "tools": [ADD], "tool_choice": "none",
        "reasoning": {"effort": "none"}, "text": {"format": {"type": "text"}}, "store": False,
    }  # fmt: skip
    told = create(client, **options).to_dict()
    expected = {**options, "service_tier": "default", "reasoning": {"effort": "none", "summary": None}}
    expected["tools"] = [{**ADD, "strict": False}]
    assert {name: told[name] for name in options} == expected


def test_sampling_fields_reach_the_engine(live, client):
    extra = {"top_k": 5, "seed": 11, "repetition_penalty": 1.2, "stop": ["x"], "min_p": 0.1, "ignore_eos": True}
    more = {"priority": 3, "deadline": 9.5, "cache_salt": "s"}
    create(client, temperature=0.5, top_p=0.6, max_output_tokens=4, extra_body={**extra, **more})
    _, params, options = live.engine.opened[-1]
    expected = {**extra, "temperature": 0.5, "top_p": 0.6, "max_tokens": 4}
    assert {name: getattr(params, name) for name in expected} == expected
    assert options == more


@pytest.mark.parametrize(
    ("script", "kinds", "thought"),
    [
        ("<think>\nI add.\n</think>\n\nWell." + CALL, ["reasoning", "message", "function_call"], 25),
        ("Well." + CALL + CALL + "\nDone.", ["message", "function_call", "function_call", "message"], 0),
        ("<think>never ends", ["reasoning"], 17),
        ("<", ["message"], 0),
        ("Prüfung 🙂", ["message"], 0),
    ],
)
def test_streamed_equals_whole(talk, script, kinds, thought):
    client, _ = talk(script)
    options = {"tools": [ADD], "include": LOGPROBS, "top_logprobs": 2}
    whole = create(client, **options)
    assert [item.type for item in whole.output] == kinds
    events = events_of(client, **options)
    last = events[-1]
    assert (events[0].type, events[1].type, last.type) == (
        "response.created", "response.in_progress", "response.completed"
    )  # fmt: skip
    assert shown(last.response.output) == shown(whole.output)
    assert last.response.usage == whole.usage
    assert whole.usage.output_tokens_details.reasoning_tokens == thought
    texts = [""] * len(kinds)
    for event in events:
        if event.type.endswith(".delta"):
            texts[event.output_index] += event.delta
            assert event.item_id == last.response.output[event.output_index].id
        if event.type == "response.output_item.done":
            assert event.item == last.response.output[event.output_index]
    for text, item in zip(texts, whole.output, strict=True):
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)
        if item.type == "message":
            assert b"".join(bytes(t.bytes) for t in item.content[0].logprobs).decode().strip() == text.strip()
            assert all(t.logprob == -1.5 and len(t.top_logprobs) == 2 for t in item.content[0].logprobs)


def test_events_open_and_close_what_they_tell_of(talk):
    client, _ = talk("<think>\nI add.\n</think>\n\nWell." + CALL)
    events = [e.type.removeprefix("response.") for e in events_of(client, tools=[ADD])]
    told = [kind for i, kind in enumerate(events) if i == 0 or kind != events[i - 1]]
    part = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    assert told == [
        "created", "in_progress",
        *part, "reasoning_text.delta", "reasoning_text.done", *done,
        *part, "output_text.delta", "output_text.done", *done,
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip


def test_the_clients_own_stream_helper_follows(talk):
    client, _ = talk("<think>\nI add.\n</think>\n\nWell." + CALL)
    with client.responses.stream(model="demo", input="x", tools=[{**ADD, "strict": True}]) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts[-1] == "Well."
    assert final.output[2].parsed_arguments == {"a": 1, "b": 2}


def test_no_logprobs_unless_asked(live, client):
    assert create(client).output[0].content[0].logprobs == []
    assert live.engine.opened[-1][1].logprobs is None


def test_an_empty_answer_is_an_empty_message(talk):
    client, _ = talk(" ")
    assert [item.type for item in create(client).output] == ["message"]


# -- the conversation -------------------------------------------------------------------------------------------------
def test_items_become_the_conversation_of_chat(talk):
    client, engine = talk()
    items = [
        {"role": "developer", "content": "Dev."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "I call.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c2", "output": "two"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "one"}]},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "Well?"},
    ]  # fmt: skip
    create(client, items, instructions="Inst.")
    function = ['{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}']
    assert engine.prompts[-1] == (
        "<system>Inst.</system><system>Dev.</system><user>a\nb</user>"
        f"<assistant>I call.[{function[0]}][{function[1]}]</assistant>"
        "<tool>two</tool><tool>one</tool><assistant>Both.</assistant><user>Well?</user><assistant>"
    )


def test_answers_can_be_sent_back(talk):
    client, engine = talk("<think>\nI add.\n</think>\n\nWell." + CALL)
    first = create(client, "Add!", tools=[ADD], include=LOGPROBS, store=False)
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    items = [{"role": "user", "content": "Add!"}, *[item.to_dict() for item in first.output], result]
    create(client, items, tools=[ADD])
    said = '<assistant>Well.[{"name": "add", "arguments": {"a": 1, "b": 2}}]</assistant><tool>3</tool>'
    assert engine.prompts[-1].startswith(f"<user>Add!</user>{said}TOOLS")


def test_previous_response(talk):
    client, engine = talk("Fine.")
    first = create(client, "How?", instructions="Be kind.")
    second = create(client, "And now?", previous_response_id=first.id)
    assert engine.prompts[-1] == "<user>How?</user><assistant>Fine.</assistant><user>And now?</user><assistant>"
    third = create(client, "Then?", previous_response_id=second.id)
    assert engine.prompts[-1].startswith("<user>How?</user><assistant>Fine.</assistant><user>And now?</user>")
    client.responses.delete(first.id)  # what went on from it keeps the conversation
    ids = [item.id for item in client.responses.input_items.list(third.id, order="asc")]
    assert ids[1] == first.output[0].id
    assert ids[3] == second.output[0].id
    create(client, "Still?", previous_response_id=third.id)
    assert engine.prompts[-1].count("Fine.") == 3
    branch = create(client, "Or?", previous_response_id=second.id)
    assert branch.previous_response_id == second.id
    assert "Then?" not in engine.prompts[-1]


def test_count_of_input_tokens(client):
    options = {"model": "demo", "input": "How many?", "instructions": "Count.", "tools": [ADD]}
    count = client.responses.input_tokens.count(**options).input_tokens
    assert count == client.responses.create(**options).usage.input_tokens


# -- tools and forms ------------------------------------------------------------------------------------------------
def test_tool_choice_decides_what_may_be_said(talk):
    client, engine = talk(CALL.strip())
    two = [ADD, {**ADD, "name": "double"}]
    assert create(client, tools=two, tool_choice="none").output_text == CALL.strip()
    assert "TOOLS" not in engine.prompts[-1]

    def grammar(choice, **options):
        create(client, tools=two, tool_choice=choice, **options)
        return engine.opened[-1][1].structured_outputs

    assert grammar("auto") is None
    assert "double" in grammar("required").grammar
    assert "double" not in grammar({"type": "function", "name": "add"}).grammar
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    assert "double" not in grammar(allowed).grammar
    assert "double" not in engine.prompts[-1]
    assert grammar({**allowed, "mode": "auto"}) is None
    assert "\\n" in grammar("required").grammar.split("start:")[1].splitlines()[0]
    assert "\\n" not in grammar("required", parallel_tool_calls=False).grammar.split("start:")[1].splitlines()[0]


def test_a_strict_tool_is_held_to_its_schema(talk):
    client, engine = talk(CALL.strip())
    create(client, tools=[{**ADD, "strict": True}])
    grammar = engine.opened[-1][1].structured_outputs.grammar
    assert "TEXT" in grammar  # free text, and calls by the schema within it
    assert '"a"' in grammar


def test_one_call_when_calls_are_not_parallel(talk):
    client, _ = talk(CALL + CALL)
    assert len(create(client, tools=[ADD]).output) == 2
    assert len(create(client, tools=[ADD], parallel_tool_calls=False).output) == 1


# -- errors ---------------------------------------------------------------------------------------------------------
REFUSED = {
    "input": {
        "": None,
        "[]": [],
        "number": 3,
        "reference": [{"id": "msg_1"}],
        "searched": [{"type": "web_search_call", "id": "x"}],
        "image": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
        "role": [{"role": "tool", "content": "x"}],
        "dangling": [{"type": "function_call_output", "call_id": "x", "output": "1"}],
        "encrypted": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}],
        "long": "x" * 5000,
    },
    "tools": {
        "search": [{"type": "web_search"}],
        "name": [{"type": "function", "name": "no spaces"}],
        "deferred": [{**ADD, "defer_loading": True}],
        "schema": [{**ADD, "output_schema": {}}],
    },
    "tool_choice": {
        "word": "sometimes",
        "kind": {"type": "mcp", "server_label": "x"},
        "unknown": {"type": "function", "name": "nobody"},
        "none offered": "required",
        "allowed": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "nobody"}]},
    },
    "text": {
        "kind": {"format": {"type": "yaml"}},
        "no schema": {"format": {"type": "json_schema", "name": "x"}},
        "verbosity": {"verbosity": "low"},
    },
    "reasoning": {"effort": {"effort": "giant"}, "summary": {"summary": "auto"}},
    "include": {"encrypted": ["reasoning.encrypted_content"], "other": ["file_search_call.results"]},
    "metadata": {"many": {str(i): "" for i in range(17)}, "number": {"a": 1}, "long": {"a": "x" * 513}},
    "background": {"unstored": True},
    "background_options": {"": {"mode": "x"}},
    "prompt_cache_retention": {"": "24h"},
    "include_reasoning": {"": False},
    "request_id": {"": "x"},
    "top_logprobs": {"alone": 2},
    "max_output_tokens": {"none": 0, "many": 10**6},
    "previous_response_id": {"unknown": "resp_1"},
    "conversation": {"": "conv_1"},
    "prompt": {"": {"id": "p"}},
    "truncation": {"": "auto"},
    "max_tool_calls": {"": 3},
    "stream_options": {"": {"include_obfuscation": True}},
    "service_tier": {"": "flex"},
    "n": {"": 2},
    "presence_penalty": {"": 3.0},
    "messages": {"": []},
    "response_format": {"": {"type": "text"}},
    "bogus": {"": 1},
}


@pytest.mark.parametrize(("field", "case"), [(field, case) for field, cases in REFUSED.items() for case in cases])
def test_refused_by_name(live, http, field, case):
    body = {"input": "x", field: REFUSED[field][case]}
    if field == "background":
        body["store"] = False
    error = error_of(http.post("/v1/responses", json=body), 400)
    assert error["param"].startswith(field)
    assert error["type"] == "invalid_request_error"


def test_the_element_at_fault_is_named(http):
    def param(**fields):
        return error_of(http.post("/v1/responses", json={"input": "x", **fields}), 400)["param"]

    assert param(tools=[ADD, {"type": "web_search"}]) == "tools[1].type"
    assert param(input=[{"role": "user", "content": [{"type": "input_image"}]}]) == "input[0].content[0].type"
    assert param(input=[{"role": "user"}]) == "input[0].content"
    assert param(text={"format": {"type": "json_schema", "schema": {}}}) == "text.format.name"
    assert param(text={"format": {"type": "json_object", "name": "x"}}) == "text.format.name"
    assert param(reasoning={"effort": "giant"}) == "reasoning.effort"


def test_limits_speak_of_this_routes_fields(make_live):
    live = make_live(settings=Settings(limits=Limits(max_messages=2, max_tools=1)))
    with live.http() as http:
        many = {"input": [{"role": "user", "content": "x"}] * 3}
        error = error_of(http.post("/v1/responses", json=many), 400)
        assert error["param"] == "input"
        assert "--max-messages" in error["message"]
        tools = {"input": "x", "tools": [ADD, {**ADD, "name": "b"}]}
        assert error_of(http.post("/v1/responses", json=tools), 400)["param"] == "tools"


def test_an_engine_that_refuses_has_its_own_status(make_live):
    live = make_live()
    live.engine.full = True
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError):
            live.openai().responses.create(model="demo", input="x", stream=stream)


def test_an_engine_that_fails_midway(make_live):
    live = make_live()
    live.engine.fails_after = 3
    client = live.openai()
    with pytest.raises(openai.InternalServerError, match="a kernel failed"):
        client.responses.create(model="demo", input="x")
    last = events_of(client)[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert "a kernel failed" in last.response.error.message
    assert client.responses.retrieve(last.response.id) == last.response


def test_a_stream_that_is_left_ends_its_request(make_live):
    live = make_live(FakeLLM(delay=0.005))
    stream = live.openai().responses.create(model="demo", input="x", stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert live.engine.running
    stream.close()
    assert eventually(lambda: not live.engine.running)


def test_never_a_500(live, http):
    text = st.text(max_size=8)
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": text})
    call = {"type": st.just("function_call"), "call_id": st.just("c"), "name": text, "arguments": text}
    output = {"type": st.just("function_call_output"), "call_id": st.just("c"), "output": text}
    good = message | st.fixed_dictionaries(call) | st.fixed_dictionaries(output)
    required = {"input": text | st.lists(good, min_size=1, max_size=4) | st.lists(good | ANYTHING, max_size=3)}

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(ResponsesRequest, required))
    def post(body):
        content = json.dumps(body).encode()  # NaN and infinity too, which are no JSON
        response = http.post("/v1/responses", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400), (response.status_code, response.text)
        if response.status_code == 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        elif body.get("stream") is not True:
            Response.model_validate_json(response.content)

    post()
    assert eventually(lambda: not live.engine.running)


# -- the demo model -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "responses.db"
    server = DemoServer("--response-store", str(path), "--response-store-max", "3")
    yield server
    assert server.close() == 0, server.log
    with closing(sqlite3.connect(path)) as store:
        assert store.execute("SELECT COUNT(*) FROM responses").fetchone() == (3,)


@pytest.fixture(scope="module")
def model(demo):
    return demo.client()


def test_arithmetic(model):
    assert "42" in create(model, SUM, temperature=0).output_text
    thought = create(model, SUM, temperature=0, reasoning={"effort": "high"}, include=LOGPROBS)
    assert [item.type for item in thought.output] == ["reasoning", "message"]
    assert "42" in thought.output_text
    assert 0 < thought.usage.output_tokens_details.reasoning_tokens < thought.usage.output_tokens
    assert "".join(t.token for t in thought.output[1].content[0].logprobs) == thought.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_and_its_result(model, stream):
    options = {"tools": [ADD], "temperature": 0}
    first = events_of(model, SUM, **options)[-1].response if stream else create(model, SUM, **options)
    (call,) = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 17, "b": 25})
    result = [{"type": "function_call_output", "call_id": call.call_id, "output": '{"result": 42}'}]
    assert "42" in create(model, result, previous_response_id=first.id, **options).output_text


def test_forced_call(model):
    response = create(model, "Hello!", tools=[ADD], tool_choice="required", temperature=0, max_output_tokens=200)
    jsonschema.validate(json.loads(response.output[0].arguments), ADD["parameters"])


def test_output_by_a_schema(model):
    class Person(BaseModel):
        name: str
        kind: bool

    options = {"model": "demo", "input": "Tell me about a person, as JSON.", "temperature": 0}
    parsed = model.responses.parse(text_format=Person, **options).output_parsed
    assert isinstance(parsed, Person)
    jsonschema.validate(parsed.model_dump(), Person.model_json_schema())
    with pytest.raises(openai.BadRequestError) as failed:
        create(model, text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "banana"}}})
    assert failed.value.param == "text.format"
    assert "response_format" not in failed.value.message


def test_a_name_is_remembered(model):
    first = create(model, "My name is Anna.", temperature=0)
    assert "Anna" in create(model, "What is my name?", previous_response_id=first.id, temperature=0).output_text
    assert "Anna" not in create(model, "What is my name?", temperature=0).output_text
