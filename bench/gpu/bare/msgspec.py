"""Stands in for msgspec on a machine that has none, so that an engine in one process, and the conformance kit, run
there: structs as plain records, and copies of them. It encodes nothing and checks no types, so a server needs the real
one. Only bench/gpu.sh puts it on the path, behind all others; tests/bench/test_gpu_script.py compares the two.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any

NODEFAULT = object()


class ValidationError(ValueError):
    """Named where the engine's configuration is checked; never raised here."""


class DecodeError(ValueError):
    """As above, for messages."""


class _Default:
    def __init__(self, default: Any, factory: Callable[[], Any] | None) -> None:
        self.default, self.factory = default, factory


def field(
    *, default: Any = NODEFAULT, default_factory: Callable[[], Any] | None = None, name: str | None = None
) -> Any:
    return _Default(default, default_factory)


class Struct:
    """Fields are the annotations of the class and its bases, in order; a mutable default is copied for each object."""

    __struct_fields__: tuple[str, ...] = ()
    _by_place: tuple[str, ...] = ()  # those that may be given without their names

    def __init_subclass__(cls, kw_only: bool = False, **options: Any) -> None:
        super().__init_subclass__()
        own = [name for name in inspect.get_annotations(cls) if not name.startswith("__")]
        cls.__struct_fields__ = tuple(dict.fromkeys((*cls.__struct_fields__, *own)))
        cls._by_place = tuple(dict.fromkeys((*cls._by_place, *(own if not kw_only else ()))))

    def __init__(self, *values: Any, **named: Any) -> None:
        kind = type(self)
        if len(values) > len(kind._by_place):
            raise TypeError("Extra positional arguments provided")
        given = dict(zip(kind._by_place, values, strict=False))
        if unknown := [name for name in named if name not in kind.__struct_fields__ or name in given]:
            raise TypeError(f"Unexpected keyword argument '{unknown[0]}'")
        given |= named
        for name in kind.__struct_fields__:
            setattr(self, name, given[name] if name in given else self._default(name))
        if hasattr(self, "__post_init__"):
            self.__post_init__()

    def _default(self, name: str) -> Any:
        default = getattr(type(self), name, NODEFAULT)
        if isinstance(default, _Default):
            default = default.factory() if default.factory is not None else default.default
        if default is NODEFAULT:
            raise TypeError(f"Missing required argument '{name}'")
        return copy.copy(default)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


def to_builtins(value: Any) -> Any:
    """A struct as the dict that :func:`convert` takes, structs in it likewise, sharing nothing that can change."""
    if isinstance(value, Struct):
        return {name: to_builtins(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: to_builtins(one) for key, one in value.items()}
    return [to_builtins(one) for one in value] if isinstance(value, (list, tuple, set)) else value


def convert(value: Any, type: Any, strict: bool = True) -> Any:
    """The struct or dataclass of a dict of its fields, with structs in it where the annotations say so."""
    if not isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(type):
        return type(**value)
    hints = typing.get_type_hints(type)
    return type(**{name: _inner(one, hints.get(name)) for name, one in value.items()})


def _inner(value: Any, hint: Any) -> Any:
    """A dict as the struct that its field's annotation names, alone or in a union."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if inspect.isclass(kind) and issubclass(kind, Struct)]
    return convert(value, kinds[0]) if kinds and isinstance(value, dict) else value
