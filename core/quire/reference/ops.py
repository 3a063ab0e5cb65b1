"""Weights, pointwise and expert operations. Shapes: T tokens, Hq/Hkv heads, D head size, I intermediate size.

Where an operation is defined in float32, it is float64 for float64 inputs, and rounded once at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.hardware import UnsupportedOnDevice
from quire.reference import accumulation_dtype, quantize
from quire.spec import NormSpec

if TYPE_CHECKING:
    from quire.hardware import Backend


def _silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)). Elfwing et al. 2017, https://arxiv.org/abs/1702.03118

    Not torch's own silu: on a host that computes full vectors and the elements left over by two different formulas, so
    an element's bits would depend on how many there are. Its exp, tanh and erf do not have that problem.
    """
    return x / x.neg().exp_().add_(1.0)


def _gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of single operations for the reason given in _silu."""
    inner = (x * x).mul_(x).mul_(0.044715).add_(x).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1.0).mul_(x).mul_(0.5)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": F.gelu,  # Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415
    "gelu_tanh": _gelu_tanh,
}


def pack_weight(raw: Mapping[str, Tensor], format: str, backend: Backend) -> Tensor | quantize.InputsRounded:
    """``dense``: raw["weight"] [out, in], or [experts, out, in] for :func:`moe`, contiguous on the device. One of
    ``quantize.FORMATS``: what is left of it after rounding, in its own dtype, which shows the error and saves nothing.

    Raises UnsupportedOnDevice for another format.
    """
    if format == "dense":
        return raw["weight"].to(backend.device, copy=True).contiguous()
    weight = raw["weight"].to(backend.device)
    if format not in quantize.FORMATS:
        known = ("dense", *quantize.FORMATS)
        raise UnsupportedOnDevice(backend.name, "pack_weight", f"the weight format '{format}' is unknown", known)
    chosen = quantize.FORMATS[format]
    rounded = quantize.rounded(weight, chosen)
    return quantize.InputsRounded(rounded, chosen.type) if chosen.inputs else rounded


def linear(x: Tensor, weight: Tensor | quantize.InputsRounded, bias: Tensor | None = None) -> Tensor:
    """x [T, in] @ weight [out, in].T + bias [out] -> [T, out] in x's dtype; torch accumulates in float32 or better."""
    if isinstance(weight, quantize.InputsRounded):
        x, weight = quantize.rounded_rows(x, weight.type), weight.weight
    return F.linear(x, weight, bias)


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of table [V, hidden] for ids int64 [T] -> [T, hidden]."""
    return table[ids]


def rms_norm(x: Tensor, weight: Tensor, spec: NormSpec, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(s / rms(s) * (weight + offset), s) with s = x + residual in x's dtype, over the last dim; float32 inside.

    x and residual [..., C], weight [C]. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    s = x if residual is None else x + residual
    wide = s.to(accumulation_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.eps)
    return (normed * (weight.to(wide.dtype) + spec.offset)).to(x.dtype), s


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """((s - mean(s)) / sqrt(var(s) + eps) * (weight + offset) + bias, s) with s = x + residual; float32 inside.

    x and residual [..., C], weight and bias [C]. Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """
    s = x if residual is None else x + residual
    wide = s.to(accumulation_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + spec.eps)
    normed = normed * (weight.to(wide.dtype) + spec.offset)
    return (normed if bias is None else normed + bias.to(wide.dtype)).to(x.dtype), s


def rotary(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate the leading R channels of q [T, Hq, D] and k [T, Hkv, D]; the rest pass through. New tensors.

    cos_sin float32 [positions, R]: R / 2 cosines, then R / 2 sines; positions int64 [T]. Channel i turns with channel
    i + R / 2, or 2 i with 2 i + 1 when ``interleaved``. float32 inside. Su et al. 2021,
    https://arxiv.org/abs/2104.09864.
    """
    rows = cos_sin[positions].to(accumulation_dtype(q.dtype))[:, None]  # [T, 1, R]
    cos, sin = rows.chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        width = rows.shape[-1]
        wide = x[..., :width].to(rows.dtype)
        if interleaved:
            a, b = wide[..., 0::2], wide[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = wide.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((turned.to(x.dtype), x[..., width:]), dim=-1)

    return rotate(q), rotate(k)


def gated_act(x: Tensor, activation: str) -> Tensor:
    """act(x[:, :I]) * x[:, I:] for x [T, 2 I] -> [T, I]; float32 inside. Shazeer 2020, https://arxiv.org/abs/2002.05202.

    ``activation``: silu, gelu (exact) or gelu_tanh.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is unknown (known: {', '.join(_ACTIVATIONS)})")
    gate, up = x.to(accumulation_dtype(x.dtype)).chunk(2, dim=-1)
    return (_ACTIVATIONS[activation](gate) * up).to(x.dtype)


def route(
    logits: Tensor, chosen: int, score: str, normalize: bool = True, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(gates float32 [T, chosen], experts int64 [T, chosen]) of logits [T, E], for :func:`moe`.

    A token's experts are those with the largest score, largest first and of equals the first; ``score``: softmax, or
    sigmoid as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437), whose bias [E] counts in the choice alone. A gate is
    the score, divided by the sum of the chosen ones if ``normalize``.
    """
    wide = logits.to(accumulation_dtype(logits.dtype))
    scores = {"softmax": lambda: wide.softmax(-1), "sigmoid": lambda: 1 / (1 + (-wide).exp())}
    if score not in scores:
        raise ValueError(f"score '{score}' is unknown (known: {', '.join(scores)})")
    of_each = scores[score]()
    wanted = of_each if bias is None else of_each + bias
    experts = wanted.sort(dim=-1, descending=True, stable=True).indices[:, :chosen]
    gates = of_each.gather(1, experts)
    return (gates / gates.sum(-1, keepdim=True) if normalize else gates), experts


def moe(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Any, down: Any, activation: str) -> Tensor:
    """Sum over j of gates[:, j] * mlp[experts[:, j]](x) -> [T, hidden], added up in float32 in order of the expert.

    x [T, hidden], gates float [T, k], experts int64 [T, k], gate_up [E, 2 I, hidden], down [E, hidden, I].
    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538.
    """
    wide = accumulation_dtype(x.dtype)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in experts.unique().tolist():
        tokens, choice = (experts == expert).nonzero(as_tuple=True)
        y = linear(gated_act(linear(x[tokens], gate_up[expert]), activation), down[expert])
        out.index_add_(0, tokens, y.to(wide) * gates[tokens, choice].to(wide)[:, None])
    return out.to(x.dtype)
