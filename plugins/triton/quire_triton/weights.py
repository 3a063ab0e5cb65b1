"""Weights in the formats of ``quire.quantization``, in the layout that the products' kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quire.hardware import reference

AT_ONCE = 1 << 24
"""Elements of a weight that are rounded together: what that needs beside the weight stays below half a gigabyte."""


@dataclass
class Packed:
    """A weight [n, k], or [experts, n, k] with a dimension in front of each tensor.

    int8: q int8 [blocks, n, group], less 128; int4: q uint8 [blocks, n, group], whose low halves are the columns of an
    even group and whose high halves those of the next; so a tile of rows is one stretch of memory whatever the group.
    scales [groups, n], zeros float32 alike or None (128 and 8 everywhere; in int8 they are less 128 too). Columns from k
    on are zeros. both: q int8 or e4m3 [n, k], scales float32 [n].
    """

    kind: Literal["int8", "int4", "both"]
    shape: tuple[int, ...]
    group: int
    q: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def pack_integers(q: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> Packed:
    """The weight (q - zeros) * scales: q uint8 [n, k] below 2**bits, scales and zeros (None: 2**(bits - 1)) [n, groups].

    Raises ValueError for bits other than 4 and 8 and groups other than 32, 64 and 128.
    """
    n, k = q.shape
    if bits not in (4, 8) or group not in (32, 64, 128):
        raise ValueError(f"bits {bits} and group {group}: there are 4 and 8, and 32, 64 and 128")
    blocks = -(-k // (group * 8 // bits))
    groups = blocks * 8 // bits
    out = torch.empty((blocks, n, group), dtype=torch.uint8, device=q.device)
    _fill(out, torch.nn.functional.pad(q, (0, groups * group - k), value=1 << (bits - 1)), bits)

    def across(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x.T, (0, 0, 0, groups - x.shape[1])).contiguous()

    points = None if zeros is None else across(zeros.float() - (128 if bits == 8 else 0))
    kind: Literal["int8", "int4"] = "int8" if bits == 8 else "int4"
    return Packed(kind, (n, k), group, out.view(torch.int8) if bits == 8 else out, across(scales), points)


def _fill(out: Tensor, q: Tensor, bits: int) -> None:
    """out [blocks, n, group] from q [n, columns of whole blocks]."""
    blocks, n, group = out.shape
    if bits == 8:
        torch.sub(q.view(n, blocks, group).transpose(0, 1), 128, out=out)  # modulo 256: the bits of int8
    else:
        pairs = q.view(n, blocks, 2, group)
        out.copy_((pairs[:, :, 0] | pairs[:, :, 1] << 4).transpose(0, 1))


def pack(weight: Tensor, format: Any, device: torch.device, fnuz: bool = False) -> Packed:
    """weight [n, k] or [experts, n, k] rounded to a format of the contract, some rows at a time. ``fnuz``: e4m3 in the form of
    AMD's MI300, whose numbers of the same bits are half as large."""
    if weight.dim() == 3:
        return _stack([pack(one, format, device, fnuz) for one in weight])
    n, k = weight.shape
    rows = max(1, AT_ONCE // max(1, k))
    pieces = []
    for start in range(0, n, rows):
        piece = weight[start : start + rows].to(device)
        if format.inputs:
            q, scales = reference.quantize.quantize_rows(piece, format.type)
            if fnuz and format.type == "e4m3":
                q, scales = as_fnuz(q), scales * 2
            pieces.append(Packed("both", tuple(piece.shape), 0, q, scales))
        else:
            integers, scales = reference.quantize.quantize(piece, format.bits, format.group)
            pieces.append(pack_integers(integers, scales, None, format.bits, format.group))
    first = pieces[0]
    along = 0 if first.kind == "both" else 1
    if len(pieces) == 1:
        return first
    q = torch.cat([p.q.view(torch.uint8) for p in pieces], along).view(first.q.dtype)
    return Packed(first.kind, (n, k), first.group, q, torch.cat([p.scales for p in pieces], -1))


def _stack(each: list[Packed]) -> Packed:
    first = each[0]
    q = torch.stack([p.q.view(torch.uint8) for p in each]).view(first.q.dtype)
    scales = torch.stack([p.scales for p in each])
    return Packed(first.kind, (len(each), *first.shape), first.group, q, scales)


def as_fnuz(q: Tensor) -> Tensor:
    """e4m3 numbers as e4m3fnuz of half the value: the same bits, but that minus zero is there what is not a number."""
    bits = q.view(torch.uint8)
    return bits.masked_fill(bits == 0x80, 0).view(torch.float8_e4m3fnuz)


def unpacked(weight: Packed) -> Tensor:
    """What a packed weight stands for, float32 [n, k] or [experts, n, k]."""
    if weight.kind == "both":
        return weight.q.float() * weight.scales[..., None]
    q = weight.q
    if weight.kind == "int4":
        q = torch.stack((q & 15, q >> 4), dim=-3)  # [blocks, 2, n, group], after the experts
        q = q.flatten(-4, -3)
    middle = 0.0 if weight.kind == "int8" else 8.0
    points = middle if weight.zeros is None else weight.zeros[..., None]
    dense = (q.float() - points) * weight.scales.float()[..., None]  # [groups, n, group]
    return dense.transpose(-3, -2).flatten(-2)[..., : weight.shape[-1]]
