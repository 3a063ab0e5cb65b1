"""What the formats of :mod:`quire.quantization` mean: how a weight is rounded to integers, in plain PyTorch.

A device may round the other side of a product too (its input, to 8 bits with a scale for each row and group).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.quantization import FORMATS, QuantFormat

__all__ = ["FORMATS", "dequantize", "quantize", "rounded"]


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(q uint8 [n, k], scales float32 [n, k / group]) with weight [n, k] ~ (q - 2**(bits - 1)) * scales.

    8 bits: the largest magnitude of a group becomes 127. 4 bits: of a few scales around those that make the largest
    magnitude -8 or 7, the one with the least squared error. The last group of a row may be short.
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
    return best.add_(middle).to(torch.uint8).view(n, -1)[:, :k], scales.squeeze(2)


def _round_to(grouped: Tensor, extreme: Tensor, most: float, middle: int) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, scale, squared error) of each group when its largest magnitude is to become ``most``; a negative one
    keeps its sign."""
    scale = extreme / most if most < 0 else extreme.abs() / most
    q = (grouped / scale.where(scale != 0, 1.0)).round_().clamp_(-middle, middle - 1)
    return q, scale, (q * scale - grouped).double().square_().sum(dim=2, keepdim=True)


def dequantize(q: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """The weight that :func:`quantize` describes, in the scales' dtype."""
    columns = scales.repeat_interleave(group, dim=1)[:, : q.shape[1]]
    return (q.to(scales.dtype) - (1 << (bits - 1))) * columns


def rounded(weight: Tensor, format: QuantFormat) -> Tensor:
    """weight [..., out, in] as it is after rounding, in its own dtype (exactly, in float64)."""
    q, scales = quantize(weight.flatten(0, -2), format.bits, format.group)
    wide = scales.double() if weight.dtype == torch.float64 else scales
    return dequantize(q, wide, format.bits, format.group).to(weight.dtype).view_as(weight)
