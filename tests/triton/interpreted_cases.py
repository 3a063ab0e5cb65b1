"""What the conformance kit does not ask of the kernels: cuts along the keys, bits, and replayed plans.

Run by test_interpreted_cases.py in a process where Triton interprets.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from quire.conformance.world import Float64, Paper, Row, Shape, Stage, close
from quire.hardware import DeviceOptions
from quire_triton import attention, configs
from tests.triton.interpreted_device import Interpreted

LENGTHS = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130]


def opened(batch_invariant: bool = False) -> Interpreted:
    backend = Interpreted()
    backend.open(0, DeviceOptions(batch_invariant=batch_invariant))
    return backend


@pytest.fixture
def short_parts(monkeypatch):
    """Parts of 32 keys, so that a hundred keys have several; counts the launches that joined parts."""
    joined = []
    monkeypatch.setattr(configs, "SHORTEST_SPLIT", 32)
    monkeypatch.setattr(configs, "INVARIANT_SPLIT", 32)
    monkeypatch.setattr(configs, "processors", lambda device: 64)
    merge = attention.attention_merge_kernel

    class Counted:
        def __getitem__(self, grid):
            joined.append(grid)
            return merge[grid]

    monkeypatch.setattr(attention, "attention_merge_kernel", Counted())
    return joined


def compare(backend, rows, shape):
    paper = Paper(rows, shape)
    out, truth = Stage(backend, paper).attend(), Stage(Float64(), paper, "float64").attend()
    close(out, truth, shape.dtype, what="attention")


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "kind",
    [{}, {"window": 40}, {"soft_cap": 2.0}, {"sinks": True}, {"sinks": True, "window": 9, "head_dim": 80}],
    ids=str,
)
def test_decode_cut_along_the_keys(short_parts, batch_invariant, kind):
    rows = [Row(0, 1), *(Row(n, 1) for n in LENGTHS)]
    compare(opened(batch_invariant), rows, Shape(kv_heads=1, heads=4, **kind))
    assert short_parts, "nothing was cut"


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_verification_cut_along_the_keys(short_parts, batch_invariant, window):
    """Drafts of several tokens, beside decodes, a prompt and a sequence with nothing to do."""
    rows = [Row(65, 4), Row(130, 2), Row(33, 1), Row(40, 0), Row(0, 0), Row(70, 70), Row(3, 3)]
    compare(opened(batch_invariant), rows, Shape(kv_heads=2, heads=8, window=window))
    assert short_parts


@pytest.mark.parametrize("kind", [{}, {"window": 40}, {"sinks": True}], ids=str)
def test_bits_alone_and_in_company(short_parts, kind):
    """Each sequence of a mixed step has the bits it has alone: longer company makes more parts, not other ones."""
    backend, shape = opened(batch_invariant=True), Shape(kv_heads=1, heads=4, **kind)
    rows = [Row(n, 1, who=n) for n in (1, 33, 64, 130)] + [Row(50, 3, who=7), Row(90, 90, who=8), Row(75, 40, who=9)]
    together = Stage(backend, Paper(rows, shape)).attend()
    begin = 0
    for row in rows:
        alone = Stage(backend, Paper([row], shape)).attend()
        assert torch.equal(together[begin : begin + row.new], alone), f"{row} has other bits alone"
        begin += row.new


@pytest.mark.parametrize("window", [None, 25])
def test_bits_of_a_prompt_in_chunks(window):
    """A query's bits do not depend on the tile of queries that it falls in."""
    backend, shape = opened(), Shape(kv_heads=1, heads=2, window=window, head_dim=64)
    whole = Stage(backend, Paper([Row(150, 150, who=3)], shape)).attend()
    for new in (10, 61, 100):
        chunk = Stage(backend, Paper([Row(150, new, who=3)], shape)).attend()
        assert torch.equal(whole[-new:], chunk), f"a last chunk of {new} has other bits"


@pytest.mark.parametrize("kind", [{}, {"sinks": True, "soft_cap": 4.0}, {"window": 50}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bits_of_a_prompt_in_chunks_that_are_cut(short_parts, kind, dtype):
    """A chunk in a tile of many queries goes through the parts one by one; a few queries have a program for each part,
    whose sums are joined: the bits are the same, whatever the number of queries."""
    shape = Shape(kv_heads=1, heads=2, head_dim=64, dtype=dtype, kv_dtype=dtype, **kind)
    backend = opened(batch_invariant=True)
    whole = Stage(backend, Paper([Row(150, 150, who=3)], shape)).attend()
    assert not short_parts
    for new in (1, 3, 40, 100):
        chunk = Stage(backend, Paper([Row(150, new, who=3)], shape)).attend()
        assert torch.equal(whole[-new:], chunk), f"a last chunk of {new} has other bits"
    assert len(short_parts) == 2, "the short ones were to be joined by another kernel, and the long ones not"


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_decode_plan_reads_lengths_on_the_device(short_parts, batch_invariant):
    """As in a replayed step: the plan is of other lengths, whose host copies are then taken away."""
    backend, shape = opened(batch_invariant), Shape(kv_heads=1, heads=4)
    paper = Paper([Row(n, 1) for n in (97, 5, 64, 33)], shape)
    stage, truth = Stage(backend, paper), Stage(Float64(), paper, "float64").attend()
    stage.store(past=False)
    now = stage.batch()
    recorded = dataclasses.replace(
        now,
        context_lens=torch.zeros_like(now.context_lens),
        block_tables=(torch.zeros_like(now.block_tables[0]),),
        context_lens_host=None,
        max_context_len=160,
    )
    plan = backend.plan_attention(recorded, stage.spec)

    def step():
        return backend.attention(stage.on(paper.q), stage.kv, 0, plan, shape.attention())

    assert not step().any(), "rows without context are not zero"
    recorded.context_lens.copy_(now.context_lens)
    recorded.block_tables[0].copy_(now.block_tables[0])
    close(step(), truth, shape.dtype, what="the replayed step")


def test_configurations_hold_what_the_kernels_assume():
    for arch in configs.SHARED_MEMORY:
        for itemsize in (2, 4):
            for dim in (64, 80, 128, 256):
                for decode, eight_bits in itertools.product((False, True), repeat=2):
                    tile = configs.attention(arch, itemsize, dim, decode, 8, eight_bits)
                    assert configs.INVARIANT_SPLIT % tile.keys == 0
                    assert tile.rows >= 16
                    assert configs.attention(arch, itemsize, dim, decode, group=71).rows >= 71
                for eight_bits in (False, True):
                    any_number = configs.attention_of_any(arch, itemsize, dim, 71, eight_bits)
                    assert configs.INVARIANT_SPLIT % any_number.keys == 0
                    assert any_number.rows == 128
                    assert any_number.warps >= 1
    with pytest.raises(ValueError, match="head_dim is 512"):
        configs.attention("sm_90", 2, 512, False)
