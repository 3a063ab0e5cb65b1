"""What sampling remembers of each running sequence, keyed by its row in the runner. Host memory, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.sampling import noise
from quire.sampling.params import SamplingParams

PENALTIES, BIAS, ALLOWED, BAD_WORDS, MIN_TOKENS, LOGPROBS = (1 << i for i in range(6))
"""What a row asks for beyond temperature, top-k, top-p and min-p, as bits of ``SamplerState.flags``."""

PROCESSED = PENALTIES | BIAS | ALLOWED | BAD_WORDS | MIN_TOKENS
"""Those that change logits."""

TEMPERATURE, TOP_P, MIN_P, TOP_K = range(4)
"""Columns of ``SamplerState.settings``."""


class TokenCounts:
    """The distinct tokens of one sequence and how often its output holds each. Appending is O(1)."""

    def __init__(self, prompt_ids: Sequence[int], output_ids: Iterable[int]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self.size = len(distinct)
        self._ids = np.concatenate((distinct, np.zeros(32, dtype=np.int64)))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._place = dict(zip(distinct.tolist(), range(self.size), strict=True))
        for token in output_ids:
            self.append(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self.size]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self.size]

    def append(self, token: int) -> None:
        place = self._place.get(token)
        if place is None:
            if self.size == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            place = self._place[token] = self.size
            self._ids[place] = token
            self.size += 1
        self._counts[place] += 1

    def copy(self) -> TokenCounts:
        twin = TokenCounts.__new__(TokenCounts)
        twin.size, twin._place = self.size, self._place.copy()
        twin._ids, twin._counts = self._ids.copy(), self._counts.copy()
        return twin


class BadWords:
    """Token sequences that an output must not come to hold, and the end of the output so far."""

    def __init__(self, words: Iterable[Sequence[int]], output_ids: Sequence[int]) -> None:
        spelled = [tuple(word) for word in words]
        self._always = sorted({word[0] for word in spelled if len(word) == 1})
        self._after: dict[int, list[tuple[int, ...]]] = {}  # by the last token but one
        for word in spelled:
            if len(word) > 1:
                self._after.setdefault(word[-2], []).append(word)
        self._reach = max(map(len, spelled)) - 1
        self._tail = list(output_ids[-self._reach :]) if self._reach else []

    def append(self, token: int) -> None:
        self._tail.append(token)
        del self._tail[: -self._reach or len(self._tail)]

    def forbidden(self) -> list[int]:
        """Tokens that would complete a bad word now, each once."""
        if not self._tail or self._tail[-1] not in self._after:
            return self._always
        tail = tuple(self._tail)
        ends = {word[-1] for word in self._after[tail[-1]] if tail[1 - len(word) :] == word[:-1]}
        return sorted(ends.union(self._always))

    def copy(self) -> BadWords:
        twin = BadWords.__new__(BadWords)
        twin._always, twin._after, twin._reach, twin._tail = self._always, self._after, self._reach, self._tail.copy()
        return twin


@dataclass
class Row:
    """One sequence. What it does not use is None."""

    params: SamplingParams
    prompt_len: int
    stop_ids: NDArray[np.int64]  # masked until min_tokens are out
    counts: TokenCounts | None = None
    bad_words: BadWords | None = None
    bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    allowed: NDArray[np.int64] | None = None


class SamplerState:
    """Rows and, as arrays indexed by row, what every step needs of them."""

    def __init__(self, capacity: int = 64) -> None:
        self.rows: dict[int, Row] = {}
        self.settings = np.zeros((capacity, 4), dtype=np.float32)
        self.seeds = np.zeros(capacity, dtype=np.uint64)
        self.flags = np.zeros(capacity, dtype=np.uint8)
        self.version = 0  # changes whenever a row's settings may have

    def admit(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int] = (),
        eos_ids: Sequence[int] = (),
    ) -> None:
        """Row ``row`` now samples for this sequence. ``params`` are resolved (see :meth:`SamplingParams.resolve`)."""
        stop_ids = np.unique(np.asarray([*eos_ids, *(params.stop_token_ids or ())], dtype=np.int64))
        state = Row(params, len(prompt_ids), stop_ids)
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            seen = prompt_ids if params.repetition_penalty != 1.0 else ()
            state.counts = TokenCounts(seen, output_ids)
        if params.bad_words_token_ids:
            state.bad_words = BadWords(params.bad_words_token_ids, output_ids)
        if params.logit_bias:
            ids, bias = zip(*sorted(params.logit_bias.items()), strict=True)
            state.bias = np.asarray(ids, dtype=np.int64), np.asarray(bias, dtype=np.float32)
        if params.allowed_token_ids:
            state.allowed = np.unique(np.asarray(params.allowed_token_ids, dtype=np.int64))
        self._place(row, state, seed)

    def fork(self, source: int, row: int, seed: int) -> None:
        """Row ``row`` goes on from where ``source`` is, with its own noise."""
        old = self.rows[source]
        counts = old.counts.copy() if old.counts else None
        bad_words = old.bad_words.copy() if old.bad_words else None
        self._place(row, Row(old.params, old.prompt_len, old.stop_ids, counts, bad_words, old.bias, old.allowed), seed)

    def append(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """tokens[j] was sampled for rows[j]."""
        remembering = self.flags[rows] & (PENALTIES | BAD_WORDS)
        if not remembering.any():
            return
        for j in np.flatnonzero(remembering):
            state, token = self.rows[int(rows[j])], int(tokens[j])
            if state.counts:
                state.counts.append(token)
            if state.bad_words:
                state.bad_words.append(token)

    def release(self, row: int) -> None:
        """Forget the row; unknown ones are fine."""
        if self.rows.pop(row, None) is not None:
            self.flags[row] = 0
            self.version += 1

    def _place(self, row: int, state: Row, seed: int) -> None:
        while row >= len(self.flags):
            self.settings = np.concatenate((self.settings, np.zeros_like(self.settings)))
            self.seeds = np.concatenate((self.seeds, np.zeros_like(self.seeds)))
            self.flags = np.concatenate((self.flags, np.zeros_like(self.flags)))
        params = state.params
        self.rows[row] = state
        self.settings[row] = params.temperature, params.top_p, params.min_p, min(params.top_k, 1 << 24)
        self.seeds[row] = noise.as_seed(seed)
        wanted = (
            (PENALTIES, state.counts), (BIAS, state.bias), (ALLOWED, state.allowed), (BAD_WORDS, state.bad_words),
            (MIN_TOKENS, params.min_tokens or None), (LOGPROBS, params.logprobs),
        )  # fmt: skip
        self.flags[row] = sum(flag for flag, used in wanted if used is not None)
        self.version += 1
