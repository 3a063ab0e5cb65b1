"""Which implementation of attention computes a step: the kernels here, or another library's where one is installed.

A device's plugin names the other implementations and has a table: for an architecture and a kind of step, the order in
which they are asked. The first that is usable on this machine and takes the shape computes it; where none does, the
kernels here, or the references. ``--attention-backend NAME`` leaves one to ask, and what that one does not take is
refused by name. Nothing is measured while a user waits: a row that puts another implementation before the kernels here
names the measurement that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quire.hardware import AttentionBatch, AttentionSpec, KVSpec

TRITON = "TRITON_ATTN"
"""The kernels of this package, under vLLM's name for its own."""


@dataclass(frozen=True)
class Shape:
    """What an implementation is asked for; ``decode``: every sequence of the step has exactly one query."""

    spec: AttentionSpec
    decode: bool
    page_size: int
    dtype: str  # of the queries
    kv_dtype: str
    sinks: bool = False


@dataclass(frozen=True)
class Row:
    """``order``: names, first to last, for steps of one kind on one architecture ("*": any other). ``measured``: the file under
    bench/results that the order comes from; None: it has not been timed, and the kernels here stand first."""

    architecture: str
    decode: bool
    order: tuple[str, ...]
    measured: str | None = None


def order(table: Sequence[Row], architecture: str, decode: bool) -> Row:
    """The row of the architecture, else the one for any."""
    rows = [row for row in table if row.decode == decode and row.architecture in (architecture, "*")]
    return min(rows, key=lambda row: row.architecture == "*")


@dataclass
class ChoosingPlan:
    """A step's batch, the plan of the kernels here, and what others have prepared for it (``states``, theirs by key).
    ``kept``: it belongs to a captured step, whose memory must stay where it is."""

    batch: AttentionBatch
    spec: KVSpec
    inner: Any
    kept: bool = False
    states: dict[Any, Any] = field(default_factory=dict)

    @property
    def decode(self) -> bool:
        batch = self.batch
        return batch.max_query_len == 1 and int(batch.query_start_host[-1]) == len(batch.context_lens_host)


class Implementation:
    """Attention of another library over the pool of ``quire.reference.paged``: one layer's is [2, pages, page_size, Hkv, D], so
    its keys and its values are each [pages, page_size, Hkv, D], contiguous, as all of these libraries take them."""

    name: str
    dtypes: frozenset[str] = frozenset({"bfloat16", "float16"})
    page_sizes: frozenset[int] | None = None  # None: any
    head_sizes: tuple[int, int] = (8, 256)  # smallest and largest; it may take not every one between

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def missing(self) -> str | None:
        """Why it cannot be used on this machine, in one line; None where it can. Looks, and loads nothing large."""
        raise NotImplementedError

    def refuses(self, shape: Shape) -> str | None:
        """Why it does not take a shape, in one line; None where it does."""
        spec = shape.spec
        if getattr(spec, "value_dim", None) is not None:
            return "it has no latent attention"
        if shape.dtype not in self.dtypes:
            return f"it computes in {', '.join(sorted(self.dtypes))}, not in {shape.dtype}"
        if shape.kv_dtype != shape.dtype:
            return f"it takes a KV cache in the dtype of the queries, not {shape.kv_dtype} with {shape.dtype}"
        if self.page_sizes is not None and shape.page_size not in self.page_sizes:
            return f"it takes pages of {', '.join(map(str, sorted(self.page_sizes)))} tokens, not of {shape.page_size}"
        if spec.window is not None:
            # A block table entry that the window has passed points to page 0, which may hold NaN. These kernels mask
            # the scores of a tile and multiply its values by the zeros, and 0 * NaN is NaN.
            return "it multiplies values that a window has passed by zero, and their page may hold NaN"
        if shape.sinks:
            return "it has no attention sinks"
        return None

    def update(self, plan: ChoosingPlan) -> None:
        """A captured step's batch has changed: bring what ``plan.states`` holds up to date in place."""

    def attention(self, q: Tensor, pool: Tensor, group: int, plan: ChoosingPlan, spec: AttentionSpec) -> Tensor:
        """Causal attention of q [T, Hq, D] over one layer's pool -> [T, Hq, D], as ``quire.reference.paged.attention``."""
        raise NotImplementedError


def tokens(plan: ChoosingPlan) -> int:
    """Tokens that belong to a sequence; those after them get zeros."""
    return int(plan.batch.query_start_host[-1])
