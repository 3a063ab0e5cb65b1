"""Mixtures of experts without waiting for the host: tokens sorted by expert on the device, one grouped product for gates
and what they gate, one for the way down, and a weighted sum in a fixed order (Gale et al. 2022,
https://arxiv.org/abs/2211.15841).

The reference is ``quire.reference.ops.moe``. Launches depend on shapes alone, so a captured step may hold them. A row's
bits do not depend on the tile of its expert that it falls in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_triton import configs
from quire_triton.kernels.linear import Sorted, form, launch
from quire_triton.kernels.quantize_rows import quantize_rows
from quire_triton.weights import Packed


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(experts_ptr, counts_ptr, pairs, BLOCK: tl.constexpr):
    """Grid (experts): how many of experts int64 [pairs] are this program's; counts int32 [experts]."""
    expert = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += (tl.load(experts_ptr + i, mask=i < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(total, 0))


@triton.jit(do_not_specialize=["pairs", "tiles"])
def sort_kernel(
    experts_ptr, counts_ptr, order_ptr, owner_ptr, pairs, tiles, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (experts): this expert's pairs in their order, filled up with ``pairs`` to whole tiles of ROWS; the last
    expert's program also says of the tiles that are left that nobody owns them."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < EXPERTS, other=0)
    first = tl.sum(tl.where(e < expert, (counts + ROWS - 1) // ROWS, 0), 0)
    count = tl.sum(tl.where(e == expert, counts, 0), 0)
    mine = (count + ROWS - 1) // ROWS
    at = first * ROWS - 1
    for start in range(0, pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        match = (tl.load(experts_ptr + i, mask=i < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order_ptr + at + tl.cumsum(match, 0), i, mask=match != 0)
        at += tl.sum(match, 0)
    rest = count + tl.arange(0, ROWS)
    tl.store(order_ptr + first * ROWS + rest, pairs, mask=rest < mine * ROWS)
    for tile in range(mine):
        tl.store(owner_ptr + first + tile, expert)
    if expert == EXPERTS - 1:
        for tile in range(first + mine, tiles):
            tl.store(owner_ptr + tile, -1)


@triton.jit
def weigh_kernel(y_ptr, gates_ptr, out_ptr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tokens, blocks of WIDTH). y [tokens, CHOSEN, WIDTH], gates [tokens, CHOSEN]: out [tokens, WIDTH] is the sum of
    gates * y, in order of the choice, in float32."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(CHOSEN):
        y = tl.load(y_ptr + (token * CHOSEN + j) * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)
        total += y * tl.load(gates_ptr + token * CHOSEN + j).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + c, total.to(out_ptr.dtype.element_ty), mask=c < WIDTH)


def sort_by_expert(experts: Tensor, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """experts int64 [T, k], each below ``count`` -> (order int32 [tiles, rows]: indices into the flat experts, each expert's
    in tiles of its own, T * k where nobody is; owner int32 [tiles]: the expert, -1 for none). ``tiles`` is what the least
    even choice needs."""
    pairs = experts.numel()
    tiles = pairs // rows + min(count, pairs)
    order = torch.empty((tiles, rows), dtype=torch.int32, device=experts.device)
    owner = torch.empty(tiles, dtype=torch.int32, device=experts.device)
    counts = torch.empty(count, dtype=torch.int32, device=experts.device)
    flat = experts.contiguous()
    block = min(1024, max(16, triton.next_power_of_2(pairs)))
    count_kernel[(count,)](flat, counts, pairs, BLOCK=block, num_warps=4)
    sort_kernel[(count,)](
        flat, counts, order, owner, pairs, tiles, EXPERTS=count, BLOCK_E=triton.next_power_of_2(count), ROWS=rows,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return order, owner


def moe(
    x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor | Packed, down: Tensor | Packed, activation: str,
    batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """Sum over j of gates[:, j] * mlp[experts[:, j]](x) -> [T, hidden] in x's dtype.

    x [T, hidden], gates float [T, k], experts int64 [T, k], gate_up [E, 2 I, hidden], down [E, hidden, I], dense or
    packed in the same format.
    """
    tokens, chosen = experts.shape
    count, width, hidden = gate_up.shape[0], gate_up.shape[1] // 2, down.shape[1]
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    pairs, dtype, both = tokens * chosen, x.dtype, isinstance(gate_up, Packed) and gate_up.kind == "both"
    kind, group = form(gate_up)
    itemsize = 1 if both else x.element_size()
    rows = None if batch_invariant else -(-pairs // count)  # that an expert has, if all have as many
    tile = configs.linear(configs.architecture(x.device), kind, itemsize, rows, group)
    order, owner = sort_by_expert(experts, count, tile.rows)
    scales = None
    y = torch.empty((pairs, hidden), dtype=dtype, device=x.device)
    if isinstance(gate_up, Packed) and both:
        x, scales = quantize_rows(x, gate_up.q.dtype)
        h = torch.empty((pairs, 2 * width), dtype=dtype, device=x.device)
        launch(x, scales, gate_up, None, h, tile, None, batch_invariant, Sorted(order, owner, chosen))
        h, scales = quantize_rows(h, gate_up.q.dtype, activation)
    else:
        h = torch.empty((pairs, width), dtype=dtype, device=x.device)
        launch(x, None, gate_up, None, h, tile, activation, batch_invariant, Sorted(order, owner, chosen))
    launch(h, scales, down, None, y, tile, None, batch_invariant, Sorted(order, owner, 1))
    block = min(1024, triton.next_power_of_2(hidden))
    weigh_kernel[(tokens, triton.cdiv(hidden, block))](
        y, gates.contiguous(), out, CHOSEN=chosen, WIDTH=hidden, BLOCK=block, num_warps=4
    )
    return out
