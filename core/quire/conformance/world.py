"""Ragged steps over a paged KV cache that is as hostile as the contract allows, laid out the same on two backends.

Physical pages are shuffled; every slot of every page, page 0 included, holds NaN until a sequence writes it; block
table entries that a window has passed point to page 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.engine.batch import StepArrays
from quire.hardware import AttentionBatch, Backend, Capabilities
from quire.reference import torch_dtype
from quire.reference.paged import SCALED, from_eight_bits, to_eight_bits
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec

TOLERANCES = {"float64": 1e-12, "float32": 3e-5, "float16": 3e-3, "bfloat16": 2e-2}
"""Largest allowed |a - b| / max(|b|, rms(b)) against float64: a few roundings of the dtype, sums in float32."""


NOISE = 4099


class Float64(Backend):
    """The definition: the reference operations in float64 in host memory."""

    name = "reference"
    capabilities = Capabilities(dtypes=frozenset({"float64"}), kv_dtypes=frozenset({"float64"}))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def close(actual: Tensor, expected: Tensor, dtype: str, factor: float = 1.0, what: str = "") -> None:
    """Assert that a device's result is the float64 one, up to the tolerance of ``dtype``."""
    a, b = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    assert a.shape == b.shape, f"{what} has shape {tuple(a.shape)}, should have {tuple(b.shape)}"
    assert bool(torch.isfinite(a).all()), f"{what} holds {int((~torch.isfinite(a)).sum())} values that are not finite"
    if b.numel() == 0:
        return
    scale = torch.maximum(b.abs(), b.square().mean().sqrt()).clamp_min(1e-30)
    error = float(((a - b).abs() / scale).max())
    limit = TOLERANCES[dtype] * factor
    assert error <= limit, (
        f"{what} is off by {error:.2e} (relative to the larger of value and rms), allowed {limit:.0e}"
    )


def usual_head(backend: Backend) -> int:
    """The head size that most cases use: 32, or the nearest that the backend declares."""
    low, high = backend.capabilities.head_sizes
    return min(max(32, low), high)


def usual_kv(backend: Backend, dtype: str) -> str:
    """The KV dtype that goes with ``dtype``: itself where it is declared."""
    declared = backend.capabilities.kv_dtypes
    return dtype if dtype in declared else sorted(declared)[0]


@dataclass(frozen=True)
class Row:
    """A sequence of the step: ``context`` tokens in all, of which the last ``new`` are this step's.

    ``who``: whose numbers it has (default: its place in the step). The same sequence in another step, with another
    context, has the same keys, values and queries at the same positions.
    """

    context: int
    new: int
    who: int | None = None


@dataclass(frozen=True)
class Shape:
    """One group of layers."""

    kv_heads: int = 2
    heads: int = 4
    head_dim: int = 32
    page_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    layers: int = 1
    dtype: str = "float32"
    kv_dtype: str = "float32"
    value_dim: int | None = None  # latent: channels of the keys that are also values

    def attention(self) -> AttentionSpec:
        return AttentionSpec(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            kind="full" if self.window is None else "window",
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
            value_dim=self.value_dim,
        )

    def kv(self, dtype: str | None = None) -> KVSpec:
        layers = tuple(range(self.layers))
        group = KVGroupSpec(
            layers, self.kv_heads, self.head_dim, dtype or self.kv_dtype, self.page_size, self.window,
            latent=self.value_dim is not None,
        )  # fmt: skip
        return KVSpec((group,))


@lru_cache(maxsize=16)
def _noise(seed: int, heads: int, dim: int) -> Tensor:
    """Random numbers [heads, NOISE, dim], from which all sequences are cut."""
    return torch.randn(heads, NOISE, dim, generator=torch.Generator().manual_seed(seed))


def stored(x: Tensor, kv_dtype: str) -> Tensor:
    """Keys or values [..., D] as a cache of ``kv_dtype`` keeps them; what is stored again reads the same."""
    dtype = torch_dtype(kv_dtype)
    if dtype not in SCALED:
        return x.to(dtype)
    return from_eight_bits(*to_eight_bits(x, dtype), torch.float32)


def _places(sequences: Iterable[tuple[int, range]]) -> Tensor:
    """Where in the noise the given positions of the given sequences are."""
    return torch.tensor([(who * 379 + p) % NOISE for who, positions in sequences for p in positions], dtype=torch.int64)


class Paper:
    """What a test knows of sequences: their keys and values, and the pages they were given. No device in it."""

    def __init__(self, rows: Sequence[Row], shape: Shape, seed: int = 0) -> None:
        self.rows, self.shape = list(rows), shape
        whos = [n if r.who is None else r.who for n, r in enumerate(self.rows)]
        self.starts = np.cumsum([0, *(r.context for r in rows)])
        context = _places((who, range(r.context)) for who, r in zip(whos, self.rows, strict=True))
        new = _places((who, range(r.context - r.new, r.context)) for who, r in zip(whos, self.rows, strict=True))
        dtype = torch_dtype(shape.dtype)
        # Rounded once here, so that every backend is given the same numbers.
        kv = stored(
            _noise(seed, 2 * shape.layers * shape.kv_heads, shape.head_dim)[:, context].to(dtype), shape.kv_dtype
        )
        # [layers, contexts, Hkv, D] each
        self.keys, self.values = kv.view(2, shape.layers, shape.kv_heads, -1, shape.head_dim).transpose(2, 3)
        # Sharper than random, so that a wrong key shows.
        self.q = 2.0 * _noise(seed + 1, shape.heads, shape.head_dim)[:, new].transpose(0, 1).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        self.sinks = torch.randn(shape.heads, generator=generator) if shape.sinks else None
        needed = [-(-max(r.context, 1) // shape.page_size) for r in rows]
        self.pages = 1 + sum(needed) + 5
        shuffled = np.random.default_rng(seed).permutation(np.arange(1, self.pages))
        self.tables = np.zeros((len(rows), max(needed, default=1) + 1), dtype=np.int32)
        taken = 0
        for n, count in enumerate(needed):
            if rows[n].context:
                self.tables[n, :count] = shuffled[taken : taken + count]
                taken += count

    def arrays(self, past: bool) -> StepArrays:
        """The step that computes each row's new tokens, or (``past``) the one that has stored what precedes them."""
        counts = np.array([max(r.context - r.new, 0) if past else r.new for r in self.rows], dtype=np.int64)
        context = np.array([max(r.context - r.new, 0) if past else r.context for r in self.rows], dtype=np.int32)
        starts = np.maximum(context - counts, 0)
        query_start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        owner = np.repeat(np.arange(len(self.rows)), counts)
        positions = np.arange(query_start[-1]) - query_start[:-1][owner] + starts[owner]
        tables = self.tables.copy()
        if self.shape.window is not None and not past:  # pages that the window has passed are gone
            for n, row in enumerate(self.rows):
                first = max(0, row.context - row.new - self.shape.window + 1)
                tables[n, : first // self.shape.page_size] = 0
        size = self.shape.page_size
        slots = self.tables[owner, positions // size].astype(np.int64) * size + positions % size
        return StepArrays(
            rows=np.arange(len(self.rows)),
            token_ids=positions.astype(np.int64),
            positions=positions.astype(np.int64),
            query_start=query_start,
            context_lens=context,
            block_tables=(tables,),
            slots=(slots,),
        )

    def tokens(self, past: bool) -> Tensor:
        """Indices into keys and values of the tokens of :meth:`arrays`; a padding row's token repeats the first."""
        chosen: list[int] = []
        for n, row in enumerate(self.rows):
            split = int(self.starts[n]) + max(row.context - row.new, 0)
            chosen += range(int(self.starts[n]), split) if past else range(split, split + row.new)
        return torch.tensor(chosen, dtype=torch.int64).clamp_max(max(self.keys.shape[1] - 1, 0))


class Stage:
    """A :class:`Paper` acted out on one backend."""

    def __init__(self, backend: Backend, paper: Paper, dtype: str | None = None) -> None:
        self.backend, self.paper = backend, paper
        self.dtype = torch_dtype(dtype or paper.shape.dtype)
        self.spec = paper.shape.kv(dtype)
        self.kv = backend.allocate_kv(self.spec, [paper.pages])
        self.poison(range(paper.pages))
        self.store(past=True)

    def on(self, x: Tensor) -> Tensor:
        """x on the device, in the stage's dtype when it is a floating one."""
        return (x.to(self.dtype) if x.is_floating_point() else x).to(self.backend.device)

    def batch(self, past: bool = False) -> AttentionBatch:
        return self.paper.arrays(past).to_device(self.backend)

    def poison(self, pages: Iterable[int]) -> None:
        """Write NaN to every slot of ``pages``, in every layer."""
        poison(self.backend, self.kv, self.spec, 0, pages, self.dtype)

    def store(self, past: bool) -> None:
        batch, tokens = self.batch(past), self.paper.tokens(past)
        if len(tokens) == 0:
            return
        for layer in range(self.paper.shape.layers):
            k, v = (self.on(side[layer, tokens]) for side in (self.paper.keys, self.paper.values))
            latent = self.paper.shape.value_dim is not None
            self.backend.write_kv(self.kv, layer, k, None if latent else v, batch)

    def attend(self, layer: int = 0) -> Tensor:
        """Store the new tokens and attend from them."""
        self.store(past=False)
        return self.read(layer)

    def read(self, layer: int = 0) -> Tensor:
        batch = self.batch()
        plan = self.backend.plan_attention(batch, self.spec)
        sinks = None if self.paper.sinks is None else self.on(self.paper.sinks)
        return self.backend.attention(self.on(self.paper.q), self.kv, layer, plan, self.paper.shape.attention(), sinks)


def poison(backend: Backend, kv: Any, spec: KVSpec, group: int, pages: Iterable[int], dtype: torch.dtype) -> None:
    """Write NaN to every slot of ``pages`` of a group, in every layer of it."""
    layout, chosen = spec.groups[group], np.asarray(list(pages), dtype=np.int64)
    slots = (chosen[:, None] * layout.page_size + np.arange(layout.page_size)).reshape(-1)
    arrays = StepArrays(
        rows=np.zeros(1, dtype=np.int64),
        token_ids=np.zeros(len(slots), dtype=np.int64),
        positions=np.arange(len(slots), dtype=np.int64),
        query_start=np.array([0, len(slots)], dtype=np.int32),
        context_lens=np.array([len(slots)], dtype=np.int32),
        block_tables=(chosen.astype(np.int32)[None],) * len(spec.groups),
        slots=(slots,) * len(spec.groups),
    )
    nothing = torch.full((len(slots), layout.kv_heads, layout.head_dim), torch.nan, dtype=dtype, device=backend.device)
    for layer in layout.layers:
        backend.write_kv(kv, layer, nothing, None if layout.latent else nothing, arrays.to_device(backend))


def compare(backend: Backend, rows: Sequence[Row], shape: Shape, seed: int = 0) -> None:
    """Attention of the backend over ``rows`` against float64, in every layer."""
    paper = Paper(rows, shape, seed)
    device, truth = Stage(backend, paper), Stage(Float64(), paper, "float64")
    # In int8 a scale is found again from numbers that the dtype has rounded, and with it every number of the token.
    factor = 3.0 if shape.kv_dtype == "int8" else 1.0
    for layer in range(shape.layers):
        close(device.attend(layer), truth.attend(layer), shape.dtype, factor, what=f"attention of layer {layer}")
