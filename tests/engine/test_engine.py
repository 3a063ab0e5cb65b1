"""The engine's promises around the tokens: log-probabilities, failures that stay alone, books that balance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.errors import ConfigError, DeviceUnavailable, ModelError, RequestRefused, UnsupportedOnDevice, UserError
from quire.message import AddRequest

PROMPT = [5, 17, 300, 42, 8, 99, 200, 11, 64, 3, 77, 120, 250, 31, 9, 10, 222, 56]


def greedy(count=8, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options)


@pytest.fixture(scope="module")
def reference(tiny):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    def logprobs(tokens):
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return logprobs


def test_logprobs_are_those_of_transformers(tiny, engine, reference):
    (output,) = engine(tiny, dtype="float32").generate([PROMPT], greedy(6, logprobs=5, prompt_logprobs=2))
    sample = output.outputs[0]
    expected = reference(PROMPT + sample.token_ids)
    for i, (token, entry) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
        row = expected[len(PROMPT) - 1 + i]
        top = row.topk(5)
        assert list(entry)[:1] == [token]
        assert sorted(entry) == sorted({token, *top.indices.tolist()})
        for other, logprob in entry.items():
            assert math.isclose(logprob.logprob, row[other].item(), abs_tol=2e-4)
            assert logprob.rank == int((row > row[other]).sum()) + 1
    total = sum(e[t].logprob for t, e in zip(sample.token_ids, sample.logprobs, strict=True))
    assert math.isclose(sample.cumulative_logprob, total)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPT)
    for i in range(1, len(PROMPT)):
        entry = output.prompt_logprobs[i]
        assert math.isclose(entry[PROMPT[i]].logprob, expected[i - 1][PROMPT[i]].item(), abs_tol=2e-4)
        assert len(entry) in (2, 3)


def test_a_device_is_told_what_is_coming_and_when_loading_ends_however_it_ends(tiny, monkeypatch):
    from quire.plugins import Registry

    told = []
    monkeypatch.setattr(Registry, "begin", lambda self, *args: told.append(args))
    LLM(str(tiny), device="cpu", dtype="float32", skip_tokenizer_init=True)
    with pytest.raises(UserError):
        LLM(str(tiny), device="cpu", dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=1)
    held = sum(file.stat().st_size for file in Path(tiny).glob("*.safetensors"))
    begun, ended, *again = told
    assert again == [begun, ended]
    assert ended == ("cpu", 0, 0)
    assert 0.9 * held < begun[1] <= held, "the checkpoint, without its header, in the dtype that was asked for"
    assert 0 < begun[2] < begun[1]


@pytest.mark.parametrize("budget", [5, 7, 2048])
def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(tiny, engine, budget):
    sampling = greedy(1, prompt_logprobs=0)
    whole = engine(tiny, dtype="float32").generate([PROMPT * 3], sampling)[0].prompt_logprobs
    llm = engine(tiny, dtype="float32", max_num_batched_tokens=budget, max_num_seqs=4)
    llm.generate([PROMPT * 3], greedy(1))  # fills the cache
    assert llm.generate([PROMPT * 3], sampling)[0].prompt_logprobs == whole


def test_stop_tokens_end_a_sample_and_are_reported(tiny, engine):
    llm = engine(tiny, dtype="float32")
    free = llm.generate([PROMPT], greedy(12))[0].outputs[0].token_ids
    stop = free[5]
    cut = llm.generate([PROMPT], greedy(12, stop_token_ids=[stop]))[0].outputs[0]
    first = free.index(stop)
    assert cut.token_ids == free[: first + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    late = llm.generate([PROMPT], greedy(12, stop_token_ids=[stop], min_tokens=first + 2))[0].outputs[0]
    assert late.token_ids[: first + 2].count(stop) == 0
    assert llm.generate([PROMPT], greedy(3))[0].outputs[0].finish_reason == "length"


def test_a_request_whose_logits_are_not_numbers_fails_alone(tiny, engine, monkeypatch):
    llm = engine(tiny, dtype="float32")
    expected = [o.outputs[0].token_ids for o in llm.generate([PROMPT, PROMPT[::-1]], greedy())]
    decoder = llm._engine.core._run.__self__.model
    logits = decoder.logits
    poisoned = [7] * 9

    def poison(hidden, rows):
        result = logits(hidden, rows)
        tables = llm._engine.core._run.__self__.tables
        for i in range(len(result)):
            if i == 1 and tables.tokens[:, :9].tolist().count(poisoned):
                result[i] = float("nan")
        return result

    monkeypatch.setattr(decoder, "logits", poison)
    good, bad, other = llm.generate([PROMPT, poisoned, PROMPT[::-1]], greedy())
    assert bad.outputs[0].finish_reason == "error"
    assert "NaN" in bad.error
    monkeypatch.undo()
    assert good.outputs[0].token_ids == expected[0]
    assert other.outputs[0].finish_reason in ("length", "error")


def test_a_step_that_raises_fails_only_the_request_at_fault(tiny, engine, monkeypatch):
    llm = engine(tiny, dtype="float32")
    prompts = [PROMPT, [7] * 9, PROMPT[::-1]]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy())]
    runner = llm._engine.core._run.__self__
    forward = runner.model.forward

    def fragile(token_ids, batch, kv, plan, rows=None):
        if (token_ids == 7).sum() >= 9:
            raise RuntimeError("this prompt breaks the kernel")
        return forward(token_ids, batch, kv, plan, rows)

    monkeypatch.setattr(runner.model, "forward", fragile)
    good, bad, other = llm.generate([[*p, 4] for p in prompts], greedy())
    assert bad.outputs[0].finish_reason == "error"
    assert "this prompt breaks the kernel" in bad.error
    monkeypatch.undo()
    again = llm.generate([[*PROMPT, 4], [*PROMPT[::-1], 4]], greedy())
    assert [good.outputs[0].token_ids, other.outputs[0].token_ids] == [o.outputs[0].token_ids for o in again]
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, greedy())] == expected


def test_abort_at_every_moment_balances_the_books(tiny, engine):
    for moment in range(8):
        llm = engine(tiny, dtype="float32", max_num_batched_tokens=16, max_num_seqs=8)
        core = llm._engine.core
        for i in range(6):
            core.add(
                AddRequest(
                    request_id=str(i), prompt_token_ids=PROMPT * (1 + i), sampling=greedy(20, n=1 + i % 3), seed=i
                )
            )
        outputs = []
        for _ in range(moment):
            outputs += core.step()
        core.abort([str(i) for i in range(0, 6, 2)], [("1", 0)])
        while core.has_work():
            outputs += core.step()
        core.scheduler.check()
        assert {o.request_id for o in outputs if o.finish_reason == "abort"} == {"0", "2", "4"}
        assert {(o.request_id, o.index) for o in outputs if o.finish_reason == "length"} >= {
            ("3", 0),
            ("5", 0),
            ("5", 2),
        }
        stats = core.stats(pages=True)
        assert stats.running == stats.waiting == 0
        assert stats.pages_free == stats.pages_total
        assert len(stats.pages[0]) == stats.pages_total + 1


def test_a_deadline_ends_a_request(tiny, engine):
    core = engine(tiny, dtype="float32")._engine.core
    core.add(AddRequest(request_id="late", prompt_token_ids=PROMPT, sampling=greedy(400), seed=1, deadline=0.05))
    outputs = []
    while core.has_work():
        outputs += core.step()
    assert outputs[-1].finish_reason == "deadline"


def test_forks_share_the_prompt_and_copy_what_they_write(tiny, engine):
    llm = engine(tiny, dtype="float32")
    sampling = SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([PROMPT], sampling)
    assert [o.index for o in output.outputs] == list(range(5))
    assert llm._engine.core.stats().prompt_tokens == len(PROMPT)  # computed once


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "is empty"),
        ([384], "384 is not a token id between 0 and 383"),
        ([-1], "-1 is not a token id"),
        ([True, 2], "True is not a token id"),
        ([1] * 512, "512 tokens leave no room"),
        ("text", "needs a tokenizer"),
        ({"text": "x"}, "unknown key text"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_by_name(tiny, engine, prompt, named):
    with pytest.raises(RequestRefused, match=named) as refused:
        engine(tiny, dtype="float32").generate([prompt] if not isinstance(prompt, dict) else prompt, greedy())
    assert refused.value.field == "prompt"


def test_what_cannot_be_built_is_refused_by_name(tiny, tmp_path):
    with pytest.raises(DeviceUnavailable, match="no plugin registers the device 'abacus'"):
        LLM(str(tiny), device="abacus")
    with pytest.raises(UnsupportedOnDevice, match="--block-size 4096"):
        LLM(str(tiny), device="cpu", block_size=4096)
    with pytest.raises(UnsupportedOnDevice, match="--kv-cache-dtype fp4"):
        LLM(str(tiny), device="cpu", kv_cache_dtype="fp4")
    with pytest.raises(UnsupportedOnDevice, match="--quantization int4 is not .*: it offers none; instead: no --quant"):
        LLM(str(tiny), device="cpu-torch", quantization="int4")
    with pytest.raises(ConfigError, match="quantization = 'awq': .* rounded to int8, int4"):
        LLM(str(tiny), device="cpu", quantization="awq")
    with pytest.raises(ConfigError, match="max_model_len = 4096: this model knows 512"):
        LLM(str(tiny), device="cpu", max_model_len=4096)
    with pytest.raises(ConfigError, match="unknown option"):
        LLM(str(tiny), device="cpu", tensor_parallel_size=2)
    (tmp_path / "config.json").write_text('{"architectures": ["FancyForCausalLM"]}')
    with pytest.raises(ModelError, match=r"FancyForCausalLM.*Qwen3ForCausalLM"):
        LLM(str(tmp_path), device="cpu")


def test_encode_is_refused_by_name(tiny, engine):
    with pytest.raises(UserError, match="no embedding"):
        engine(tiny, dtype="float32").encode("x")


def test_dummy_weights_need_only_a_config(tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    llm = LLM(
        str(tmp_path), device="cpu", load_format="dummy", skip_tokenizer_init=True, kv_cache_memory_bytes=16 << 20
    )
    assert len(llm.generate([PROMPT], greedy(4))[0].outputs[0].token_ids) == 4
    llm.shutdown()
