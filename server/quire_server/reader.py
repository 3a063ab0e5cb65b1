"""Text that comes in pieces, read as if it were whole: the ground that the parsers of answers stand on.

A format is one generator over a :class:`Reader`. Where the text has not come yet it yields and goes on with the next
piece, so what it does follows from the text alone, however that is cut. Every character is looked at a bounded number
of times, and what is held back is bounded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]

MAX_HELD = 2**20
"""Characters of a call that are held until its end: a longer one is content."""
MAX_DEPTH = 100
"""Brackets within brackets in the arguments of a call."""

_NOT_SPACE = re.compile(r"\S")


class Tags:
    """A few strings to look for at once. None may be a part of another."""

    def __init__(self, *tags: str) -> None:
        self.tags = tags
        self.longest = max(map(len, tags))
        self._pattern = re.compile("|".join(map(re.escape, tags)))
        self._beginnings = frozenset(tag[:n] for tag in tags for n in range(1, len(tag)))

    def search(self, text: str, at: int, end: int = sys.maxsize) -> re.Match[str] | None:
        return self._pattern.search(text, at, end)

    def begun(self, text: str, at: int) -> int:
        """Length of the end of text[at:] that may be the beginning of a tag."""
        longest = min(self.longest - 1, len(text) - at)
        return next((n for n in range(longest, 0, -1) if text[-n:] in self._beginnings), 0)


class Reader:
    """Operations are generators: ``found = yield from reader.accept("<tag>")``."""

    def __init__(self) -> None:
        self._text, self._at, self._ended = "", 0, False

    def add(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def end(self) -> None:
        self._ended = True

    @property
    def held(self) -> int:
        """Characters that came and are not consumed."""
        return len(self._text) - self._at

    def search(self, pattern: Tags | re.Pattern[str], at: int, end: int = sys.maxsize) -> re.Match[str] | None:
        return pattern.search(self._text, at, end)

    def until(self, tags: Tags, give: Callable[[str], None], limit: int | None = None) -> Steps[str]:
        """Consume to behind the first tag and return it; what stands before it goes to ``give`` as it comes.

        "": the text ended, or ``limit`` characters came, without one.
        """
        size = 0
        while True:
            # No further than the limit: what is behind it will be read again.
            found = self.search(
                tags, self._at, sys.maxsize if limit is None else self._at + limit - size + tags.longest
            )
            if found:
                stop = found.start()
            else:
                stop = len(self._text) - (0 if self._ended else tags.begun(self._text, self._at))
            if limit is not None and size + stop - self._at > limit:
                stop, found, size = self._at + limit - size, None, limit + 1
            if stop > self._at:
                give(self._text[self._at : stop])
            size += stop - self._at
            self._at = stop
            if found:
                self._at = found.end()
                return found.group()
            if self._ended or (limit is not None and size > limit):
                return ""
            yield

    def body(self, tags: Tags, limit: int = MAX_HELD) -> Steps[tuple[str, str]]:
        """(what stands before the first tag, that tag), as :meth:`until`."""
        parts: list[str] = []
        tag = yield from self.until(tags, parts.append, limit)
        return "".join(parts), tag

    def accept(self, *tags: str) -> Steps[str]:
        """Consume one of the tags if the text goes on with it and return it, else ""."""
        longest = max(map(len, tags))
        while True:
            ahead = self._text[self._at : self._at + longest]
            tag = next((tag for tag in tags if ahead.startswith(tag)), "")
            if tag or self._ended or not any(tag.startswith(ahead) for tag in tags):
                self._at += len(tag)
                return tag
            yield

    def ahead(self, characters: str) -> Steps[bool]:
        """Whether the next character is one of these; it is not consumed."""
        while not self.held and not self._ended:
            yield
        return self.held > 0 and self._text[self._at] in characters

    def back(self, text: str) -> None:
        """Put back what has just been consumed."""
        if len(text) <= self._at:
            self._at -= len(text)
        else:  # its beginning came with an earlier piece
            self._text, self._at = text + self._text[self._at :], 0

    def space(self, limit: int = 4096) -> Steps[str]:
        """Consume white space, at most ``limit`` characters of it."""
        parts: list[str] = []
        size = 0
        while True:
            found = self.search(_NOT_SPACE, self._at)
            stop = min(found.start() if found else len(self._text), self._at + limit - size)
            parts.append(self._text[self._at : stop])
            size += stop - self._at
            self._at = stop
            if found or self._ended or size == limit:
                return "".join(parts)
            yield

    def value(self, quotes: str = '"', limit: int = MAX_HELD) -> Steps[tuple[str, bool]]:
        """Consume from the bracket that comes next to the one that closes it: (the text, whether it is closed).

        Not closed: the text ended, or it is longer than ``limit`` or deeper than MAX_DEPTH.
        """
        outside = re.compile(rf"[\[\](){{}}{quotes}]")
        parts: list[str] = []
        size = depth = 0
        quote = ""
        while True:
            inside = re.compile(rf"\\.|{quote}", re.DOTALL)
            place, end = self._at, self._at + limit - size + 1
            closed = False
            while (
                not closed and depth <= MAX_DEPTH and (found := self.search(inside if quote else outside, place, end))
            ):
                place, mark = found.end(), found.group()
                if quote:
                    quote = "" if mark == quote else quote
                elif mark in quotes:
                    quote, inside = mark, re.compile(rf"\\.|{mark}", re.DOTALL)
                else:
                    depth += 1 if mark in "[({" else -1
                    closed = depth <= 0
            if not closed and depth <= MAX_DEPTH:
                # A backslash at the end escapes what is still to come.
                place = min(len(self._text), end)
                if (
                    place < end
                    and quote
                    and not self._ended
                    and found is None
                    and self._text.endswith("\\")
                    and self._lone(place)
                ):
                    place -= 1
            if size + place - self._at > limit:
                place, closed, size = self._at + limit - size, False, limit + 1
            parts.append(self._text[self._at : place])
            size += place - self._at
            self._at = place
            if closed or self._ended or depth > MAX_DEPTH or size > limit:
                return "".join(parts), closed
            yield

    def _lone(self, end: int) -> bool:
        """Whether an odd number of backslashes stands before ``end``."""
        start = end
        while start > self._at and self._text[start - 1] == "\\":
            start -= 1
        return (end - start) % 2 == 1
