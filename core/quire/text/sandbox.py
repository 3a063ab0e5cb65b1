"""A Jinja environment for templates that nobody here has read: no access to Python, and bounds on time and memory.

What is bounded, while a template runs:

- time: every loop turn, macro, call, filter and arithmetic operation counts, and the processor time spent is looked at
  every few of them;
- size: no string, list or number may grow beyond a limit, whether by ``~``, ``+``, ``*``, ``**``, ``%``, ``format``,
  ``replace``, ``join``, padding, a filter or a macro; containers that are turned into text count with all that they
  share, so one that holds itself many times over is refused;
- single operations that would take long in C, where no clock is looked at: comparing and hashing containers that hold
  something many times over, searching and stripping from the right by a long text, adding up lists;
- memory: what operations make is added up, whether it is kept or not;
- output: its characters are counted as they come.
"""

from __future__ import annotations

import json
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LARGEST_INTEGER_BITS = 4096
TICKS_PER_LOOK = 16
TOTAL = 16  # times as many characters as one string may have are made in all
REMOVED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap")  # superlinear, or not a function of the input
WORK = 64  # times as many pairs of characters may be compared by one method
EXISTING_VALUE_FILTERS = frozenset(("attr", "d", "default", "first", "last", "max", "min"))  # these make nothing new
COMPARING_FILTERS = frozenset(("dictsort", "groupby", "max", "min", "sort", "unique"))
UNSAFE_METHODS = frozenset(("encode", "to_bytes"))  # bytes have methods that nothing here bounds
WHOLE_VALUE_FILTERS = frozenset(  # these look at a container's items, and do not turn all of it into text
    ("attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map",
     "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique")
)  # fmt: skip
_WIDE = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*|\{[^{}]*\{[^{]")
"""A width of a million or more in a format, or one that is taken from an argument."""


class TemplateTooCostly(TemplateError):
    """A template ran too long or made something too large."""


@dataclass
class Limits:
    seconds: float = 2.0  # of processor time
    characters: int = 8_000_000  # of the output, of any string, items of any list


@dataclass
class _Budget:
    limits: Limits
    until: float
    ticks: int = 0
    made: int = 0


_budget: ContextVar[_Budget | None] = ContextVar("template budget", default=None)


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Templates that run inside are held to ``limits``."""
    token = _budget.set(_Budget(limits, time.thread_time() + limits.seconds))
    try:
        yield
    finally:
        _budget.reset(token)


def tick() -> None:
    budget = _budget.get()
    if budget is None:
        return
    budget.ticks += 1
    if budget.ticks % TICKS_PER_LOOK == 0 and time.thread_time() > budget.until:
        raise TemplateTooCostly(f"the template ran longer than {budget.limits.seconds:g} s")


def check_size(size: int) -> None:
    budget = _budget.get()
    limit = (budget.limits if budget else Limits()).characters
    if size > limit:
        raise TemplateTooCostly(f"the template makes something of {size:.3g} characters or items; the limit is {limit}")


def made(value: Any) -> Any:
    """``value``, a new one, unless it is too large or all that was made is."""
    if not isinstance(value, str | list | tuple | dict):
        return value
    check_size(len(value))
    budget = _budget.get()
    if budget is not None:
        budget.made += len(value) if isinstance(value, str) else 8 * len(value)
        limit = TOTAL * budget.limits.characters
        if budget.made > limit:
            raise TemplateTooCostly(f"the template makes more than {limit} characters in all")
    return value


def text_size(value: Any) -> int:
    """At least the characters that ``value`` has as text, counting what is shared each time that it would appear."""
    known: dict[int, int] = {}

    def measure(item: Any) -> int:
        if isinstance(item, str):
            return len(item)
        if not isinstance(item, Mapping | list | tuple | set):
            return 1
        if id(item) not in known:
            known[id(item)] = 1  # a container inside itself prints as dots
            inner = [*item.keys(), *item.values()] if isinstance(item, Mapping) else item
            known[id(item)] = 2 + sum(map(measure, inner)) + 2 * len(item)
        return known[id(item)]

    return measure(value)


def check_compared(*values: Any) -> None:
    """Refuse to compare containers, or to hash one, that hold too much, counting what is shared each time."""
    containers = [value for value in values if isinstance(value, Mapping | list | tuple | set)]
    if len(containers) > 1:
        for value in containers:
            check_size(text_size(value))


def compare(name: str, left: Any, right: Any) -> Any:
    """One comparison of a template, by Jinja's name of it."""
    tick()
    check_compared(left, right)
    return _COMPARISONS[name](left, right)


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gteq": operator.ge, "lt": operator.lt, "lteq": operator.le,
    "in": lambda left, right: left in right, "notin": lambda left, right: left not in right,
}  # fmt: skip


def hashable(value: Any) -> Any:
    """``value``, unless hashing it would take too long: tuples do not remember their hashes."""
    if isinstance(value, tuple):
        check_size(text_size(value))
    return value


def check_text(value: Any) -> None:
    """Refuse a container that would be too long as text."""
    if not isinstance(value, str):
        check_size(text_size(value))


def _check_format(template: str, marker: str, arguments: Iterable[Any]) -> None:
    """Refuse a formatting operation whose result could be too long."""
    if _WIDE.search(template):
        raise TemplateTooCostly("the template formats with a very large or computed width")
    check_size(len(template) + template.count(marker) * max(map(text_size, arguments), default=0))


def _check_string_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call of a str method whose result could be too long."""
    values = [*args, *kwargs.values()]
    if name in ("center", "ljust", "rjust", "zfill"):
        check_size(max((v for v in values if isinstance(v, int)), default=0))
    elif name == "expandtabs":
        check_size(len(text) + text.count("\t") * max((v for v in values if isinstance(v, int)), default=8))
    elif name in ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"):
        # Unlike the others, these look at every character of the one for every character of the other.
        check_size(len(text) * max((len(v) for v in values if isinstance(v, str)), default=0) // WORK)
    elif name == "replace" and len(args) >= 2 and all(isinstance(v, str) for v in args[:2]):
        check_size(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join":
        check_size(sum(len(text) + text_size(item) for value in values if not isinstance(value, str) for item in value))
    elif name == "translate":
        check_size(
            len(text) * max((text_size(item) for v in values if isinstance(v, dict) for item in v.values()), default=1)
        )


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step, and whose result is bounded before it is made."""
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment comes first

    @wraps(function)  # keeps jinja_pass_arg
    def guarded(*args: Any, **kwargs: Any) -> Any:
        tick()
        value, rest = args[passed], args[passed + 1 :]
        if name not in WHOLE_VALUE_FILTERS:
            check_text(value)
        if name not in ("d", "default"):
            check_size(max((v for v in [*rest, *kwargs.values()] if isinstance(v, int)), default=0))
        if name in COMPARING_FILTERS:
            value = value if isinstance(value, Mapping | str) else list(value)
            args = (*args[:passed], value, *rest)
            check_text(value)
        if name == "format":
            _check_format(str(value), "%", [*rest, *kwargs.values()])
        elif name == "trim":
            _check_string_method(str(value), "strip", (*rest, *kwargs.values()), {})
        elif name == "round" and any(isinstance(v, int) and abs(v) > 400 for v in [*rest, *kwargs.values()]):
            raise TemplateTooCostly("the template rounds to a very large precision")
        elif name == "sum":
            value = list(value)
            args = (*args[:passed], value, *rest)
            if any(isinstance(v, list | tuple) for v in [*rest, *kwargs.values()]):  # each step copies what there is
                check_size(len(value) * text_size(value))
        elif name == "replace":
            _check_string_method(str(value), "replace", tuple(map(str, rest)), {})
        elif name == "join":
            value = list(value)
            separator = str(rest[0]) if rest else str(kwargs.get("d", ""))
            check_size(text_size(value) + len(separator) * len(value))
            args = (*args[:passed], value, *rest)
        elif name == "indent":
            width = next((v for v in [*rest, *kwargs.values()] if not isinstance(v, bool)), 4)
            check_size(len(value) + str(value).count("\n") * (width if isinstance(width, int) else len(str(width))))
        result = function(*args, **kwargs)
        return result if name in EXISTING_VALUE_FILTERS else made(result)

    return guarded


def _guarded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """``is eq(x)``, ``select("in", x)`` and the like compare too."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        tick()
        check_compared(*args, *kwargs.values())
        return function(*args, **kwargs)

    return guarded


def _asked(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Node:
    """A call of the environment's ``name``."""
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None).set_lineno(line)


class _Counted(NodeTransformer):
    """Puts a tick in every body that can run many times, and makes calls that look at sizes of ``~``, of comparisons, of
    slices and of keys."""

    def _with_tick(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_asked("tick", [], node.lineno)).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _with_tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _asked("joined", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        left: nodes.Expr = node.expr
        result: Any = None
        for operand in node.ops:
            this: Any = _asked("compare", [nodes.Const(operand.op), left, operand.expr], node.lineno)
            result = this if result is None else nodes.And(result, this, lineno=node.lineno)
            left = operand.expr
        return result

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _asked("made", [node], node.lineno)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _asked("hashable", [node.arg], node.lineno)  # type: ignore[assignment]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _asked("hashable", [node.key], node.lineno)  # type: ignore[assignment]
        return node


class _Generation(Extension):
    """``{% generation %}``, which marks what an assistant says for training, is let through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's namespace without names that Python gives a meaning to."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r} in a template")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that Transformers gives chat templates, with bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_finalize,
            optimized=False,
        )
        for name in REMOVED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        for name, function in list(self.filters.items()):
            self.filters[name] = _guarded_filter(name, function)
        self.tests = {name: _guarded_test(cast(Any, function)) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _dict, "namespace": _Namespace,
            "raise_exception": _raise_exception, "strftime_now": _strftime_now,
        }  # fmt: skip

    tick = staticmethod(tick)
    compare = staticmethod(compare)
    made = staticmethod(made)
    hashable = staticmethod(hashable)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def compile_bounded(self, source: str) -> Any:
        """A template whose loops, macros and concatenations are counted."""
        tree = _Counted().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def concat(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        check_size(sum(map(len, parts)))
        return str(made("".join(parts)))

    @staticmethod
    def joined(*values: Any) -> str:
        for value in values:
            check_text(value)
        check_size(sum(len(value) for value in values if isinstance(value, str)))
        return str(made("".join(map(str, values))))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        tick()
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 0)
            if bits > LARGEST_INTEGER_BITS:
                raise TemplateTooCostly("the template computes a very large number")
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(items, str | list | tuple):
                    check_size(len(items) * times)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, "%", right if isinstance(right, tuple) else [right])
        return made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def guarded(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, "{", [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return guarded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_string_method(owner, __obj.__name__, args, kwargs)
        elif isinstance(owner, Mapping | list | tuple):  # get, index, count
            check_compared(owner, *args)
            for value in args:
                hashable(value)
        return made(super().call(__context, __obj, *args, **kwargs))


def _finalize(value: Any) -> Any:
    if isinstance(value, list | tuple | dict | set):
        check_text(value)
    return value


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as Transformers writes it: no HTML escapes, and the options of json.dumps."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
