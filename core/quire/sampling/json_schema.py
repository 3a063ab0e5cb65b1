"""A JSON schema made ready for llguidance: what says nothing is left out, what it would take too lightly is made exact.

llguidance names the keywords that it does not know and refuses them; the rest of a schema it honours, with a few
exceptions that ``bench/json_schema_suite.py`` and its own probes have found. Those are here, and nowhere else.
"""

from __future__ import annotations

import re
from typing import Any

from quire.sampling.ecma_regex import RegexError, translate

OPTIONS: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}
r"""Of llguidance. Not lenient: a keyword that would be ignored is an error. No ``\u``: a key could be written in two
ways, and the second would escape what ``properties`` says of the first; it could be half a surrogate pair, too."""

_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"enum", "const", "default", "examples"}
_WRITTEN = {"enum", "const", "properties", "required"}  # hold texts that the output must have
_BY_NUMBER = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_IN_PLACE = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas"}

_YEAR = r"([1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_LEAP = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_MONTHS = r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
_DATE = rf"({_YEAR}-{_MONTHS}|{_LEAP}-02-29)"
_HOUR = r"([01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_HOUR}:[0-5]\d(\.\d{{1,9}})?(Z|[+-]{_HOUR})"
FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""llguidance's own let 30 days into February and leap seconds into any minute. These know no leap seconds."""


class SchemaError(ValueError):
    """Why a schema cannot be honoured."""


def prepare(schema: Any) -> Any:
    """The same schema in llguidance's terms; never one that allows more. Raises SchemaError, RecursionError."""
    if isinstance(schema, list):
        return [prepare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _WRITTEN:
            _check_written(name, value)
        if name in _MAPS and isinstance(value, dict):
            keyed = _pattern if name == "patternProperties" else str
            made[name] = {keyed(key): prepare(item) for key, item in value.items()}
        elif name == "pattern" and isinstance(value, str):
            made[name] = _pattern(value)
        elif name in _COUNTS and isinstance(value, float) and value.is_integer():
            made[name] = int(value)
        else:
            made[name] = value if name in _VALUES else prepare(value)
    _drop_idle(made)
    _names(made)
    _unevaluated(made)
    _distinct(made)
    _format(made)
    return made


def _pattern(pattern: str) -> str:
    try:
        return translate(pattern)
    except RegexError as error:
        raise SchemaError(f"pattern: {error}") from None


def close(schema: Any) -> Any:
    """The same schema with no additional properties in objects that name some and do not speak of others."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, dict):
            made[name] = {key: close(item) for key, item in value.items()}
        else:
            made[name] = value if name in _VALUES else close(value)
    if {"properties", "patternProperties"} & set(made):
        made.setdefault("additionalProperties", False)
    return made


def _check_written(name: str, value: Any) -> None:
    """Raise for a text that only an escape by number could write."""
    if isinstance(value, str) and _BY_NUMBER.search(value):
        raise SchemaError(f"{name}: control characters that JSON has no name for are not supported")
    if isinstance(value, list | dict):
        for item in value:
            _check_written(name, item)
        if isinstance(value, dict) and name in _VALUES:
            _check_written(name, list(value.values()))


def _drop_idle(schema: dict[str, Any]) -> None:
    """Keywords that say nothing as they stand."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if "contains" not in schema:
        schema.pop("minContains", None)
        schema.pop("maxContains", None)
    if "if" not in schema or not {"then", "else"} & set(schema):
        for name in ("if", "then", "else"):
            schema.pop(name, None)
    for name in ("dependentRequired", "dependentSchemas", "dependencies"):
        if schema.get(name) == {}:
            del schema[name]


def _names(schema: dict[str, Any]) -> None:
    """``propertyNames`` as ``patternProperties``, where it is a pattern or a list and nothing else names properties."""
    names = schema.get("propertyNames")
    if isinstance(names, dict):
        names = {key: value for key, value in names.items() if (key, value) != ("type", "string")}
    if names is True or names == {}:
        del schema["propertyNames"]
    elif isinstance(names, dict) and not {"properties", "patternProperties", "required"} & set(schema):
        texts = names.get("enum") if set(names) == {"enum"} else [names["const"]] if set(names) == {"const"} else None
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            pattern = "^(" + "|".join(map(_quoted, texts)) + ")$"
        elif set(names) == {"pattern"} and isinstance(names["pattern"], str):
            pattern = names["pattern"]
        else:
            return
        del schema["propertyNames"]
        schema["patternProperties"] = {pattern: schema.get("additionalProperties", True)}
        schema["additionalProperties"] = False


def _quoted(text: str) -> str:
    """A regex of the text alone. ``re.escape`` would escape what is no special character, which is an error here."""
    return "".join("\\" + c if c in r"\.+*?()|[]{}^$/" else c for c in text)


def _unevaluated(schema: dict[str, Any]) -> None:
    """Without subschemas in the same place, what is not evaluated is what is additional."""
    for name, plain, beside in (
        ("unevaluatedProperties", "additionalProperties", set()),
        ("unevaluatedItems", "items", {"contains"}),
    ):
        if schema.get(name) in (True, {}) or (plain in schema and not isinstance(schema[plain], list)):
            schema.pop(name, None)
        elif name in schema and not ({plain, *_IN_PLACE} | beside) & set(schema):
            schema[plain] = schema.pop(name)


def _distinct(schema: dict[str, Any]) -> None:
    """A grammar lets additional keys repeat, which counts once: ``minProperties`` holds only by what is required."""
    least, required = schema.get("minProperties"), schema.get("required")
    if isinstance(least, int) and least > 1:
        if not isinstance(required, list) or len(set(map(str, required))) < least:
            raise SchemaError("minProperties above 1 is only supported when as many properties are required")
        del schema["minProperties"]


def _format(schema: dict[str, Any]) -> None:
    pattern = FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
    if pattern is None:
        return
    del schema["format"]
    if "pattern" in schema:
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": pattern}]
    else:
        schema["pattern"] = pattern
