r"""ECMA-262's regular expressions in the terms of llguidance, whose syntax is that of Rust's regex crate.

JSON Schema's ``pattern`` is ECMA-262's, and so are the regexes of structured output. The two syntaxes look alike and part
in what a class is: ``\d`` and ``\w`` are ASCII in one and Unicode in the other, ``\s`` and ``.`` disagree on a few
characters, and in a class of Rust ``[``, ``&&``, ``--`` and ``~~`` are operators. All of that is written out here. What
ECMA-262 has and Rust has not (look-around, back-references, ``\b`` of words) stays, and is refused by its parser.
"""

from __future__ import annotations

import re

_SPACE = r"\t\n\x0B\f\r \u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}"
_SETS = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACE}
_NOT_DOT = r"\n\r\u{2028}\u{2029}"
_ATOM = re.compile(r"\\(?:c[A-Za-z]|x[0-9A-Fa-f]{2}|u\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|[pP]\{[^}]*\}|.)|.", re.DOTALL)
_CLASSES = "dDwWsSpP"  # escapes that are sets of characters, so that no range begins or ends with one
_IN_CLASS = r"\[]^-&~"


class RegexError(ValueError):
    """Why a regex cannot be honoured."""


def translate(pattern: str) -> str:
    """The same regex for llguidance. Raises RegexError."""
    made, at = [], 0
    while at < len(pattern):
        if pattern[at] == "[":
            text, at = _class(pattern, at + 1)
            made.append(text)
            continue
        atom = _atom(pattern, at)
        at += len(atom)
        made.append(rf"[^{_NOT_DOT}]" if atom == "." else _escape(atom))
    return "".join(made)


def _atom(pattern: str, at: int) -> str:
    found = _ATOM.match(pattern, at)
    assert found is not None  # some character is there
    if found.group() == "\\":
        raise RegexError("a regex cannot end with a backslash")
    return found.group()


def _escape(atom: str) -> str:
    """An atom outside of a class; a set becomes a class."""
    if len(atom) == 2 and atom[1].lower() in _SETS and atom[0] == "\\":
        return f"[{'^' if atom[1].isupper() else ''}{_SETS[atom[1].lower()]}]"
    return _control(atom)


def _control(atom: str) -> str:
    return f"\\x{ord(atom[2]) % 32:02X}" if atom.startswith(r"\c") and len(atom) == 3 else atom


def _class(pattern: str, at: int) -> tuple[str, int]:
    """The class whose content begins at ``at``, and where the pattern goes on behind it."""
    negated = pattern.startswith("^", at)
    at += negated
    members: list[str] = []
    while (atom := _member(pattern, at)) != "]":
        at += len(atom)
        last = _member(pattern, at + 1) if pattern.startswith("-", at) else "]"
        if last == "]":  # also of "[a-]": there the dash is a member like any other
            members.append(_in_class(atom))
            continue
        if _is_set(atom) or _is_set(last):
            raise RegexError(f"{atom}-{last}: a range begins and ends with a character")
        members.append(f"{_in_class(atom)}-{_in_class(last)}")
        at += 1 + len(last)
    if members:
        return f"[{'^' if negated else ''}{''.join(members)}]", at + 1
    if negated:
        return "(?s:.)", at + 1
    raise RegexError("[]: an empty class matches nothing")


def _member(pattern: str, at: int) -> str:
    if at >= len(pattern):
        raise RegexError("a class ([...]) is not closed")
    return _atom(pattern, at)


def _is_set(atom: str) -> bool:
    return len(atom) > 1 and atom[1] in _CLASSES


def _in_class(atom: str) -> str:
    if atom == r"\b":  # no boundary there, but a backspace
        return r"\x08"
    if len(atom) == 1:
        return "\\" + atom if atom in _IN_CLASS else atom
    return _escape(atom)
