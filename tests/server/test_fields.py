"""Every field that the openai client can send, and every one of vLLM's: it acts, or it is refused by name."""

from __future__ import annotations

from typing import get_args

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from fake import FakeLLM
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from openai.types.shared.reasoning_effort import ReasoningEffort

from quire_server.anthropic.schema import MessagesRequest
from quire_server.openai.batches_schema import BatchRequest
from quire_server.openai.chat_schema import ChatRequest
from quire_server.openai.completions_schema import CompletionRequest
from quire_server.openai.pooling_schema import EmbeddingRequest
from quire_server.openai.responses_schema import ResponsesRequest

ASK = [{"role": "user", "content": "Hello?"}]
THOUGHT = "<think>\nTwo and 二.\n</think>\n\nFour."

SHARED = {
    "model", "stream", "stream_options", "n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty",
    "logit_bias", "stop", "user", "logprobs", "max_tokens",
}  # fmt: skip
CHAT = SHARED | {
    "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort",
    "max_completion_tokens", "top_logprobs", "safety_identifier", "metadata", "prompt_cache_key",
}  # fmt: skip
COMPLETIONS = SHARED | {"prompt", "echo", "best_of"}
# name -> (a value that is refused, one that asks for nothing)
CHAT_REFUSED = {
    "audio": ({"voice": "alloy", "format": "wav"}, None),
    "function_call": ("auto", "none"),
    "functions": ([{"name": "f"}], None),
    "modalities": (["text", "audio"], ["text"]),
    "moderation": ({"model": "m"}, None),
    "prediction": ({"type": "content", "content": "x"}, None),
    "prompt_cache_options": ({"mode": "explicit"}, None),
    "prompt_cache_retention": ("24h", "in_memory"),
    "service_tier": ("priority", "auto"),
    "store": (True, False),
    "verbosity": ("low", "medium"),
    "web_search_options": ({}, None),
}
COMPLETIONS_REFUSED = {"suffix": ("x", None)}
VLLM = {
    "top_k", "min_p", "repetition_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids", "bad_words", "prompt_logprobs",
    "truncate_prompt_tokens", "truncation_side", "request_id", "return_tokens_as_token_ids", "return_token_ids",
    "structured_outputs",
    "response_format", "cache_salt", "priority", "add_special_tokens", "echo",
}  # fmt: skip
VLLM_CHAT = {
    "add_generation_prompt", "continue_final_message", "documents", "chat_template", "chat_template_kwargs",
    "include_reasoning",
}  # fmt: skip
VLLM_REFUSED = {
    "guided_json": ({}, None), "guided_regex": ("a", None), "guided_choice": (["a"], None), "guided_grammar": ("a", None),
    "guided_decoding_backend": ("x", None), "guided_whitespace_pattern": ("x", None), "structural_tag": ("x", None),
    "use_beam_search": (True, False), "length_penalty": (0.5, 1.0), "early_stopping": (True, False),
    "logits_processors": (["x"], None), "kv_transfer_params": ({}, None), "mm_processor_kwargs": ({}, None),
    "ec_transfer_params": ({}, None), "mm_payload": ({}, None), "return_mm_kwargs": (True, False),
    "prompt_embeds": ("x", None), "logprob_token_ids": ([1], None), "repetition_detection": ({}, None),
    "return_token_offsets": (True, False), "routed_experts_prompt_start": (1, 0), "session_id": ("x", None),
    "stream_interval": (2, 1), "thinking_token_budget": (5, None), "vllm_xargs": ({}, None), "watermarking": (True, False),
}  # fmt: skip


RESPONSES = {
    "background", "include", "input", "instructions", "max_output_tokens", "metadata", "model", "parallel_tool_calls",
    "previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier", "store", "stream", "temperature",
    "text", "tool_choice", "tools", "top_logprobs", "top_p", "user",
}  # fmt: skip
RESPONSES_REFUSED = {
    "access_programs", "background_options", "context_management", "conversation", "image", "max_tool_calls",
    "moderation", "prompt", "prompt_cache_options", "prompt_cache_retention", "service_tier", "stream_options",
    "truncation",
}  # fmt: skip
OTHER_CLIENTS = [
    (ResponsesRequest, RESPONSES, RESPONSES_REFUSED,
     (response_create_params.ResponseCreateParamsNonStreaming,
      response_create_params.ResponseCreateParamsStreaming)),
    (EmbeddingRequest, {"input", "model", "dimensions", "encoding_format", "user"}, set(),
     (embedding_create_params.EmbeddingCreateParams,)),
    (BatchRequest, {"completion_window", "endpoint", "input_file_id", "metadata", "output_expires_after"}, set(),
     (batch_create_params.BatchCreateParams,)),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "acts", "refused", "params"), OTHER_CLIENTS)
def test_the_other_routes_know_every_field_of_their_clients_too(schema, acts, refused, params):
    assert fields_of(*params) == acts | refused
    assert acts <= set(schema.model_fields)
    assert refused <= set(schema.refused)


def test_messages_know_every_field_of_anthropics_client():
    """Its own ``output_format`` and the like become ``output_config`` before they are sent."""
    sent = fields_of(message_create_params.MessageCreateParamsNonStreaming) | {"stream"}
    known = set(MessagesRequest.model_fields) | set(MessagesRequest.refused)
    assert sent - known == set()
    assert fields_of(message_count_tokens_params.MessageCountTokensParams) - known == set()


def fields_of(*params):
    return set().union(*(p.__required_keys__ | p.__optional_keys__ for p in params))


CLIENTS = [
    ("/v1/chat/completions", {"messages": ASK}, ChatRequest, CHAT, CHAT_REFUSED, VLLM | VLLM_CHAT,
     (chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming)),
    ("/v1/completions", {"prompt": "a"}, CompletionRequest, COMPLETIONS, COMPLETIONS_REFUSED, VLLM,
     (completion_create_params.CompletionCreateParamsNonStreaming,
      completion_create_params.CompletionCreateParamsStreaming)),
]  # fmt: skip
ROUTES = pytest.mark.parametrize(
    ("path", "body", "schema", "acts", "refused", "vllm", "params"), CLIENTS, ids=["chat", "completions"]
)


@ROUTES
def test_the_table_has_every_field_of_the_client(path, body, schema, acts, refused, vllm, params):
    assert not acts & refused.keys()
    assert fields_of(*params) == acts | refused.keys()


@ROUTES
def test_what_acts_is_a_field_of_the_schema(path, body, schema, acts, refused, vllm, params):
    # Beyond both tables there is what this server alone knows.
    assert (acts | vllm) - set(schema.model_fields) == set()
    assert set(schema.model_fields) - acts - vllm == {"deadline"}


@ROUTES
def test_what_is_refused_is_refused_by_name(http, path, body, schema, acts, refused, vllm, params):
    for name, (value, nothing) in {**refused, **VLLM_REFUSED}.items():
        answer = http.post(path, json={**body, name: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
        assert error["message"].removeprefix(f"{name}: ")
        assert http.post(path, json={**body, "max_tokens": 1, name: nothing}).status_code == 200, name
    unknown = http.post(path, json={**body, "nonsense": 1}).json()["error"]
    assert unknown["code"] == "unknown_parameter"


@pytest.mark.parametrize("stop_after", [3, 12, 20, 33, 200])
@pytest.mark.parametrize("shown", [True, False])
def test_reasoning_tokens_are_counted(make_live, stop_after, shown):
    """The fake's tokens are bytes: those before the closing mark are reasoning, as far as the answer goes."""
    engine = FakeLLM()
    engine.script = THOUGHT
    client = make_live(engine).openai()
    options = {
        "model": "demo",
        "messages": ASK,
        "max_tokens": stop_after,
        "n": 2,
        "extra_body": {"include_reasoning": shown},
    }
    usage = client.chat.completions.create(**options).usage
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].usage == usage
    thought = len(THOUGHT[: THOUGHT.index("\n</think>")].encode())
    count = usage.completion_tokens_details.reasoning_tokens
    if stop_after == 3:
        assert count == 0  # not yet known to be a mark
    elif stop_after == 200:
        assert count == 2 * thought
    else:
        assert count == 2 * min(stop_after, thought)
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_an_answer_without_reasoning_has_none(client):
    usage = client.chat.completions.create(model="demo", messages=ASK).usage
    assert usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("effort", [e for e in get_args(get_args(ReasoningEffort)[0]) if e])
def test_every_effort_of_the_client_is_taken(client, effort):
    assert client.chat.completions.create(model="demo", messages=ASK, max_tokens=1, reasoning_effort=effort).choices
