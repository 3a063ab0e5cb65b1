"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from quire.sampling.params import SamplingParams
from quire_server.errors import from_engine, json_response, refuse
from quire_server.model import Model
from quire_server.openai import generation
from quire_server.openai.completions_schema import CompletionRequest
from quire_server.openai.generation import Job, PromptLogprobs, Result, StreamUsage
from quire_server.openai.structure import renamed
from quire_server.record import response_id
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of
from quire_server.streaming import DONE, EventStream, answer, event

router = APIRouter(tags=["completions"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest, server: State) -> Response:
    """Complete one prompt or a batch of them, each ``n`` times: choice ``i * n + j`` is sample j of prompt i."""
    model = server.model(body.model)
    body.check(server.limits)
    request.state.user = body.user
    head = {
        "id": response_id("cmpl", body.request_id),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or model.name,
        "system_fingerprint": server.fingerprint,
    }
    if body.stream:
        return EventStream(_stream(model, body, head), server.lifecycle)
    return await answer(request, server.lifecycle, _complete(model, body, head))


async def _jobs(model: Model, body: CompletionRequest, request_id: str) -> list[Job]:
    batch = body.prompt
    model.server.limits.at_most("prompt", len(batch), "max_prompts")
    model.server.limits.at_most("n", len(batch) * body.n, "max_sequences")
    scored = body.logprobs if body.echo else None
    if body.prompt_logprobs is not None:
        scored = max(body.prompt_logprobs, scored or 0)
    generate = max(body.max_tokens, 1)

    def prepare() -> SamplingParams:
        return body.sampling(
            model.text.defaults,
            max_tokens=generate,
            logprobs=body.logprobs,
            prompt_logprobs=scored,
            structure=body.structure(),
        )

    try:
        sampling = await model.server.run(body.size, prepare)
    except ValueError as error:
        raise renamed(from_engine(error), body.structure_field) from None
    texts = [prompt for prompt in batch if isinstance(prompt, str)]
    encoded = iter(await model.text.encode(texts, add_special_tokens=body.add_special_tokens))
    jobs = []
    for i, prompt in enumerate(batch):
        text, ids = (prompt, next(encoded)) if isinstance(prompt, str) else (None, prompt)
        kept = generation.truncate(body, ids, model.engine.info.max_model_len)
        if len(kept) != len(ids):
            text, ids = None, kept
        if not ids:
            raise refuse("prompt", "prompt: it has no tokens")
        model.room(len(ids), generate, "prompt")
        if text is None and body.echo:
            text = await model.text.decode(ids, skip_special_tokens=False)
        jobs.append(Job(f"{request_id}-{i}", text, ids, sampling))
    return jobs


async def _complete(model: Model, body: CompletionRequest, head: dict[str, Any]) -> Response:
    jobs = await _jobs(model, body, head["id"])
    results = await generation.gather(model, body, jobs)
    choices = [
        _choice(model, body, i, j, job, result)
        for i, (job, result) in enumerate(zip(jobs, results, strict=True))
        for j in range(body.n)
    ]
    return json_response({**head, "choices": choices, "usage": generation.total_usage(results)})


def _choice(model: Model, body: CompletionRequest, i: int, j: int, job: Job, result: Result) -> dict[str, Any]:
    sample = result.samples[j]
    if body.max_tokens == 0:  # one token was generated because the engine scores a prompt only on its way to one
        sample.text, sample.token_ids, sample.logprobs = "", [], []
        sample.finish_reason, sample.stop_reason = "length", None
    logprobs = None
    if body.logprobs is not None:
        table = LogprobTable(model, body)
        if body.echo:
            table.add_prompt(job.prompt_token_ids, result.prompt_logprobs or [])
        table.add(sample.token_ids, sample.logprobs)
        logprobs = table.take()
    choice = {
        "index": i * body.n + j,
        "text": (job.prompt or "") + sample.text if body.echo else sample.text,
        "logprobs": logprobs,
        **generation.finish(sample.finish_reason, sample.stop_reason),
    }
    if body.prompt_logprobs is not None and result.prompt_logprobs is not None:
        choice["prompt_logprobs"] = generation.prompt_logprobs_json(result.prompt_logprobs)
    if body.return_token_ids:
        choice["prompt_token_ids"], choice["token_ids"] = job.prompt_token_ids, sample.token_ids
    return choice


async def _stream(model: Model, body: CompletionRequest, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    jobs = await _jobs(model, body, head["id"])
    counts = StreamUsage(body, jobs)
    choices = [_StreamedChoice(model, body, jobs[i // body.n], i) for i in range(len(jobs) * body.n)]
    async with aclosing(generation.outputs(model, body, jobs)) as items:
        async for index, item in items:
            counts.saw(index, item)
            for output in item.outputs:
                choice = choices[index * body.n + output.index]
                if body.max_tokens != 0:
                    counts.completion += len(output.token_ids)
                made = choice.chunk(output, item.prompt_logprobs)
                if made is not None:
                    yield event(counts.on({**head, "choices": [made]}))
    if body.include_usage:
        yield event({**head, "choices": [], "usage": counts.total()})
    yield DONE


class _StreamedChoice:
    """Turns one sample's deltas into the choices of chunks; the first carries the prompt when it is echoed."""

    def __init__(self, model: Model, body: CompletionRequest, job: Job, index: int) -> None:
        self.body, self.job, self.index = body, job, index
        self.table = LogprobTable(model, body) if body.logprobs is not None else None
        self.first = True
        self.prompt_rows: PromptLogprobs | None = None

    def chunk(self, output: Any, prompt_logprobs: PromptLogprobs | None) -> dict[str, Any] | None:
        body = self.body
        silent = body.max_tokens == 0
        text = "" if silent else output.text
        token_ids = [] if silent else output.token_ids
        choice: dict[str, Any] = {"index": self.index}
        if self.first and body.echo:
            text = (self.job.prompt or "") + text
            if self.table is not None:
                self.table.add_prompt(self.job.prompt_token_ids, prompt_logprobs or [])
        if self.first and body.return_token_ids:
            choice["prompt_token_ids"] = self.job.prompt_token_ids
        wanted = self.table is not None or body.return_token_ids
        if not text and output.finish_reason is None and not (wanted and token_ids):
            return None
        self.first = False
        choice["text"] = text
        if self.table is not None and not silent:
            self.table.add(token_ids, output.logprobs or [])
        choice["logprobs"] = self.table.take() if self.table is not None else None
        if body.return_token_ids:
            choice["token_ids"] = token_ids
        reason = "length" if silent and output.finish_reason else output.finish_reason
        return choice | generation.finish(reason, output.stop_reason)


class LogprobTable:
    """OpenAI's completion logprobs: parallel lists, with each token's offset in the choice's text."""

    def __init__(self, model: Model, body: CompletionRequest) -> None:
        self.model, self.body = model, body
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._offsets: list[int] = []
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []

    def add_prompt(self, token_ids: Sequence[int], rows: PromptLogprobs) -> None:
        for token, row in zip(token_ids, rows, strict=False):
            if row is None:  # nothing comes before the first token: it has no probability
                self._row(self.model.text.token(token), None, None)
            else:
                self.add([token], [row])

    def add(self, token_ids: Sequence[int], rows: generation.Logprobs) -> None:
        for token, row in zip(token_ids, rows, strict=True):
            top = {generation.token_name(self.body, t, lp): generation.finite(lp.logprob) for t, lp in row.items()}
            name = generation.token_name(self.body, token, row[token])
            self._row(name, generation.finite(row[token].logprob), top)

    def _row(self, name: str, logprob: float | None, top: dict[str, float] | None) -> None:
        self._offsets.append(self._offset)
        self._tokens.append(name)
        self._logprobs.append(logprob)
        self._top.append(top)
        self._offset += len(name)

    def take(self) -> dict[str, Any]:
        taken = {
            "text_offset": self._offsets,
            "token_logprobs": self._logprobs,
            "tokens": self._tokens,
            "top_logprobs": self._top,
        }
        self._clear()
        return taken
