"""How many of an answer's tokens are reasoning, for the usage of the APIs that tell it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

from quire_server.tool_calls import AnswerParser, CallStart, Content, Reasoning


class ReasoningTokens:
    """Counts one sample's tokens, each read by itself, so the count does not depend on how they were put together.

    A token is reasoning when its text, or the text that the parser had to wait for it to tell, is: the opening mark
    counts, the closing one does not. What never becomes text (a lone mark, the end of the sequence) goes with what is
    before it.
    """

    def __init__(self, parser: AnswerParser | None, bytes_of: Callable[[int], bytes]) -> None:
        """``parser``: one of this sample's own, which shows reasoning; None: the model's is not told apart."""
        self._parser, self._bytes_of = parser, bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = self._waiting = 0
        self._inside = False

    def add(self, token_ids: Iterable[int]) -> None:
        if self._parser is None:
            return
        for token in token_ids:
            self._waiting += 1
            events = self._parser.read(self._decoder.decode(self._bytes_of(token)))
            if any(isinstance(event, Reasoning) for event in events):
                self._told(True)
            elif any(isinstance(event, Content | CallStart) for event in events):
                self._told(False)
                if self._parser.reasoned:  # nothing that follows counts
                    self._parser = None
                    return

    def _told(self, inside: bool) -> None:
        self._inside = inside
        self._count += self._waiting if inside else 0
        self._waiting = 0

    @property
    def count(self) -> int:
        return self._count + (self._waiting if self._inside else 0)
