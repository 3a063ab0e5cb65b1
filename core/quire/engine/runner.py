"""Executes step plans: the only part of the engine that holds tensors.

Steps run in the order they were planned, on one thread. A token that was not yet known when a step was planned is
known here by the time the step runs, because the step before has appended it to the row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from quire.engine.batch import RowTables, StepArrays
from quire.engine.graphs import DecodeGraphs
from quire.hardware import Backend
from quire.layers.decoder import Decoder
from quire.message import RowError, StepPlan, StepResult, TokenLogprobs
from quire.sampling.grammar import GrammarCompiler
from quire.sampling.grammar_state import GrammarStates, Masks
from quire.sampling.sampler import Sampler
from quire.spec import KVSpec

logger = logging.getLogger("quire.runner")

PROMPT_LOGPROB_ROWS = 64  # rows of logits held at once while scoring a prompt


class Runner:
    """One device's share of the engine: the model, its KV pools, the row tables and the sampler."""

    def __init__(
        self,
        backend: Backend,
        model: Decoder,
        kv_spec: KVSpec,
        pages: tuple[int, ...],
        host_pages: tuple[int, ...],
        max_num_seqs: int,
        max_model_len: int,
        capture: bool = True,
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self.backend, self.model, self.kv_spec = backend, model, kv_spec
        self.launched: Callable[[], None] = lambda: None  # called when a step waits for the device alone
        self.kv = backend.allocate_kv(kv_spec, pages)
        self.host_kv = backend.allocate_kv(kv_spec, host_pages, host=True) if any(host_pages) else None
        self.tables = RowTables(max_num_seqs, max_model_len, kv_spec)
        self.sampler = Sampler(backend, model.spec.vocab_size)
        self.grammars = GrammarStates(compiler)
        self.graphs = (
            DecodeGraphs(backend, model, self.kv, kv_spec, max_num_seqs, max_model_len)
            if capture and backend.capabilities.graphs
            else None
        )

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one plan. Never raises for what one request brought: that becomes a RowError."""
        self._apply(plan)
        if not plan.rows:
            return StepResult(step=plan.step, token_ids=[])
        try:
            return self._compute(plan, range(len(plan.rows)))
        except Exception:
            logger.exception("step %d failed; running its %d sequences one by one", plan.step, len(plan.rows))
        return self._isolate(plan)

    def _apply(self, plan: StepPlan) -> None:
        """The plan's effects that come before computing, in StepPlan's order."""
        for row in plan.released:
            self.sampler.release(row)
            self.grammars.release(row)
        for new in plan.admitted:
            if new.forked_from >= 0:
                self.tables.fork(new.forked_from, new.row, new.prompt_len)
                self.sampler.fork(new.forked_from, new.row, new.seed)
                self.grammars.fork(new.forked_from, new.row)
            else:
                self.tables.admit(new)
                tokens = new.token_ids
                self.sampler.admit(
                    new.row,
                    new.sampling,
                    new.seed,
                    tokens[: new.prompt_len],
                    tokens[new.prompt_len :],
                    new.eos_token_ids,
                )
                self.grammars.admit(new.row, new.sampling.structured_outputs, tokens[new.prompt_len :])
        self._move(plan.swap_out, self.kv, self.host_kv)
        self._move(plan.swap_in, self.host_kv, self.kv)
        self._move(plan.copies, self.kv, self.kv)
        self.tables.write_pages(plan)

    def _move(self, moves: list[tuple[int, int, int]], source: object, target: object) -> None:
        for group in {move[0] for move in moves}:
            self.backend.copy_pages(source, target, group, [(a, b) for g, a, b in moves if g == group])

    def _compute(self, plan: StepPlan, sequences: Sequence[int]) -> StepResult:
        """Compute and sample for the given sequences of the plan (all of them, unless a step failed)."""
        numbers = np.array((plan.rows, plan.starts, plan.counts), dtype=np.int64)
        sources, targets = plan.sample_from, plan.sample_rows
        scored = [(index, index) for index in plan.prompt_logprobs]
        if len(sequences) < len(plan.rows):
            numbers = numbers[:, sequences]
            place = {sequence: i for i, sequence in enumerate(sequences)}
            wanted = [(place[s], r) for s, r in zip(sources, targets, strict=True) if s in place]
            sources, targets = [s for s, _ in wanted], [r for _, r in wanted]
            scored = [(index, place[index]) for index in plan.prompt_logprobs if index in place]
        rows, starts, counts = numbers
        # Masks are made on the host while the device computes: all that they depend on is known.
        masks = self.grammars.begin(targets)
        result = StepResult(step=plan.step, token_ids=[])
        if self.graphs is not None and not scored and int(counts.max()) == 1 and self.graphs.fits(len(rows)):
            logits = self.graphs.run(self.tables, rows, starts, self.launched)[: len(rows)]
            computed: Sequence[int] = range(len(rows))
        else:
            arrays = self.tables.arrays(rows, starts, counts)
            batch = arrays.to_device(self.backend)
            attention_plan = self.backend.plan_attention(batch, self.kv_spec)
            self.launched()
            computed = sorted(set(sources))
            last = arrays.query_start[1:][computed].astype(np.int64) - 1
            token_ids = self.backend.to_device(arrays.token_ids)
            # A scored prompt needs all that its tokens became, and a step of single tokens has no others.
            needed = None if scored or len(last) == len(token_ids) else self.backend.to_device(last)
            hidden = self.model.forward(token_ids, batch, self.kv, attention_plan, needed)
            if computed:
                places = last if needed is None else np.arange(len(last), dtype=np.int64)
                logits = self.model.logits(hidden, self.backend.to_device(places))
            for index, i in scored:
                result.prompt_logprobs[index] = self._score_prompt(arrays, hidden, i)
        if targets:
            if sources != list(computed):
                where = {sequence: i for i, sequence in enumerate(computed)}
                logits = logits[self.backend.to_device(np.array([where[s] for s in sources], dtype=np.int64))]
            self._sample(result, logits, np.array(targets, dtype=np.int64), (starts + counts)[sources], masks)
        return result

    def _sample(
        self, result: StepResult, logits, rows: np.ndarray, positions: np.ndarray, masks: Future[Masks] | None
    ) -> None:
        """Sample the next token of each of the rows, from its logits [i], and append it to the row."""
        if masks is None:
            sampled = self.sampler.sample(logits, rows, positions)
        else:
            made = masks.result()
            bitmask, masked = self.backend.to_device(made.bits), self.backend.to_device(made.rows)
            sampled = self.sampler.sample(logits, rows, positions, bitmask, masked)
            result.errors = [RowError(int(rows[i]), message) for i, message in made.errors]
        result.token_ids = sampled.token_ids
        result.logprobs = sampled.logprobs
        result.errors += [RowError(int(rows[i]), message) for i, message in sampled.errors]
        tokens = np.maximum(np.array(sampled.token_ids, dtype=np.int64), 0)  # a failed row's token is never used
        self.tables.append(rows, tokens)
        self.sampler.append(rows, tokens)
        self.grammars.append(rows, tokens)

    def _score_prompt(self, arrays: StepArrays, hidden, sequence: int) -> list[TokenLogprobs | None]:
        """Logprobs of the prompt tokens that follow this chunk's positions, a few rows of logits at a time."""
        row = int(arrays.rows[sequence])
        begin, end = int(arrays.query_start[sequence]), int(arrays.query_start[sequence + 1])
        first = int(arrays.positions[begin])
        last = min(first + end - begin, int(self.tables.prompt_len[row]) - 1)  # the last prompt token predicts output
        scores: list[TokenLogprobs | None] = []
        for start in range(first, last, PROMPT_LOGPROB_ROWS):
            stop = min(start + PROMPT_LOGPROB_ROWS, last)
            at = np.arange(begin + start - first, begin + stop - first, dtype=np.int64)
            following = self.tables.tokens[row, start + 1 : stop + 1].astype(np.int64)
            scores += self.sampler.prompt_logprobs(
                self.model.logits(hidden, self.backend.to_device(at)), following, row
            )
        return scores

    def _isolate(self, plan: StepPlan) -> StepResult:
        """A step failed: run its sequences one by one, so that only the one at fault fails.

        Bits do not depend on company, so the others get the tokens that they would have had.
        """
        merged = StepResult(step=plan.step, token_ids=[0] * len(plan.sample_rows))
        merged.logprobs = [None] * len(plan.sample_rows)
        for i in range(len(plan.rows)):
            samples = [j for j, source in enumerate(plan.sample_from) if source == i]
            try:
                one = self._compute(plan, [i])
            except Exception as error:
                logger.exception("row %d fails alone", plan.rows[i])
                message = f"{type(error).__name__}: {error}"
                failed = {plan.rows[i], *(plan.sample_rows[j] for j in samples)}
                merged.errors += [RowError(row, message) for row in sorted(failed)]
                continue
            for j, token in zip(samples, one.token_ids, strict=True):
                merged.token_ids[j] = token
            for j, logprobs in zip(samples, one.logprobs, strict=False):
                merged.logprobs[j] = logprobs
            merged.prompt_logprobs.update(one.prompt_logprobs)
            merged.errors += one.errors
        return merged
