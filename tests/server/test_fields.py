"""Every field that the openai client can send, and vLLM's further ones, is known: it acts, or it is refused by name."""

from __future__ import annotations

from functools import partial

import openai
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from quire_server.openai.chat_schema import ChatRequest
from quire_server.openai.completions_schema import CompletionRequest
from quire_server.openai.pooling import EmbeddingRequest

# What vLLM's own requests have beside OpenAI's.
VLLM = {
    "top_k", "min_p", "repetition_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids", "bad_words", "prompt_logprobs",
    "truncate_prompt_tokens", "return_tokens_as_token_ids", "return_token_ids", "structured_outputs", "cache_salt",
    "priority", "add_special_tokens", "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "logits_processors", "use_beam_search", "length_penalty", "kv_transfer_params",
}  # fmt: skip
VLLM_CHAT = {
    "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "documents", "echo",
    "include_reasoning", "mm_processor_kwargs",
}  # fmt: skip
REQUESTS = {
    "chat": (ChatRequest, {*chat_create_params.CompletionCreateParamsBase.__annotations__, "stream", *VLLM, *VLLM_CHAT}),
    "completions": (CompletionRequest, {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream", *VLLM}),
    "embeddings": (EmbeddingRequest, set(embedding_create_params.EmbeddingCreateParams.__annotations__)),
}  # fmt: skip
# A value that asks for something, where "something" would not reach the check of the field itself.
ASKS = {"modalities": ["audio"], "store": True, "verbosity": "low", "best_of": 2, "length_penalty": 2.0}


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_field_is_known(kind):
    request, names = REQUESTS[kind]
    assert len(names) >= 5
    assert not names - set(request.model_fields) - set(request.refused)
    assert not set(request.model_fields) & set(request.refused)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ("chat", "completions")
        for name in sorted(REQUESTS[kind][1] & set(REQUESTS[kind][0].refused))
    ],
)
def test_what_cannot_act_is_refused_by_name(client, kind, name):
    more = {name: ASKS.get(name, "something")}
    if kind == "chat":
        messages = [{"role": "user", "content": "Hello?"}]
        ask = partial(client.chat.completions.create, model="demo", messages=messages, extra_body=more)
    else:
        ask = partial(client.completions.create, model="demo", prompt="abc", extra_body=more)
    with pytest.raises(openai.BadRequestError) as caught:
        ask()
    assert caught.value.param == name
    assert name in caught.value.body["message"]


def test_a_field_that_nobody_knows(client):
    with pytest.raises(openai.BadRequestError, match="unrecognized request argument"):
        client.completions.create(model="demo", prompt="abc", extra_body={"temprature": 1})


# -- embeddings, scores and reranking -----------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["abc", ["abc", "de"], [97, 98], [[97, 98], [99]]])
def test_a_model_that_generates_gives_no_embeddings(client, text):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="demo", input=text)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_supported")
    assert "generates text and gives no embeddings" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": ["a"] * 100_000}, "input"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, "model"),
        ("/pooling", {"input": "a", "task": "paint"}, "task"),
        ("/pooling", {"input": "a"}, "model"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["c", "d", "e"]}, "model"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("/v2/rerank", {"query": "a", "documents": ["b"]}, "model"),
    ],
)
def test_pooling_requests_are_checked(live, path, body, param):
    with live.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
