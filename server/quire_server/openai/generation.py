"""From prompts to outputs: what completions and chat do alike."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from quire.outputs import CompletionOutput, Logprob, RequestOutput
from quire.sampling.params import SamplingParams
from quire_server.errors import ApiError, from_engine, refuse
from quire_server.keys import current_key
from quire_server.metrics import RequestTimer
from quire_server.model import Model
from quire_server.openai.fields import GenerationFields
from quire_server.openai.structure import renamed
from quire_server.reasoning_tokens import ReasoningTokens
from quire_server.state import Server
from quire_server.streaming import merged

logger = logging.getLogger("quire.server")

Logprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]

least_priority: ContextVar[int] = ContextVar("least priority", default=-(2**31))
"""What this request runs at when it asks for a lower number, which would be earlier: a batch's lines wait for others."""


@dataclass
class Job:
    """One prompt of a request, ready for the engine."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling: SamplingParams


def outputs(
    model: Model, fields: GenerationFields, jobs: Sequence[Job]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Deltas of all jobs, as (index of the job, output). Raises ApiError; closing it aborts what still runs."""
    return merged([_observed(model, fields, job) for job in jobs])


async def _observed(model: Model, fields: GenerationFields, job: Job) -> AsyncGenerator[RequestOutput, None]:
    server = model.server
    _log(server, job)
    timer = RequestTimer(model.metrics, job.sampling.n, job.sampling.max_tokens or 0)
    timer.sent(fields.model or model.name, job.request_id, len(job.prompt_token_ids), job.sampling)
    prompt = {"prompt": job.prompt, "prompt_token_ids": job.prompt_token_ids}
    finished = False
    try:
        source = model.engine.generate(
            prompt,
            job.sampling,
            job.request_id,
            priority=max(fields.priority, least_priority.get()),
            deadline=fields.deadline,
            cache_salt=server.cache_salt(fields.cache_salt),
        )
        async with aclosing(source) as items:  # type: ignore[type-var]
            async for item in items:
                timer.saw(item)
                finished, failed = item.finished, item.error is not None
                for output in item.outputs:
                    failed |= output.finish_reason == "error"
                if failed:
                    raise ApiError(500, f"the request failed: {item.error or 'no reason given'}", code="request_failed")
                yield item
        if not finished:
            raise ApiError(500, "the engine ended the request early", code="internal_error")
    except Exception as error:
        raise renamed(from_engine(error), fields.structure_field) from error
    finally:
        if not finished:
            timer.abandoned()


def _log(server: Server, job: Job) -> None:
    """What is asked, when the server's owner wants to see it: bounded, and on one line."""
    if not server.settings.log_requests:
        return
    most = server.settings.max_log_len
    prompt = ascii(job.prompt[:most]) if job.prompt is not None else repr(job.prompt_token_ids[:most])
    key = current_key.get()
    logger.info(
        "request %s%s: %d prompt tokens; %s; prompt %s",
        job.request_id, f" key={key.name}" if key else "", len(job.prompt_token_ids),
        ascii(job.sampling)[:most], prompt[:most],
    )  # fmt: skip


@dataclass
class Sample:
    """One choice, gathered from deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, output: CompletionOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


@dataclass
class Result:
    """Everything one job gave."""

    prompt_token_ids: list[int]
    samples: list[Sample]
    prompt_logprobs: PromptLogprobs | None = None
    cached: int = 0


async def gather(
    model: Model,
    fields: GenerationFields,
    jobs: Sequence[Job],
) -> list[Result]:
    """All jobs to their end."""
    results = [Result(job.prompt_token_ids, [Sample() for _ in range(job.sampling.n)]) for job in jobs]
    async with aclosing(outputs(model, fields, jobs)) as items:
        async for index, item in items:
            result = results[index]
            result.cached = max(result.cached, item.num_cached_tokens)
            if item.prompt_logprobs is not None:
                result.prompt_logprobs = item.prompt_logprobs
            for output in item.outputs:
                result.samples[output.index].add(output)
    return results


def usage(prompt: int, completion: int, cached: int, reasoning: int | None = None) -> dict[str, Any]:
    """``reasoning`` None: the request's answers have no such part."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if reasoning is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return counts


def total_usage(results: Sequence[Result], reasoning: int | None = None) -> dict[str, Any]:
    completion = sum(len(s.token_ids) for r in results for s in r.samples)
    prompt, cached = sum(len(r.prompt_token_ids) for r in results), sum(r.cached for r in results)
    return usage(prompt, completion, cached, reasoning)


class StreamUsage:
    """Counts a stream's tokens, for the last event or, when asked, for each."""

    def __init__(self, fields: GenerationFields, jobs: Sequence[Job]) -> None:
        self._told, self._each = fields.include_usage, fields.continuous_usage
        self.prompt = sum(len(job.prompt_token_ids) for job in jobs)
        self.completion = 0
        self.thoughts: Sequence[ReasoningTokens] | None = None  # counters of the samples, where reasoning is counted
        self._cached = [0] * len(jobs)

    def saw(self, index: int, item: RequestOutput) -> None:
        if item.num_cached_tokens > self._cached[index]:
            self._cached[index] = item.num_cached_tokens

    def total(self) -> dict[str, Any]:
        reasoning = None if self.thoughts is None else sum(one.count for one in self.thoughts)
        return usage(self.prompt, self.completion, sum(self._cached), reasoning)

    def on(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """OpenAI: with include_usage every chunk has the field, null until the last."""
        if self._told:
            chunk["usage"] = self.total() if self._each else None
        return chunk


def finish(reason: str | None, stop_reason: int | str | None) -> dict[str, Any]:
    """A request that ran into its deadline is reported as cut off, in the words that clients know."""
    if reason == "deadline":
        return {"finish_reason": "length", "stop_reason": "deadline"}
    return {"finish_reason": reason, "stop_reason": stop_reason}


def finite(logprob: float) -> float:
    """JSON knows no infinity; -9999.0 is what OpenAI's answers have in its place."""
    return max(logprob, -9999.0)


def prompt_logprobs_json(rows: PromptLogprobs) -> list[dict[str, Any] | None]:
    """vLLM's form: for each prompt token but the first, the candidates by token id."""
    return [
        None
        if row is None
        else {
            str(token): {"logprob": finite(lp.logprob), "rank": lp.rank, "decoded_token": lp.decoded_token}
            for token, lp in row.items()
        }
        for row in rows
    ]


def token_name(fields: GenerationFields, token: int, logprob: Logprob) -> str:
    return f"token_id:{token}" if fields.return_tokens_as_token_ids else logprob.decoded_token or ""


def truncate(fields: GenerationFields, token_ids: list[int], max_model_len: int) -> list[int]:
    """The last ``truncate_prompt_tokens`` of the prompt, or the first of them; -1 keeps what the context holds."""
    keep = fields.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep == 0:
        raise refuse(
            "truncate_prompt_tokens", "truncate_prompt_tokens: must be at least 1, or -1 for what the context holds"
        )
    if keep == -1:
        keep = max_model_len - 1
    return token_ids[:keep] if fields.truncation_side == "right" else token_ids[max(len(token_ids) - keep, 0) :]
