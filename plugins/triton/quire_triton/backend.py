"""What a device plugin inherits so that its operations are computed by the kernels here.

The plugin keeps devices, memory, streams and communicators to itself. Where Triton cannot be used the references
compute instead, and one line in the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import quire_triton
from quire.hardware import AttentionBatch, AttentionSpec, Backend, DeviceOptions, KVSpec, NormSpec, SamplingBatch

log = logging.getLogger("quire.triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = (16, 256)
MOST_TOKENS = 1 << 19
"""The largest vocabulary whose sums of weights are exact: see ``quire.reference.sampling``."""
LATENT_SIZES = frozenset({(576, 512)})
"""(channels of a key, those of them that are its value): DeepSeek-V2 and V3."""
KV_DTYPES = frozenset({"float32", "bfloat16", "float16", "int8", "float8_e4m3fn"})
"""What pages may hold. A code of fp8 is made and read by arithmetic, so that it is the same on every architecture."""


class TritonOps(Backend):
    """Attention, KV writes, norms, rotary, activations and page copies in Triton, on whatever device torch has Triton
    for, and sampling. Experts are the references'; so is linear (torch's own library), except where bits must not depend
    on the batch."""

    without_kernels: str | None = "the device is not open"
    """Why the references compute; None where the kernels do."""

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        """Looks for Triton, and says once where it cannot be used."""
        super().open(index, options)
        self.without_kernels = quire_triton.missing()
        if self.without_kernels is not None:
            log.warning("%s. Computing with the reference operations, which are slow", self.without_kernels)

    def _kernels_take(self, x: Tensor) -> bool:
        return self.without_kernels is None and x.dtype in FLOATS

    # -- paged KV --------------------------------------------------------------------------------------------------
    def write_kv(self, kv: Any, layer: int, k: Tensor, v: Tensor | None, batch: AttentionBatch) -> None:
        if not self._kernels_take(k):
            return super().write_kv(kv, layer, k, v, batch)
        from quire_triton.kernels.write_kv import write_kv

        group, index = kv.place[layer]
        scales = kv.scales[group]
        write_kv(kv.pools[group][index], None if scales is None else scales[index], k, v, batch.slots[group])
        return None

    def copy_pages(self, source: Any, target: Any, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        a, b = source.pools[group], target.pools[group]
        # The kernel reads and writes in no order, so what is both read and written goes through the reference.
        apart = source is not target or not {x for x, _ in pairs} & {y for _, y in pairs}
        here = a.dtype == b.dtype and a.device == b.device == self.device
        if not (pairs and apart and here and self.without_kernels is None):
            return super().copy_pages(source, target, group, pairs)
        from quire_triton.kernels.copy_pages import copy_pages

        there = self.to_device(np.asarray(pairs, dtype=np.int32))
        copy_pages(a, b, there)
        scales = source.scales[group], target.scales[group]
        if scales[0] is not None and scales[1] is not None:
            copy_pages(*scales, there)
        return None

    def plan_attention(self, batch: AttentionBatch, spec: KVSpec, reuse: Any = None) -> Any:
        if self.without_kernels is not None:
            return super().plan_attention(batch, spec, reuse)
        from quire_triton.attention import Plan

        return Plan(batch, spec, self.to_device) if reuse is None else reuse.update(batch, spec)

    def attention(self, q: Tensor, kv: Any, layer: int, plan: Any, spec: AttentionSpec, sinks: Any = None) -> Tensor:
        if spec.value_dim is None:
            known = HEAD_DIM[0] <= spec.head_dim <= HEAD_DIM[1]
        else:
            known = (spec.head_dim, spec.value_dim) in LATENT_SIZES and spec.kv_heads == 1
        if not (known and self._kernels_take(q)):
            return super().attention(q, kv, layer, plan, spec, sinks)
        if not len(q):
            return q.new_empty((0, spec.heads, spec.value_dim or spec.head_dim))
        from quire_triton.attention import attention

        group, index = kv.place[layer]
        pool, scales = kv.pools[group][index], kv.scales[group]
        own = None if scales is None else scales[index]
        return attention(q, pool, own, group, plan, spec, sinks, self.options.batch_invariant)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        if not (self.options.batch_invariant and self._kernels_take(x)):
            return super().linear(x, weight, bias)
        from quire_triton.kernels.linear import linear

        return linear(x, weight, bias, batch_invariant=True)

    # -- sampling --------------------------------------------------------------------------------------------------
    def _samples(self, logits: Tensor) -> bool:
        return self.without_kernels is None and logits.dtype == torch.float32 and logits.shape[1] <= MOST_TOKENS

    def sample(self, logits: Tensor, settings: SamplingBatch) -> Tensor:
        if not self._samples(logits):
            return super().sample(logits, settings)
        from quire_triton.kernels.sample import sample

        return sample(logits, settings)

    def logprobs(self, logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        from quire_triton.kernels.logprobs import MOST_LOGPROBS, logprobs

        if not self._samples(logits) or min(count, logits.shape[1]) > MOST_LOGPROBS:
            return super().logprobs(logits, chosen, count)
        return logprobs(logits, chosen, count)

    # -- pointwise operations --------------------------------------------------------------------------------------
    def rms_norm(
        self, x: Tensor, weight: Tensor, spec: NormSpec, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._kernels_take(x):
            return super().rms_norm(x, weight, spec, residual)
        from quire_triton.kernels.rms_norm import rms_norm

        return rms_norm(x, weight, spec, residual)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._kernels_take(x):
            return super().layer_norm(x, weight, bias, spec, residual)
        from quire_triton.kernels.layer_norm import layer_norm

        return layer_norm(x, weight, bias, spec, residual)

    def rotary(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        if not self._kernels_take(q):
            return super().rotary(q, k, positions, cos_sin, interleaved)
        from quire_triton.kernels.rotary import rotary

        return rotary(q, k, positions, cos_sin, interleaved)

    def gated_act(self, x: Tensor, activation: str) -> Tensor:
        if not self._kernels_take(x) or x.dim() != 2:
            return super().gated_act(x, activation)
        from quire_triton.kernels.gated_act import gated_act

        return gated_act(x, activation)
