"""Products, rounded weights and mixtures of experts beyond what the conformance kit asks: shapes at random, cuts of the sums,
bits, and the whole way from ``--quantization`` to tokens.

Run by test_interpreted_cases.py in a process where Triton interprets.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.conformance.world import close
from quire.quantization import FORMATS
from quire.reference import ops, quantize
from quire_triton import architectures, configs, weights
from quire_triton.kernels import linear as kernels
from quire_triton.kernels.linear import linear
from quire_triton.kernels.moe import moe, sort_by_expert
from quire_triton.kernels.quantize_rows import quantize_rows
from quire_triton.kernels.route import route
from tests.triton.interpreted_device import Interpreted

HOST = torch.device("cpu")
FUZZ = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ACTS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(weight: torch.Tensor, name: str | None):
    """(the weight as the kernels take it, what it stands for in float64, whether x is rounded and how)."""
    if name is None:
        return weight, weight.double(), None
    format = FORMATS[name]
    made = weights.pack(weight, format, HOST)
    return made, quantize.rounded(weight.double(), format), format.type if format.inputs else None


def product(x, true, rounds, bias=None):
    x = x.double() if rounds is None else quantize.rounded_rows(x.double(), rounds)
    out = x @ true.T
    return out if bias is None else out + bias.double()


@FUZZ
@given(st.data())
def test_products_of_any_shape(data):
    name = data.draw(st.sampled_from([None, *FORMATS]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rows, n, k = (data.draw(st.integers(1, most)) for most in (90, 150, 420))
    activation = data.draw(st.sampled_from([None, None, "silu", "gelu"]))
    n += n % 2
    x = normal(rows, k + 24, dtype=dtype)[:, 8 : 8 + k]  # rows that lie apart
    weight, true, rounds = packed(normal(n, k, seed=1, dtype=dtype), name)
    bias = normal(n, seed=2, dtype=dtype) if data.draw(st.booleans()) else None
    expected = product(x, true, rounds, bias)
    if activation is not None:
        gate, up = expected.chunk(2, -1)
        expected = ACTS[activation](gate) * up
    given = linear(x, weight, bias, activation, batch_invariant=data.draw(st.booleans()))
    assert given.dtype == dtype
    close(given, expected, str(dtype).removeprefix("torch."), 3 if activation else 1, what="linear")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_a_checkpoint(bits, group, zeros):
    """Any integers, scales and zero points, with a last block that is not full; scales in 16 bits stay so."""
    generator = torch.Generator().manual_seed(group)
    n, k = 70, 3 * group
    q = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, 3, generator=generator) / 100).half()
    points = torch.randint(0, 1 << bits, scales.shape, generator=generator, dtype=torch.uint8) if zeros else None
    weight = weights.pack_integers(q, scales, points, bits, group)
    middle = points[:, :, None].double() if zeros else 1 << (bits - 1)
    true = ((q.view(n, 3, group).double() - middle) * scales[:, :, None].double()).view(n, k)
    assert torch.equal(weights.unpacked(weight).double(), true.float().double())
    assert weight.scales.dtype == torch.float16
    for rows in (1, 20):
        x = normal(rows, k)
        close(linear(x, weight), product(x, true, None), "float32", what="linear")


@pytest.mark.parametrize("name", FORMATS)
def test_rounded_some_rows_at_a_time(name, monkeypatch):
    weight = normal(70, 200)
    whole = weights.pack(weight, FORMATS[name], HOST)
    monkeypatch.setattr(weights, "AT_ONCE", 200 * 16)
    parts = weights.pack(weight, FORMATS[name], HOST)
    assert torch.equal(whole.q.view(torch.uint8), parts.q.view(torch.uint8))
    assert torch.equal(whole.scales, parts.scales)
    assert whole.shape == parts.shape == (70, 200)
    torch.testing.assert_close(weights.unpacked(whole), quantize.rounded(weight, FORMATS[name]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_arithmetic(name):
    shape = (96, 512)
    made = weights.pack(normal(*shape), FORMATS[name], HOST)
    assert made.q.nbytes + made.scales.nbytes == FORMATS[name].bytes(shape)


@FUZZ
@given(st.integers(1, 9), st.integers(1, 300), st.booleans(), st.sampled_from([None, "silu"]), st.integers(-30, 4))
def test_rounded_inputs_have_the_reference_s_bits(rows, width, e4m3, activation, spread):
    """Magnitudes from below e4m3's smallest to the largest, rows of zeros, ties."""
    x = normal(rows, width * (1 if activation is None else 2)) * 2.0 ** torch.randint(spread, 5, (1,)).item()
    x = (x * 8).round() / 8 if spread > 0 else x * torch.logspace(-8, 0, x.shape[1])
    x[0] = 0
    before = x if activation is None else ops.gated_act(x.double(), activation).float()
    q, scales = quantize_rows(x, torch.float8_e4m3fn if e4m3 else torch.int8, activation)
    true, true_scales = quantize.quantize_rows(before, "e4m3" if e4m3 else "int")
    if activation is None:
        assert torch.equal(q.float(), true.float())
        assert torch.equal(scales, true_scales)
    else:  # an activation may differ in its last bit, and what is rounded by a step
        torch.testing.assert_close(scales, true_scales, rtol=1e-5, atol=0)
        close(q.float() * scales[:, None], before, "float32", factor=3e4 if e4m3 else 2e3)


def test_e4m3_of_two_kinds_gives_the_same_bits(monkeypatch):
    """The form of AMD's MI300 has half the value for the same bits, and the scales make up for it."""
    weight, x = normal(40, 96), normal(5, 96)
    x[1, :7] = -1e-9  # a zero whose sign must not become what is no number there
    usual = weights.pack(weight, FORMATS["fp8"], HOST)
    other = weights.pack(weight, FORMATS["fp8"], HOST, fnuz=True)
    assert other.q.dtype == torch.float8_e4m3fnuz
    assert torch.equal(weights.unpacked(other), weights.unpacked(usual))
    assert torch.equal(linear(x, other), linear(x, usual))
    row = architectures.Architecture("other", 64, architectures.FNUZ, "")
    monkeypatch.setitem(architectures.ARCHITECTURES, "other", row)
    backend = Interpreted()
    backend.open()
    assert backend.pack_weight({"weight": weight}, "fp8").q.dtype == torch.float8_e4m3fnuz


@pytest.fixture
def launches(monkeypatch):
    """(programs, parts of a sum, parts side by side) of every product."""
    seen = []
    kernel = kernels.linear_kernel

    class Counted:
        def __getitem__(self, grid):
            def run(*arguments, **constants):
                seen.append((grid, constants["PARTS"], constants["SPLIT"]))
                return kernel[grid](*arguments, **constants)

            return run

    monkeypatch.setattr(kernels, "linear_kernel", Counted())
    return seen


@pytest.mark.parametrize(
    ("name", "activation"),
    [(None, None), (None, "silu"), ("int8", None), ("int4-128", "silu"), ("w8a8", None), ("fp8", "silu")],
)
def test_parts_side_by_side_and_one_by_one_have_the_same_bits(name, activation, launches):
    """A few rows have a program for each part of a sum, many rows do not: the bits of a row are the same, and the counters
    are left as they were."""
    n, k, half = 72, 2200, torch.float16
    x = normal(230, k, dtype=half) / 8
    weight, true, rounds = packed(normal(n, k, seed=1, dtype=half) / 8, name)
    bias = normal(n, seed=2, dtype=half)
    whole = linear(x, weight, bias, activation, batch_invariant=True)
    assert launches[-1][1:] == (4, False)
    for begin, end in [(0, 1), (3, 20), (211, 230), (0, 65)]:
        part = linear(x[begin:end], weight, bias, activation, batch_invariant=True)
        assert launches[-1][1:] == (4, True)
        assert torch.equal(part, whole[begin:end]), f"rows {begin} to {end} have other bits among 230"
    assert not kernels.arrivals(HOST).any()
    expected = product(x, true, rounds, bias)
    if activation:
        gate, up = expected.chunk(2, -1)
        expected = ACTS[activation](gate) * up
    close(whole, expected, "float16", 3)


def test_one_row_of_a_split_product_does_not_see_another_s_parts():
    """Partial sums lie in memory that was used before; what is no row of x is neither read nor written."""
    weight = normal(40, 2048)
    for rows in (1, 5, 16, 2):
        x = normal(rows, 2048, seed=rows)
        close(linear(x, weight), x.double() @ weight.double().T, "float32")


@FUZZ
@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 9), st.sampled_from([16, 64]), st.integers(0, 1000))
def test_pairs_are_sorted_by_expert(tokens, chosen, count, rows, seed):
    experts = torch.randint(0, count, (tokens, chosen), generator=torch.Generator().manual_seed(seed))
    if seed % 3 == 0:
        experts[:] = seed % count  # all the same
    order, owner = sort_by_expert(experts, count, rows)
    flat, seen = experts.flatten(), []
    for tile, expert in zip(order.tolist(), owner.tolist(), strict=True):
        if expert >= 0:
            mine = [i for i in tile if i < len(flat)]
            assert mine
            assert tile == mine + [len(flat)] * (rows - len(mine))
            assert all(flat[i] == expert for i in mine)
            seen += mine
    assert sorted(seen) == list(range(len(flat)))
    assert seen == flat.sort(stable=True).indices.tolist()


@FUZZ
@given(st.data())
def test_mixtures_of_any_shape(data):
    name = data.draw(st.sampled_from([None, None, *FORMATS]))
    tokens, count = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    chosen = data.draw(st.integers(1, count))
    hidden, inner = data.draw(st.integers(8, 90)), data.draw(st.integers(4, 90))
    experts = torch.rand(tokens, count, generator=torch.Generator().manual_seed(tokens)).argsort(1)[:, :chosen]
    x, gates = normal(tokens, hidden), normal(tokens, chosen, seed=1).softmax(-1)
    raw = normal(count, 2 * inner, hidden, seed=2) / hidden**0.5, normal(count, hidden, inner, seed=3) / inner**0.5
    (gate_up, wide_up, rounds), (down, wide_down, _) = (packed(w, name) for w in raw)
    if rounds is not None:
        wide_up, wide_down = (quantize.InputsRounded(w, rounds) for w in (wide_up, wide_down))
    expected = ops.moe(x.double(), gates.double(), experts, wide_up, wide_down, "silu")
    given = moe(x, gates, experts, gate_up, down, "silu", data.draw(st.booleans()))
    # Between two products with rounded inputs a number may be rounded the other way.
    close(given, expected, "float32", 3 if rounds is None else 3000)


@pytest.mark.parametrize("name", [None, "int4", "fp8"])
def test_a_token_s_bits_do_not_depend_on_who_chose_its_experts(name):
    count, chosen, hidden, inner = 6, 2, 72, 40
    x, gates = normal(150, hidden), normal(150, chosen, seed=1).softmax(-1)
    experts = torch.rand(150, count, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :chosen]
    gate_up, down = packed(normal(count, 2 * inner, hidden), name)[0], packed(normal(count, hidden, inner), name)[0]
    whole = moe(x, gates, experts, gate_up, down, "silu", batch_invariant=True)
    for begin, end in [(0, 1), (5, 7), (20, 90), (149, 150)]:
        part = moe(x[begin:end], gates[begin:end], experts[begin:end], gate_up, down, "silu", batch_invariant=True)
        assert torch.equal(part, whole[begin:end])


@FUZZ
@given(st.data())
def test_routes_of_any_width(data):
    tokens, count = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 300))
    chosen = data.draw(st.integers(1, min(count, 9)))
    score, normalize = data.draw(st.sampled_from(["softmax", "sigmoid"])), data.draw(st.booleans())
    logits = torch.rand(tokens, count, generator=torch.Generator().manual_seed(count)).argsort(1) / 64
    bias = torch.arange(count).flip(0) * 4.0 if data.draw(st.booleans()) else None
    gates, experts = route(logits, chosen, score, normalize, bias)
    true_gates, true_experts = ops.route(logits.double(), chosen, score, normalize, bias)
    assert torch.equal(experts, true_experts)
    close(gates, true_gates, "float32", 2)


def test_what_is_no_number_routes_to_experts_that_exist():
    _, experts = route(torch.full((2, 5), float("nan")), 3, "softmax")
    assert ((experts >= 0) & (experts < 5)).all()


def test_configurations_hold_what_the_kernels_assume():
    for arch in configs.SHARED_MEMORY:
        for kind, itemsize in (("dense", 2), ("dense", 4), ("int8", 2), ("int4", 2), ("int4", 4), ("both", 1)):
            for group in (32, 64, 128) if kind in ("int8", "int4") else (0,):
                one = configs.linear(arch, kind, itemsize, None, group)
                for rows in (1, 16, 17, 64, 65, 5000):
                    tile = configs.linear(arch, kind, itemsize, rows, group)
                    assert tile.step & (tile.step - 1) == 0
                    assert not group or group % tile.step == 0
                    assert tile.step >= (32 if kind == "both" else 16)
                    assert tile.columns <= kernels.ARRIVALS
                assert one == configs.linear(arch, kind, itemsize, None, group)
        assert {"int8", "int4"} <= configs.formats(arch)
        assert ("fp8" in configs.formats(arch)) == (configs.e4m3(arch) is not None)
    for tiles in (1, 60, 500):
        for columns in (64, 1024, 4096, 14336):
            count = configs.parts(132, tiles, columns)
            assert count == 1 or columns // count >= configs.SHORTEST_PART


@pytest.mark.parametrize("quantization", ["int4-64", "w8a8", "fp8"])
def test_from_the_flag_to_tokens(quantization, tmp_path, monkeypatch):
    """A model that is rounded while it is loaded, behind the scheduler: a request's tokens alone and in company."""
    from quire import LLM, SamplingParams
    from quire.engine import build
    from quire.plugins import Plugin, load

    config = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=64, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=64, max_position_embeddings=64,
        rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=True, torch_dtype="float32",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    registry = load()
    registry.backends["interpreted"] = Interpreted
    registry.plugins.append(plugin := Plugin("interpreted", "tests", "0"))
    plugin.registered["backends"].append("interpreted")
    monkeypatch.setattr(build, "load", lambda only: registry)

    def tokens(quantization, prompts):
        llm = LLM(
            str(tmp_path), device="interpreted", load_format="dummy", skip_tokenizer_init=True, dtype="float32",
            kv_cache_memory_bytes=1 << 20, batch_invariant=True, quantization=quantization,
        )  # fmt: skip
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=4, logprobs=1)
        outputs = [out.outputs[0] for out in llm.generate([{"prompt_token_ids": p} for p in prompts], params)]
        llm.shutdown()
        return [(list(out.token_ids), out.cumulative_logprob) for out in outputs]

    prompts = [[3, 7, 11], [5] * 20, [9, 60]]
    together = tokens(quantization, prompts)
    assert tokens(quantization, prompts[:1]) == together[:1]
    assert tokens(None, prompts) != together, "nothing was rounded"
