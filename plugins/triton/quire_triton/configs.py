"""Launch configurations by architecture. Nothing is tuned while a user waits: a number here was chosen beforehand,
and tests/triton/test_compile.py holds every row below the shared memory and register limits of its architecture.

The rows have been compiled for their architectures and not yet timed on them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "gfx1100": 64 * 1024,
    "other": 64 * 1024,
}
"""Bytes of shared memory (LDS) that one program may have."""


@dataclass(frozen=True)
class Tile:
    """Attention's tile: rows (query tokens x heads of a group), keys, and how Triton is to run it."""

    rows: int
    keys: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` and the like; ``other`` for what has no row of its own."""
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            name = properties.gcnArchName.partition(":")[0]
        else:
            name = f"sm_{properties.major}{properties.minor}"
            if name == "sm_103":
                name = "sm_100"
        return name if name in SHARED_MEMORY else "other"
    return "other"


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units, Xe cores) of the device: what a launch should keep busy."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return max(1, getattr(torch.xpu.get_device_properties(device), "gpu_subslice_count", 0) or 64)
    return 4


# (architecture) -> head size up to -> tile, for 16-bit queries.
_PREFILL: dict[str, dict[int, Tile]] = {
    "sm_80": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    "sm_86": {64: Tile(128, 64, 8, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 2)},
    "sm_90": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 32, 8, 2)},
    "sm_100": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "gfx942": {64: Tile(128, 64, 4, 1), 128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
    "gfx1100": {64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "other": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
}
_DECODE: dict[str, dict[int, Tile]] = {
    "sm_80": {64: Tile(16, 128, 4, 5), 128: Tile(16, 64, 4, 5), 256: Tile(16, 32, 4, 5)},
    "sm_86": {64: Tile(16, 64, 4, 3), 128: Tile(16, 32, 4, 3), 256: Tile(16, 32, 4, 2)},
    "sm_90": {64: Tile(16, 128, 4, 6), 128: Tile(16, 64, 4, 6), 256: Tile(16, 32, 4, 6)},
    "sm_100": {64: Tile(16, 128, 4, 6), 128: Tile(16, 64, 4, 6), 256: Tile(16, 32, 4, 6)},
    "gfx942": {64: Tile(16, 64, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
    "gfx1100": {64: Tile(16, 32, 2, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
    "other": {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 1)},
}
_SAME_AS = {"sm_89": "sm_86", "sm_120": "sm_86", "gfx90a": "gfx942", "gfx950": "gfx942"}
# Latent attention's, 576 channels of which 512 are values: architecture -> (prompts, decode).
_LATENT: dict[str, tuple[Tile, Tile]] = {
    "sm_80": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
    "sm_86": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    "sm_90": (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    "sm_100": (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    "gfx942": (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    "gfx1100": (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    "other": (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_LATENT_FLOAT32 = Tile(16, 16, 8, 1)
# Products of float32 are not tensor-core products: one small tile does everywhere.
_PREFILL_FLOAT32 = {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 32, 8, 1)}
_DECODE_FLOAT32 = {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)}


@dataclass(frozen=True)
class Product:
    """A matrix product's tile: rows of x, rows of the weight, columns of a step, and how Triton is to run it."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


FEW_ROWS = 16
QUANTIZED_STEP = 64
"""Most columns of one step of a quantized weight: in 4 bits its layout is made for it."""
# (architecture) -> (more rows than FEW_ROWS and the tile of batch invariance, few rows), for 16-bit inputs.
_PRODUCT: dict[str, tuple[Product, Product]] = {
    "sm_80": (Product(64, 128, 64, 4, 3), Product(16, 64, 128, 4, 4)),
    "sm_86": (Product(64, 64, 64, 4, 3), Product(16, 64, 64, 4, 4)),
    "sm_90": (Product(128, 128, 64, 8, 3), Product(16, 64, 128, 4, 5)),
    "sm_100": (Product(128, 128, 64, 8, 3), Product(16, 64, 128, 4, 5)),
    "gfx942": (Product(64, 128, 32, 4, 2), Product(16, 64, 64, 4, 2)),
    "gfx1100": (Product(64, 64, 32, 4, 1), Product(16, 64, 64, 4, 1)),
    "other": (Product(64, 64, 32, 4, 2), Product(16, 64, 64, 4, 2)),
}
_PRODUCT_FLOAT32 = Product(16, 64, 32, 4, 2)


def linear(arch: str, itemsize: int, few: bool, group: int | None) -> Product:
    """The tile of a product with inputs of ``itemsize`` bytes; ``group``: columns of a scale of a quantized weight."""
    tile = _PRODUCT_FLOAT32 if itemsize > 2 else _PRODUCT[_SAME_AS.get(arch, arch)][few]
    return tile if group is None else replace(tile, step=min(group, QUANTIZED_STEP))


INVARIANT_SPLIT = 1024
"""Keys of one part where bits must not depend on the batch: boundaries lie at multiples of it, whatever the batch."""
SHORTEST_SPLIT = 256
"""Keys below which another part costs more than it saves."""
MOST_SPLITS = 64


def attention(arch: str, itemsize: int, head_dim: int, decode: bool, group: int = 1) -> Tile:
    """The tile for queries of ``itemsize`` bytes; widened to hold one token's ``group`` heads.

    Raises ValueError for a head size above 256.
    """
    arch = _SAME_AS.get(arch, arch)
    if itemsize > 2:
        table = _DECODE_FLOAT32 if decode else _PREFILL_FLOAT32
    else:
        table = (_DECODE if decode else _PREFILL)[arch]
    for largest, tile in table.items():
        if head_dim <= largest:
            rows = tile.rows
            while rows < group:
                rows *= 2
            return Tile(rows, tile.keys, tile.warps, tile.stages)
    raise ValueError(f"head_dim is {head_dim}; the attention kernel goes to 256")


def latent(arch: str, itemsize: int, decode: bool, group: int) -> Tile:
    """The tile of latent attention for queries of ``itemsize`` bytes, with no more rows than ``group`` heads need."""
    tile = _LATENT_FLOAT32 if itemsize > 2 else _LATENT[_SAME_AS.get(arch, arch)][decode]
    rows = max(16, 1 << (group - 1).bit_length())
    return replace(tile, rows=min(tile.rows, rows)) if decode else tile


def splits(arch_processors: int, programs: int) -> int:
    """Into how many parts to cut each sequence's keys so that ``programs`` (sequences x KV heads) fill the device
    about twice; a power of two, so that few launches differ."""
    count = 1
    while count < MOST_SPLITS and programs * count < 2 * arch_processors:
        count *= 2
    return count


def row_block(width: int) -> tuple[int, int]:
    """(rows a program, warps) for an operation along rows of ``width`` elements."""
    if width <= 256:
        return max(1, 1024 // width), 4
    return 1, 4 if width <= 2048 else 8 if width <= 8192 else 16
