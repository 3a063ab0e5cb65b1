"""From a request's fields to the form that its output must have (core's StructuredOutputs)."""

from __future__ import annotations

import json
from typing import Any, Literal

from quire.sampling.grammar import GrammarError, json_rule
from quire.sampling.params import STRUCTURES, StructuredOutputs
from quire_server.errors import ApiError, refuse
from quire_server.openai.base import Strict
from quire_server.tool_parsers.hermes import Hermes

OPTIONS = (*STRUCTURES, "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class ResponseFormat(Strict):
    """OpenAI's response_format, and vLLM's structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: dict[str, Any] | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None

    def outputs(self) -> StructuredOutputs | None:
        """None: nothing is asked. Raises ApiError."""
        allowed = {"json_schema": {"json_schema"}, "structural_tag": {"structures", "triggers"}}.get(self.type, set())
        for name in ("json_schema", "structures", "triggers"):
            given = getattr(self, name) is not None
            if given != (name in allowed):
                verb = "needs" if name in allowed else "takes no"
                raise refuse(f"response_format.{name}", f"response_format: type {self.type!r} {verb} {name}")
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type == "structural_tag":
            return StructuredOutputs(structural_tag={"structures": self.structures, "triggers": self.triggers})
        return StructuredOutputs(json=_schema_of(self.json_schema or {}))


def _schema_of(given: dict[str, Any]) -> dict[str, Any]:
    """The schema is held to whether ``strict`` or not: a form that may be left is none."""
    where = "response_format.json_schema"
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,),
        "schema": (dict,),
        "description": (str, type(None)),
        "strict": (bool, type(None)),
    }
    for name, value in given.items():
        if name not in kinds:
            raise refuse(f"{where}.{name[:64]}", f"{where}.{name[:64]}: unrecognized request argument")
        if not isinstance(value, kinds[name]):
            raise refuse(f"{where}.{name}", f"{where}.{name}: must be a {kinds[name][0].__name__}")
    for name in ("name", "schema"):
        if name not in given:
            raise refuse(f"{where}.{name}", f"missing required parameter: {where}.{name}", "missing_required_parameter")
    schema: dict[str, Any] = given["schema"]
    return schema


def outputs_of(options: dict[str, Any]) -> StructuredOutputs:
    """vLLM's ``structured_outputs``. Raises ApiError, or InvalidParameter."""
    for name in options:
        if name not in OPTIONS:
            shown = f"structured_outputs.{name[:64]}"
            raise refuse(shown, f"{shown}: unrecognized request argument", "unknown_parameter")
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("json_object") is False:
        del given["json_object"]
    return StructuredOutputs(**given)


def calls(tools: list[tuple[str, dict[str, Any] | None]], many: bool, instead: str | None = None) -> StructuredOutputs:
    """One call of one of ``tools`` (name, schema of the arguments), or with ``many`` at least one, in the Hermes form.

    ``instead``: a JSON schema that the whole output may match as well. Raises ApiError.
    """
    try:
        rules = [f"tool_{i}: {_text(_opening(name))} {_rule(schema)} {_text(CLOSING)}"
                 for i, (name, schema) in enumerate(tools)]  # fmt: skip
        start = 'start: call ("\\n" call)*' if many else "start: call"
        if instead is not None:
            start += " | answer"
            rules.append("answer: " + json_rule(json.loads(instead)))
    except GrammarError as error:
        raise refuse("tools", f"tools: {error}") from None
    return StructuredOutputs(
        grammar="\n".join([start, "call: " + " | ".join(f"tool_{i}" for i in range(len(tools))), *rules])
    )


def strict_calls(tools: list[tuple[str, dict[str, Any] | None]]) -> StructuredOutputs:
    """Free text in which a call, once it begins, is one of ``tools`` with arguments by its schema."""
    structures = [{"begin": _opening(name), "schema": schema or ANY_OBJECT, "end": CLOSING} for name, schema in tools]
    return StructuredOutputs(structural_tag={"structures": structures, "triggers": [Hermes.OPEN]})


CLOSING = "}\n" + Hermes.CLOSE


def _opening(name: str) -> str:
    return f'{Hermes.OPEN}\n{{"name": {json.dumps(name)}, "arguments": '


def _rule(schema: dict[str, Any] | None) -> str:
    return json_rule({**ANY_OBJECT, **schema} if schema else {**ANY_OBJECT, "properties": {}})


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def renamed(error: ApiError, field: str) -> ApiError:
    """The engine speaks of structured_outputs; the client must read of the field that it has sent."""
    if error.param != "structured_outputs" or field == error.param:
        return error
    return ApiError(error.status_code, error.message.replace("structured_outputs", field, 1), param=field)
