"""The input of a product in 8 bits: each row by a scale of its own, after a gated activation where one precedes.

The reference is ``quire.reference.quantize.quantize_rows``, whose bits these are: all is float32, and divisions are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_triton import configs
from quire_triton.kernels.gated_act import ACTIVATIONS, activated


@triton.jit
def whole(x):
    """x float32, below 2**22 in magnitude, to the nearest integer, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_e4m3(x):
    """x float32 of at most 448 to the nearest number that e4m3 has, ties to even, so that converting it rounds nothing:
    conversions differ between devices."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000
    coarse = bits.to(tl.float32, bitcast=True)
    # Below 2**-6 in steps of 2**-9. No zero is negative: e4m3fnuz has none.
    return tl.where(tl.abs(x) < 0.015625, whole(x * 512.0) * 0.001953125, coarse)


@triton.jit
def quantize_rows_kernel(
    x_ptr, out_ptr, scales_ptr, stride_x, WIDTH: tl.constexpr, ACT: tl.constexpr, E4M3: tl.constexpr,
    HALVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows). x [rows, WIDTH], or [rows, 2 WIDTH] with ACT of gated_act; out [rows, WIDTH] int8 or e4m3, HALVED
    for e4m3fnuz; scales float32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + c, mask=c < WIDTH, other=0.0)
    wide = x.to(tl.float32)
    if ACT >= 0:
        up = tl.load(x_ptr + row * stride_x + WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)
        wide = (activated(wide, ACT) * up).to(x.dtype).to(tl.float32)
    most = 448.0 if E4M3 else 127.0
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide), 0), 1e-30), most)
    q = tl.div_rn(wide, scale)
    if E4M3:
        q = to_e4m3(q)
        if HALVED:
            q, scale = q * 0.5, scale * 2.0
    else:
        q = whole(q)
    tl.store(out_ptr + row * WIDTH + c, q.to(out_ptr.dtype.element_ty), mask=c < WIDTH)
    tl.store(scales_ptr + row, scale)


def quantize_rows(x: Tensor, dtype: torch.dtype, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """x [T, k] -> (q [T, k] in ``dtype``: int8, float8_e4m3fn or float8_e4m3fnuz, scales float32 [T]).

    ``activation``: x is [T, 2 k], and what is rounded is activation(first half) * second half, in x's dtype.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape[0], x.shape[1] // (1 if activation is None else 2)
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        quantize_rows_kernel[(rows,)](
            x, out, scales, x.stride(0), WIDTH=width, ACT=-1 if activation is None else ACTIVATIONS[activation],
            E4M3=dtype != torch.int8, HALVED=dtype == torch.float8_e4m3fnuz, BLOCK=block,
            num_warps=configs.row_block(width)[1],
        )  # fmt: skip
    return out, scales
