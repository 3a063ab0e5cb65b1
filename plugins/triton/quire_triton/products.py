"""Who computes a product: torch's own library (cuBLASLt, hipBLASLt, oneDNN) or the kernels here, as configs.py says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.hardware import reference
from quire_triton import configs
from quire_triton.kernels.linear import linear
from quire_triton.kernels.quantize_rows import quantize_rows
from quire_triton.weights import Packed

__all__ = ["library", "linear", "scaled_mm"]

Product = Callable[[Tensor, Any, Tensor | None], Tensor]


def library(x: Tensor, weight: Tensor | Packed, arch: str) -> Product | None:
    """torch's product of x [T, k] and a weight [n, k], where the table gives it this one; None: it is Triton's.

    Its bits depend on the number of rows. int8 on both sides is always Triton's: ``torch._int_mm`` leaves int32, and
    reading that again to scale it costs a quarter of the product.
    """
    if not isinstance(weight, Packed):
        return None if configs.dense_in_triton(arch, len(x)) else reference.ops.linear
    e4m3 = weight.kind == "both" and weight.q.dtype != torch.int8
    # What torch takes: sides of 16 bytes, and (with a scale for each row) an output in bfloat16.
    fits = x.dtype == torch.bfloat16 and not weight.shape[0] % 16 and not weight.shape[1] % 16
    if e4m3 and fits and configs.e4m3_in_torch(arch, len(x)) and hasattr(torch, "_scaled_mm"):
        return scaled_mm
    return None


def scaled_mm(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """x bfloat16 [T, k] @ weight (e4m3, packed) [n, k].T + bias [n] -> bfloat16 [T, n]; sums in float32."""
    assert isinstance(weight, Packed)
    q, scales = quantize_rows(x, weight.q.dtype)
    y = torch._scaled_mm(q, weight.q.T, scales[:, None], weight.scales[None, :], out_dtype=x.dtype)
    return y if bias is None else y + bias
