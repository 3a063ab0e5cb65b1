"""What the formats of :mod:`quire.quantization` mean: how a weight is rounded to integers, in plain PyTorch.

Where the format says so, a product's input is rounded too (:class:`InputsRounded`). In other formats a device may do that,
to 8 bits with a scale for each row and group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.quantization import FORMATS, QuantFormat

__all__ = ["FORMATS", "InputsRounded", "dequantize", "quantize", "quantize_rows", "rounded", "rounded_rows"]


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(q uint8 [n, k], scales bfloat16 [n, k / group]) with weight [n, k] ~ (q - 2**(bits - 1)) * scales.

    8 bits: the largest magnitude of a group becomes 127. 4 bits: of a few scales around those that make the largest
    magnitude -8 or 7, the one with the least squared error. Scales are rounded to bfloat16 before the integers are chosen.
    The last group of a row may be short.
    """
    n, k = weight.shape
    middle = 1 << (bits - 1)
    grouped = F.pad(weight.float(), (0, -k % group)).view(n, -1, group)
    extreme = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))  # [n, groups, 1], with its sign
    ranges = (middle - 1.0,) if bits == 8 else (-8.0, -8.7, 7.0, 7.7)
    best, scales, best_error = _round_to(grouped, extreme, ranges[0], middle)
    for most in ranges[1:]:
        q, scale, error = _round_to(grouped, extreme, most, middle)
        better = error < best_error
        best, scales, best_error = q.where(better, best), scale.where(better, scales), error.where(better, best_error)
    return best.add_(middle).to(torch.uint8).view(n, -1)[:, :k], scales.squeeze(2).bfloat16()


def _round_to(grouped: Tensor, extreme: Tensor, most: float, middle: int) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, scale, squared error) of each group when its largest magnitude is to become ``most``; a negative one
    keeps its sign."""
    scale = (extreme / most if most < 0 else extreme.abs() / most).bfloat16().float()
    q = (grouped / scale.where(scale != 0, 1.0)).round_().clamp_(-middle, middle - 1)
    return q, scale, (q * scale - grouped).double().square_().sum(dim=2, keepdim=True)


def dequantize(q: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """The weight that :func:`quantize` describes, float64 where the scales are, otherwise float32."""
    wide = torch.promote_types(scales.dtype, torch.float32)
    columns = scales.to(wide).repeat_interleave(group, dim=1)[:, : q.shape[1]]
    return (q.to(wide) - (1 << (bits - 1))) * columns


LARGEST = {"int": 127.0, "e4m3": 448.0}
"""What the largest magnitude of a row becomes."""


def quantize_rows(x: Tensor, type: Literal["int", "e4m3"]) -> tuple[Tensor, Tensor]:
    """(q int8 or float8_e4m3fn [n, k], scales float32 [n]) with x [n, k] ~ q * scales, ties to even.

    Every step is float32 and rounds once, so that a device can give the same bits.
    """
    wide = x.float()
    scales = wide.abs().amax(dim=1).clamp_min(1e-30) / LARGEST[type] if x.shape[1] else wide.new_ones(len(x))
    q = wide / scales[:, None]
    return (q.round_().to(torch.int8) if type == "int" else q.to(torch.float8_e4m3fn)), scales


def rounded_rows(x: Tensor, type: Literal["int", "e4m3"]) -> Tensor:
    """x [n, k] as it is after :func:`quantize_rows`, in its own dtype (exactly, in float64)."""
    q, scales = quantize_rows(x, type)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (q.float().to(wide) * scales.to(wide)[:, None]).to(x.dtype)


@dataclass
class InputsRounded:
    """A weight [..., out, in] after rounding, whose product rounds each row of its input to ``type`` first."""

    weight: Tensor
    type: Literal["int", "e4m3"]

    def __getitem__(self, expert: int) -> InputsRounded:
        return InputsRounded(self.weight[expert], self.type)


def rounded(weight: Tensor, format: QuantFormat) -> Tensor:
    """weight [..., out, in] as it is after rounding, in its own dtype (exactly, in float64)."""
    if format.inputs:
        return rounded_rows(weight.flatten(0, -2), format.type).view_as(weight)
    q, scales = quantize(weight.flatten(0, -2), format.bits, format.group)
    wide = scales.double() if weight.dtype == torch.float64 else scales
    return dequantize(q, wide, format.bits, format.group).to(weight.dtype).view_as(weight)
