# ruff: noqa: RUF001 - the bars in DeepSeek's marks are full-width
"""Which parsers read a model's answers: those that were named, else those whose marks the chat template has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

from quire import plugins
from quire.errors import ConfigError
from quire.sampling.params import Thinking
from quire_server.tool_calls import AnswerParser
from quire_server.tool_grammar import ForceableParser, Special, Writer

AUTO, NONE = "auto", "none"
Marks = tuple[tuple[tuple[str, ...], str], ...]

TOOL_MARKS: Marks = (
    (("<|channel|>", "<|message|>"), "openai"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁call▁begin｜>",), "deepseek_v31"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<arg_key>",), "glm45"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<|tool_call|>",), "granite"),
    (("<|start_of_role|>", "<tool_call>["), "granite"),
    (("<tool_call>",), "hermes"),
    (("[func_name1(",), "llama4_pythonic"),
    (("<|header_start|>", '"parameters": '), "llama4_json"),
    (("<|start_header_id|>", '"parameters": '), "llama3_json"),
)
"""(what must all occur in the chat template, the tool parser): the first row that fits decides."""

REASONING_MARKS: Marks = (
    (("<|channel|>", "<|message|>"), "openai_gptoss"),
    (("[THINK]",), "mistral"),
    (("Here is my thought process:",), "granite"),
    (("<｜Assistant｜>", "</think>", "thinking"), "deepseek_v3"),
    (("<｜Assistant｜>", "</think>"), "deepseek_r1"),
    (("<arg_key>", "</think>"), "glm45"),
    (("<think>",), "qwen3"),
)
"""The same for reasoning."""


def chosen(marks: Marks, template: str) -> str | None:
    """The parser that the template's marks speak for."""
    return next((name for needed, name in marks if all(mark in template for mark in needed)), None)


@cache
def _registry(names: tuple[str, ...] | None) -> plugins.Registry:
    return plugins.load(names)


@dataclass(frozen=True)
class Choice:
    """The parsers' makers for one template."""

    reasoning: Callable[..., Any] | None
    tools: Callable[..., Any] | None

    def keeps_special(self, tools: bool) -> bool:
        """Whether special tokens must stay in the text, since they are the marks that are looked for."""
        makes = (self.reasoning, self.tools if tools else None)
        return any(getattr(make, "special_tokens", False) for make in makes)

    def inside(self, prompt: str, continued: str | None = None) -> bool | None:
        """Whether the prompt ends within the reasoning (True), behind it (False) or says nothing (None).

        Only its very end counts, for anyone may write a mark into a message; ``continued`` is the message, if any,
        that the answer continues.
        """
        starts, ends = (tuple(getattr(self.reasoning, name, ())) for name in ("STARTS", "ENDS"))
        if continued is not None:
            return max(map(continued.rfind, starts), default=-1) > max(map(continued.rfind, ends), default=-1)
        text = prompt[-256:].rstrip()
        return True if text.endswith(starts) else False if text.endswith(ends) else None

    def thinking(self, inside: bool | None) -> Thinking | None:
        """What stands before an answer whose form is asked for; None: nothing does, or no mark says where it ends."""
        starts, ends = (list(getattr(self.reasoning, name, ())) for name in ("STARTS", "ENDS"))
        if inside is None:
            inside = True if getattr(self.reasoning, "OPENED", False) else None
        if inside is False or not ends or not (starts or inside):
            return None
        return Thinking(ends, starts, opened=bool(inside))

    def writer(self, special: Special, inside: bool | None) -> Writer | None:
        """What writes the grammars that force calls; None: no parser reads them, or it has no grammar of its format."""
        if not hasattr(self.tools, "forced") or not hasattr(self.tools, "free"):
            return None
        return Writer(cast(ForceableParser, self.tools), special, bool(inside))

    def parser(
        self, inside: bool | None, tools: Sequence[dict[str, Any]], parallel: bool, show_reasoning: bool
    ) -> AnswerParser:
        """A parser for one sample. ``tools``: those that are offered; none, and a call is text like any other."""
        calls = self.tools(tools) if self.tools is not None and tools else None
        if self.reasoning is None:
            return AnswerParser(None, calls, parallel, show_reasoning)
        if tools and self.tools is not None and getattr(self.reasoning, "reads_calls", None) is self.tools:
            return AnswerParser(self.reasoning(inside, tools), None, parallel, show_reasoning)
        return AnswerParser(self.reasoning(inside), calls, parallel, show_reasoning)


@dataclass(frozen=True)
class Parsers:
    """``tool`` and ``reasoning`` are names, "auto" or "none". Raises ConfigError for a name that is unknown or fails."""

    tool: str = AUTO
    reasoning: str = AUTO
    plugins: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for flag, kind, name in (
            ("--tool-call-parser", "tool_parsers", self.tool),
            ("--reasoning-parser", "reasoning_parsers", self.reasoning),
        ):
            if name in (AUTO, NONE):
                continue
            known = self._table(kind)
            if name not in known:
                raise ConfigError(f"{flag} {name}: no such parser; there are {', '.join([AUTO, NONE, *sorted(known)])}")
            try:
                known[name]()
            except Exception as error:  # whatever a stranger's code raises is its own
                raise ConfigError(f"{flag} {name}: it cannot be loaded: {plugins.describe(error)}") from error

    def _table(self, kind: str) -> dict[str, Callable[[], Any]]:
        table: dict[str, Callable[[], Any]] = getattr(_registry(self.plugins), kind)
        return table

    def _make(self, kind: str, name: str, marks: Marks, template: str) -> Callable[..., Any] | None:
        found = chosen(marks, template) if name == AUTO else None if name == NONE else name
        factory = self._table(kind).get(found) if found else None
        return factory() if factory is not None else None

    @lru_cache(maxsize=16)  # noqa: B019
    def choice(self, template: str) -> Choice:
        """The parsers for answers to prompts that ``template`` makes."""
        return Choice(
            self._make("reasoning_parsers", self.reasoning, REASONING_MARKS, template),
            self._make("tool_parsers", self.tool, TOOL_MARKS, template),
        )
