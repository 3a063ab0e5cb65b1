"""Each keyword of JSON Schema is honoured or refused by name. ``bench/json_schema_suite.py`` is the same at large."""

from __future__ import annotations

import json

import jsonschema
import pytest

from quire import plugins
from quire.sampling.grammar import GrammarCompiler, GrammarError
from quire.sampling.params import StructuredOutputs
from quire.text.tokenizer import Tokenizer

# (schema, texts to accept, texts to reject); every text is compact JSON.
KEYWORDS = {
    "type": ({"type": "integer"}, ["1", "-20"], ["1.5", '"a"']),
    "type list": ({"type": ["integer", "null"]}, ["1", "null"], ['"a"']),
    "enum": ({"enum": [1, "a", None]}, ["1", '"a"', "null"], ["2"]),
    "const": ({"const": {"a": 1}}, ['{"a":1}'], ["2"]),
    "minLength": ({"type": "string", "minLength": 3}, ['"abc"'], ['"ab"']),
    "maxLength": ({"type": "string", "maxLength": 1}, ['"日"'], ['"ab"']),
    "pattern": ({"type": "string", "pattern": "^a+b$"}, ['"aab"'], ['"ba"']),
    "pattern, searched": ({"type": "string", "pattern": "ab"}, ['"xaby"'], ['"ba"']),
    "pattern, by escapes": ({"type": "string", "pattern": "^[^a]$"}, ['"b"'], ['"\\u0061"']),
    "pattern, digits": ({"type": "string", "pattern": "^\\d$"}, ['"1"'], ['"٣"']),
    "format date": (
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"2000-02-29"'],
        ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"'],
    ),
    "format date with a pattern": (
        {"type": "string", "format": "date", "pattern": "^2"},
        ['"2024-02-29"'],
        ['"1024-02-29"', '"2"'],
    ),
    "format time": (
        {"type": "string", "format": "time"},
        ['"23:59:59Z"', '"01:02:03.5+02:00"'],
        ['"24:00:00Z"', '"12:00:60Z"'],
    ),
    "format date-time": (
        {"type": "string", "format": "date-time"},
        ['"2024-02-29T01:02:03Z"'],
        ['"2023-02-29T01:02:03Z"', '"2024-02-29"'],
    ),
    "format uuid": ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"x"']),
    "format email": ({"type": "string", "format": "email"}, ['"a@b.co"'], ['"x"']),
    "minimum": ({"type": "integer", "minimum": 5}, ["5", "77"], ["4"]),
    "maximum": ({"type": "integer", "maximum": 5}, ["5", "-9"], ["6"]),
    "exclusiveMinimum": ({"type": "number", "exclusiveMinimum": 5}, ["5.5"], ["5"]),
    "number range": ({"type": "number", "minimum": 0, "maximum": 1}, ["0.5"], ["1.5"]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, ["14"], ["15"]),
    "required": ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, ['{"a":1}'], ["{}"]),
    "additionalProperties false": ({"type": "object", "additionalProperties": False}, ["{}"], ['{"b":1}']),
    "additionalProperties": (
        {"type": "object", "additionalProperties": {"type": "null"}},
        ['{"b":null}'],
        ['{"b":"x"}'],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        ['{"xa":1}'],
        ['{"b":1}', '{"xa":""}'],
    ),
    "properties, by escapes": (
        {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        ['{"a":null,"b":1}'],
        ['{"\\u0061":1}'],
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, ['{"ab":1}'], ['{"b":1}']),
    "propertyNames of a list": (
        {"type": "object", "propertyNames": {"enum": ["a.b", "c"]}, "additionalProperties": {"type": "integer"}},
        ['{"a.b":1,"c":2}', "{}"],
        ['{"axb":1}', '{"c":null}'],
    ),
    "propertyNames, any": ({"type": "object", "propertyNames": {"type": "string"}}, ['{"b":1}'], ["1"]),
    "propertyNames beside properties": (
        {"type": "object", "properties": {"a": {}}, "propertyNames": {"pattern": "^a"}},
        ['{"ab":1}'],
        ['{"b":1}'],
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
    "minProperties, required": (
        {"type": "object", "minProperties": 2, "required": ["a", "b"]},
        ['{"a":1,"b":2}'],
        ['{"a":1}'],
    ),
    "minProperties, many": ({"type": "object", "minProperties": 2}, ['{"a":1,"b":2}'], ['{"a":1,"a":2}']),
    "maxProperties": ({"type": "object", "maxProperties": 1}, ["{}"], ['{"a":1,"b":2}']),
    "minItems": ({"type": "array", "minItems": 2}, ["[1,2]"], ["[1]"]),
    "maxItems": ({"type": "array", "maxItems": 1}, ["[1]"], ["[1,2]"]),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}},
        ["[1,null]"],
        ["[null]"],
    ),
    "items, after": ({"type": "array", "items": {"type": "integer"}}, ["[1,2]"], ['[1,"a"]']),
    "items, of a float's length": ({"type": "array", "maxItems": 1.0}, ["[1]"], ["[1,2]"]),
    "uniqueItems, not": ({"type": "array", "uniqueItems": False}, ["[1,1]"], ["1"]),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, ["[1]"], ["[1,1]"]),
    "contains": ({"type": "array", "contains": {"const": 1}}, ["[1]"], ["[2]"]),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["null"]),
    "oneOf, disjoint": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["null"]),
    "oneOf, overlapping": ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]}, ["1"], ["3"]),
    "allOf": (
        {"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": {"type": "null"}}}]},
        ['{"a":null}'],
        ['{"a":1}', "{}"],
    ),
    "not": ({"type": "integer", "not": {"const": 3}}, ["4"], ["3"]),
    "if": ({"if": {"type": "integer"}, "then": {"minimum": 3}}, ["4"], ["2"]),
    "$ref": ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}, ["4"], ['"a"']),
    "$ref, recursive": ({"type": "array", "items": {"$ref": "#"}}, ["[[],[[]]]"], ["[1]"]),
    "if, alone": ({"if": {"type": "integer"}, "type": "string"}, ['"a"'], ["1"]),
    "$anchor": ({"$defs": {"n": {"$anchor": "n", "type": "integer"}}, "$ref": "#n"}, ["4"], ['"a"']),
    "$dynamicRef": ({"$dynamicAnchor": "n", "type": "array", "items": {"$dynamicRef": "#n"}}, ["[[]]"], ["[1]"]),
    "dependentSchemas": (
        {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
        ['{"a":1,"b":1}'],
        ['{"a":1}'],
    ),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, ['{"a":1,"b":1}'], ['{"a":1}']),
    "unevaluatedProperties, alone": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        ['{"a":1}'],
        ['{"b":1}'],
    ),
    "unevaluatedProperties": (
        {"allOf": [{"type": "object", "properties": {"a": {}}}], "unevaluatedProperties": False},
        ['{"a":1}'],
        ['{"b":1}'],
    ),
    "unevaluatedItems, alone": (
        {"type": "array", "prefixItems": [True], "unevaluatedItems": False},
        ["[1]"],
        ["[1,2]"],
    ),
    "unevaluatedItems": (
        {"type": "array", "allOf": [{"prefixItems": [True]}], "unevaluatedItems": False},
        ["[1]"],
        ["[1,2]"],
    ),
    "control characters": ({"const": "a\u0001"}, ['"a\\u0001"'], ['"a"']),
    "annotations": ({"type": "null", "title": "t", "description": "d", "default": 1, "examples": [1]}, ["null"], ["1"]),
    "true": (True, ["1", '{"a":[null]}'], ["x"]),
}
REFUSED = {
    "propertyNames beside properties": "propertyNames", "uniqueItems": "uniqueItems", "contains": "contains",
    "oneOf, overlapping": "oneOf", "not": "not", "if": "if", "dependentRequired": "dependentRequired",
    "unevaluatedProperties": "unevaluatedProperties", "unevaluatedItems": "unevaluatedItems",
    "minProperties, many": "minProperties", "$dynamicRef": "dynamic", "dependentSchemas": "dependentSchemas",
    "control characters": "control characters",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler():
    tokenizer = Tokenizer.load(plugins.load().checkpoints["demo"]())
    return GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)


def takes(compiler, schema, text, tag=False):
    """Whether the whole of ``text`` is an output that the schema allows."""
    if tag:
        structure = {"begin": "<f>", "schema": schema, "end": "</f>"}
        spec, text = (
            StructuredOutputs(structural_tag={"triggers": ["<f>"], "structures": [structure]}),
            f"<f>{text}</f>",
        )
    else:
        spec = StructuredOutputs(json=schema)
    matcher = compiler.matcher(spec)
    ids = compiler._open().encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", KEYWORDS)
def test_keyword_is_honoured_or_refused(compiler, name):
    """Never ignored. The texts are held against jsonschema first."""
    schema, valid, invalid = KEYWORDS[name]
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    assert all(check.is_valid(json.loads(text)) for text in valid)
    assert not any(check.is_valid(json.loads(text)) for text in invalid if told_by_jsonschema(name, text))
    if name in REFUSED:
        with pytest.raises(GrammarError, match=REFUSED[name]):
            compiler.matcher(StructuredOutputs(json=schema))
        return
    for tag in [False, True] if isinstance(schema, dict) else [False]:
        assert all(takes(compiler, schema, text, tag) for text in valid)
        assert not any(takes(compiler, schema, text, tag) for text in invalid)


def told_by_jsonschema(name, text):
    """It reads ``\\d`` as Python does, and knows no times without a further package."""
    return text != "x" and not name.startswith(("pattern, digits", "format time", "format date-time"))


def test_a_reference_into_a_rewritten_place(compiler):
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "uniqueItems": False, "items": {"type": "integer"}},
            "b": {"$ref": "#/properties/a"},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    assert takes(compiler, schema, '{"a":[1],"b":[2]}')
    assert not takes(compiler, schema, '{"a":[1],"b":["x"]}')


def test_values_are_no_schemas(compiler):
    """What stands in ``enum``, ``const`` or ``properties`` under the name of a keyword is none."""
    value = {"uniqueItems": False, "if": 1, "minLength": 2.5}
    assert takes(compiler, {"const": value}, json.dumps(value))
    assert takes(
        compiler,
        {"properties": {"uniqueItems": {"const": False}}, "required": ["uniqueItems"]},
        '{"uniqueItems":false}',
    )


def test_objects_can_be_closed(compiler):
    """vLLM's option: where a schema names properties and says nothing of others, there are none."""
    open_one = {"type": "object", "properties": {"a": {"type": "object"}, "b": {"properties": {"properties": {}}}}}
    told = {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}}
    cases = {
        '{"a":{"x":1}}': (open_one, True), '{"c":1}': (open_one, False), '{"b":{"properties":1}}': (open_one, True),
        '{"b":{"q":1}}': (open_one, False), '{"z":null}': (told, True), '{"z":1}': (told, False),
    }  # fmt: skip
    for text, (schema, allowed) in cases.items():
        matcher = compiler.matcher(StructuredOutputs(json=schema, disable_additional_properties=True))
        ids = compiler._open().encode(text, add_special_tokens=False)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == allowed, text
