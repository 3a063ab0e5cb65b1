"""x W^T with a fixed order of its sums: W dense, or integers with a scale for each group of columns, or both sides in
8 bits. Also for rows that were sorted by expert, and with a gated activation at its end.

The reference is ``quire.reference.ops.linear``. A program has a tile of W's rows and of x's, computed as W x^T: the
weight is the first factor, which matrix units take from registers, where integers have just become numbers, and few
rows of x are the narrow side, which costs the hardware least.

The order of a sum depends on K, the tile and PARTS alone: K is cut into PARTS, each is summed in steps from its first
column, and the parts are added in order. Few rows have a program for each part, of which the last to finish adds up
(SPLIT); many rows go through the parts one by one. Both give the same bits, so in a mode where bits must not depend on
the batch one tile and one PARTS serve every number of rows.

Weight-only quantization as in GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): the products of a group are
added up exactly and scaled in float32. Both sides in 8 bits as in LLM.int8 (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339) and FP8 formats (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_triton import configs
from quire_triton.kernels.gated_act import ACTIVATIONS, activated
from quire_triton.kernels.integers import integers
from quire_triton.kernels.quantize_rows import quantize_rows
from quire_triton.weights import Packed

ARRIVALS = 4096
"""Tiles that may be summed by several programs in one launch."""
SWIZZLE = tl.constexpr(8)
"""Row tiles that go through the weight together, so that what they share is still in the cache."""


@triton.jit
def multiply(
    x_row, inside_m, weight_ptr, scales_ptr, zeros_ptr, n, first, last, N: tl.constexpr, K: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` - 1 of the sums of weight rows n and the rows at x_row: float32 [BLOCK_N, BLOCK_M]."""
    k = tl.arange(0, BLOCK_K)
    if KIND == "int8" or KIND == "int4":
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        PACKED: tl.constexpr = 2 if KIND == "int4" else 1
        INSIDE: tl.constexpr = GROUP // BLOCK_K  # steps of a block of GROUP bytes a row
        EVEN: tl.constexpr = K % (PACKED * GROUP) == 0
        w_at = (n * GROUP)[:, None] + k[None, :]
        for step in tl.range(
            first, last, num_stages=STAGES
        ):  # stages said here: a group's scales are then fetched ahead too
            block = step // INSIDE
            column = block * (PACKED * GROUP) + step % INSIDE * BLOCK_K + k
            base = weight_ptr + block.to(tl.int64) * (N * GROUP) + step % INSIDE * BLOCK_K
            q = tl.load(base + w_at)
            for half in tl.static_range(PACKED):
                group = block * PACKED + half
                mask = inside_m if EVEN else inside_m & (column + half * GROUP < K)[None, :]
                x = tl.load(x_row + (column + half * GROUP)[None, :], mask=mask, other=0.0)
                if ZEROS:
                    w = integers(q, KIND, half, True, DOT, PTX)
                    w = w - tl.load(zeros_ptr + group * N + n)[:, None].to(DOT)
                else:
                    w = integers(q, KIND, half, False, DOT, PTX)
                scale = tl.load(scales_ptr + group * N + n).to(tl.float32)
                part = tl.dot(w, tl.trans(x.to(DOT)), input_precision="ieee")
                acc += part * scale[:, None]
    else:
        WHOLE: tl.constexpr = KIND == "both" and tl.int8 == DOT
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if WHOLE else tl.float32)
        w_row = weight_ptr + n.to(tl.int64)[:, None] * K
        for step in range(first, last):
            column = (step * BLOCK_K + k)[None, :]
            if K % BLOCK_K == 0:
                x = tl.load(x_row + column, mask=inside_m, other=0.0)
                w = tl.load(w_row + column)
            else:
                x = tl.load(x_row + column, mask=inside_m & (column < K), other=0.0)
                w = tl.load(w_row + column, mask=column < K, other=0.0)
            if KIND == "dense":
                acc = tl.dot(w.to(DOT), tl.trans(x.to(DOT)), acc, input_precision="ieee")
            elif WHOLE:
                acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
            else:
                # Each step from zero: Hopper's units keep fewer bits than float32 of a sum of e4m3 products.
                acc += tl.dot(w, tl.trans(x))
        acc = acc.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x_ptr, x_scales_ptr, weight_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, parts_ptr, arrived_ptr, order_ptr,
    owner_ptr, rows, stride_x, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    STEPS: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N x tiles of rows, PARTS if SPLIT).

    x [rows, K]; KIND dense: weight [N, K]; int8 and int4: as ``weights.Packed`` has them; both: x and weight [N, K] in 8
    bits, x_scales [rows] and scales [N]. bias [N]; out [rows, N], or [rows, N / 2] where ACT (a number of gated_act)
    makes act(first half) * second half of the columns. SPLIT: parts float32 [tiles, PARTS, BLOCK_N, BLOCK_M], arrived
    int32 [tiles] zeros, which it leaves so.

    EXPERTS: weight, scales and zeros have a dimension in front; order int32 [tiles of rows, BLOCK_M] names rows of out
    (``rows`` or more: none), owner int32 [tiles of rows] each tile's expert (negative: an empty tile). Row r of out
    belongs to row r // CHOSEN of x.
    """
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.num_programs(0) // tiles_n
    tile = tl.program_id(0)
    above = tile // (SWIZZLE * tiles_n) * SWIZZLE
    high = tl.minimum(tiles_m - above, SWIZZLE)
    tile_m = above + tile % (SWIZZLE * tiles_n) % high
    tile_n = tile % (SWIZZLE * tiles_n) // high

    place = tl.arange(0, BLOCK_N)
    if ACT >= 0:  # half a tile of gates, and the same of what they gate
        HALF: tl.constexpr = BLOCK_N // 2
        n = tile_n * HALF + place % HALF
        if N % BLOCK_N != 0:
            n = tl.minimum(n, N // 2 - 1)
        n += place // HALF * (N // 2)
    else:
        n = tile_n * BLOCK_N + place
        if N % BLOCK_N != 0:
            n = tl.minimum(n, N - 1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if EXPERTS:
        expert = tl.load(owner_ptr + tile_m).to(tl.int64)
        if expert < 0:
            return
        m = tl.load(order_ptr + m)
        PACKED: tl.constexpr = 2 if KIND == "int4" else 1
        if KIND == "int8" or KIND == "int4":
            GROUPS: tl.constexpr = (K + PACKED * GROUP - 1) // (PACKED * GROUP) * PACKED
            weight_ptr += expert * (GROUPS // PACKED * GROUP) * N
            scales_ptr += expert * GROUPS * N
            zeros_ptr += expert * GROUPS * N
        else:
            weight_ptr += expert * N * K
            scales_ptr += expert * N
    inside_m = m < rows
    x_row = x_ptr + (m // CHOSEN).to(tl.int64)[:, None] * stride_x

    EACH: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    part = tl.program_id(1) if SPLIT else 0
    acc = multiply(
        x_row, inside_m[:, None], weight_ptr, scales_ptr, zeros_ptr, n, part * EACH,
        tl.minimum(part * EACH + EACH, STEPS), N, K, KIND, GROUP, ZEROS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, DOT, PTX,
    )  # fmt: skip
    if SPLIT:
        at = (place * BLOCK_M)[:, None] + tl.arange(0, BLOCK_M)[None, :]
        mine = parts_ptr + tile.to(tl.int64) * (PARTS * BLOCK_N * BLOCK_M)
        tl.store(mine + part * (BLOCK_N * BLOCK_M) + at, acc, mask=inside_m[None, :], cache_modifier=".cg")
        tl.debug_barrier()  # every thread has stored before the one that counts
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") < PARTS - 1:
            return
        tl.store(arrived_ptr + tile, 0)
        acc = tl.load(mine + at, mask=inside_m[None, :], other=0.0, cache_modifier=".cg")
        for later in range(1, PARTS):
            acc += tl.load(
                mine + later * (BLOCK_N * BLOCK_M) + at, mask=inside_m[None, :], other=0.0, cache_modifier=".cg"
            )
    else:
        for later in range(1, PARTS):
            acc += multiply(
                x_row, inside_m[:, None], weight_ptr, scales_ptr, zeros_ptr, n, later * EACH,
                tl.minimum(later * EACH + EACH, STEPS), N, K, KIND, GROUP, ZEROS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, DOT, PTX,
            )  # fmt: skip

    if KIND == "both":
        acc = acc * tl.load(scales_ptr + n)[:, None]
        acc = acc * tl.load(x_scales_ptr + m // CHOSEN, mask=inside_m, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    if ACT >= 0:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, HALF, BLOCK_M)), (1, 2, 0)))
        acc = activated(gate, ACT) * up
        c = tile_n * HALF + tl.arange(0, HALF)
    else:
        c = tile_n * BLOCK_N + place
    WIDTH: tl.constexpr = N // 2 if ACT >= 0 else N
    out = out_ptr + m.to(tl.int64)[:, None] * WIDTH + c[None, :]
    tl.store(out, tl.trans(acc.to(out_ptr.dtype.element_ty)), mask=inside_m[:, None] & (c < WIDTH)[None, :])


def factors(x: Tensor) -> Any:
    """The type of the products' factors: x's. Host memory is the interpreter's, which has no product of bfloat16."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return tl.float32
    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
    return kinds.get(x.dtype, tl.float8e4nv)


@functools.lru_cache(maxsize=16)
def arrivals(device: torch.device) -> Tensor:
    """Counters of the programs of a tile. Launches on one queue share them: each leaves zeros."""
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)


def form(weight: Tensor | Packed) -> tuple[str, int]:
    """(kind, group) of a weight, for ``configs.linear``."""
    return (weight.kind, weight.group) if isinstance(weight, Packed) else ("dense", 0)


@dataclass(frozen=True)
class Sorted:
    """The output's rows by expert: see ``linear_kernel``. ``chosen``: how many there are for each row of x."""

    order: Tensor
    owner: Tensor
    chosen: int


def launch(
    x: Tensor, x_scales: Tensor | None, weight: Tensor | Packed, bias: Tensor | None, out: Tensor, tile: configs.Product,
    activation: str | None, invariant: bool, by_expert: Sorted | None = None,
) -> None:  # fmt: skip
    """Run the kernel; ``out`` [rows, n], or [rows, n / 2] with an activation, is written."""
    kind, group = form(weight)
    q, scales, zeros = (weight.q, weight.scales, weight.zeros) if isinstance(weight, Packed) else (weight, None, None)
    n, k = weight.shape[-2:]
    arch = configs.architecture(x.device)
    tiles_n = triton.cdiv(n, tile.columns)
    tiles_m = triton.cdiv(len(out), tile.rows) if by_expert is None else len(by_expert.owner)
    steps = triton.cdiv(k, tile.step)
    if group:
        steps = triton.cdiv(k, group * (2 if kind == "int4" else 1)) * (group // tile.step)
    busy, tiles = configs.processors(x.device), tiles_n * tiles_m
    parts = 1 if by_expert is not None else configs.parts(busy, tiles_n if invariant else tiles, k)
    split = parts > 1 and tiles < 2 * busy and tiles <= ARRIVALS
    space = out
    if split:
        space = torch.empty(tiles * parts * tile.columns * tile.rows, dtype=torch.float32, device=x.device)
    linear_kernel[(tiles, parts if split else 1)](
        x, x if x_scales is None else x_scales, q, x if scales is None else scales, x if zeros is None else zeros,
        x if bias is None else bias, out, space, arrivals(x.device) if split else x,
        x if by_expert is None else by_expert.order, x if by_expert is None else by_expert.owner,
        len(out), x.stride(0), N=n, K=k, KIND=kind, GROUP=group, ZEROS=zeros is not None, BIAS=bias is not None,
        ACT=-1 if activation is None else ACTIVATIONS[activation], EXPERTS=by_expert is not None,
        CHOSEN=1 if by_expert is None else by_expert.chosen, STEPS=steps, PARTS=parts, SPLIT=split, BLOCK_M=tile.rows,
        BLOCK_N=tile.columns, BLOCK_K=tile.step, STAGES=tile.stages, DOT=factors(x), PTX=arch.startswith("sm_"),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None, activation: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """x [T, k] @ weight [n, k].T + bias [n] -> [T, n] in x's dtype, sums in float32 (of integers: exact).

    ``activation``: x @ weight.T is a gate and what it gates, and activation(gate) * up [T, n / 2] is returned.
    """
    n, _ = weight.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty((len(x), n if activation is None else n // 2), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x_scales, itemsize = None, x.element_size()
    kind, group = form(weight)
    if isinstance(weight, Packed) and kind == "both":
        x, x_scales = quantize_rows(x, weight.q.dtype)
        itemsize = 1
    tile = configs.linear(configs.architecture(x.device), kind, itemsize, None if batch_invariant else len(x), group)
    launch(x, x_scales, weight, bias, out, tile, activation, batch_invariant)
    return out
