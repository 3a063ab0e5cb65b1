"""Which tokens of an answer are its text and which its reasoning. The parsers speak of text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quire.outputs import Logprob

Token = tuple[int, dict[int, Logprob] | None]


class Ledger:
    """Finds each piece of text in the bytes of the tokens that came, in order; between pieces stand a format's marks.

    ``reasoning`` is the number of tokens in reasoning, its marks included.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._waiting: list[Token] = []  # came, and are of no piece so far
        self._thinking = False
        self.reasoning = 0

    def add(self, token_ids: Sequence[int], rows: Sequence[dict[int, Logprob]] | None) -> None:
        """``rows`` are the tokens' log probabilities, when they are asked for."""
        self._waiting += zip(token_ids, rows, strict=True) if rows is not None else ((t, None) for t in token_ids)

    def text(self, piece: str) -> list[Token]:
        """The tokens of a piece of the answer's text."""
        marks, tokens = self._take(piece)
        if self._thinking:
            self.reasoning += marks
        self._thinking = False
        return tokens

    def thought(self, piece: str) -> None:
        """A piece of the reasoning."""
        marks, tokens = self._take(piece)
        self._thinking = True
        self.reasoning += marks + len(tokens)

    def call(self) -> None:
        """A call: its tokens are neither."""
        self._waiting, self._thinking = [], False

    def _take(self, piece: str) -> tuple[int, list[Token]]:
        """(how many tokens stand before the piece, its own); those behind it go on waiting."""
        raw = [self._bytes_of(token) for token, _ in self._waiting]
        wanted = piece.encode()
        # The last place where it stands: what is before it has been told of, or is a mark.
        begin = b"".join(raw).rfind(wanted)
        if begin < 0:  # a token's bytes that are no text, or a text that the parser has rewritten
            tokens, self._waiting = self._waiting, []
            return 0, tokens
        end, at, first, last = begin + len(wanted), 0, 0, 0
        for index, part in enumerate(raw):
            if at + len(part) <= begin:
                first = index + 1
            if at < end:
                last = index + 1
            at += len(part)
        tokens, self._waiting = self._waiting[first:last], self._waiting[last:]
        return first, tokens
