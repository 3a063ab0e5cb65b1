"""The requests of the pooling routes: embeddings (OpenAI), pooling and scores (vLLM), reranking (Jina, Cohere)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from quire_server.errors import refuse
from quire_server.openai.base import Strict
from quire_server.openai.completions_schema import Batch
from quire_server.openai.fields import Int32, Texts

Prompts = list[str | list[int]]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TEXT_ONLY = "only text is supported"


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a text or a list of texts, and not empty")
    return texts


OneOrMore = Annotated[list[str], PlainValidator(_texts, json_schema_input_type=str | list[str])]


class PoolingFields(Strict):
    """vLLM's fields of all of them."""

    model: str | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Shown in the server's log.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool = True
    priority: Int32 = 0
    refused = {"mm_processor_kwargs": ((), TEXT_ONLY)}  # noqa: RUF012

    def prompts(self) -> tuple[str, Prompts]:
        """The field that they come from, and what the model would read, in order. Raises ApiError."""
        raise NotImplementedError


class EmbeddingRequest(PoolingFields):
    input: Batch
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    normalize: bool = True
    refused = {**PoolingFields.refused, "messages": ((), "give the text as input")}  # noqa: RUF012

    def prompts(self) -> tuple[str, Prompts]:
        return "input", self.input


class PoolingRequest(EmbeddingRequest):
    task: Literal["embed", "classify", "token_embed", "token_classify"] | None = None


class ScoreRequest(PoolingFields):
    """Each of ``text_1`` with the one at its place in ``text_2``; a single one with all."""

    text_1: OneOrMore
    text_2: OneOrMore
    activation: bool = True

    def prompts(self) -> tuple[str, Prompts]:
        if len(self.text_1) not in (1, len(self.text_2)):
            message = f"text_1: must be one text or as many as text_2 ({len(self.text_2)}), not {len(self.text_1)}"
            raise refuse("text_1", message)
        first = self.text_1 * (len(self.text_2) // len(self.text_1))
        return "text_2", [one + two for one, two in zip(first, self.text_2, strict=True)]


class RerankRequest(PoolingFields):
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[Texts, Field(min_length=1)]
    top_n: Count | None = None
    return_documents: bool = True
    max_tokens_per_doc: Count | None = Field(None, description="Cohere's: longer documents are cut.")
    activation: bool = True
    refused = {  # noqa: RUF012
        **PoolingFields.refused,
        "max_chunks_per_doc": ((), "documents are not cut into chunks: use max_tokens_per_doc"),
        "rank_fields": ((), "documents are texts"),
    }

    def prompts(self) -> tuple[str, Prompts]:
        return "documents", [self.query + document for document in self.documents]
