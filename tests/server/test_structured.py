"""Structured output over HTTP: the openai client against the demo model, and what is refused by name."""

from __future__ import annotations

import json
import re
from typing import Literal

import jsonschema
import openai
import pytest
from demo_server import DemoServer
from fake import FakeLLM
from pydantic import BaseModel, Field
from test_errors import CHAT, TEXT, error_of

ASK = [{"role": "user", "content": "Tell me about a person, as JSON."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "sex": {"enum": ["f", "m"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
    },
    "required": ["name", "sex", "sizes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


def tool(name, *fields, strict=False):
    schema = {
        "type": "object",
        "properties": {field: {"type": "integer", "minimum": 0, "maximum": 99} for field in fields},
        "required": list(fields),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


TOOLS = [tool("add", "a", "b"), tool("double", "x")]
SCHEMAS = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}


@pytest.fixture(scope="module")
def demo():
    server = DemoServer()
    yield server
    assert server.close() == 0, server.log


@pytest.fixture(scope="module")
def client(demo):
    return demo.client()


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "demo", "messages": ASK, "temperature": 1, "seed": 1, "max_tokens": 120, **options}
    )


def test_json_schema_whole_and_streamed(client):
    whole = chat(client, response_format=FORMAT, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.finish_reason for choice in whole.choices] == ["stop"] * 3
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    streamed = ["", "", ""]
    for chunk in chat(client, response_format=FORMAT, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert len(set(texts)) > 1


def test_parsed_into_a_model(client):
    class Answer(BaseModel):
        number: Literal[1, 2, 3]
        words: list[Literal["yes", "no"]] = Field(max_length=2)

    done = client.chat.completions.parse(model="demo", messages=ASK, response_format=Answer, max_tokens=60, seed=4)
    assert isinstance(done.choices[0].message.parsed, Answer)


def test_json_object_and_text(client):
    text = chat(client, response_format={"type": "json_object"}, max_tokens=20).choices[0].message.content
    assert text.startswith("{")
    free = chat(client, response_format={"type": "text"}, temperature=0).choices[0].message.content
    assert free == chat(client, temperature=0).choices[0].message.content


@pytest.mark.parametrize(
    ("structure", "texts"),
    [
        ({"choice": ["north", "south"]}, {"north", "south"}),
        ({"regex": "(ab){2}"}, {"abab"}),
        ({"grammar": 'root ::= "x" [yz]'}, {"xy", "xz"}),
        ({"json": {"const": {"a": [1]}}, "disable_any_whitespace": True}, {'{"a":[1]}'}),
    ],
)
def test_vllms_field(client, structure, texts):
    extra = {"structured_outputs": structure}
    done = client.completions.create(model="demo", prompt="So:", n=2, max_tokens=20, extra_body=extra)
    assert {choice.text for choice in done.choices} <= texts
    assert chat(client, extra_body=extra).choices[0].message.content in texts


def called(choice):
    """(name, arguments) of each call, each held to its tool's schema."""
    assert choice.finish_reason == "tool_calls"
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
    return calls


def test_forced_calls(client):
    named = {"type": "function", "function": {"name": "double"}}
    for seed in range(3):
        choice = chat(client, tools=TOOLS, tool_choice=named, seed=seed, temperature=1.5).choices[0]
        assert [name for name, _ in called(choice)] == ["double"]
        assert not choice.message.content
        one = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        assert len(called(one)) == 1
    streamed = []
    for chunk in chat(client, tools=TOOLS, tool_choice=named, stream=True):
        streamed += [call.function for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [call.name for call in streamed] == ["double"]
    jsonschema.validate(json.loads(streamed[0].arguments), SCHEMAS["double"])


def test_allowed_tools_are_forced_alike(client):
    named = [{"type": "function", "function": {"name": "double"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": named}}
    for seed in range(2):
        made = chat(client, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1.5).choices[0]
        assert {name for name, _ in called(made)} == {"double"}


def test_strict_tools_leave_the_model_free(client):
    strict = [tool("add", "a", "b", strict=True)]
    sum_of = [{"role": "user", "content": "What is 12 + 30?"}]
    choice = chat(client, messages=sum_of, tools=strict, temperature=0).choices[0]
    assert called(choice) == [("add", {"a": 12, "b": 30})]
    capital = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in chat(client, messages=capital, tools=strict, temperature=0).choices[0].message.content


def test_schema_beside_tools(client):
    """The answer has the form, or is a call."""
    for seed in range(3):
        choice = chat(client, tools=TOOLS, response_format=FORMAT, parallel_tool_calls=False, seed=seed).choices[0]
        if choice.message.tool_calls:
            called(choice)
        else:
            jsonschema.validate(json.loads(choice.message.content), PERSON)


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusal_names_the_field(client, stream):
    unique = {"type": "array", "uniqueItems": True}
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": unique}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        chat(client, response_format=wrong, stream=stream)
    assert refused.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="look-ahead") as refused:
        chat(client, extra_body={"structured_outputs": {"regex": "(?=a)"}}, stream=stream)
    assert refused.value.param == "structured_outputs"
    forced = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": unique}}}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        chat(client, tools=[forced], tool_choice="required", stream=stream)
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)  # fmt: skip
def test_refused_by_name(http, fields, param):
    for route, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        error = error_of(http.post(route, json={**body, **fields}), 400)
        assert error["param"] == param
    if param.startswith("guided"):
        assert "structured_outputs" in error["message"]


def test_forced_calls_need_a_tool_and_a_template_that_teaches_them(make_live):
    live = make_live(FakeLLM())
    with live.http() as http:

        def refused(**fields):
            return error_of(http.post("/v1/chat/completions", json={**CHAT, **fields}), 400)["param"]

        named = {"type": "function", "function": {"name": "nothing"}}
        assert refused(tool_choice="required") == "tool_choice"
        assert refused(tool_choice=named, tools=TOOLS) == "tool_choice"
        assert refused(tool_choice="required", tools=TOOLS, response_format=FORMAT) == "response_format"
        live.engine.text.tokenizer.chat_templates = {"default": "{{ messages[0].content }}{{ tools }}"}
        assert refused(tool_choice="required", tools=TOOLS) == "tool_choice"


THINK = {"chat_template_kwargs": {"enable_thinking": True}}


def test_the_form_begins_behind_the_reasoning(client):
    """The prompt has opened it. Whole and streamed, of several samples; the thoughts are no JSON, the answer is."""
    options = {"response_format": FORMAT, "n": 2, "extra_body": THINK, "max_tokens": 400}
    question = [{"role": "user", "content": "What is 12 + 30?"}]
    whole = chat(client, messages=question, **options)
    streamed = [["", ""] for _ in range(2)]
    for chunk in chat(client, messages=question, **options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index][0] += getattr(choice.delta, "reasoning", None) or ""
            streamed[choice.index][1] += choice.delta.content or ""
    for choice, (reasoning, content) in zip(whole.choices, streamed, strict=True):
        assert choice.finish_reason == "stop"
        assert choice.message.reasoning == reasoning
        assert choice.message.content == content
        with pytest.raises(ValueError):
            json.loads(reasoning)
        jsonschema.validate(json.loads(content), PERSON)


def test_forced_calls_after_the_reasoning(client):
    named = {"type": "function", "function": {"name": "add"}}
    question = [{"role": "user", "content": "What is 12 + 30?"}]  # of which the model thinks to an end
    options = dict(tools=TOOLS, tool_choice=named, extra_body=THINK, max_tokens=400, temperature=0)
    choice = chat(client, messages=question, **options).choices[0]
    assert [name for name, _ in called(choice)] == ["add"]
    assert choice.message.reasoning


def test_structural_tag(client):
    """Free text in which the trigger opens a structure, and nothing else follows it."""
    tag = {
        "type": "structural_tag",
        "triggers": ["<"],
        "structures": [{"begin": "<n>", "schema": {"type": "integer", "minimum": 0, "maximum": 9}, "end": "</n>"}],
    }
    bias = {str(t): 100 for t in client.post("/../tokenize", cast_to=object, body={"prompt": "<"})["tokens"][:1]}
    text = chat(client, response_format=tag, logit_bias=bias, max_tokens=40).choices[0].message.content
    assert re.search(r"<n>\d</n>", text), text
    assert not re.sub(r"<n>\d</n>", "", text).rstrip("</n>0123456789").count("<")
