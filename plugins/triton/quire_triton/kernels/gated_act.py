"""act(gate) * up of a gated MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202).

The reference is ``quire.reference.ops.gated_act``. Each element is computed by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def activated(gate, KIND: tl.constexpr):
    """act(gate) in float32; KIND: a value of ACTIVATIONS."""
    if KIND == 0:
        gate = gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))  # (1 + tanh(y)) / 2 = 1 - 1 / (exp(2 y) + 1)
    return gate


@triton.jit
def gated_act_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """Grid (tokens, blocks of WIDTH). x [tokens, 2 WIDTH]: gate, then up; out [tokens, WIDTH]."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + token * 2 * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * 2 * WIDTH + WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + c, (activated(gate, KIND) * up).to(out_ptr.dtype.element_ty), mask=c < WIDTH)


def gated_act(x: Tensor, activation: str) -> Tensor:
    """x [T, 2 I] -> act(x[:, :I]) * x[:, I:] [T, I]; ``activation``: silu, gelu or gelu_tanh; float32 inside."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is unknown (known: {', '.join(ACTIVATIONS)})")
    x = x.contiguous()
    tokens, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if tokens:
        block = min(1024, triton.next_power_of_2(width))
        gated_act_kernel[(tokens, triton.cdiv(width, block))](
            x, out, WIDTH=width, BLOCK=block, KIND=ACTIVATIONS[activation], num_warps=4
        )
    return out
