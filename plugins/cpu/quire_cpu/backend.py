"""The CPU backend in torch operations, in forms whose bits do not depend on the batch: what runs without a compiler.

:mod:`quire_cpu.native_backend` has the native kernels, and takes from here what does not compute.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quire.hardware import (
    AttentionBatch,
    AttentionSpec,
    Backend,
    Capabilities,
    DeviceInfo,
    DeviceOptions,
    KVSpec,
    MemoryInfo,
    UnsupportedOnDevice,
)
from quire_cpu import attention, linear, memory, pointwise

log = logging.getLogger("quire.cpu")


class CpuBackend(Backend):
    """Bfloat16 and float32 in host memory, sums in float32."""

    name = "cpu"
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16"}),
        kv_dtypes=frozenset({"float32", "bfloat16"}),
        page_sizes=frozenset({8, 16, 32, 64, 128, 256}),
        head_sizes=(8, 256),
        collectives=frozenset(
            {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "barrier"}
        ),
        batch_invariant=True,
        embed_formats=frozenset(),  # products have layouts of their own
        attention_backends=frozenset({"CPU_ATTN"}),
    )

    def __init__(self) -> None:
        self._exactness = linear.Exactness()
        self._exact: dict[tuple[int, int], bool] = {}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def devices(self) -> list[DeviceInfo]:
        name, sets = memory.processor()
        cores = memory.cores()
        return [DeviceInfo(0, name, f"{cores} core{'s' if cores != 1 else ''}; {' '.join(sets) or 'baseline'}", cores)]

    def memory(self, index: int = 0) -> MemoryInfo:
        return memory.memory()

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        """Sets torch's threads (for the process) and checks the products that attention is made of."""
        super().open(index, options)
        if index != 0:
            raise UnsupportedOnDevice(self.name, "open", f"there is one device, 0, not {index}")
        threads = memory.cores() if options.threads is None else options.threads
        if threads < 1:
            raise UnsupportedOnDevice(self.name, "open", f"threads is {threads}, at least 1 is needed")
        torch.set_num_threads(threads)
        products = all(attention.tiles_agree(attention.ROWS, attention.ROWS, dim) for dim in (32, 64, 128, 256))
        if not (products and pointwise.places_agree()):
            self._not_invariant(options)

    def _prefill_exact(self, rows: int, dim: int) -> bool:
        """Whether large query tiles may be used; found out once per shape."""
        if (rows, dim) not in self._exact:
            self._exact[rows, dim] = attention.tiles_agree(rows, attention.PREFILL_ROWS, dim)
            if not self._exact[rows, dim]:
                log.info("attention: tiles of %d rows are not exact for head size %d", attention.PREFILL_ROWS, dim)
        return self._exact[rows, dim]

    def _not_invariant(self, options: DeviceOptions) -> None:
        reason = "what torch computes here depends on the size of the batch"
        if options.batch_invariant:
            raise UnsupportedOnDevice(self.name, "batch_invariant", reason, ("--threads 1",))
        log.warning("%s: results may depend on the load; --threads 1 may help", reason)
        self.capabilities = dataclasses.replace(self.capabilities, batch_invariant=False)

    # -- paged KV --------------------------------------------------------------------------------------------------
    def allocate_kv(self, spec: KVSpec, pages: Sequence[int], host: bool = False) -> attention.PagedKV:
        return attention.allocate_kv(spec, pages)

    def write_kv(self, kv: attention.PagedKV, layer: int, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
        attention.write_kv(kv, layer, k, v, batch)

    def copy_pages(self, source: Any, target: Any, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        attention.copy_pages(source, target, group, pairs)

    def plan_attention(
        self, batch: AttentionBatch, spec: KVSpec, reuse: attention.Plan | None = None
    ) -> attention.Plan:
        return attention.Plan(batch, spec, self._prefill_exact) if reuse is None else reuse.update(batch, spec)

    def attention(
        self, q: Tensor, kv: Any, layer: int, plan: attention.Plan, spec: AttentionSpec, sinks: Any = None
    ) -> Tensor:
        return attention.attention(q, kv, layer, plan, spec, sinks)

    # -- weights ---------------------------------------------------------------------------------------------------
    def pack_weight(self, raw: Mapping[str, Tensor], format: str = "dense") -> Any:
        return linear.pack(raw, format, self._exactness)

    def linear(self, x: Tensor, weight: linear.PackedWeight, bias: Tensor | None = None) -> Tensor:
        return weight(x, bias)

    def gated_act(self, x: Tensor, activation: str) -> Tensor:
        return pointwise.gated_act(x, activation)

    def moe(self, x: Tensor, gates: Tensor, experts: Tensor, gate_up: Any, down: Any, activation: str) -> Tensor:
        """As the reference, expert after expert, with products whose bits do not depend on who else chose the expert."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in experts.unique().tolist():
            tokens, choice = (experts == expert).nonzero(as_tuple=True)
            y = down[expert](self.gated_act(gate_up[expert](x[tokens], None), activation), None)
            out.index_add_(0, tokens, y.float() * gates[tokens, choice].float()[:, None])
        return out.to(x.dtype)
