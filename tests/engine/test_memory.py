"""The memory arithmetic: what it says is what is allocated, and what does not fit is refused with the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from quire.cli.engine_args import byte_size, length, make_config
from quire.engine.measure import largest_step
from quire.engine.memory import capture_bytes, plan_memory, request_pages, working_bytes
from quire.errors import ConfigError, DoesNotFit
from quire.hardware import MemoryInfo
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

SPEC = ModelSpec("X", 1000, 64, (LayerSpec(AttentionSpec(4, 2, 16, 0.25), MlpSpec(128)),) * 4, NormSpec(), 4096)
FULL = KVSpec((KVGroupSpec((0, 1, 2, 3), 2, 16, "bfloat16", 16),))
MIXED = KVSpec((KVGroupSpec((0, 1), 2, 16, "bfloat16", 16), KVGroupSpec((2, 3), 2, 16, "bfloat16", 16, window=128)))
PAGE = 2 * 4 * 16 * 2 * 16 * 2
GIB = 1 << 30


def plan(memory=MemoryInfo(GIB, GIB), kv=FULL, weights=100 << 20, **options):
    config = make_config("x", **options)
    return plan_memory(config, SPEC, kv, [PAGE] * len(kv.groups), weights, "bfloat16", memory)


def test_the_sum_stays_inside_the_budget():
    made = plan(max_num_seqs=256)
    assert made.weights + made.working + made.kv <= made.budget <= GIB
    assert made.kv == sum(made.pages) * PAGE
    assert made.max_model_len == 4096
    report = made.report()
    assert "weights 100.00 MiB" in report
    assert "4,096" in report


def test_no_more_pages_than_the_sequences_can_use():
    made = plan(memory=MemoryInfo(64 * GIB, 64 * GIB), max_num_seqs=3)
    assert made.requests == 3
    assert made.pages == (3 * 256 + 1,)


def test_a_shared_memory_is_left_half_to_others():
    assert plan(memory=MemoryInfo(GIB, 2 * GIB, shared=True)).budget == GIB // 2
    assert plan(memory=MemoryInfo(GIB, 2 * GIB, shared=True), gpu_memory_utilization=0.25).budget == GIB // 2


def test_an_explicit_size_is_obeyed():
    made = plan(kv_cache_memory_bytes=8 << 20, max_model_len=512)
    assert made.kv <= (8 << 20) + PAGE
    assert made.max_model_len == 512


def test_a_context_nobody_asked_for_is_shortened_and_said():
    made = plan(kv_cache_memory_bytes=100 * PAGE)
    assert 1 <= made.requests < 2
    assert made.max_model_len <= 1600
    assert "the model allows 4,096" in made.report()


def test_what_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(DoesNotFit) as refused:
        plan(weights=2 * GIB)
    text = str(refused.value)
    assert "weights 2.00 GiB" in text
    assert "--max-model-len" in text
    with pytest.raises(DoesNotFit, match="one request of 4,096 tokens"):
        plan(kv_cache_memory_bytes=100 * PAGE, max_model_len=4096)


def test_a_window_group_needs_pages_for_the_window_and_a_chunk():
    full, window = request_pages(MIXED, 4096, 256)
    assert full == 256
    assert window == (128 + 256) // 16 + 1
    made = plan(kv=MIXED, kv_cache_memory_bytes=64 << 20, max_num_batched_tokens=256)
    assert made.pages[1] < made.pages[0]


def test_working_memory_grows_with_tokens_and_vocabulary():
    assert working_bytes(SPEC, "float32", 2000, 10) == 2 * working_bytes(SPEC, "float32", 1000, 5)
    assert working_bytes(SPEC, "float32", 0, 1) == 1000 * 16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(block_size=24), "block_size = 24"),
        (dict(max_num_seqs=0), "max_num_seqs = 0"),
        (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization = 1.5"),
        (dict(dtype="int3"), "dtype = 'int3'"),
        (dict(device="cpu:x"), "device = cpu:x"),
        (dict(scheduling_policy="random"), "scheduling_policy = 'random'"),
        (dict(enable_chunked_prefill=False, max_model_len=9000), "max_num_batched_tokens = 2048"),
        (dict(tensor_parallel_size=2), "unknown option tensor_parallel_size"),
        (dict(max_num_seqs="many"), "Expected `int`, got `str`.*max_num_seqs"),
        (dict(enforce_eager=3), "Expected `bool`, got `int`.*enforce_eager"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_named(options, named):
    with pytest.raises(ConfigError, match=named):
        make_config("x", **options)


def test_sizes_are_read_as_people_write_them():
    assert [byte_size(t) for t in ("4G", "512M", "1.5GiB", "123", "2kb")] == [4 << 30, 512 << 20, 3 << 29, 123, 2048]
    assert [length(t) for t in ("4096", "32k", "auto")] == [4096, 32768, 0]


def test_a_measured_step_replaces_the_estimate():
    """Less than estimated: more pages; more than estimated: fewer. The length never grows beyond what was loaded for."""
    memory, weights = MemoryInfo(GIB, GIB), 700 << 20
    config = make_config("x", max_num_seqs=1000)

    def made(measured=None, longest=None):
        return plan_memory(config, SPEC, FULL, [PAGE], weights, "bfloat16", memory, measured, longest)

    estimated = made()
    less, more = made(estimated.working // 2), made(estimated.working + (100 << 20))
    assert more.kv < estimated.kv < less.kv
    assert more.kv + more.working + more.weights <= more.budget + PAGE  # page 0 is nobody's
    assert "(measured)" in less.report()
    assert "(measured)" not in estimated.report()
    assert made(0, longest=512).max_model_len == 512
    with pytest.raises(DoesNotFit, match="working memory 2.00 GiB"):
        made(2 * GIB)


@pytest.mark.parametrize("family", ["tiny", "windowed"])
def test_an_engine_sizes_its_pages_by_the_step_it_measured(family, engine, request, monkeypatch):
    """Through the real step, on a device that is made to tell: the pages shrink by what it took, the answer is the same."""
    from quire_cpu.native_backend import NativeCpuBackend

    model = request.getfixturevalue(family)
    options = dict(device="cpu", max_num_seqs=4, kv_cache_memory_bytes=None, max_num_batched_tokens=600)
    plain = engine(model, **options)
    ran = []

    def tell(self, fn):
        ran.append(fn())
        return 300 << 20

    monkeypatch.setattr(NativeCpuBackend, "peak_memory", tell)
    told = engine(model, **options)
    assert len(ran) == 1
    assert not plain._engine.memory.measured
    assert told._engine.memory.measured
    # What captured steps hold is not in the measured step, and is added to it.
    assert told._engine.memory.working > 300 << 20
    prompt = dict(prompt_token_ids=list(range(3, 40)))
    from quire import SamplingParams

    answers = [llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8)) for llm in (plain, told)]
    assert answers[0][0].outputs[0].token_ids == answers[1][0].outputs[0].token_ids


def test_a_step_that_does_not_fit_is_refused(engine, tiny, monkeypatch):
    import torch

    from quire_cpu.native_backend import NativeCpuBackend

    def full(self, fn):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 5 GiB\nmore")

    monkeypatch.setattr(NativeCpuBackend, "peak_memory", full)
    with pytest.raises(DoesNotFit, match=r"2,048 tokens and 4 sampled rows.*tried to allocate 5 GiB\).*--max-num-seqs"):
        engine(tiny, max_num_seqs=4)


def test_captured_steps_hold_their_logits_and_one_pool():
    assert capture_bytes(SPEC, "bfloat16", [1, 2, 4]) == 7 * 1000 * 4 + working_bytes(SPEC, "bfloat16", 4, 0)


@pytest.mark.parametrize(("tokens", "length"), [(2048, 4096), (100, 32), (64, 32), (1, 1)])
def test_the_measured_step_is_the_largest(tokens, length):
    step = largest_step(MIXED, tokens, length)
    counts = np.diff(step.query_start)
    assert counts.sum() == len(step.token_ids) == len(step.positions) == tokens
    assert counts.max() == min(tokens, length)
    assert (counts > 0).all()
    assert (step.context_lens == counts).all()
    for group, table, slots in zip(MIXED.groups, step.block_tables, step.slots, strict=True):
        assert table.shape == (len(counts), -(-counts.max() // group.page_size))
        assert (table == 1).all()
        assert (slots // group.page_size == 1).all()
