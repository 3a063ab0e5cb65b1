"""The whole road on the demo model: the command, HTTP, the engine process, the CPU plugin, and back."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from conftest import eventually
from demo_server import ADD_PARAMETERS, DemoServer, checkpoint

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": ADD_PARAMETERS,
    },
}


@pytest.fixture(scope="module")
def demo():
    server = DemoServer("--max-logprobs", "40")  # more than the engine allows by itself
    yield server
    assert server.close() == 0, server.log


@pytest.fixture(scope="module")
def client(demo):
    return demo.client()


@pytest.fixture(scope="module")
def reference():
    """Transformers' tokenizer of the same checkpoint."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint())


def ask(client, messages=CAPITAL, **options):
    options = {"model": "demo", "temperature": 0, "max_tokens": 100, **options}
    return client.chat.completions.create(messages=messages, **options)


def test_answers_make_sense(client):
    assert "Paris" in ask(client).choices[0].message.content
    sum_of = [{"role": "user", "content": "What is 12 + 30?"}]
    answer = ask(client, sum_of).choices[0]
    assert "42" in answer.message.content
    assert answer.finish_reason == "stop"


def test_tool_call_and_its_result(client):
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    choice = ask(client, messages, tools=[ADD]).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 12, "b": 30}
    messages += [choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": '{"result": 42}'}]
    assert "42" in ask(client, messages, tools=[ADD]).choices[0].message.content


def test_thinking_when_asked(client):
    message = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}}).choices[0].message
    assert message.reasoning
    assert message.reasoning_content == message.reasoning
    assert "Paris" in message.content
    assert "think>" not in message.content + message.reasoning
    assert getattr(ask(client).choices[0].message, "reasoning", None) is None


@pytest.mark.parametrize("prompt", [STORY, "naïve 春の海 🙂🙂"])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_streamed_equals_whole(client, prompt, temperature):
    options = {
        "model": "demo", "prompt": prompt, "max_tokens": 60, "temperature": temperature, "seed": 5, "n": 2,
        "logprobs": 2, "stream_options": {"include_usage": True},
    }  # fmt: skip
    whole = client.completions.create(**{k: v for k, v in options.items() if k != "stream_options"})
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.completions.create(stream=True, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [c.text for c in whole.choices]
    assert tokens == [c.logprobs.token_logprobs for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_seed(client):
    def text(seed):
        return (
            client.completions.create(model="demo", prompt=STORY, seed=seed, temperature=1.5, max_tokens=30)
            .choices[0]
            .text
        )

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_tokens_of_the_reasoning_are_counted(client, reference):
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "return_token_ids": True}
    whole = ask(client, extra_body=thinking)
    counted = whole.usage.completion_tokens_details.reasoning_tokens
    marked = whole.choices[0].token_ids.index(reference.convert_tokens_to_ids("</think>"))
    assert marked - 1 <= counted <= marked + 1, "what is before the closing mark"
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, extra_body=thinking))
    assert chunks[-1].usage == whole.usage
    assert ask(client).usage.completion_tokens_details.reasoning_tokens == 0


def test_prompt_is_transformers_own(demo, reference):
    messages = [{"role": "system", "content": "Be kind."}, *CAPITAL]
    ours = httpx.post(f"{demo.base}/tokenize", json={"messages": messages, "tools": [ADD]}).json()["tokens"]
    theirs = reference.apply_chat_template(messages, tools=[ADD], add_generation_prompt=True, return_dict=False)
    assert ours == theirs
    text = "Ünïcode 🙂 and <|im_start|> inside"
    ours = httpx.post(f"{demo.base}/tokenize", json={"prompt": text}).json()["tokens"]
    assert ours == reference(text)["input_ids"]
    assert httpx.post(f"{demo.base}/detokenize", json={"tokens": ours}).json()["prompt"] == reference.decode(ours)


def test_logprobs_are_transformers_own(demo, client):
    """Scored by an implementation that is not ours: the same weights in Transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    prompt = "The capital of France is"
    extra = {"return_token_ids": True}
    choice = client.completions.create(
        model="demo", prompt=prompt, max_tokens=0, echo=True, logprobs=3, extra_body=extra
    ).choices[0]
    ids = torch.tensor([choice.prompt_token_ids])
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    table = choice.logprobs
    assert "".join(table.tokens) == choice.text == prompt
    assert table.token_logprobs[0] is None
    assert (
        len(client.completions.create(model="demo", prompt=prompt, logprobs=40).choices[0].logprobs.top_logprobs[0])
        >= 40
    )
    # The server computes in the checkpoint's bfloat16.
    np.testing.assert_allclose(table.token_logprobs[1:], expected.numpy(), atol=0.15, rtol=0.05)


def test_stop_and_limits(client):
    story = client.completions.create(model="demo", prompt=STORY, temperature=0, max_tokens=40).choices[0].text
    word = story.split()[4]
    cut = client.completions.create(model="demo", prompt=STORY, temperature=0, max_tokens=40, stop=[word])
    assert cut.choices[0].text == story[: story.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].stop_reason == word


def test_batch_is_like_each_alone(client):
    prompts = [STORY, "The capital of France is", [5, 6, 7], "2 + 2 ="]
    mixed = [p for p in prompts if isinstance(p, str)]
    together = client.completions.create(model="demo", prompt=mixed, temperature=0, max_tokens=20)
    for prompt, choice in zip(mixed, together.choices, strict=True):
        alone = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=20)
        assert alone.choices[0].text == choice.text
    assert client.completions.create(model="demo", prompt=[5, 6, 7]).usage.prompt_tokens == 3


def test_client_that_goes_away_frees_its_pages(demo, client):
    extra = {"ignore_eos": True}
    options = {"model": "demo", "prompt": STORY, "max_tokens": 1500, "n": 3, "extra_body": extra}
    stream = client.completions.create(stream=True, **options)
    next(iter(stream))
    assert demo.metric("num_requests_running") >= 1
    assert demo.metric("kv_cache_usage_perc") > 0
    stream.close()
    assert eventually(lambda: demo.metric("num_requests_running") == 0, 3)
    assert demo.metric("kv_cache_usage_perc") == 0
    with pytest.raises(Exception, match="timed out"):
        client.with_options(timeout=0.5).completions.create(**options)
    assert eventually(lambda: demo.metric("num_requests_running") == 0, 3)
    assert demo.metric("kv_cache_usage_perc") == 0


def test_prefixes_are_reused_and_salted(demo, client):
    prompt = " ".join(f"word{i}" for i in range(60))

    def cached(salt=None):
        done = client.completions.create(model="demo", prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt})
        return done.usage.prompt_tokens_details.cached_tokens

    hits = demo.metric("prefix_cache_hits_total")
    assert cached() == 0
    assert cached() > 50
    assert cached("mine") == 0
    assert cached("mine") > 50
    assert demo.metric("prefix_cache_hits_total") > hits


def test_a_deadline_cuts_off(client):
    began = time.monotonic()
    extra = {"ignore_eos": True, "deadline": 0.3}
    choice = client.completions.create(model="demo", prompt=STORY, max_tokens=1900, extra_body=extra).choices[0]
    assert time.monotonic() - began < 3
    assert (choice.finish_reason, choice.stop_reason) == ("length", "deadline")


def test_refusals_come_from_the_whole_road(demo):
    def error(**fields):
        response = httpx.post(f"{demo.base}/v1/completions", json={"prompt": "x", **fields})
        assert response.status_code == 400, response.text
        return response.json()["error"]["param"]

    assert error(prompt=[10**6]) == "prompt"
    assert error(stop_token_ids=[10**6]) == "stop_token_ids"
    assert error(allowed_token_ids=[10**6]) == "allowed_token_ids"
    assert error(logit_bias={"1000000": 1}) == "logit_bias"
    assert error(min_tokens=50, max_tokens=4) == "min_tokens"
    assert error(temperature=-1) == "temperature"
    assert error(max_tokens=10**6) == "max_tokens"
    assert error(prompt="x " * 3000) == "prompt"
    assert httpx.get(f"{demo.base}/health").status_code == 200


def test_engine_killed_in_the_middle_of_a_stream(demo, client):
    """The stream goes on with the tokens it would have had, greedy and sampled alike."""
    options = {
        "model": "demo", "prompt": STORY, "max_tokens": 150, "seed": 3, "n": 2, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    undisturbed = [c.text for c in client.completions.create(**options).choices]
    texts, engine = ["", ""], demo.engine
    for count, chunk in enumerate(client.completions.create(stream=True, **options)):
        if count == 20:
            engine.kill()
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == undisturbed
    assert demo.engine.pid != engine.pid
    assert httpx.get(f"{demo.base}/health").status_code == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["/no/such/model"], "/no/such/model"), (["--max-model-len", "10000000"], "max_model_len = 10000000")],
)
def test_what_cannot_be_served_is_said_in_one_line(flags, said):
    command = [sys.executable, "-m", "quire.cli.main", "serve", "--port", "0", "--device", "cpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
