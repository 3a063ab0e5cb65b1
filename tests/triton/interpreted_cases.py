"""What the conformance kit does not ask of the kernels: cuts along the keys, bits, and replayed plans.

Run by test_interpreted.py in a process where Triton interprets.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quire.conformance.world import Float64, Paper, Row, Shape, Stage, close
from quire.hardware import DeviceOptions
from quire_triton import attention, configs
from quire_triton.kernels.linear import Quantized, linear
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
                for decode in (False, True):
                    tile = configs.attention(arch, itemsize, dim, decode, group=8)
                    assert configs.INVARIANT_SPLIT % tile.keys == 0
                    assert tile.rows >= 16
                    assert configs.attention(arch, itemsize, dim, decode, group=71).rows >= 71
    with pytest.raises(ValueError, match="head_dim is 512"):
        configs.attention("sm_90", 2, 512, False)


def product(x, weight, bias=None):
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 64), (5, 129, 96), (17, 64, 200), (130, 72, 33)])
def test_linear_dense(rows, n, k, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(size, k, generator=generator).to(dtype) for size in (rows, n))
    bias = torch.randn(n, generator=generator).to(dtype)
    close(linear(x, weight, bias), product(x, weight, bias), str(dtype).removeprefix("torch."), what="linear")
    wide = torch.randn(rows, 2 * k, generator=generator).to(dtype)[:, :k]  # rows that lie apart
    close(linear(wide, weight), product(wide, weight), str(dtype).removeprefix("torch."), what="linear")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_of_integers(bits, group, zeros):
    generator = torch.Generator().manual_seed(group)
    n, k = 70, 256
    q = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=generator) / 100
    points = torch.randint(0, 1 << bits, scales.shape, generator=generator, dtype=torch.uint8) if zeros else None
    weight = Quantized(q, scales, points, bits, group)
    middle = points[:, :, None].float() if zeros else 1 << (bits - 1)
    truth = ((q.view(n, -1, group).double() - middle) * scales[:, :, None]).view(n, k)
    torch.testing.assert_close(weight.dense().double(), truth)
    for rows in (1, 20):
        x = torch.randn(rows, k, generator=generator)
        close(linear(x, weight), product(x, truth), "float32", what="linear")


@pytest.mark.parametrize("kind", ["dense", 4, 8])
def test_the_bits_of_a_product_do_not_depend_on_the_batch(kind):
    generator = torch.Generator().manual_seed(3)
    x, dense = torch.randn(70, 192, generator=generator), torch.randn(50, 192, generator=generator)
    weight = dense
    if kind != "dense":
        q = torch.randint(0, 1 << kind, (50, 192), generator=generator, dtype=torch.uint8)
        weight = Quantized(q, torch.rand(50, 3, generator=generator), None, kind, 64)
    whole = linear(x, weight, batch_invariant=True)
    for rows in (1, 2, 16, 17, 33):
        assert torch.equal(linear(x[5 : 5 + rows], weight, batch_invariant=True), whole[5 : 5 + rows])
