"""Matrix products whose bits do not depend on how many rows come together.

A matrix library picks its blocking, and thus the order of its sums, by the shape. Here a row is always computed as if
in a tile of ``TILE`` rows, whatever its company. Calls of other sizes are faster, so each size is tried once per weight
shape against the tile: only if every bit agrees is that size used from then on. The trial's sums cancel, exactly if
they were exact, so that a result is nothing but the rounding of its order, and another order shows even in bfloat16.
Whether a size is admitted or not, the result is the tile's bits; only speed depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from quire.hardware import UnsupportedOnDevice

log = logging.getLogger("quire.cpu")

TILE = 16
LARGEST = 512  # rows of one call
COLUMNS = 8192  # outputs of one call: so that a trial is small also for a vocabulary
ALIGNMENT = 64  # bytes: libraries may take another path for data that is not aligned


def padded_size(rows: int) -> int:
    """The smallest size we would call the library with for ``rows`` rows: few sizes, little padding."""
    for size in (1, 4, 8, TILE):
        if rows <= size:
            return size
    step = TILE if rows <= 128 else 64
    return min(-(-rows // step) * step, LARGEST)


def fresh(x: Tensor, size: int) -> Tensor:
    """x [T, K] as ``size`` rows, contiguous and aligned; added rows are zero."""
    if x.shape[0] == size and x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    out = x.new_zeros(size, x.shape[1]) if x.shape[0] < size else x.new_empty(size, x.shape[1])
    out[: x.shape[0]] = x
    return out


class Block:
    """Up to ``COLUMNS`` rows of a weight [out, in], in the layout the library likes best."""

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        self.packed = _library_layout(weight)
        kept = weight if self.packed is None else weight[:0]  # a copy: the caller's memory is used again
        self.weight = kept.clone(memory_format=torch.contiguous_format)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return torch.nn.functional.linear(x, self.weight, bias)

    def tiles(self, x: Tensor, bias: Tensor | None, tile: int) -> Tensor:
        out = x.new_empty(x.shape[0], self.shape[0])
        for start in range(0, x.shape[0], tile):
            piece = x[start : start + tile]
            out[start : start + tile] = self(fresh(piece, tile), bias)[: len(piece)]
        return out


class Exactness:
    """Which sizes of a call give the tile's bits, for each shape of weight; found out when first asked."""

    def __init__(self) -> None:
        self.known: dict[tuple, bool] = {}

    def admits(self, block: Block, size: int, bias: bool) -> bool:
        key = (block.shape, block.dtype, block.packed is None, bias, size, torch.get_num_threads())
        if key not in self.known:
            self.known[key] = self._try(block.shape, block.dtype, size, bias)
            if not self.known[key]:
                log.info("linear %s %s: calls of %d rows are not exact and not used", block.shape, block.dtype, size)
        return self.known[key]

    def _try(self, shape: tuple[int, int], dtype: torch.dtype, size: int, with_bias: bool) -> bool:
        out, inner = shape
        generator = torch.Generator().manual_seed(size)
        weight, x = cancelling(out, inner, max(size, TILE), dtype, generator)
        bias = torch.randn(out, generator=generator).to(dtype) * 1e-6 if with_bias else None
        block = Block(weight)
        if size == TILE:
            base = block(x, bias)
            for shift in (1, 2, 3, 5, 8, 11, 14):
                moved = torch.cat((x.flip(0)[:shift] * 0.5, x[:-shift]))  # other company, another place
                if not torch.equal(block(moved, bias)[shift:], base[:-shift]):
                    return False
            return True
        if not self.admits(block, TILE, with_bias):
            return size == 1  # a call of one row has no company: the definition of last resort
        base = block.tiles(x, bias, TILE)
        return all(
            torch.equal(block(fresh(p, size), bias), b) for p, b in zip(x.split(size), base.split(size), strict=True)
        )


def cancelling(
    out: int, inner: int, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A weight [out, inner] and an x [rows, inner] whose product is zero but for rounding: every input has a partner
    elsewhere with the same x and the opposite weight (an odd one out is zero). Magnitudes span 2^-4 to 2^4."""
    half = inner // 2
    order = torch.randperm(inner, generator=generator)
    first, second = order[:half], order[half : 2 * half]
    distinct = min(out, 512)  # enough different columns; more are repeats
    weight = torch.zeros(distinct, inner)
    weight[:, first] = torch.randn(distinct, half, generator=generator)
    weight[:, first] *= 2.0 ** torch.randint(-4, 5, (distinct, half), generator=generator)
    weight[:, second] = -weight[:, first]
    x = torch.zeros(rows, inner)
    x[:, first] = torch.randn(rows, half, generator=generator)
    x[:, second] = x[:, first]
    return weight.to(dtype).repeat(-(-out // distinct), 1)[:out], x.to(dtype)


class PackedWeight:
    """A weight [out, in], packed in blocks of outputs."""

    def __init__(self, weight: Tensor, exactness: Exactness) -> None:
        self.shape, self.dtype, self.exactness = tuple(weight.shape), weight.dtype, exactness
        self.blocks = [Block(part) for part in weight.split(COLUMNS)]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] in x's dtype, sums in float32."""
        if x.dtype != self.dtype:
            raise UnsupportedOnDevice("cpu", "linear", f"input {x.dtype} with a weight of {self.dtype}", ("cast one",))
        if len(self.blocks) == 1 and 0 < x.shape[0] <= LARGEST:
            return self._exact(self.blocks[0], x, bias)
        out = x.new_empty(x.shape[0], self.shape[0])
        for start in range(0, x.shape[0], LARGEST):
            rows = x[start : start + LARGEST]
            for i, block in enumerate(self.blocks):
                columns = slice(i * COLUMNS, i * COLUMNS + block.shape[0])
                part = None if bias is None else bias[columns].contiguous()
                out[start : start + len(rows), columns] = self._exact(block, rows, part)
        return out

    def _exact(self, block: Block, x: Tensor, bias: Tensor | None) -> Tensor:
        size = padded_size(x.shape[0])
        if self.exactness.admits(block, size, bias is not None):
            return block(fresh(x, size), bias)[: x.shape[0]]
        return block.tiles(x, bias, TILE if self.exactness.admits(block, TILE, bias is not None) else 1)


def _library_layout(weight: Tensor) -> Tensor | None:
    """oneDNN's blocked layout where it has one for this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or weight.numel() == 0:
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TILE)
    except (RuntimeError, AttributeError):
        return None


def pack(raw: Mapping[str, Tensor], format: str, exactness: Exactness) -> PackedWeight | list[PackedWeight]:
    """raw["weight"] [out, in], or [experts, out, in]: then one packed weight an expert."""
    if format != "dense":
        raise UnsupportedOnDevice("cpu", "pack_weight", f"it has no weight format '{format}'", ("dense",))
    weight = raw["weight"]
    if weight.dim() == 3:
        return [PackedWeight(one, exactness) for one in weight]
    return PackedWeight(weight, exactness)
