"""x W^T with a fixed order of its sums, W dense or in 8 or 4 bits with a scale for each group of columns.

The reference is ``quire.reference.ops.linear``. A row's sum goes over the columns in steps of BLOCK_K from the first.
Where bits must not depend on the batch one tile serves every number of rows; else few rows have a smaller one.
Weight-only quantization as in GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) and AWQ (Lin et al. 2023,
https://arxiv.org/abs/2306.00978): integers become numbers of x's type in registers, a group's sum is scaled in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_triton import configs


@triton.jit
def linear_kernel(
    x_ptr, weight_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, rows, stride_x, N: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, tiles of rows): the tiles that share weights run side by side.

    x [rows, K], weight [N, K] (BITS 16 or 32), uint8 [N, K] (8) or uint8 [N, K / 2] (4: within each BLOCK_K columns the
    low halves are the first half of them); scales, zeros float32 [N, K / GROUP]; bias [N]; out [rows, N]. GROUP is a
    multiple of BLOCK_K, K of GROUP when BITS is below 16.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64)[:, None] * stride_x
    inside_m, inside_n = m[:, None] < rows, n[:, None] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BITS >= 16:
        k = tl.arange(0, BLOCK_K)
        w_row = weight_ptr + n.to(tl.int64)[:, None] * K
        for start in range(0, K, BLOCK_K):
            inside_k = (start + k)[None, :] < K
            x = tl.load(x_row + (start + k)[None, :], mask=inside_m & inside_k, other=0.0)
            w = tl.load(w_row + (start + k)[None, :], mask=inside_n & inside_k, other=0.0)
            acc = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), acc, input_precision="ieee")
    else:
        GROUPS: tl.constexpr = K // GROUP
        MIDDLE: tl.constexpr = 1 << (BITS - 1)
        for start in range(0, K, BLOCK_K):
            scale = tl.load(scales_ptr + n * GROUPS + start // GROUP, mask=n < N, other=0.0)
            if ZEROS:
                zero = tl.load(zeros_ptr + n * GROUPS + start // GROUP, mask=n < N, other=0.0)[:, None]
            else:
                zero = tl.full((BLOCK_N, 1), MIDDLE, tl.float32)
            if BITS == 8:
                k = start + tl.arange(0, BLOCK_K)
                x = tl.load(x_row + k[None, :], mask=inside_m, other=0.0).to(DOT)
                q = tl.load(weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside_n, other=0)
                w = (q.to(tl.float32) - zero).to(DOT)
                part = tl.dot(x, tl.trans(w), input_precision="ieee")
            else:
                half = tl.arange(0, BLOCK_K // 2)
                at = n.to(tl.int64)[:, None] * (K // 2) + (start // 2 + half)[None, :]
                q = tl.load(weight_ptr + at, mask=inside_n, other=0)
                low = ((q & 15).to(tl.float32) - zero).to(DOT)
                high = ((q >> 4).to(tl.float32) - zero).to(DOT)
                first = tl.load(x_row + (start + half)[None, :], mask=inside_m, other=0.0).to(DOT)
                second = tl.load(x_row + (start + BLOCK_K // 2 + half)[None, :], mask=inside_m, other=0.0).to(DOT)
                part = tl.dot(first, tl.trans(low), input_precision="ieee")
                part = tl.dot(second, tl.trans(high), part, input_precision="ieee")
            acc += part * scale[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside_m & (n[None, :] < N))


class Quantized:
    """A weight (q - zeros) * scales as the kernel reads it. q uint8 [n, k] below 2**bits; scales float32, zeros uint8 or
    None (2**(bits - 1) everywhere) [n, k / group]. Raises ValueError for a k that is no multiple of the group."""

    def __init__(self, q: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> None:
        n, k = q.shape
        if bits not in (4, 8) or group not in (32, 64, 128) or k % group:
            raise ValueError(
                f"bits {bits} and group {group} of {k} columns: 4 or 8, and 32, 64 or 128 that divide them"
            )
        self.shape, self.bits, self.group = (n, k), bits, group
        self.scales = scales.float().contiguous()
        self.zeros = None if zeros is None else zeros.float().contiguous()
        self.step = min(group, configs.QUANTIZED_STEP)
        if bits == 4:
            pairs = q.view(n, k // self.step, 2, self.step // 2)
            q = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(n, k // 2)
        self.q = q.contiguous()

    def dense(self) -> Tensor:
        """The numbers it stands for, float32 [n, k]."""
        n, k = self.shape
        q = self.q
        if self.bits == 4:
            pairs = q.view(n, k // self.step, self.step // 2)
            q = torch.stack((pairs & 15, pairs >> 4), dim=2).reshape(n, k)
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[:, :, None]
        return ((q.view(n, -1, self.group).float() - zeros) * self.scales[:, :, None]).view(n, k)


def factors(x: Tensor) -> Any:
    """The type of the products' factors: x's. Host memory is the interpreter's, which has no product of bfloat16."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


def linear(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None, batch_invariant: bool = False) -> Tensor:
    """x [T, k] @ weight [n, k].T + bias [n] -> [T, n] in x's dtype, sums in float32."""
    n, k = weight.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    few = len(x) <= configs.FEW_ROWS and not batch_invariant
    values: Tensor
    if isinstance(weight, Quantized):
        values, scales, bits, group = weight.q, weight.scales, weight.bits, weight.group
        zeros = weight.zeros
    else:
        values, scales, bits, group, zeros = weight, x, 8 * x.element_size(), 0, None
    tile = configs.linear(configs.architecture(x.device), x.element_size(), few, group or None)
    grid = (triton.cdiv(n, tile.columns), triton.cdiv(len(x), tile.rows))
    linear_kernel[grid](
        x, values, scales, x if zeros is None else zeros, x if bias is None else bias, out, len(x), x.stride(0),
        N=n, K=k, BITS=bits, GROUP=group, ZEROS=zeros is not None, BIAS=bias is not None, BLOCK_M=tile.rows,
        BLOCK_N=tile.columns, BLOCK_K=tile.step, DOT=factors(x), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
