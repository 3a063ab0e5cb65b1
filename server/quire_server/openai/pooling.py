"""Embeddings, scores and reranking: the requests of OpenAI, vLLM, Jina and Cohere, checked in full.

Models that pool are not served yet. A request that is right is refused with what this server's model does, one that is
wrong by the field at fault, so that a client's mistake shows before such a model is there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from fastapi import APIRouter, Depends
from pydantic import Field, PlainValidator
from starlette.responses import Response

from quire_server.errors import refuse
from quire_server.openai.base import Strict
from quire_server.openai.completions_schema import Batch
from quire_server.openai.fields import Int32, Texts
from quire_server.routing import StrictRoute
from quire_server.state import Server, server_of

router = APIRouter(tags=["pooling"], route_class=StrictRoute)
State = Annotated[Server, Depends(server_of)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a text or a list of texts, and not empty")
    return value


OneOrMore = Annotated[list[str], PlainValidator(_texts, json_schema_input_type=str | list[str])]


class PoolingFields(Strict):
    model: str | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool = True
    priority: Int32 = 0


class EmbeddingRequest(PoolingFields):
    """OpenAI's; texts or token ids, one or many."""

    input: Batch
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    normalize: bool = True


class PoolingRequest(EmbeddingRequest):
    """vLLM's: what the model's pooler gives, whatever it is."""

    task: Literal["embed", "classify", "score", "token_embed", "token_classify"] | None = None


class ScoreRequest(PoolingFields):
    """vLLM's: how well each of ``text_2`` fits ``text_1``."""

    text_1: OneOrMore
    text_2: OneOrMore

    def check(self) -> None:
        if len(self.text_1) not in (1, len(self.text_2)):
            message = f"text_1: must be one text or as many as text_2 ({len(self.text_2)}), not {len(self.text_1)}"
            raise refuse("text_1", message)


class RerankRequest(PoolingFields):
    """Jina's and Cohere's."""

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[Texts, Field(min_length=1)]
    top_n: Count | None = None
    return_documents: bool = True
    max_tokens_per_doc: Count | None = None


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingRequest, server: State) -> Response:
    """Vectors of texts."""
    _count(server, "input", len(body.input))
    _refuse(server, body, "embeddings")


@router.post("/pooling")
async def create_pooling(body: PoolingRequest, server: State) -> Response:
    """What the model's pooler gives."""
    _count(server, "input", len(body.input))
    _refuse(server, body, "poolings")


@router.post("/score")
@router.post("/v1/score")
async def create_score(body: ScoreRequest, server: State) -> Response:
    """Scores of pairs of texts."""
    body.check()
    _count(server, "text_2", len(body.text_2))
    _refuse(server, body, "scores")


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def create_rerank(body: RerankRequest, server: State) -> Response:
    """Documents by how well they fit a query."""
    _count(server, "documents", len(body.documents))
    _refuse(server, body, "scores")


def _count(server: Server, name: str, count: int) -> None:
    server.limits.at_most(name, count, "max_prompts")


def _refuse(server: Server, body: PoolingFields, what: str) -> NoReturn:
    model = server.model(body.model)
    message = f"model: {model} generates text and gives no {what}; models that pool are not supported yet"
    raise refuse("model", message, "model_not_supported")
