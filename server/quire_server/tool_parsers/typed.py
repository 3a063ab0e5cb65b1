"""Formats that write arguments one by one: strings as bare text, all else as JSON, told apart by the tool's JSON schema."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from quire.sampling.json_schema import FORMATS
from quire_server.reader import MAX_HELD, Steps, Tags
from quire_server.tool_calls import Framed, read_json
from quire_server.tool_grammar import TEXT, CannotWrite, Grammar, Tool, literal, pattern, without

ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
        "$defs", "definitions",
    }
)  # fmt: skip
_OF_OBJECTS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}
_OF_TEXTS = ANNOTATIONS | {"type", "enum", "const", "pattern", "minLength", "maxLength", "format"}


LIFTED = "\ud800"  # stands for a JSON value that was taken out; half a surrogate pair is in no text


class ByArgument(Framed):
    """Calls whose arguments stand between marks, one by one. A JSON object or array ends with its bracket, so that its
    strings may hold any text, those marks too. A bare string ends with the next mark: that it holds one cannot be told."""

    FIRST: str  # begins an argument
    END: str  # ends its value; white space around it is the format's

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(tools)
        self._lifted: deque[str] = deque()

    def function(self, head: str) -> str:
        """The name of the tool, from what stands before its first argument."""
        raise NotImplementedError

    def key(self) -> Steps[tuple[str, str | None]]:
        """Read on to where a value begins: (what was read, the argument's name or None if no value begins there). Nothing
        that was read holds FIRST or the mark that closes a call."""
        raise NotImplementedError

    def body(self, close: str) -> Steps[tuple[str, str, str]]:
        """Up to the mark that closes a call: (the text, the same with LIFTED for each JSON value, that mark)."""
        tags = Tags(self.FIRST, close)
        raw: list[str] = []
        body: list[str] = []
        schemas: dict[str, Any] | None = None
        size = 0
        self._lifted.clear()
        while True:
            text, tag = yield from self.reader.body(tags, max(MAX_HELD - size, 0))
            raw.append(text)
            body.append(text)
            if tag != self.FIRST:
                return "".join(raw), "".join(body), tag
            if schemas is None:
                schemas = properties(self.tools, self.function(text))
            start, key = yield from self.key()
            raw += tag, start
            body += tag, start
            size += len(text) + len(tag) + len(start)
            lifted = ""
            if key is not None and "string" not in _kinds(schemas.get(key)):
                lifted = yield from self.value(self.END.strip(), MAX_HELD - size)
            if lifted:
                size += len(lifted)
                self._lifted.append(lifted)
                raw.append(lifted)
                body.append(LIFTED)

    def argument(self, text: str, schema: Any) -> Any:
        """What an argument's text of :meth:`body` stands for. To be asked in the order of the arguments."""
        return value(self._lifted.popleft() if LIFTED in text else text, schema)


def properties(tools: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Schemas of the arguments of the tool ``name``, as far as it is offered and says so."""
    for tool in tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            found = (function.get("parameters") or {}).get("properties")
            return found if isinstance(found, dict) else {}
    return {}


def value(text: str, schema: Any) -> Any:
    """What ``text`` stands for: a string where the schema lets it be one, else the JSON value, else the text."""
    kinds = _kinds(schema)
    stripped = text.strip()
    if "null" in kinds and stripped in ("null", "None"):
        return None
    if "string" in kinds:
        return text
    if "boolean" in kinds and stripped in ("True", "False"):
        return stripped == "True"
    try:
        return read_json(stripped)
    except ValueError:
        return text


def _kinds(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    kinds = schema.get("type")
    found = {kind for kind in ([kinds] if isinstance(kinds, str) else _list(kinds)) if isinstance(kind, str)}
    choices = schema.get("enum")
    if not found and isinstance(choices, list) and any(isinstance(choice, str) for choice in choices):
        found = {"string"}
    for key in ("anyOf", "oneOf"):
        for part in _list(schema.get(key)):
            if isinstance(part, dict) and isinstance(part.get("type"), str):
                found.add(part["type"])
    return found


def _list(value: Any) -> list[Any]:
    """A client's schema may have anything anywhere."""
    return value if isinstance(value, list) else []


# -- the same as a grammar ---------------------------------------------------------------------------------------------
def fields(tool: Tool) -> list[tuple[str, Any, bool]]:
    """(name, schema, whether it must be given) of each argument of a tool that is held to its schema, in its order.

    Formats that write arguments one by one can say no more of them together. Raises CannotWrite.
    """
    schema = tool.schema()
    other = sorted(set(schema) - _OF_OBJECTS)
    if other:
        raise CannotWrite(
            f"the parameters of {tool.name!r} have {other[0]!r}, which this model's form of calls, argument by argument, "
            "cannot be held to: leave it out, or use tool_choice 'auto' without strict"
        )
    known, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(known, dict) or not isinstance(required, list):
        raise CannotWrite(f"the parameters of {tool.name!r} are no JSON schema")
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    given = {**known, **{name: {} for name in required if name not in known}}
    return [(name, _with(part, shared), name in required) for name, part in given.items()]


def arguments(g: Grammar, tool: Tool, opening: str, end: str, *marks: str) -> str:
    """The arguments of ``tool``, each between ``opening`` (with NAME for its name) and ``end``: in the schema's order when
    the tool is held to it, else any of those that it knows. No bare text holds ``end`` or one of ``marks``."""

    def start(name: str) -> str:
        if not name or name != name.strip() or set(name) & set("<>\n"):
            raise CannotWrite(f"{name[:64]!r} cannot be an argument's name in this model's form of calls")
        return literal(opening.replace("NAME", name))

    if not tool.held:
        known = (tool.parameters or {}).get("properties")
        given = [f"{start(name)} {anything(g, end, *marks)}" for name in (known if isinstance(known, dict) else ())]
        return f"{g.one_of(given)}*" if given else ""
    parts = []
    for name, schema, needed in fields(tool):
        one = g.rule(f"{start(name)} {written(g, name, schema, end, *marks)}")
        parts.append(one if needed else f"{one}?")
    return " ".join(parts)


def _with(schema: Any, shared: dict[str, Any]) -> Any:
    return {**shared, **schema} if isinstance(schema, dict) else schema


def written(g: Grammar, name: str, schema: Any, end: str, *marks: str) -> str:
    """The argument ``name`` as bare text that :func:`value` makes match ``schema``, and ``end`` behind it; ``marks`` and
    ``end`` do not occur in it. Raises CannotWrite, GrammarError."""
    kinds = _kinds(schema)
    if "string" not in kinds:
        return f"{g.json(schema if isinstance(schema, dict) else {'allOf': [schema]})} {literal(end)}"
    texts = " | ".join(f"({text} & {without(end.strip(), *marks)})" for text in _texts(name, schema))
    if "null" in kinds:
        texts += ' | "null"'
    return g.terminal(f"({texts}) {literal(end)}")


def anything(g: Grammar, end: str, *marks: str) -> str:
    """Any bare text, and ``end``."""
    return g.terminal(f"({TEXT} & {without(end.strip(), *marks)}) {literal(end)}")


def _texts(name: str, schema: dict[str, Any]) -> list[str]:
    """Terminals of the strings that a schema allows."""
    union = next((key for key in ("anyOf", "oneOf") if key in schema), None)
    if union is not None:
        parts = [part for part in _list(schema[union]) if isinstance(part, dict) and part.get("type") == "string"]
        if set(schema) - ANNOTATIONS - {union} or not parts or (union == "oneOf" and len(parts) > 1):
            raise _bare(name, union)
        return [text for part in parts for text in _texts(name, part)]
    other = sorted(set(schema) - _OF_TEXTS)
    if other:
        raise _bare(name, other[0])
    made = []
    if "const" in schema or "enum" in schema:
        choices = [schema["const"]] if "const" in schema else _list(schema["enum"])
        strings = [choice for choice in choices if isinstance(choice, str)]
        if not strings:
            raise _bare(name, "const" if "const" in schema else "enum")
        made.append("(" + " | ".join(map(literal, strings)) + ")")
    if "pattern" in schema:
        made.append(_matching(str(schema["pattern"])))
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise _bare(name, f"format: {schema['format']}")
        made.append(_matching(FORMATS[schema["format"]]))
    if "minLength" in schema or "maxLength" in schema:
        made.append(f"/(.|\\n){{{_count(name, schema, 'minLength', '0')},{_count(name, schema, 'maxLength', '')}}}/")
    return [" & ".join(made) if made else TEXT]


def _count(name: str, schema: dict[str, Any], keyword: str, default: str) -> str:
    count = schema.get(keyword, default)
    if count is default:
        return default
    if isinstance(count, bool) or not isinstance(count, int | float) or count < 0 or count != int(count):
        raise CannotWrite(f"{name!r}: {keyword} must be a whole number, not {str(count)[:20]!r}")
    return str(int(count))


def _matching(regex: str) -> str:
    """A pattern of JSON Schema may match anywhere, unless it is anchored; its digits and letters are ASCII's."""
    regex = _ascii(regex)
    start = "" if regex.startswith("^") else r"(.|\n)*"
    regex = regex.removeprefix("^")
    slashes = len(regex[:-1]) - len(regex[:-1].rstrip("\\"))
    if regex.endswith("$") and slashes % 2 == 0:
        return pattern(f"{start}({regex[:-1]})")
    return pattern(rf"{start}({regex})(.|\n)*")


def _ascii(regex: str) -> str:
    """``\\d`` and ``\\w`` as ECMAScript means them. (``\\D`` and ``\\W`` stay: theirs is the wider meaning.)"""
    made, inside = [], False
    for part in re.findall(r"\\.|.", regex, re.DOTALL):
        inside = part == "[" or (inside and part != "]")
        letters = {r"\d": "0-9", r"\w": "A-Za-z0-9_"}.get(part)
        made.append(part if letters is None else letters if inside else f"[{letters}]")
    return "".join(made)


def _bare(name: str, keyword: str) -> CannotWrite:
    return CannotWrite(
        f"{name!r} has {keyword!r}, to which a string without quotes, as this model's form of calls has it, cannot be held: "
        "leave it out, or use tool_choice 'auto' without strict"
    )
