"""Whatever JSON comes, the answer is 200 or a refusal in OpenAI's shape: never a 500, never a request left behind."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from conftest import eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import plugins
from quire.sampling.grammar import GrammarCompiler
from quire.sampling.params import InvalidParameter, StructuredOutputs
from quire.text.tokenizer import Tokenizer
from quire_server.openai.chat_schema import ChatRequest
from quire_server.openai.completions_schema import CompletionRequest
from quire_server.tokenize import DetokenizeRequest, TokenizeRequest

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([0, 1, 2, "user"])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id"]), ANYTHING
) | st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": st.text(max_size=8)}
)
KEYWORDS = {
    "type": st.sampled_from(["object", "array", "string", "integer", "number", "null", "boolean", ["null", "string"], "x"]),
    "format": st.sampled_from(["date", "time", "uuid", "email", "ipv6", "regex", "x"]),
    "pattern": st.sampled_from(["^a+$", "[0-9]{2}", "(", "(?=a)", "\\\\d", ".*"]),
    "required": st.lists(st.sampled_from(["a", "b", "a\x00"]), max_size=2),
    "enum": st.lists(ANYTHING, max_size=3),
    "const": ANYTHING,
    "$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/a", "http://x/y"]),
    **{name: st.integers(-1, 4) | st.floats(-1, 4) for name in ("minLength", "maxLength", "minItems", "maxItems", "minimum",
       "maximum", "exclusiveMinimum", "multipleOf", "minProperties", "maxProperties", "minContains")},
    **dict.fromkeys(("uniqueItems", "title", "default", "x-guidance", "dependentRequired", "propertyNames"), ANYTHING),
}  # fmt: skip


def schemas(inner):
    nested = {
        **dict.fromkeys(("items", "additionalProperties", "not", "if", "then", "contains", "propertyNames",
           "unevaluatedProperties", "unevaluatedItems"), inner),
        **{name: st.lists(inner, max_size=2) for name in ("anyOf", "oneOf", "allOf", "prefixItems")},
        **{name: st.dictionaries(st.sampled_from(["a", "b", "^a"]), inner, max_size=2) for name in ("properties", "$defs",
           "patternProperties", "dependentSchemas")},
    }  # fmt: skip
    field = st.sampled_from(sorted({**KEYWORDS, **nested})).flatmap(
        lambda name: st.tuples(st.just(name), {**KEYWORDS, **nested}[name])
    )
    return st.lists(field, max_size=4).map(dict)


SCHEMA = st.recursive(schemas(st.booleans()), schemas, max_leaves=4)
FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"])}, optional={"parameters": SCHEMA, "strict": st.booleans()}
)
TAG = st.fixed_dictionaries(
    {
        "triggers": st.lists(st.sampled_from(["<", "<f", "", "<|im_end|>"]), max_size=2),
        "structures": st.lists(
            st.fixed_dictionaries(
                {
                    "begin": st.sampled_from(["<f>", "x"]),
                    "schema": SCHEMA,
                    "end": st.sampled_from(["", "</f>", "<|im_end|>"]),
                }
            ),
            max_size=2,
        ),
    }
)
GRAMMAR = st.lists(
    st.sampled_from(["start: ", "root ::= ", "a", '"x"', "|", "(", ")", "*", "+", "?", "\n", "a: ", "/[a-z]+/", "%json {", "}",
                     "@", "<[5]>", "%ignore ", "{2,9}", "[lazy]", "\\"]), max_size=10,
).map("".join)  # fmt: skip
STRUCTURE = st.one_of(
    st.fixed_dictionaries({"json": SCHEMA}, optional={"disable_any_whitespace": st.booleans()}),
    st.fixed_dictionaries({"json": SCHEMA, "whitespace_pattern": st.sampled_from(["[ ]*", "(", ""])}),
    st.fixed_dictionaries({"regex": st.text("ab(){}[]*+?|\\^$.09,-", max_size=10)}),
    st.fixed_dictionaries({"choice": st.lists(st.text(max_size=4), max_size=3)}),
    st.fixed_dictionaries({"grammar": GRAMMAR}),
    st.fixed_dictionaries({"structural_tag": TAG}),
)
GOOD = {
    "prompt": st.text(max_size=8) | st.lists(st.integers(0, 299), min_size=1, max_size=4),
    "messages": st.lists(MESSAGE, min_size=1, max_size=3),
    "stream": st.booleans(),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 5),
    "echo": st.booleans(),
    "logprobs": st.integers(0, 3) | st.booleans(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "tokens": st.lists(st.integers(0, 400), max_size=4),
    "tools": st.lists(
        st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION | ANYTHING}), max_size=2
    ),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])})
    | st.fixed_dictionaries(
        {
            "type": st.just("json_schema"),
            "json_schema": st.fixed_dictionaries(
                {"name": st.just("x"), "schema": SCHEMA}, optional={"strict": ANYTHING}
            ),
        }
    )
    | TAG.map(lambda tag: {"type": "structural_tag", **tag}),
    "structured_outputs": STRUCTURE,
    "reasoning_effort": st.sampled_from(["none", "low", "high"]),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "messages", "x"]), ANYTHING),
    "logit_bias": st.dictionaries(st.integers(-5, 310).map(str), st.floats(-120, 120), max_size=3),
}
ROUTES = {
    "/v1/completions": (CompletionRequest, {"prompt": GOOD["prompt"]}),
    "/v1/chat/completions": (ChatRequest, {"messages": GOOD["messages"]}),
    "/tokenize": (TokenizeRequest, {}),
    "/detokenize": (DetokenizeRequest, {"tokens": GOOD["tokens"]}),
}


def bodies(model, required):
    names = sorted({*model.model_fields, *model.refused} - {"model"})
    field = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), GOOD.get(name, ANYTHING) | ANYTHING))
    return st.tuples(st.fixed_dictionaries(required), st.lists(field, max_size=4)).map(lambda t: {**t[0], **dict(t[1])})


@pytest.fixture(scope="module")
def demo_compiler():
    tokenizer = Tokenizer.load(plugins.load().checkpoints["demo"]())
    return GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("route", ROUTES)
def test_never_a_500(live, http, route):
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(*ROUTES[route]))
    def post(body):
        response = http.post(route, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400), (response.status_code, response.text)
        if response.status_code == 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        else:
            assert '"error":' not in response.text

    post()
    assert eventually(lambda: not live.engine.running)


def check_grammar(compiler, given, choices):
    """It is refused by name, or some sequence of tokens can follow it: no other error, and no hang."""
    try:
        spec = StructuredOutputs(**given)
        compiler.check(spec)
    except InvalidParameter:
        return
    began = time.monotonic()
    matcher = compiler.matcher(spec)
    for choice in choices:
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if matcher.is_error() or matcher.is_stopped() or not len(allowed):
            break  # a budget ran out, or the output is complete
        assert matcher.consume_token(int(allowed[choice % len(allowed)])), "a token that the mask allows is taken"
    assert time.monotonic() - began < 10


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(STRUCTURE, st.lists(st.integers(0, 10**6), max_size=6))
def test_grammars(demo_compiler, given, choices):
    check_grammar(demo_compiler, given, choices)
