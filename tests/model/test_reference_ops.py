"""Reference operations against PyTorch's and Transformers' own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from quire.hardware import Backend, UnsupportedOnDevice
from quire.reference import ops, torch_dtype
from quire.spec import NormSpec

DTYPES = [torch.float32, torch.float64]


class Host(Backend):
    name = "host"
    device = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("module", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_rms_norm(dtype, module, offset):
    x, residual = torch.randn(2, 5, 24, dtype=dtype)
    theirs = module(24, eps=1e-5).to(dtype)
    theirs.weight.data = torch.randn(24, dtype=dtype)
    ours, summed = ops.rms_norm(x, theirs.weight.data, NormSpec("rms", 1e-5, offset), residual)
    assert ours.dtype == dtype
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(ours, theirs(x + residual).detach(), rtol=1e-5, atol=1e-6)
    alone, same = ops.rms_norm(x, theirs.weight.data, NormSpec("rms", 1e-5, offset))
    assert same is x
    torch.testing.assert_close(alone, theirs(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(dtype, biased):
    x, residual = torch.randn(2, 5, 24, dtype=dtype) + 3
    weight, bias = torch.randn(24, dtype=dtype), torch.randn(24, dtype=dtype) if biased else None
    ours, summed = ops.layer_norm(x, weight, bias, NormSpec("layer", 1e-5), residual)
    torch.testing.assert_close(ours, F.layer_norm(x + residual, (24,), weight, bias, 1e-5), rtol=1e-5, atol=1e-6)
    assert torch.equal(summed, x + residual)


def test_norms_in_bfloat16_round_once():
    x, weight = torch.randn(5, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    exact, _ = ops.rms_norm(x.double(), weight.double(), NormSpec())
    assert torch.equal(ops.rms_norm(x, weight, NormSpec())[0], exact.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 8])
def test_rotary_turns_halves(dtype, width):
    q, k = torch.randn(7, 4, 16, dtype=dtype), torch.randn(7, 2, 16, dtype=dtype)
    angles = torch.arange(40.0)[:, None] * torch.rand(width // 2)
    table, positions = torch.cat((angles.cos(), angles.sin()), 1), torch.tensor([0, 3, 39, 5, 1, 2, 2])
    cos, sin = (f(torch.cat((angles, angles), 1))[positions].to(dtype) for f in (torch.cos, torch.sin))
    theirs = [
        torch.cat((turned.transpose(0, 1), x[..., width:]), -1)
        for x in (q, k)
        for turned in apply_rotary_pos_emb(*[x[..., :width].transpose(0, 1)] * 2, cos, sin, unsqueeze_dim=0)[:1]
    ]
    ours = ops.rotary(q, k, positions, table)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_rotary_interleaved_turns_neighbours():
    q = torch.randn(6, 2, 8)
    angles = torch.arange(6.0)[:, None] * torch.rand(4)
    theirs = gptj_rotary(q[None], angles.sin()[None], angles.cos()[None])[0]
    ours, _ = ops.rotary(q, q, torch.arange(6), torch.cat((angles.cos(), angles.sin()), 1), interleaved=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_gated_act(name):
    x = torch.randn(5, 12)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": torch.nn.GELU(approximate="tanh")}[name]
    torch.testing.assert_close(ops.gated_act(x, name), act(x[:, :6]) * x[:, 6:])


def test_gated_act_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'relu' is unknown"):
        ops.gated_act(torch.randn(2, 4), "relu")


def test_moe_sums_what_each_expert_says():
    tokens, chosen, count, hidden, inner = 9, 2, 4, 8, 6
    x, gates = torch.randn(tokens, hidden), torch.rand(tokens, chosen)
    experts = torch.stack([torch.randperm(count)[:chosen] for _ in range(tokens)])
    gate_up, down = torch.randn(count, 2 * inner, hidden), torch.randn(count, hidden, inner)
    ours = ops.moe(x, gates, experts, gate_up, down, "silu")
    for t in range(tokens):
        total = torch.zeros(hidden)
        for g, e in zip(gates[t], experts[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            total += g * (down[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(ours[t], total, rtol=1e-4, atol=1e-5)


def test_pack_weight_copies_and_refuses_other_formats():
    weight = torch.randn(4, 3)
    packed = Host().pack_weight({"weight": weight})
    assert torch.equal(packed, weight)
    assert packed.data_ptr() != weight.data_ptr()
    with pytest.raises(UnsupportedOnDevice, match=r"pack_weight is not supported on device 'host'.*'int3'"):
        Host().pack_weight({"weight": weight}, "int3")


def test_dtypes_by_name():
    assert torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="'nonsense' is not the name of a torch dtype"):
        torch_dtype("nonsense")
    with pytest.raises(ValueError, match="'linspace'"):
        torch_dtype("linspace")
