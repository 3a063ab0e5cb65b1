"""Bits do not depend on company: exact equality whatever else is in the step and however a sequence was cut.

The products are of numbers whose sums cancel: what is left is the rounding, and another order of summing shows in it
even where a small dtype would hide it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.conformance.ops import Weight, Wide, prepare, random
from quire.conformance.test_sampling import settings
from quire.conformance.world import Paper, Row, Shape, Stage, usual_head, usual_kv
from quire.spec import NormSpec

pytestmark = pytest.mark.capability("batch_invariant")

ROWS = 90
CUTS = [(0, 1), (1, 2), (5, 6), (0, 2), (3, 7), (1, 9), (7, 23), (0, 32), (2, 35), (10, 74), (1, ROWS)]


def expect_rows(whole: Tensor, part: Tensor, cut: tuple[int, int], what: str) -> None:
    begin, end = cut
    a, b = whole[begin:end].cpu(), part.cpu()
    assert torch.equal(a, b), f"{what}: rows {begin}..{end - 1} have other bits alone than among {ROWS}"


def cancelling(out: int, inner: int) -> tuple[Tensor, Tensor]:
    """x [ROWS, inner] and weight [out, inner], products zero but for rounding."""
    order = torch.randperm(inner, generator=torch.Generator().manual_seed(inner))
    x, weight = random(ROWS, inner // 2), random(out, inner // 2, seed=1, scale=4.0)
    return torch.cat((x, x), 1)[:, order], torch.cat((weight, -weight), 1)[:, order]


@pytest.mark.parametrize(("out", "inner"), [(96, 64), (1000, 256), (64, 2432), (24, 36)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(backend, dtype, out, inner, biased):
    raw_x, raw_weight = cancelling(out, inner)
    x, weight = prepare(backend, dtype, raw_x, False), prepare(backend, dtype, Weight(raw_weight), False)
    bias = prepare(backend, dtype, random(out, scale=1e-6), False) if biased else None
    whole = backend.linear(x, weight, bias)
    assert whole.any(), "the sums cancel exactly, which shows nothing"
    for count in [*range(1, 20), 31, 32, 33, 63, 64, 65, 70]:
        expect_rows(whole, backend.linear(x[:count], weight, bias), (0, count), "linear")
    for begin, end in CUTS:
        expect_rows(whole, backend.linear(x[begin:end].clone(), weight, bias), (begin, end), "linear")


def test_quantized_linear(backend, dtype, quantization):
    """An input that is rounded on the way must be rounded by its own row's scale."""
    x = prepare(backend, dtype, random(ROWS, 320) * 10.0 ** (torch.arange(ROWS) % 5 - 2)[:, None], False)
    weight = prepare(backend, dtype, Weight(random(200, 320, seed=1), quantization), False)
    whole = backend.linear(x, weight)
    for begin, end in [*((0, count) for count in range(1, 20)), *CUTS]:
        expect_rows(whole, backend.linear(x[begin:end].clone(), weight), (begin, end), "quantized linear")


def row_wise(backend, dtype, call, *raw: Tensor | None) -> None:
    """``call`` on all rows of the arguments, and on cuts of them."""
    arguments = [prepare(backend, dtype, a, False) for a in raw]
    whole = call(*arguments)
    for begin, end in CUTS:
        part = call(*(None if a is None else a[begin:end].clone() for a in arguments))
        for w, p in zip(*((r,) if isinstance(r, Tensor) else r for r in (whole, part)), strict=True):
            expect_rows(w, p, (begin, end), "the operation")


@pytest.mark.parametrize("width", [48, 1000, 4096])
@pytest.mark.parametrize("residual", [False, True])
def test_norms(backend, dtype, width, residual):
    weight, bias = (prepare(backend, dtype, random(width, seed=s), False) for s in (1, 2))
    x, r = random(ROWS, width), random(ROWS, width, seed=3) if residual else None
    row_wise(backend, dtype, lambda x, r: backend.rms_norm(x, weight, NormSpec(), r), x, r)
    row_wise(backend, dtype, lambda x, r: backend.layer_norm(x, weight, bias, NormSpec(kind="layer"), r), x, r)


def test_rotary(backend, dtype):
    table = prepare(backend, dtype, Wide(random(200, 64)), False)
    positions = torch.arange(ROWS) * 2
    row_wise(
        backend, dtype, lambda q, k, p: backend.rotary(q, k, p, table),
        random(ROWS, 6, 64), random(ROWS, 2, 64, seed=1), positions,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [52, 1000])
def test_gated_act(backend, dtype, activation, width):
    row_wise(backend, dtype, lambda x: backend.gated_act(x, activation), random(ROWS, 2 * width, scale=2.0))


def test_moe(backend, dtype):
    """An expert's rows are few or many as it happens."""
    gate_up = prepare(backend, dtype, Weight(random(4, 48, 64, seed=1)), False)
    down = prepare(backend, dtype, Weight(random(4, 64, 24, seed=2)), False)
    generator = torch.Generator().manual_seed(5)
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(ROWS)])
    gates = prepare(backend, dtype, Wide(random(ROWS, 2, seed=4).softmax(-1)), False)
    x, experts = prepare(backend, dtype, random(ROWS, 64), False), experts.to(backend.device)
    whole = backend.moe(x, gates, experts, gate_up, down, "silu")
    for begin, end in CUTS:
        part = backend.moe(x[begin:end], gates[begin:end], experts[begin:end], gate_up, down, "silu")
        expect_rows(whole, part, (begin, end), "moe")


def test_sampling(backend):
    logits = random(ROWS, 3000, scale=3.0).to(backend.device)
    uniform = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = backend.sample(logits, settings(backend, ROWS, uniform, top_p=0.9, top_k=40, temperature=0.8))
    for begin, end in CUTS:
        own = settings(backend, end - begin, uniform[begin:end], top_p=0.9, top_k=40, temperature=0.8)
        expect_rows(whole, backend.sample(logits[begin:end], own), (begin, end), "sample")


def test_logprobs(backend):
    logits, chosen = random(ROWS, 3000, scale=3.0).to(backend.device), torch.arange(ROWS).to(backend.device)
    whole = backend.logprobs(logits, chosen, 20)
    for begin, end in CUTS:
        for count in (0, 7, 20):
            part = backend.logprobs(logits[begin:end], chosen[begin:end], count)
            for w, p in zip(whole, part, strict=True):
                expect_rows(w if w.dim() == 1 else w[:, : count + 1], p, (begin, end), "logprobs")


def test_attention_over_other_kv_dtypes(backend, primary, size, kv_dtype):
    """What is rounded on its way into the cache is rounded the same whoever it is stored with."""
    shape = Shape(head_dim=usual_head(backend), page_size=size, dtype=primary, kv_dtype=kv_dtype)

    def run(rows: list[Row]) -> list[Tensor]:
        return list(Stage(backend, Paper(rows, shape)).attend().cpu().split([row.new for row in rows]))

    (whole,) = run([Row(200, 200, 7)])
    for rows in ([Row(65, 65, 5), Row(200, 33, 7)], [Row(200, 1, 7)], [Row(200, 7, 7), Row(3, 1, 2), Row(130, 1, 6)]):
        mine = next(i for i, row in enumerate(rows) if row.who == 7)
        assert torch.equal(run(rows)[mine], whole[200 - rows[mine].new :]), "a sequence has other bits in company"


LENGTHS = [1, 2, 15, 17, 64, 65, 130, 200]
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 21},
    "capped, with sinks": {"soft_cap": 4.0, "sinks": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(4, 2), (14, 2), (3, 3)])
def test_attention(backend, dtype, size, kind, heads):
    """Whole prompts alone; all together; in chunks; token after token; decoded in one crowded step."""
    shape = Shape(
        heads=heads[0], kv_heads=heads[1], head_dim=usual_head(backend), page_size=size, dtype=dtype,
        kv_dtype=usual_kv(backend, dtype), **KINDS[kind],
    )  # fmt: skip

    def run(rows: list[Row]) -> list[Tensor]:
        out = Stage(backend, Paper(rows, shape)).attend().cpu()
        return list(out.split([row.new for row in rows]))

    alone = {who: run([Row(length, length, who)])[0] for who, length in enumerate(LENGTHS)}

    def expect(rows: list[Row], what: str) -> None:
        for row, part in zip(rows, run(rows), strict=True):
            assert row.who is not None
            true = alone[row.who][row.context - row.new : row.context]
            assert torch.equal(part, true), f"{what}: tokens up to {row.context} of sequence {row.who} have other bits"

    whole = [Row(length, length, who) for who, length in enumerate(LENGTHS)]
    expect(whole, "together")
    expect(whole[::-1], "together, in another order")
    for piece in (7, 64):
        chunks = [Row(min(e + piece, 200), min(piece, 200 - e), 7) for e in range(0, 200, piece)]
        expect(chunks, f"in chunks of {piece}")
    expect([Row(length, 1, who) for who, length in enumerate(LENGTHS)], "decoded together")
    expect([Row(e, 1, 6) for e in range(1, 131)], "token after token")
    expect([Row(200, 1, 7), Row(130, 77, 6), Row(65, 65, 5), Row(64, 3, 4)], "mixed")
    expect([Row(200, 1, 7)], "decoded alone")
