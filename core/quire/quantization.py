"""Weight formats that a plain checkpoint is rounded to while it is loaded (``--quantization``). No torch here.

A format keeps small numbers and, for each row and so many neighbouring columns (a group), one scale. What rounding
means is in :mod:`quire.reference.quantize`. Norms and biases stay as they are, and so does the embedding's table (rows of
it are looked up, not multiplied), unless it is also the output projection and the device holds the two as one: then its
rows are the rounded ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from quire.models.family import WeightMap


@dataclass(frozen=True)
class QuantFormat:
    """``bits`` of a number; ``group`` columns that share a scale, 0: the whole row does. ``type``: int, or e4m3 (Micikevicius
    et al. 2022, https://arxiv.org/abs/2209.05433). ``inputs``: each row of a product's input is rounded to the same type."""

    bits: int
    group: int
    type: Literal["int", "e4m3"] = "int"
    inputs: bool = False

    def bytes(self, shape: Sequence[int]) -> int:
        """What a weight [..., out, in] takes: whole groups of numbers, and their scales."""
        group = self.group or shape[-1]
        scale = 2 if self.group else 4  # bfloat16, or float32
        return math.prod(shape[:-1]) * -(-shape[-1] // group) * (group * self.bits // 8 + scale)


FORMATS = {
    "int8": QuantFormat(8, 128),
    "int4": QuantFormat(4, 32),
    "int4-64": QuantFormat(4, 64),
    "int4-128": QuantFormat(4, 128),
    "w8a8": QuantFormat(8, 0, inputs=True),
    "fp8": QuantFormat(8, 0, "e4m3", inputs=True),
}
"""By the names of ``--quantization``. The first four have 8.125, 4.5, 4.25 and 4.125 bits a weight and save memory and the
time to read it; bench/perplexity.py measures their cost. The last two have 8 bits on both sides of a product, which
runs on units that do twice the work in a cycle: each output channel has a scale, and each token one as it comes."""


def head_format(quantization: str) -> str:
    """The format of the output projection, which decides between tokens directly: int8, but with 4-bit weights the finest of
    4 bits, because a small model's head is a third of what a step reads."""
    return "int4" if FORMATS[quantization].bits == 4 else "int8"


def format_of(weight: WeightMap, quantization: str | None) -> str:
    """What ``pack_weight`` is asked to make of a matrix of the graph."""
    if quantization is None:
        return "dense"
    return head_format(quantization) if weight.owner == "model" else quantization
