"""From a request's fields to the form that its output must have (core's StructuredOutputs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from quire.sampling.grammar import GrammarError
from quire.sampling.params import STRUCTURES, StructuredOutputs
from quire_server.errors import ApiError, refuse
from quire_server.openai.base import Strict
from quire_server.tool_grammar import CannotWrite, Writer

OPTIONS = (*STRUCTURES, "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


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


@dataclass(frozen=True)
class Form:
    """``outputs`` None: nothing is asked. ``reasoning`` says how it goes with what a model may think first: "before" the
    form, "within" it, for it lets text be; or "own": the form itself says where reasoning stands."""

    outputs: StructuredOutputs | None
    reasoning: Literal["before", "within", "own"] = "before"


def of_calls(writer: Writer, make: Callable[[], str], free: bool = False) -> Form:
    """The grammar that ``make`` has ``writer`` write. Raises ApiError when the tools cannot be written so."""
    try:
        grammar = make()
    except (CannotWrite, GrammarError) as error:
        raise refuse("tools", f"tools: {error}") from None
    own = getattr(writer.parser, "REASONS", False)
    return Form(StructuredOutputs(grammar=grammar), "own" if own else "within" if free else "before")


def renamed(error: ApiError, field: str) -> ApiError:
    """The engine speaks of structured_outputs; the client must read of the field that it has sent."""
    if error.param != "structured_outputs" or field == error.param:
        return error
    return ApiError(error.status_code, error.message.replace("structured_outputs", field, 1), param=field)
