"""Weight formats that a plain checkpoint is rounded to while it is loaded (``--quantization``). No torch here.

A format keeps integers and, for each row and so many neighbouring columns (a group), one float32 scale. What rounding
means is in :mod:`quire.reference.quantize`. Norms and biases stay as they are, and so does the embedding's table (rows of
it are looked up, not multiplied), unless it is also the output projection and the device holds the two as one: then its
rows are the rounded ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.family import WeightMap


@dataclass(frozen=True)
class QuantFormat:
    """``bits`` of an integer, ``group`` columns that share a scale."""

    bits: int
    group: int

    def bytes(self, shape: Sequence[int]) -> int:
        """What a weight [..., out, in] takes: whole groups of integers, and their scales."""
        return math.prod(shape[:-1]) * -(-shape[-1] // self.group) * (self.group * self.bits // 8 + 4)


FORMATS = {
    "int8": QuantFormat(8, 128),
    "int4": QuantFormat(4, 32),
    "int4-64": QuantFormat(4, 64),
    "int4-128": QuantFormat(4, 128),
}
"""By the names of ``--quantization``. 8, 5, 4.5 and 4.25 bits a weight, about; bench/perplexity.py measures their cost."""

HEAD = "int8"
"""The format of the output projection, whatever the others': it decides between tokens directly."""


def format_of(weight: WeightMap, quantization: str | None) -> str:
    """What ``pack_weight`` is asked to make of a matrix of the graph."""
    if quantization is None:
        return "dense"
    return HEAD if weight.owner == "model" else quantization
