"""Grammars of calls: what a parser says of its own format so that ``tool_choice`` and ``strict`` can hold a model to it.

A parser's class that can be forced is :class:`Forceable`. It writes rules of Lark (as llguidance has it) through a
:class:`Grammar`, which knows the tokenizer: a mark that is a special token is no text there, and no text can spell it.
What a format cannot say is refused by name (:class:`CannotWrite`), and never written wrongly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quire.sampling.grammar import json_rule

TEXT = r"/(.|\n)*/"
Special = Callable[[str], int | None]
"""The id of a text that is one special token of the tokenizer."""


class CannotWrite(ValueError):
    """Why a format cannot be held to what is asked, and what to do instead."""


@dataclass(frozen=True)
class Tool:
    """``held``: its arguments must match ``parameters``, a JSON schema (None: it takes none); else they may be any."""

    name: str
    parameters: dict[str, Any] | None = None
    held: bool = True

    def schema(self) -> dict[str, Any]:
        """Of the arguments as one JSON object. Raises CannotWrite."""
        if not self.held:
            return {"type": "object"}
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        if self.parameters.get("type", "object") != "object":
            raise CannotWrite(f"the parameters of {self.name!r} must be a schema of type 'object'")
        return {"type": "object", **self.parameters}


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class Grammar:
    """Rules in the making. What its methods return is an expression to use in other rules.

    ``opened``: the prompt has opened the reasoning; only a format whose reasoning is its own affair looks at it.
    """

    def __init__(self, special: Special, opened: bool = False) -> None:
        self.special, self.opened = special, opened
        self.rules: list[str] = []

    def rule(self, body: str, prefix: str = "r", attributes: str = "") -> str:
        name = f"{prefix}{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """Rules of terminals make one lexeme, which may be made of regexes by ``|``, ``&`` and ``~``."""
        return self.rule(body, "T")

    def mark(self, text: str) -> str:
        token = self.special(text)
        return literal(text) if token is None else f"<[{token}]>"

    def until(self, mark: str) -> str:
        """Any text to the first ``mark``, and the mark."""
        token = self.special(mark)
        if token is None:
            return self.rule(f"{self.text} {literal(mark)}", attributes="[lazy]")
        return f"{self.text} <[{token}]>"

    @property
    def text(self) -> str:
        """Any text; no special token."""
        if "TEXT: " + TEXT not in self.rules:
            self.rules.append("TEXT: " + TEXT)
        return "TEXT"

    def one_of(self, bodies: Iterable[str]) -> str:
        return self.rule(" | ".join(bodies))

    def json(self, schema: dict[str, Any]) -> str:
        """Raises GrammarError."""
        return self.rule(json_rule(schema))

    def json_call(self, tool: Tool, key: str = "arguments") -> str:
        """``{"name": ..., key: {...}}``"""
        start = f'{{"name": {json.dumps(tool.name)}, {json.dumps(key)}: '
        return f"{literal(start)} {self.json(tool.schema())} {literal('}')}"


@dataclass(frozen=True)
class Opening:
    """A mark behind which a call or a group of calls stands: ``rest``. ``usual`` False: only what a model that is not
    forced may write as well."""

    mark: str
    rest: str
    usual: bool = True


class Forceable:
    """A parser's class whose format can be forced. This is the usual kind: marks, within text, open calls."""

    REASONS = False
    """Whether these grammars say where the reasoning stands; else it is free text before what they begin with."""
    AGAIN: str | None = None
    """What stands between calls that each have an opening of their own; None: an opening has room for several."""

    @classmethod
    def openings(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> list[Opening]:
        """Raises CannotWrite, GrammarError."""
        raise NotImplementedError

    @classmethod
    def forced(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> str:
        """The whole output is one call, or at least one."""
        usual = [o for o in cls.openings(g, tools, many) if o.usual]
        unit = g.one_of(f"{g.mark(o.mark)} {o.rest}" for o in usual)
        if not many or cls.AGAIN is None:
            return unit
        return f"{unit} ({literal(cls.AGAIN) if cls.AGAIN else ''} {unit})*"

    @classmethod
    def free(cls, g: Grammar, tools: Sequence[Tool]) -> str:
        """Text in which calls may stand."""
        turn = g.one_of(f"{g.until(o.mark)} {o.rest}" for o in cls.openings(g, tools, True))
        return f"{turn}* {g.rule(g.text)}"

    @classmethod
    def either(cls, g: Grammar, tools: Sequence[Tool], many: bool, answer: dict[str, Any]) -> str:
        """As :meth:`forced`, or an answer that calls nothing and is JSON by the schema ``answer``."""
        return f"{cls.forced(g, tools, many)} | {g.json(answer)}"


class ForceableParser(Protocol):
    """What is asked of a parser's class, a plugin's too: see :class:`Forceable`."""

    REASONS: bool

    @classmethod
    def forced(cls, g: Grammar, tools: Sequence[Tool], many: bool) -> str: ...

    @classmethod
    def free(cls, g: Grammar, tools: Sequence[Tool]) -> str: ...

    @classmethod
    def either(cls, g: Grammar, tools: Sequence[Tool], many: bool, answer: dict[str, Any]) -> str: ...


@dataclass(frozen=True)
class Writer:
    """The grammars of one format over one tokenizer. All methods raise CannotWrite and GrammarError."""

    parser: ForceableParser
    special: Special
    opened: bool = False

    def calls(self, tools: Sequence[Tool], many: bool, instead: dict[str, Any] | None = None) -> str:
        """One call of one of ``tools``, or with ``many`` at least one; or JSON by the schema ``instead``."""
        g = Grammar(self.special, self.opened)
        if instead is None:
            return self._whole(g, self.parser.forced(g, tools, many))
        return self._whole(g, self.parser.either(g, tools, many, instead))

    def free(self, tools: Sequence[Tool]) -> str:
        """Free text in which a call, once it begins, is one of ``tools``."""
        g = Grammar(self.special, self.opened)
        return self._whole(g, self.parser.free(g, tools))

    @staticmethod
    def _whole(g: Grammar, start: str) -> str:
        return "\n".join([f"start: {start}", *g.rules])


def pattern(regex: str) -> str:
    """A regex as Lark writes one."""
    return "/" + re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", regex, flags=re.DOTALL).replace("\n", r"\n") + "/"


def without(*marks: str) -> str:
    """The terminal of texts in which none of ``marks`` occurs."""
    return "~" + pattern(rf"(.|\n)*({'|'.join(map(quoted, marks))})(.|\n)*")


def quoted(text: str) -> str:
    """A regex of the text alone; ``re.escape`` would escape what is no special character, which llguidance refuses."""
    return "".join("\\" + c if c in r"\.+*?()|[]{}^$" else c for c in text)
