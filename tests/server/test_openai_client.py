"""Every OpenAI route with the real openai client, streaming and not, over loopback, around the fake engine."""

from __future__ import annotations

import itertools

import openai
import pytest

ASK = [{"role": "user", "content": "Hello?"}]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def streamed(client, count=1, **options):
    """(texts by choice, finish reasons, usages) of a streamed completion."""
    texts, reasons, usages = [""] * count, [None] * count, []
    for chunk in client.completions.create(model="demo", stream=True, **options):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return texts, reasons, usages


def test_models(client):
    assert [m.id for m in client.models.list()] == ["demo", "alias/of-it"]
    assert client.models.retrieve("alias/of-it").id == "alias/of-it"
    with pytest.raises(openai.NotFoundError) as failed:
        client.models.retrieve("gpt-5")
    assert failed.value.code == "model_not_found"


def test_completion(client):
    done = client.completions.create(model="demo", prompt="abc", max_tokens=20)
    assert done.object == "text_completion"
    assert done.model == "demo"
    assert done.usage.prompt_tokens == 3
    assert done.usage.completion_tokens == 20
    assert done.usage.total_tokens == 23
    assert done.usage.prompt_tokens_details.cached_tokens == 3
    assert done.choices[0].finish_reason == "length"
    assert len(done.choices[0].text) > 5


def test_default_max_tokens_is_openais(client):
    assert client.completions.create(model="demo", prompt="abc").usage.completion_tokens == 16


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt", ["abc", ["abc", "de"], [97, 98], [[97, 98], [99]]])
@pytest.mark.parametrize("stop", [None, ["日", "word"]])
def test_streamed_equals_whole(client, prompt, n, stop):
    options = {"prompt": prompt, "max_tokens": 50, "n": n, "stop": stop}
    whole = client.completions.create(model="demo", **options)
    count = len(whole.choices)
    assert count == n * (1 if prompt in ("abc", [97, 98]) else 2)
    assert [c.index for c in whole.choices] == list(range(count))
    texts, reasons, usages = streamed(client, count, stream_options={"include_usage": True}, **options)
    assert texts == [c.text for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usages[-1] == whole.usage
    assert all(u is None for u in usages[:-1])


def test_samples_and_prompts_are_kept_apart(client):
    apart = [client.completions.create(model="demo", prompt=p, max_tokens=9, n=2).choices for p in ("abc", "de")]
    together = client.completions.create(model="demo", prompt=["abc", "de"], max_tokens=9, n=2).choices
    assert [c.text for c in together] == [c.text for choices in apart for c in choices]
    assert len({c.text for c in together}) == 4


def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, _, usages = streamed(client, prompt="abc", max_tokens=6, stream_options=options)
    counts = [u.completion_tokens for u in usages]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert all(u.prompt_tokens == 3 for u in usages)


def test_no_usage_unless_asked(client):
    _, _, usages = streamed(client, prompt="abc", max_tokens=6)
    assert set(usages) == {None}


def test_seed_decides(client):
    def text(seed):
        return client.completions.create(model="demo", prompt="abc", seed=seed).choices[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize("prompt", ["häß", [104, 97]])
def test_echo(client, prompt):
    plain = client.completions.create(model="demo", prompt=prompt, max_tokens=8).choices[0].text
    echoed = client.completions.create(model="demo", prompt=prompt, max_tokens=8, echo=True).choices[0].text
    before = prompt if isinstance(prompt, str) else "ha"
    assert echoed == before + plain
    assert streamed(client, prompt=prompt, max_tokens=8, echo=True)[0] == [echoed]


def test_echo_without_a_token(client):
    done = client.completions.create(model="demo", prompt="abc", max_tokens=0, echo=True, logprobs=2)
    choice = done.choices[0]
    assert choice.text == "abc"
    assert choice.finish_reason == "length"
    assert done.usage.completion_tokens == 0
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == [-1.5, -1.5]
    texts, reasons, usages = streamed(
        client, prompt="abc", max_tokens=0, echo=True, stream_options={"include_usage": True}
    )
    assert (texts, reasons, usages[-1].completion_tokens) == (["abc"], ["length"], 0)


def test_completion_logprobs(client):
    options = {"prompt": "abc", "max_tokens": 5, "logprobs": 3, "echo": True}
    choice = client.completions.create(model="demo", **options).choices[0]
    table = choice.logprobs
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset) == 8
    assert "".join(table.tokens[:3]) == "abc"
    assert table.text_offset[:4] == [0, 1, 2, 3]
    assert table.top_logprobs[0] is None
    assert table.top_logprobs[1] == {"b": -1.5, "A": -1.0, "B": -3.0}
    pieces = [c.choices[0].logprobs for c in client.completions.create(model="demo", stream=True, **options)]
    assert joined(p.tokens for p in pieces if p) == table.tokens
    assert joined(p.text_offset for p in pieces if p) == table.text_offset
    assert joined(p.top_logprobs for p in pieces if p) == table.top_logprobs


def test_impossible_tokens_have_a_finite_logprob(client):
    table = client.completions.create(model="demo", prompt="abc", max_tokens=1, logprobs=4).choices[0].logprobs
    assert table.top_logprobs[0]["C"] == -9999.0


def test_chat(client):
    done = client.chat.completions.create(model="demo", messages=ASK, max_completion_tokens=20)
    message = done.choices[0].message
    assert message.role == "assistant"
    assert message.content
    assert message.refusal is None
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == 20
    assert done.usage.prompt_tokens == len("<user>Hello?</user><assistant>")


@pytest.mark.parametrize("n", [1, 3])
def test_chat_streamed_equals_whole(client, n):
    options = {"model": "demo", "messages": ASK, "max_tokens": 70, "n": n, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    texts, tokens, reasons, roles = [""] * n, [[] for _ in range(n)], [None] * n, [None] * n
    usage = None
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles[choice.index] = choice.delta.role or roles[choice.index]
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.content
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices] == ["stop"] * n
    assert roles == ["assistant"] * n
    assert usage == whole.usage
    assert tokens == [c.logprobs.content for c in whole.choices]
    assert b"".join(bytes(t.bytes) for t in tokens[0][:-1]).decode() == texts[0]


def test_chat_logprobs(client):
    def first(**options):
        done = client.chat.completions.create(model="demo", messages=ASK, max_tokens=3, logprobs=True, **options)
        return done.choices[0].logprobs.content[0]

    entry = first(top_logprobs=3)
    assert entry.logprob == -1.5
    assert [t.logprob for t in entry.top_logprobs] == [-1.0, -1.5, -3.0]  # best first, the chosen one in its place
    assert [t.logprob for t in first(top_logprobs=1).top_logprobs] == [-1.0]  # the chosen one is not among the best
    assert first().top_logprobs == []


def test_chat_takes_what_the_context_leaves(live, client):
    done = client.chat.completions.create(model="demo", messages=ASK, extra_body={"ignore_eos": True})
    assert done.usage.total_tokens == live.engine.info.max_model_len


def test_text_parts_are_joined(client, http):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}], "add_generation_prompt": False}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    assert bytes(tokens).decode() == "<user>a\nb</user>"
    assert client.chat.completions.create(model="demo", messages=body["messages"]).choices


def test_openais_own_answers_can_be_sent_back(client):
    answer = client.chat.completions.create(model="demo", messages=ASK).choices[0].message
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        answer.model_dump(),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    assert client.chat.completions.create(model="demo", messages=messages).choices


def test_continue_final_message(client, http):
    messages = [*ASK, {"role": "assistant", "content": "It is"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    tokens = http.post("/tokenize", json={"messages": messages, **fields}).json()["tokens"]
    assert bytes(tokens).decode() == "<user>Hello?</user><assistant>It is"
    plain = client.chat.completions.create(model="demo", messages=messages, max_tokens=9, extra_body=fields)
    echoed = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=9, extra_body={**fields, "echo": True}
    )
    assert echoed.choices[0].message.content == "It is" + plain.choices[0].message.content


def test_return_token_ids(client):
    extra = {"return_token_ids": True}
    whole = client.completions.create(model="demo", prompt="abc", max_tokens=4, extra_body=extra).choices[0]
    assert whole.prompt_token_ids == [97, 98, 99]
    assert len(whole.token_ids) == 4
    chunks = list(client.completions.create(model="demo", prompt="abc", max_tokens=4, stream=True, extra_body=extra))
    assert chunks[0].choices[0].prompt_token_ids == [97, 98, 99]
    assert joined(c.choices[0].token_ids for c in chunks) == whole.token_ids
    chat = client.chat.completions.create(model="demo", messages=ASK, max_tokens=4, extra_body=extra)
    assert bytes(chat.prompt_token_ids).decode() == "<user>Hello?</user><assistant>"
    assert len(chat.choices[0].token_ids) == 4


def test_every_sampling_field_reaches_the_engine(live, client):
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [7],
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "include_stop_str_in_output": True,
        "allowed_token_ids": [1, 2], "bad_words": ["no"], "prompt_logprobs": 1, "cache_salt": "s", "priority": 3,
        "deadline": 9.5,
    }  # fmt: skip
    client.completions.create(
        model="demo", prompt="abc", n=2, temperature=0.5, top_p=0.6, seed=11, presence_penalty=0.7,
        frequency_penalty=0.8,
        logit_bias={"5": -1}, stop=["x"], max_tokens=4, logprobs=2, extra_body=extra,
    )  # fmt: skip
    _, params, options = live.engine.opened[-1]
    expected = {
        **{k: v for k, v in extra.items() if k not in ("cache_salt", "priority", "deadline")},
        "n": 2, "temperature": 0.5, "top_p": 0.6, "seed": 11, "presence_penalty": 0.7, "frequency_penalty": 0.8,
        "logit_bias": {5: -1}, "stop": ["x"], "max_tokens": 4, "logprobs": 2,
    }  # fmt: skip
    assert {name: getattr(params, name) for name in expected} == expected
    assert options == {"cache_salt": "s", "priority": 3, "deadline": 9.5}


def test_prompt_logprobs(client):
    extra = {"prompt_logprobs": 1}
    choice = client.completions.create(model="demo", prompt="abc", extra_body=extra).choices[0]
    assert choice.prompt_logprobs[0] is None
    assert choice.prompt_logprobs[1]["98"] == {"logprob": -1.5, "rank": 2, "decoded_token": "b"}
    chat = client.chat.completions.create(model="demo", messages=ASK, extra_body=extra)
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens


def test_truncated_prompt(client):
    extra = {"truncate_prompt_tokens": 2}
    done = client.completions.create(model="demo", prompt="abc", max_tokens=3, echo=True, extra_body=extra)
    assert done.usage.prompt_tokens == 2
    assert done.choices[0].text.startswith("bc")
    extra["truncation_side"] = "right"
    done = client.completions.create(model="demo", prompt="abc", max_tokens=3, echo=True, extra_body=extra)
    assert done.choices[0].text.startswith("ab")
    with pytest.raises(openai.BadRequestError, match="truncation_side"):
        client.completions.create(model="demo", prompt="abc", extra_body={"truncation_side": "left"})


def test_an_id_of_the_callers_own(client, http):
    """In the body, as vLLM takes it; a header beats it."""
    body = {"model": "demo", "prompt": "abc", "request_id": "job:7"}
    ids = [http.post("/v1/completions", json=body).json()["id"] for _ in range(2)]
    assert all(one.startswith("cmpl-job:7-") for one in ids)
    assert len(set(ids)) == 2, "given twice, it is two answers"
    answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"}).json()
    assert answer["id"].startswith("cmpl-mine")
    assert (
        client.chat.completions.create(model="demo", messages=ASK, extra_body={"request_id": "a"}).id[:11]
        == "chatcmpl-a-"
    )
    with pytest.raises(openai.BadRequestError, match="request_id"):
        client.completions.create(model="demo", prompt="abc", extra_body={"request_id": "two words"})


def test_only_the_allowed_tools_are_in_the_prompt(client, live):
    tools = [{"type": "function", "function": {"name": name}} for name in ("north", "south", "west")]

    def choice(*names, mode="auto"):
        named = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}

    def prompt(chosen):
        extra = {"return_token_ids": True}
        made = client.chat.completions.create(
            model="demo", messages=ASK, max_tokens=1, tools=tools, tool_choice=chosen, extra_body=extra
        )
        return bytes(made.prompt_token_ids).decode()

    assert prompt(choice("north", "west")).count('"name"') == 2
    assert "south" not in prompt(choice("north", "west"))
    assert "south" in prompt("auto")
    with pytest.raises(openai.BadRequestError, match="tool_choice: no tool is named 'east'"):
        prompt(choice("east"))
    with pytest.raises(openai.BadRequestError, match=r"tool_choice\.custom: custom tools are not supported"):
        prompt({"type": "custom", "custom": {"name": "north"}})


def test_tokens_as_ids(client):
    extra = {"return_tokens_as_token_ids": True}
    table = (
        client.completions.create(model="demo", prompt="abc", max_tokens=1, logprobs=1, extra_body=extra)
        .choices[0]
        .logprobs
    )
    assert table.tokens[0].startswith("token_id:")


def test_reasoning_effort_switches_thinking(http):
    def prompt(**fields):
        body = {"model": "demo", "messages": ASK, "max_tokens": 1, "return_token_ids": True, **fields}
        return bytes(http.post("/v1/chat/completions", json=body).json()["prompt_token_ids"]).decode()

    assert "<think>" in prompt(reasoning_effort="high")
    assert "<think>" not in prompt(reasoning_effort="none")
    assert "<think>" in prompt(chat_template_kwargs={"enable_thinking": True})
    assert "<think>" not in prompt()


def test_tokenize_and_back(http):
    answer = http.post("/tokenize", json={"model": "demo", "prompt": "ab", "return_token_strs": True}).json()
    assert answer == {"count": 2, "max_model_len": 4096, "tokens": [97, 98], "token_strs": ["a", "b"]}
    assert http.post("/detokenize", json={"model": "demo", "tokens": [97, 98]}).json() == {"prompt": "ab"}


def test_async_client(live):
    import asyncio

    async def both():
        async with openai.AsyncOpenAI(base_url=f"{live.base}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(model="demo", messages=ASK, stream=True, max_tokens=9)
            streamed = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
            whole = await client.chat.completions.create(model="demo", messages=ASK, max_tokens=9)
            return streamed, whole.choices[0].message.content

    streamed, whole = asyncio.run(both())
    assert streamed == whole != ""
