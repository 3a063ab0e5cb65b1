"""Launch configurations by architecture. Nothing is tuned while a user waits: a number here was chosen beforehand,
and tests/triton/test_compile.py holds every row below the shared memory and register limits of its architecture.

The rows have been compiled for their architectures and not yet timed on them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from quire_triton import architectures

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


def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` and the like; ``other`` for what has no row of its own."""
    return _architecture(device, torch.version.hip) if device.type == "cuda" else "other"


@functools.lru_cache(maxsize=16)
def _architecture(device: torch.device, hip: str | None) -> str:
    name = architectures.of("cuda", torch.cuda.get_device_properties(device), hip is not None).name
    name = _KIN.get(name, name)
    return name if name in SHARED_MEMORY else "other"


# Architectures that another's rows fit in every number: the same matrix units, and no less of anything.
_KIN = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120", "gfx1101": "gfx1100", "gfx1102": "gfx1100"}


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
# The same for any number of queries (batch-invariant): fewer rows than prefill has, since decoding fills few of them, and
# registers for the sums of the parts before; where there is no row, prefill's.
_ANY: dict[str, dict[int, Tile]] = {
    "sm_80": {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 8, 3), 256: Tile(32, 32, 8, 2)},
    "sm_86": {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 8, 3), 256: Tile(32, 32, 8, 2)},
    "sm_90": {64: Tile(64, 128, 4, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    "sm_100": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    "gfx942": {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
    "gfx1100": {64: Tile(32, 32, 4, 1), 128: Tile(64, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# The same of caches in 8 bits, where codes take registers while they become numbers: (prompts and any number, decode).
_EIGHT_BITS: dict[str, tuple[dict[int, Tile], dict[int, Tile]]] = {
    "gfx1100": (
        {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        {64: Tile(16, 32, 2, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ),
}
_SAME_AS = {"sm_89": "sm_86", "sm_120": "sm_86", "gfx90a": "gfx942", "gfx950": "gfx942"}
# Latent attention's, 576 channels of which 512 are values: architecture -> (prompts, decode).
_LATENT: dict[str, tuple[Tile, Tile]] = {
    "sm_80": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
    "sm_86": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    "sm_90": (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    "sm_100": (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    "gfx942": (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    "gfx1100": (Tile(16, 16, 16, 1), Tile(16, 16, 16, 1)),
    "other": (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_LATENT_FLOAT32 = Tile(16, 16, 8, 1)
# Products of float32 are not tensor-core products: one small tile does nearly everywhere (RDNA 3 has fewer registers).
_PREFILL_FLOAT32 = {
    "gfx1100": {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 16, 1)},
    "other": {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
}
_DECODE_FLOAT32 = {
    "gfx1100": {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 16, 1)},
    "other": {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}


@dataclass(frozen=True)
class Product:
    """A matrix product's tile: rows of x, rows of the weight, most columns of a step, and how Triton is to run it."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


# (architecture) -> kind of weight -> tiles for few rows, some and many. dense: both sides of 16 bits; integers: a weight
# of int8 or int4 by groups; both: both sides of 8 bits. The one in the middle serves every number of rows where bits
# must not depend on it: more rows than decoding has, since those few more cost little beside reading the weight.
_PRODUCT: dict[str, dict[str, tuple[Product, Product, Product]]] = {
    "sm_80": {
        "dense": (Product(16, 64, 128, 4, 4), Product(64, 64, 64, 8, 4), Product(128, 128, 32, 8, 4)),
        "integers": (Product(16, 64, 128, 4, 4), Product(64, 64, 64, 8, 4), Product(128, 128, 32, 8, 3)),
        "both": (Product(16, 64, 128, 4, 4), Product(64, 64, 128, 4, 4), Product(128, 128, 64, 8, 4)),
    },
    "sm_86": {
        "dense": (Product(16, 64, 64, 4, 4), Product(64, 64, 64, 4, 3), Product(64, 128, 32, 4, 3)),
        "integers": (Product(16, 64, 128, 4, 4), Product(64, 64, 64, 4, 2), Product(64, 128, 32, 8, 3)),
        "both": (Product(16, 64, 128, 4, 4), Product(64, 64, 64, 4, 4), Product(128, 128, 64, 8, 3)),
    },
    "sm_90": {
        "dense": (Product(16, 64, 128, 4, 5), Product(64, 64, 64, 4, 5), Product(128, 128, 64, 8, 3)),
        "integers": (Product(16, 64, 128, 4, 5), Product(64, 64, 64, 4, 5), Product(128, 128, 64, 8, 3)),
        "both": (Product(16, 64, 128, 4, 6), Product(64, 64, 128, 4, 5), Product(128, 128, 128, 8, 3)),
    },
    "sm_100": {
        "dense": (Product(16, 64, 128, 4, 5), Product(64, 64, 64, 4, 5), Product(128, 128, 64, 8, 3)),
        "integers": (Product(16, 64, 128, 4, 5), Product(64, 64, 64, 4, 5), Product(128, 128, 64, 8, 3)),
        "both": (Product(16, 64, 128, 4, 6), Product(64, 64, 128, 4, 5), Product(128, 128, 128, 8, 3)),
    },
    "gfx942": {
        "dense": (Product(16, 64, 64, 4, 2), Product(64, 64, 64, 4, 2), Product(128, 128, 32, 8, 2)),
        "integers": (Product(16, 64, 64, 4, 2), Product(64, 64, 64, 4, 2), Product(128, 128, 32, 8, 2)),
        "both": (Product(16, 64, 128, 4, 2), Product(64, 64, 128, 4, 2), Product(128, 128, 64, 8, 2)),
    },
    "gfx1100": {
        "dense": (Product(16, 64, 64, 4, 1), Product(64, 64, 32, 4, 1), Product(64, 64, 32, 4, 1)),
        "integers": (Product(16, 64, 64, 4, 1), Product(64, 64, 32, 4, 1), Product(64, 64, 32, 4, 1)),
        "both": (Product(16, 64, 64, 4, 1), Product(64, 64, 64, 4, 1), Product(64, 64, 64, 4, 1)),
    },
    "other": {
        "dense": (Product(16, 64, 64, 4, 2), Product(64, 64, 32, 4, 2), Product(64, 64, 32, 4, 2)),
        "integers": (Product(16, 64, 64, 4, 2), Product(64, 64, 32, 4, 2), Product(64, 64, 32, 4, 2)),
        "both": (Product(16, 64, 64, 4, 2), Product(64, 64, 64, 4, 2), Product(64, 64, 64, 4, 2)),
    },
}
_PRODUCT_FLOAT32 = Product(16, 32, 32, 4, 2)


def linear(arch: str, kind: str, itemsize: int, rows: int | None, group: int = 0) -> Product:
    """The tile of a product of ``rows`` rows of ``itemsize`` bytes an element (None: the one for any number of rows) with
    a weight of ``kind`` (dense, int8, int4, both), by groups of ``group`` columns."""
    integers = kind in ("int8", "int4")
    if itemsize > 2:
        tile = _PRODUCT_FLOAT32
    else:
        tiles = _PRODUCT[_SAME_AS.get(arch, arch)]["integers" if integers else kind]
        tile = tiles[1] if rows is None else next((t for t in tiles if rows <= t.rows), tiles[-1])
    return replace(tile, step=min(group, tile.step)) if integers else tile


MOST_PARTS = 8
SHORTEST_PART = 512
"""Columns below which another part of a product's sums costs more than it saves."""


def parts(arch_processors: int, tiles: int, columns: int) -> int:
    """Into how many parts to cut the sums of a product over ``columns`` so that ``tiles`` fill the device twice; a power
    of two."""
    count = 1
    while count < MOST_PARTS and tiles * count < 2 * arch_processors and columns >= 2 * count * SHORTEST_PART:
        count *= 2
    return count


# (architecture) -> most rows of a dense product that Triton computes; more are torch's own library's (cuBLASLt,
# hipBLASLt, oneDNN). None has been timed yet, so the library has them all.
_TRITON_ROWS: dict[str, int] = {}


def dense_in_triton(arch: str, rows: int) -> bool:
    """Whether a dense product of so many rows is Triton's, where torch's library could compute it too."""
    return rows <= _TRITON_ROWS.get(_SAME_AS.get(arch, arch), 0)


# (architecture) -> rows from which torch's own product of e4m3 with a scale for each row and column is used.
_SCALED_MM_ROWS = {"sm_90": 65, "sm_100": 65, "gfx942": 65, "gfx950": 65}


def e4m3_in_torch(arch: str, rows: int) -> bool:
    """Whether an e4m3 product of so many rows is for ``torch._scaled_mm``."""
    return arch in _SCALED_MM_ROWS and rows >= _SCALED_MM_ROWS[arch]


def e4m3(arch: str) -> torch.dtype | None:
    """The form of e4m3 that the matrix units of ``arch`` take; None where they take none."""
    known = architectures.ARCHITECTURES.get(arch)
    return None if known is None or known.fp8 is None else getattr(torch, known.fp8)


def formats(arch: str) -> frozenset[str]:
    """Names of ``--quantization`` that the products have on ``arch``."""
    both = () if arch == "other" else ("w8a8",) if e4m3(arch) is None else ("w8a8", "fp8")
    return frozenset({"int8", "int4", "int4-64", "int4-128", *both})


INVARIANT_SPLIT = 1024
"""Keys of one part where bits must not depend on the batch: boundaries lie at multiples of it, whatever the batch."""
SHORTEST_SPLIT = 256
"""Keys below which another part costs more than it saves."""
MOST_SPLITS = 64


def attention(arch: str, itemsize: int, head_dim: int, decode: bool, group: int = 1, eight_bits: bool = False) -> Tile:
    """The tile for queries of ``itemsize`` bytes over a cache of as many or of ``eight_bits``; widened to hold one token's
    ``group`` heads.

    Raises ValueError for a head size above 256.
    """
    arch = _SAME_AS.get(arch, arch)
    if itemsize > 2:
        tables = _DECODE_FLOAT32 if decode else _PREFILL_FLOAT32
        table = tables.get(arch, tables["other"])
    elif eight_bits and arch in _EIGHT_BITS:
        table = _EIGHT_BITS[arch][decode]
    else:
        table = (_DECODE if decode else _PREFILL)[arch]
    for largest, tile in table.items():
        if head_dim <= largest:
            rows = tile.rows
            while rows < group:
                rows *= 2
            return Tile(rows, tile.keys, tile.warps, tile.stages)
    raise ValueError(f"head_dim is {head_dim}; the attention kernel goes to 256")


def attention_of_any(arch: str, itemsize: int, head_dim: int, group: int = 1, eight_bits: bool = False) -> Tile:
    """The tile for any number of queries, where bits must not depend on it. Raises ValueError as :func:`attention`."""
    tile, arch = attention(arch, itemsize, head_dim, False, 1, eight_bits), _SAME_AS.get(arch, arch)
    if itemsize <= 2 and not (eight_bits and arch in _EIGHT_BITS):
        table = _ANY.get(arch, {})
        tile = next((own for largest, own in table.items() if head_dim <= largest), tile)
    return replace(tile, rows=max(tile.rows, 1 << (group - 1).bit_length()))


def stay(arch: str) -> bool:
    """Whether attention's loops compute what they do not change: addresses and descriptors kept around them take registers
    that tiles need, except on sm_80 and its kin, where computing them within the pipelined loop takes more."""
    return _SAME_AS.get(arch, arch) not in ("sm_80", "sm_86")


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
