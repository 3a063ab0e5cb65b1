"""From the engine's tokens to what a caller reads: text, stop strings, log-probabilities.

One object per request, in the caller's process. It yields *deltas*; :func:`merge` adds them up, so that a slow reader
holds one pending item, never a queue of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.message import AddRequest, SampleOutput, TokenLogprobs
from quire.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from quire.text.detokenizer import Detokenizer
    from quire.text.tokenizer import Tokenizer


@dataclass
class _Sample:
    detokenizer: Detokenizer | None
    tokens: int = 0
    cumulative: float = 0.0
    finished: bool = False


class RequestState:
    """Turns SampleOutputs into RequestOutput deltas.

    ``stopped`` lists samples that ended on a stop string, which only this side sees: the engine is to be told.
    """

    def __init__(self, message: AddRequest, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        self.message, self.prompt, self.tokenizer = message, prompt, tokenizer
        params = message.sampling
        self.metrics = RequestMetrics(arrival_time=message.arrival)
        self.stopped: list[int] = []
        self.samples = [_Sample(self._detokenizer()) for _ in range(params.n)]
        self._open = len(self.samples)
        self._stop_ids = frozenset(params.stop_token_ids or ())

    def _detokenizer(self) -> Detokenizer | None:
        if self.tokenizer is None or not self.message.sampling.detokenize:
            return None
        from quire.text.detokenizer import Detokenizer

        return Detokenizer(self.tokenizer, self.message.sampling, self.message.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return not self._open

    def update(self, output: SampleOutput) -> RequestOutput | None:
        """The news of one output, or None when there is none for the caller."""
        sample = self.samples[output.index]
        if sample.finished:
            return None
        metrics = self.metrics
        now = metrics.last_token_time = time.monotonic()
        if metrics.first_token_time is None and output.token_ids:
            metrics.first_token_time = now
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = output.scheduled
        reason = output.finish_reason
        stop_reason: int | str | None = None  # an end-of-sequence token is no reason to report, as in vLLM
        if output.stop_token_id in self._stop_ids:
            stop_reason = output.stop_token_id
        token_ids, logprobs, text = output.token_ids, output.logprobs, ""
        if sample.detokenizer is not None:
            step = sample.detokenizer.add(token_ids, reason is not None, stop_token=output.stop_token_id is not None)
            text = step.text
            if step.stop is not None:
                token_ids = token_ids[: step.used]
                logprobs = logprobs[: step.used] if logprobs is not None else None
                if reason is None:
                    self.stopped.append(output.index)
                reason, stop_reason = "stop", step.stop
        sample.tokens += len(token_ids)
        if reason is not None:
            sample.finished = True
            self._open -= 1
            if not self._open:
                metrics.finished_time = now
        named = self._named(logprobs)
        if logprobs:
            sample.cumulative += sum(entry.logprobs[0] for entry in logprobs)
        completion = CompletionOutput(
            index=output.index,
            text=text,
            token_ids=list(token_ids),
            cumulative_logprob=sample.cumulative if self.message.sampling.logprobs is not None else None,
            logprobs=named,
            finish_reason=reason,
            stop_reason=stop_reason,
        )
        return RequestOutput(
            request_id=self.message.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.message.prompt_token_ids,
            outputs=[completion],
            finished=not self._open,
            prompt_logprobs=self._named(output.prompt_logprobs),
            num_cached_tokens=output.num_cached_tokens,
            metrics=metrics,
            error=output.error,
        )

    def _named(self, entries: list[TokenLogprobs] | list[TokenLogprobs | None] | None) -> list | None:
        if entries is None:
            return None
        return [None if entry is None else self._name(entry) for entry in entries]

    def _name(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """vLLM's form: token id to Logprob, the chosen token first."""
        named: dict[int, Logprob] = {}
        for place, (token, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
            if token not in named:
                text = self.tokenizer.token_text(token) if self.tokenizer is not None else None
                named[token] = Logprob(logprob, entry.rank if place == 0 else place, text)
        return named


def merge(total: RequestOutput | None, delta: RequestOutput) -> RequestOutput:
    """``total`` with ``delta`` added (in place), samples in order of their index."""
    if total is None:
        return delta
    for news in delta.outputs:
        known = next((o for o in total.outputs if o.index == news.index), None)
        if known is None:
            total.outputs.append(news)
            total.outputs.sort(key=lambda o: o.index)
            continue
        known.text += news.text
        known.token_ids += news.token_ids
        if news.logprobs is not None:
            known.logprobs = (known.logprobs or []) + news.logprobs
        known.cumulative_logprob = news.cumulative_logprob
        known.finish_reason, known.stop_reason = news.finish_reason, news.stop_reason
    total.finished = delta.finished
    total.error = delta.error or total.error
    total.num_cached_tokens = max(total.num_cached_tokens, delta.num_cached_tokens)
    if delta.prompt_logprobs is not None:
        total.prompt_logprobs = delta.prompt_logprobs
    return total
