"""Weights, pointwise operations, experts and the compound operations against float64."""

from __future__ import annotations

import pytest
import torch

from quire.conformance.ops import Weight, Wide, both, random
from quire.conformance.world import Paper, Row, Shape, Stage, close, usual_head, usual_kv
from quire.quantization import FORMATS
from quire.reference import torch_dtype
from quire.spec import AttentionWeights, MlpSpec, MlpWeights, NormSpec, RotarySpec

ROWS = [0, 1, 2, 7, 33]


@pytest.mark.parametrize(("inner", "out"), [(64, 96), (37, 53), (256, 1000), (1024, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(backend, dtype, inner, out, biased):
    for rows in ROWS:
        bias = random(out, seed=2) if biased else None
        weight = Weight(random(out, inner, seed=1, scale=inner**-0.5))
        both(backend, dtype, lambda b, x, w, c: b.linear(x, w, c), random(rows, inner), weight, bias)


def test_linear_sums_in_float32(backend, dtype):
    """Ten thousand small terms beside a large one: a sum kept in a small dtype loses them."""
    inner = 8193
    x = torch.full((3, inner), 2.0**-9)
    x[:, 0] = 64.0
    weight = Weight(torch.ones(16, inner))
    both(backend, dtype, lambda b, x, w: b.linear(x, w), x, weight)


def test_linear_of_rows_with_gaps(backend, dtype):
    x = random(9, 80)
    both(backend, dtype, lambda b, x, w: b.linear(x[:, 8:72], w), x, Weight(random(24, 64, seed=1, scale=0.1)))


def test_what_is_packed_is_the_devices_own(backend, primary):
    """A loader packs one weight after the other from the same memory, or from a file's."""
    x = random(3, 128).to(torch_dtype(primary)).to(backend.device)
    for format in ("dense", *sorted(backend.capabilities.quantization & set(FORMATS))):
        raw = random(64, 128, seed=1, scale=0.1).to(torch_dtype(primary))
        weight = backend.pack_weight({"weight": raw}, format)
        before = backend.linear(x, weight).cpu()
        raw.zero_()
        assert torch.equal(backend.linear(x, weight).cpu(), before), f"{format}: the caller's memory is still read"


INPUT_IN_8_BITS = {"float64": 0.0, "float32": 1500.0, "float16": 15.0, "bfloat16": 3.0}
"""Times the usual tolerance: 4.5 to 6 % of the result's rms. With the input rounded to 8 bits by groups of up to 128,
an output is off by 0.6 % of it, give or take; the worst of thousands by five times that."""
INPUT_IN_E4M3 = {"float64": 0.0, "float32": 1500.0, "float16": 30.0, "bfloat16": 8.0}
"""The same for e4m3, whose steps are an eighth: 4.5 % in float32, where hardly a number is rounded the other way for a last
bit that differs before it, up to 16 % where it is so for one in ten."""


def rounding(quantization: str, dtype: str, times: int = 1) -> float:
    """The factor of the usual tolerance for ``times`` products with rounded weights, one after the other. Where the format
    rounds the input too, so does the definition, and exactly: only what comes before may be rounded the other way."""
    format = FORMATS[quantization]
    if format.inputs and times == 1:
        return 1.0
    return times * (INPUT_IN_E4M3 if format.type == "e4m3" else INPUT_IN_8_BITS)[dtype]


@pytest.mark.parametrize(("inner", "out"), [(64, 96), (37, 53), (300, 1000), (1024, 8)])
def test_quantized_linear(backend, dtype, quantization, inner, out):
    """Against float64 of the very weights that rounding leaves: the definition rounds the same for every device."""
    for rows in ROWS:
        weight = Weight(random(out, inner, seed=1, scale=inner**-0.5), quantization)
        both(
            backend, dtype, lambda b, x, w, c: b.linear(x, w, c), random(rows, inner), weight, random(out, seed=2),
            factor=rounding(quantization, dtype),
        )  # fmt: skip


def test_quantized_groups_have_scales_of_their_own(backend, dtype, quantization):
    """Columns whose weights differ by orders of magnitude, times inputs that make up for it."""
    inner = 512
    size = 10.0 ** (torch.arange(inner) // 128 - 2)
    weight = Weight(random(64, inner, seed=1) * size, quantization)
    x = random(5, inner) / size
    both(backend, dtype, lambda b, x, w: b.linear(x, w), x, weight, factor=rounding(quantization, dtype))


def test_embed(backend, dtype):
    table = random(50, 24)
    for ids in ([], [0], [49, 0, 7, 7, 23]):
        both(backend, dtype, lambda b, i, t: b.embed(i, t), torch.tensor(ids, dtype=torch.int64), table)


def test_embed_of_a_packed_table(backend, dtype, embed_format):
    """A tied table is held once: its rows, as they were packed, or as rounding left them, from the packed form."""
    for tokens, width in ((50, 24), (129, 300)):
        ids, table = torch.tensor([tokens - 1, 0, 7, 7, 33]), Weight(random(tokens, width), embed_format)
        (rows,) = both(backend, dtype, lambda b, i, t: b.embed(i, t), ids, table)
        if embed_format == "dense":
            assert torch.equal(rows.cpu(), table.value[ids].to(rows.dtype))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [32, 96, 1000, 5120])
def test_rms_norm(backend, dtype, width, offset):
    spec = NormSpec(eps=1e-5, offset=offset)
    for rows in (0, 1, 5):
        x, weight, residual = random(rows, width), random(width, seed=1), random(rows, width, seed=2)
        both(backend, dtype, lambda b, x, w: b.rms_norm(x, w, spec), x, weight, factor=2)
        both(backend, dtype, lambda b, x, w, r: b.rms_norm(x, w, spec, r), x, weight, residual, factor=2)


def test_rms_norm_of_heads(backend, dtype):
    both(backend, dtype, lambda b, x, w: b.rms_norm(x, w, NormSpec())[0], random(6, 4, 64), random(64, seed=1))


def test_norm_of_small_numbers(backend, dtype):
    """eps is inside the root, and does its work where there is little else."""
    both(backend, dtype, lambda b, x, w: b.rms_norm(x, w, NormSpec(eps=1e-5))[0], random(3, 64, scale=1e-3), random(64))


def test_layer_norm(backend, dtype):
    spec = NormSpec(kind="layer", eps=1e-5)
    for width in (32, 1000):
        x, weight, bias, residual = random(5, width) + 3, random(width, seed=1), random(width, seed=3), random(5, width)
        both(backend, dtype, lambda b, x, w, c: b.layer_norm(x, w, c, spec), x, weight, bias, factor=2)
        both(backend, dtype, lambda b, x, w, r: b.layer_norm(x, w, None, spec, r), x, weight, residual, factor=3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_rotary(backend, dtype, interleaved, part):
    """Positions in any order, all or some of the channels."""
    head = 64
    width = int(head * part)
    angles = torch.arange(300)[:, None] * (10000.0 ** (-torch.arange(0, width, 2) / width))
    table = Wide(torch.cat((angles.cos(), angles.sin()), dim=-1).float())
    positions = torch.tensor([0, 299, 1, 17, 17, 16, 15])
    both(
        backend, dtype, lambda b, q, k, p, t: b.rotary(q, k, p, t, interleaved),
        random(7, 6, head), random(7, 2, head, seed=1), positions, table,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_act(backend, dtype, activation):
    for rows in (0, 1, 9):
        both(backend, dtype, lambda b, x: b.gated_act(x, activation), random(rows, 2 * 72, scale=3.0))


@pytest.mark.parametrize(("count", "chosen"), [(4, 2), (8, 1), (5, 5)])
def test_moe(backend, dtype, count, chosen):
    x, rows = random(13, 32), 13
    generator = torch.Generator().manual_seed(5)
    experts = torch.stack([torch.randperm(count, generator=generator)[:chosen] for _ in range(rows)])
    gates = Wide(random(rows, chosen, seed=4).softmax(-1))
    gate_up, down = random(count, 2 * 24, 32, seed=1, scale=0.2), random(count, 32, 24, seed=2, scale=0.2)
    both(
        backend, dtype, lambda b, x, g, e, u, d: b.moe(x, g, e, u, d, "silu"),
        x, gates, experts, Weight(gate_up), Weight(down), factor=3,
    )  # fmt: skip


def test_quantized_moe(backend, dtype, quantization):
    """Many tokens and few, an expert that nobody chose."""
    count, chosen, hidden, inner = 5, 2, 64, 96
    gate_up = Weight(random(count, 2 * inner, hidden, seed=1, scale=0.2), quantization)
    down = Weight(random(count, hidden, inner, seed=2, scale=0.2), quantization)
    for rows in (1, 40):
        generator = torch.Generator().manual_seed(rows)
        experts = torch.stack([torch.randperm(count - 1, generator=generator)[:chosen] for _ in range(rows)])
        both(
            backend, dtype, lambda b, x, g, e, u, d: b.moe(x, g, e, u, d, "silu"),
            random(rows, hidden), Wide(random(rows, chosen, seed=4).softmax(-1)), experts, gate_up, down,
            factor=rounding(quantization, dtype, 2),
        )  # fmt: skip


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("count", "chosen"), [(8, 2), (60, 4), (256, 8), (3, 3)])
def test_route(backend, dtype, count, chosen, score, normalize):
    """Logits lie 1/64 apart, so that no rounding changes the choice; some are equal, of which the first is taken."""
    generator = torch.Generator().manual_seed(count)
    logits = torch.stack([torch.randperm(count, generator=generator) for _ in range(9)]) / 64 - count / 128
    logits[0] = 1.5
    logits[1, : count // 2] = logits[1].max()
    bias = Wide(torch.randperm(count, generator=generator) * 10.0)  # decides alone
    for more in (None, bias):
        both(
            backend,
            dtype,
            lambda b, x, c: b.route(x, chosen, score, normalize, c),
            logits,
            more,
            factor=2,
            out="float32",
        )


@pytest.mark.parametrize("residual", [False, True])
def test_gated_mlp(backend, dtype, residual):
    spec, norm = MlpSpec(intermediate=72, activation="silu"), NormSpec()

    def call(b, x, r, n, gate_up, down):
        return b.gated_mlp(x, r, MlpWeights(n, gate_up, down), spec, norm)

    other = random(6, 48, seed=1) if residual else None
    weights = Weight(random(144, 48, seed=2, scale=0.15)), Weight(random(48, 72, seed=3, scale=0.15))
    both(backend, dtype, call, random(6, 48), other, random(48, seed=4), *weights, factor=3)


def test_quantized_gated_mlp(backend, dtype, quantization):
    spec, norm = MlpSpec(intermediate=96, activation="silu"), NormSpec()

    def call(b, x, r, n, gate_up, down):
        return b.gated_mlp(x, r, MlpWeights(n, gate_up, down), spec, norm)

    weights = (
        Weight(random(192, 64, seed=2, scale=0.15), quantization),
        Weight(random(64, 96, seed=3, scale=0.15), quantization),
    )
    x, other = random(6, 64), random(6, 64, seed=1)
    both(backend, dtype, call, x, other, random(64, seed=4), *weights, factor=rounding(quantization, dtype, 2))


def test_final_head(backend, dtype):
    def call(b, x, r, rows, n, head):
        return b.final_head(x, r, rows, n, head, NormSpec())

    rows = torch.tensor([6, 0, 3])
    x, residual, norm, head = random(7, 48), random(7, 48, seed=1), random(48, seed=2), Weight(random(200, 48, seed=3))
    both(backend, dtype, call, x, residual, rows, norm, head, factor=3, out="float32")
    both(backend, dtype, call, x, None, torch.zeros(0, dtype=torch.int64), norm, head, out="float32")


@pytest.mark.parametrize("extras", [False, True])
def test_attention_block(backend, dtype, size, extras):
    """The compound operation stores, rotates and attends; ``extras``: biases and a norm of queries and keys."""
    import dataclasses

    head, kv_dtype = usual_head(backend), usual_kv(backend, dtype)
    shape = Shape(heads=4, kv_heads=2, head_dim=head, page_size=size, dtype=dtype, kv_dtype=kv_dtype)
    paper, hidden = Paper([Row(size + 1, 3), Row(0, 0), Row(5, 5), Row(2 * size, 1)], shape), 48
    norm, tokens = NormSpec(), 9
    spec = dataclasses.replace(shape.attention(), rotary=RotarySpec(head), qk_norm=norm if extras else None)
    angles = torch.arange(300)[:, None] * (10000.0 ** (-torch.arange(0, head, 2) / head))
    table = Wide(torch.cat((angles.cos(), angles.sin()), dim=-1).float())
    optional = (random(8 * head, seed=6), random(hidden, seed=7), random(head, seed=8), random(head, seed=9))

    def call(b, x, r, n, qkv, out, table, *more):
        stage = Stage(b, paper, None if b is backend else "float64")
        batch = stage.batch()
        named = dict(zip(("qkv_bias", "out_bias", "q_norm", "k_norm"), more, strict=False))
        weights = AttentionWeights(n, qkv, out, **named, cos_sin=table)
        return b.attention_block(x, r, weights, spec, norm, stage.kv, 0, batch, b.plan_attention(batch, stage.spec))

    both(
        backend, dtype, call, random(tokens, hidden), random(tokens, hidden, seed=1), random(hidden, seed=2),
        Weight(random(8 * head, hidden, seed=3, scale=0.15)), Weight(random(hidden, 4 * head, seed=4, scale=0.1)), table,
        *(optional if extras else ()), factor=4,
    )  # fmt: skip


def test_dtypes_are_kept_by_attention(backend, dtype, size):
    shape = Shape(head_dim=usual_head(backend), page_size=size, dtype=dtype, kv_dtype=usual_kv(backend, dtype))
    out = Stage(backend, Paper([Row(9, 2)], shape)).attend()
    assert out.dtype == getattr(torch, dtype)
    close(out, out, dtype)
