"""Bits do not depend on company: exact equality of tokens and log-probabilities, however a request is served."""

from __future__ import annotations

import asyncio
import random

import pytest

from quire import AsyncLLM, SamplingParams
from quire.config import make_config
from quire.engine.outputs import merge

COUNT = 32


def prompts(seed: int = 0, count: int = COUNT) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 384) for _ in range(40)]
    made = []
    for i in range(count):
        own = [rng.randrange(3, 384) for _ in range(rng.choice([1, 3, 15, 16, 17, 40, 90]))]
        made.append((shared if i % 3 == 0 else []) + own)
    return made


def params(count: int = COUNT) -> list[SamplingParams]:
    """Greedy and sampled, with and without penalties, all with log-probabilities."""
    kinds = [
        dict(temperature=0.0),
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=20, top_p=0.9),
        dict(temperature=1.3, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1),
    ]
    return [
        SamplingParams(
            max_tokens=12 + i % 9, seed=1000 + i, logprobs=3, ignore_eos=True, detokenize=False, **kinds[i % 4]
        )
        for i in range(count)
    ]


def bits(outputs) -> list:
    """Everything that must be equal to the bit."""
    return [
        [
            (o.token_ids, [[(t, p.logprob.hex(), p.rank) for t, p in entry.items()] for entry in o.logprobs])
            for o in output.outputs
        ]
        for output in outputs
    ]


@pytest.fixture(scope="module", params=["tiny", "windowed"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def alone(model, dtype):
    """Each request served by itself, nothing cached: what every other way of serving must reproduce."""
    from quire import LLM

    llm = LLM(str(model), device="cpu", dtype=dtype, skip_tokenizer_init=True, kv_cache_memory_bytes=64 << 20,
              enable_prefix_caching=False)  # fmt: skip
    expected = [bits(llm.generate([p], s))[0] for p, s in zip(prompts(), params(), strict=True)]
    llm.shutdown()
    return expected


WAYS = {
    "together": dict(),
    "one step ahead of nothing": dict(async_scheduling=False),
    "chunked by 7": dict(max_num_batched_tokens=7, max_num_seqs=7),
    "long prompts in pieces": dict(long_prefill_token_threshold=5),
    "not chunked": dict(enable_chunked_prefill=False, max_model_len=512, max_num_batched_tokens=512),
    "larger pages": dict(block_size=32),
    "preempted, recomputed": dict(tiny_pool=True, preemption_mode="recompute"),
    "preempted, swapped": dict(tiny_pool=True, preemption_mode="swap"),
    "by priority": dict(scheduling_policy="priority", tiny_pool=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_served(way, model, dtype, alone, engine):
    options = dict(WAYS[way])
    groups = 2 if "windowed" in str(model) else 1
    tiny_pool = options.pop("tiny_pool", False)
    if tiny_pool:
        options.update(num_pages=(18,) * groups, num_host_pages=(30,) * groups, max_model_len=200)
    llm = engine(model, dtype=dtype, **options)
    order = [i % 5 for i in range(COUNT)] if options.get("scheduling_policy") else None
    outputs = llm.generate(prompts(), params(), priority=order)
    assert bits(outputs) == alone
    if tiny_pool:
        assert llm._engine.core.stats().preemptions > 0, "the pool was meant to be too small"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_with_rounded_weights(quantization, tiny, engine):
    """Inputs of a product are rounded too, each row by its own scales: company must not show in them."""
    options = dict(dtype="bfloat16", quantization=quantization, enable_prefix_caching=False)
    llm = engine(tiny, **options)
    expected = [bits(llm.generate([p], s))[0] for p, s in zip(prompts(count=12), params(12), strict=True)]
    assert bits(llm.generate(prompts(count=12), params(12))) == expected
    assert expected != bits(engine(tiny, dtype="bfloat16").generate(prompts(count=12), params(12))), (
        "nothing was rounded"
    )
    tight = engine(tiny, **options, max_num_batched_tokens=7, max_num_seqs=7, num_pages=(18,), num_host_pages=(30,),
                   max_model_len=200, preemption_mode="swap")  # fmt: skip
    assert bits(tight.generate(prompts(count=12), params(12))) == expected


@pytest.mark.parametrize("kv_cache_dtype", ["fp16", "int8"])
def test_with_a_smaller_cache(kv_cache_dtype, windowed, engine):
    """Keys and values are rounded as they are stored: who is stored with them must not show."""
    options = dict(dtype="float32", kv_cache_dtype=kv_cache_dtype)
    llm = engine(windowed, **options, enable_prefix_caching=False)
    expected = [bits(llm.generate([p], s))[0] for p, s in zip(prompts(count=12), params(12), strict=True)]
    cached = engine(windowed, **options)
    assert bits(cached.generate(prompts(count=12), params(12))) == expected
    assert bits(cached.generate(prompts(count=12), params(12))) == expected
    assert expected != bits(engine(windowed, dtype="float32").generate(prompts(count=12), params(12)))
    tight = engine(windowed, **options, max_num_batched_tokens=7, max_num_seqs=7, num_pages=(18, 18),
                   num_host_pages=(30, 30), max_model_len=200, preemption_mode="swap")  # fmt: skip
    assert bits(tight.generate(prompts(count=12), params(12))) == expected


def test_prefix_cached(model, dtype, alone, engine):
    llm = engine(model, dtype=dtype)
    assert bits(llm.generate(prompts(), params())) == alone
    again = llm.generate(prompts(), params())
    assert bits(again) == alone
    assert sum(output.num_cached_tokens for output in again) > 500


def test_samples_of_one_request(model, dtype, engine):
    """Sample i of n is the request with sample i's seed, alone: forking a prompt changes nothing."""
    from quire.sampling.noise import child_seed

    llm = engine(model, dtype=dtype)
    base = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=20, logprobs=2, ignore_eos=True, detokenize=False)
    prompt = prompts()[5]
    together = bits(llm.generate([prompt], base))[0]
    for index in range(4):
        single = base.clone()
        single.n, single.seed = 1, child_seed(7, index)
        assert bits(llm.generate([prompt], single))[0][0] == together[index]
    assert len({tuple(tokens) for tokens, _ in together}) > 1, "the samples should differ"


def test_in_another_process(model, dtype, alone):
    async def run():
        config = make_config(
            str(model), device="cpu", dtype=dtype, kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True
        )
        llm = AsyncLLM(config)
        await llm.start()
        try:

            async def one(prompt, sampling):
                total = None
                async for delta in llm.generate(prompt, sampling):
                    total = merge(total, delta)
                return total

            return await asyncio.gather(*(one(p, s) for p, s in zip(prompts(), params(), strict=True)))
        finally:
            await llm.shutdown()

    assert bits(asyncio.run(run())) == alone
