"""The routes of models that pool, which no model that is served does yet: each request is checked, then refused."""

from __future__ import annotations

import openai
import pytest
from openai.types import embedding_create_params

from quire_server.openai.pooling_schema import EmbeddingRequest

SCORE = {"text_1": "a", "text_2": ["b", "c"]}
RERANK = {"query": "a", "documents": ["b", "c"]}
ROUTES = [
    ("/v1/embeddings", {"input": "a"}), ("/pooling", {"input": ["a", "b"]}), ("/score", SCORE), ("/v1/score", SCORE),
    ("/rerank", RERANK), ("/v1/rerank", RERANK), ("/v2/rerank", RERANK),
]  # fmt: skip


@pytest.mark.parametrize("given", ["abc", ["abc", "de"], [97, 98], [[97], [98, 99]]])
@pytest.mark.parametrize("fields", [{}, {"encoding_format": "float", "dimensions": 8, "user": "me"}])
def test_the_client_reads_what_to_do_instead(client, given, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="demo", input=given, **fields)
    assert caught.value.code == "model_not_supported"
    assert caught.value.param == "model"
    assert "demo does not embed, it can generate: serve an embedding model" in caught.value.message


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_every_route_refuses_by_name(http, path, body):
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "model_not_supported"
    wrong = http.post(path, json={**body, "nonsense": 1}).json()["error"]
    assert (wrong["param"], wrong["code"]) == ("nonsense", "unknown_parameter")
    assert http.post(path, json={**body, "model": "other"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/v1/embeddings", {}, "input", "missing"),
        ("/v1/embeddings", {"input": []}, "input", "empty"),
        ("/v1/embeddings", {"input": [[]]}, "input", "at least one"),
        ("/v1/embeddings", {"input": ["a"] * 257}, "input", "256"),
        ("/v1/embeddings", {"input": ["a", "x" * 5000]}, "input", "input[1] has 5000 tokens"),
        ("/v1/embeddings", {"input": [[7] * 5000]}, "input", "4096"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions", "1"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ("/pooling", {"input": "a", "task": "sing"}, "task", "classify"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1", "as many as text_2 (1)"),
        ("/score", {"text_1": "a", "text_2": "x" * 4096}, "text_2", "4097 tokens"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "at least 1"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "1"),
        ("/v2/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields", "texts"),
    ],
)
def test_what_is_wrong_is_named_first(http, path, body, param, says):
    error = http.post(path, json=body).json()["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_every_field_of_the_client_is_known():
    params = embedding_create_params.EmbeddingCreateParams
    fields = set(params.__required_keys__ | params.__optional_keys__)
    assert fields - set(EmbeddingRequest.model_fields) - set(EmbeddingRequest.refused) == set()


def test_the_engine_says_what_its_model_can_do(make_live):
    live = make_live()
    live.engine.info.tasks = ("embed",)
    with live.http() as http:
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 501
        error = http.post("/rerank", json=RERANK).json()["error"]
    assert "does not score, it can embed" in error["message"]
