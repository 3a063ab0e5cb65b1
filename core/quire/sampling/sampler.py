"""From logits to tokens, for the rows of one step: edits, noise, the device's ``sample``, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.hardware import Backend, SamplingBatch
from quire.message import TokenLogprobs
from quire.sampling import noise, processors
from quire.sampling.logprobs import token_logprobs
from quire.sampling.params import SamplingParams
from quire.sampling.state import LOGPROBS, MIN_P, PROCESSED, TEMPERATURE, TOP_K, TOP_P, SamplerState

Entries = list[tuple[int, NDArray[np.int64]]]  # (row of the logits, tokens of it)


@dataclass
class SampledTokens:
    """Of each row: its token (-1: none, see ``errors``: (index, message)) and its logprobs when it asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[tuple[int, str]] = field(default_factory=list)


class Sampler:
    """Samples for runner rows. ``state`` must have admitted every row that is sampled."""

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self.backend, self.vocab_size = backend, vocab_size
        self.state = SamplerState()
        self._cached_for: tuple[bytes, int] | None = None
        self._cached: SamplingBatch | None = None

    def admit(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int] = (),
        eos_ids: Sequence[int] = (),
    ) -> None:
        self.state.admit(row, params, seed, prompt_ids, output_ids, eos_ids)

    def fork(self, source: int, row: int, seed: int) -> None:
        self.state.fork(source, row, seed)

    def append(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        self.state.append(rows, tokens)

    def release(self, row: int) -> None:
        self.state.release(row)

    def sample(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        bitmask: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> SampledTokens:
        """The token at positions[i] (its absolute index in the sequence) of runner row rows[i], from logits[i].

        logits float32 [S, V], changed in place. ``bitmask`` int32 [M, ceil(V / 32)]: which tokens a grammar allows in the
        rows ``masked`` int64 [M] of the logits (all of them when it is None).
        """
        if not len(rows):
            return SampledTokens([], [])
        flags = self.state.flags[rows]
        wanted = int(np.bitwise_or.reduce(flags))
        raw = None
        if wanted & LOGPROBS:
            asking = np.flatnonzero(flags & LOGPROBS)
            raw = logits if len(asking) == len(rows) else logits[self._ids(asking)]
            if raw is logits and (bitmask is not None or wanted & PROCESSED):
                raw = logits.clone()
        if bitmask is not None:
            processors.apply_bitmask(logits, bitmask, masked)
        if wanted & PROCESSED:
            self._process(logits, rows, positions, flags)
        tokens = self.backend.sample(logits, self._settings(rows, positions))
        result = SampledTokens(tokens.tolist(), [None] * len(rows))
        if raw is not None:
            chosen = tokens if len(asking) == len(rows) else tokens[self._ids(asking)]
            counts = [self.state.rows[int(r)].params.logprobs or 0 for r in rows[asking]]
            entries = token_logprobs(self.backend, raw, chosen.clamp(min=0), counts)
            for i, entry in zip(asking.tolist(), entries, strict=True):
                result.logprobs[i] = entry
        for i in [i for i, token in enumerate(result.token_ids) if token < 0] if min(result.token_ids) < 0 else ():
            result.logprobs[i] = None
            result.errors.append((i, _reason(logits[i])))
        return result

    def prompt_logprobs(self, logits: Tensor, next_ids: NDArray[np.int64], row: int) -> list[TokenLogprobs]:
        """Scores of the prompt tokens next_ids[i] that follow the positions of logits float32 [T, V], for ``row``."""
        count = self.state.rows[row].params.prompt_logprobs or 0
        return token_logprobs(self.backend, logits, self._ids(next_ids), [count] * len(next_ids))

    def _settings(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> SamplingBatch:
        """The device's view of the rows' settings, kept while the same rows are sampled, and this step's noise."""
        key = rows.tobytes(), self.state.version
        if self._cached_for != key:
            settings = self.state.settings[rows]
            column = [self.backend.to_device(np.ascontiguousarray(settings[:, i])) for i in range(4)]
            self._cached = SamplingBatch(
                temperature=column[TEMPERATURE], top_p=column[TOP_P], min_p=column[MIN_P],
                top_k=column[TOP_K].to(torch.int32),
                uniform=self.backend.to_device(np.zeros(len(rows))),
                all_greedy=not settings[:, TEMPERATURE].any(),
                any_top_k=bool(settings[:, TOP_K].any()),
                any_top_p=bool((settings[:, TOP_P] < 1).any()),
                any_min_p=bool(settings[:, MIN_P].any()),
            )  # fmt: skip
            self._cached_for = key
        assert self._cached is not None
        if not self._cached.all_greedy:
            self._cached.uniform = self.backend.to_device(noise.uniform(self.state.seeds[rows], positions))
        return self._cached

    def _process(
        self, logits: Tensor, rows: NDArray[np.int64], positions: NDArray[np.int64], flags: NDArray[np.uint8]
    ) -> None:
        """Bias, then penalties, then masks, of the rows that want them."""
        states = {int(i): self.state.rows[int(rows[i])] for i in np.flatnonzero(flags & PROCESSED)}
        biased = [(i, s.bias) for i, s in states.items() if s.bias]
        if biased:
            bias = np.concatenate([values for _, (_, values) in biased])
            processors.add_bias(
                logits, *self._entries([(i, ids) for i, (ids, _) in biased]), self.backend.to_device(bias)
            )
        counted = [(i, s.counts, s.params) for i, s in states.items() if s.counts and s.counts.size]
        if counted:
            sizes = [c.size for _, c, _ in counted]
            columns = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, _, p in counted]
            table = np.repeat(np.asarray(columns, dtype=np.float32).T, sizes, axis=1)
            table = np.concatenate((np.concatenate([c.counts for _, c, _ in counted])[None], table))
            entries = self._entries([(i, c.ids) for i, c, _ in counted])
            self.backend.penalize(logits, *entries, self.backend.to_device(np.ascontiguousarray(table)))
        only = [(i, s.allowed) for i, s in states.items() if s.allowed is not None]
        if only:
            some = self._ids(np.asarray([i for i, _ in only]))
            processors.allow_only(logits, some, *self._entries(only))
        forbidden: Entries = []
        for i, s in states.items():
            early = positions[i] - s.prompt_len < s.params.min_tokens
            if s.bad_words:
                ids = np.asarray(s.bad_words.forbidden(), dtype=np.int64)
                forbidden.append((i, np.union1d(ids, s.stop_ids) if early else ids))
            elif early:
                forbidden.append((i, s.stop_ids))
        if any(len(ids) for _, ids in forbidden):
            processors.forbid(logits, *self._entries(forbidden))

    def _entries(self, pairs: Entries) -> tuple[Tensor, Tensor]:
        """Flat (rows, ids) on the device."""
        rows = np.repeat(np.asarray([i for i, _ in pairs], dtype=np.int64), [len(ids) for _, ids in pairs])
        both = self.backend.to_device(np.stack((rows, np.concatenate([ids for _, ids in pairs]))))
        return both[0], both[1]

    def _ids(self, ids: NDArray[np.int64]) -> Tensor:
        return self.backend.to_device(np.ascontiguousarray(ids, dtype=np.int64))


def _reason(logits: Tensor) -> str:
    """Why no token could be chosen from one row."""
    if bool(torch.isnan(logits).any()):
        return "the model's logits hold NaN"
    if bool(torch.isposinf(logits).any()):
        return "a logit is infinite: a penalty or bias is too extreme"
    return "no token is left to choose from: allowed_token_ids, bad_words, min_tokens and the grammar exclude all"
