"""/v1/embeddings, /pooling, /score and /rerank: for models that pool, which ``EngineReady.tasks`` would tell.

No model does yet. A request is checked in full all the same, its tokens counted against the context, so that a wrong
one reads of its fault and a right one of what the model that is served can do instead.
"""

from __future__ import annotations

from typing import Annotated, NoReturn

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from quire_server.errors import ApiError, refuse
from quire_server.model import Model
from quire_server.openai.pooling_schema import (
    EmbeddingRequest,
    PoolingFields,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of

router = APIRouter(tags=["pooling"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]
_INSTEAD = {
    "embed": "serve an embedding model with another server",
    "classify": "ask for one of the classes by /v1/chat/completions with structured_outputs: {choice: [...]}",
    "score": "ask for a judgement by /v1/chat/completions with logprobs",
}


@router.post("/v1/embeddings")
async def create_embeddings(request: Request, body: EmbeddingRequest, server: State) -> Response:
    """Vectors of texts."""
    await _pool(request, server, body, "embed")


@router.post("/pooling")
async def create_pooling(request: Request, body: PoolingRequest, server: State) -> Response:
    """What the model's pooler gives."""
    await _pool(request, server, body, body.task or "embed")


@router.post("/score")
@router.post("/v1/score")
async def create_score(request: Request, body: ScoreRequest, server: State) -> Response:
    """How well texts fit each other."""
    await _pool(request, server, body, "score")


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def create_rerank(request: Request, body: RerankRequest, server: State) -> Response:
    """Documents in the order of how well they fit a query."""
    await _pool(request, server, body, "score")


async def _pool(request: Request, server: Server, body: PoolingFields, task: str) -> NoReturn:
    """Raises ApiError: the request's fault if it has one, else that the model cannot."""
    model = server.model(body.model)
    named = body.model or model.name
    request.state.user = body.user
    field, prompts = body.prompts()
    server.limits.at_most(field, len(prompts), "max_prompts")
    if body.truncate_prompt_tokens == 0:
        raise refuse("truncate_prompt_tokens", "truncate_prompt_tokens: must be at least 1, or -1 for the context")
    if body.truncate_prompt_tokens is None:
        await _check_lengths(model, body, field, prompts)
    if task not in model.engine.info.tasks:
        does = " and ".join(model.engine.info.tasks)
        instead = _INSTEAD[task.removeprefix("token_")]
        message = f"model: {named} does not {task}, it can {does}: {instead}"
        raise refuse("model", message, "model_not_supported")
    raise ApiError(501, f"model: {named} can {task}, but this server cannot ask it to yet", param="model")


async def _check_lengths(model: Model, body: PoolingFields, field: str, prompts: list[str | list[int]]) -> None:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await model.text.encode(texts, add_special_tokens=body.add_special_tokens))
    limit = model.engine.info.max_model_len
    for index, prompt in enumerate(prompts):
        count = len(next(encoded) if isinstance(prompt, str) else prompt)
        if count > limit:
            message = f"{field}[{index}] has {count} tokens, more than the {limit} that this model's context holds"
            raise refuse(field, message, "context_length_exceeded")
