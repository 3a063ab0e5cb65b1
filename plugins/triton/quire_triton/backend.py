"""What a device plugin inherits so that its operations are computed by the kernels here.

The plugin keeps devices, memory, streams and communicators to itself. Where Triton cannot be used the references
compute instead, and one line in the log says why.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import quire_triton
from quire.hardware import (
    AttentionBatch,
    AttentionSpec,
    Backend,
    DeviceOptions,
    KVSpec,
    MlpSpec,
    MlpWeights,
    NormSpec,
    SamplingBatch,
    UnsupportedOnDevice,
    reference,
)

log = logging.getLogger("quire.triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = (16, 256)
MOST_TOKENS = 1 << 19
"""The largest vocabulary whose sums of weights are exact: see ``quire.reference.sampling``."""
LATENT_SIZES = frozenset({(576, 512)})
"""(channels of a key, those of them that are its value): DeepSeek-V2 and V3."""
KV_DTYPES = frozenset({"float32", "bfloat16", "float16", "int8", "float8_e4m3fn"})
"""What pages may hold. A code of fp8 is made and read by arithmetic, so that it is the same on every architecture."""
MOST_EXPERTS = 1024  # that one program chooses from


class TritonOps(Backend):
    """Attention, KV writes, norms, rotary, activations, page copies, penalties, sampling, experts and products of rounded
    weights in Triton, on whatever device torch has Triton for. Dense products are torch's library's or Triton's as a table
    says; where bits must not depend on the batch they are all Triton's."""

    without_kernels: str | None = "the device is not open"
    """Why the references compute; None where the kernels do."""
    maker: str | None = None
    """Triton's name for whom it compiles (nvidia, amd, intel); None: it interprets."""

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        """Looks for Triton, and says once where it cannot be used; narrows the weight formats to the architecture's."""
        super().open(index, options)
        self.without_kernels = quire_triton.missing(self.maker)
        offered: frozenset[str] = frozenset()
        if self.without_kernels is None:
            from quire_triton import configs

            offered = self.capabilities.quantization & configs.formats(configs.architecture(self.device))
        self.capabilities = dataclasses.replace(self.capabilities, quantization=offered)
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

    # -- products --------------------------------------------------------------------------------------------------
    def pack_weight(self, raw: Mapping[str, Tensor], format: str = "dense") -> Any:
        """Rounded weights in the layout of the kernels; a dense one as it is, which torch's products and the kernels
        both read."""
        weight = raw["weight"]
        if format == "dense":
            return super().pack_weight(raw, format)
        offered = self.capabilities.quantization
        if format not in reference.quantize.FORMATS or format not in offered or not self._kernels_take(weight):
            reason = f"no kernel here has the weight format '{format}' for {weight.dtype}"
            raise UnsupportedOnDevice(self.name, "pack_weight", reason, ("dense", *sorted(offered)))
        from quire_triton import configs
        from quire_triton.weights import pack

        fnuz = configs.e4m3(configs.architecture(self.device)) == torch.float8_e4m3fnuz
        return pack(weight, reference.quantize.FORMATS[format], self.device, fnuz)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return self._product(x, weight, bias, None)

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None, activation: str | None) -> Tensor:
        """linear, or gated_act of it, by torch's library or the kernels as the table says."""
        if self._kernels_take(x):
            from quire_triton import configs
            from quire_triton.products import library, linear

            by = None if self.options.batch_invariant else library(x, weight, configs.architecture(x.device))
            if by is None:
                return linear(x, weight, bias, activation, self.options.batch_invariant)
            y = by(x, weight, bias)
        else:
            y = super().linear(x, weight, bias)
        return y if activation is None else self.gated_act(y, activation)

    def gated_mlp(
        self, x: Tensor, residual: Tensor | None, weights: MlpWeights, spec: MlpSpec, norm: NormSpec
    ) -> tuple[Tensor, Tensor]:
        """As the reference; a product by the kernels applies the activation itself."""
        h, residual = reference.blocks.norm(self, x, weights.norm, norm, residual)
        h = self._product(h, weights.gate_up, weights.gate_up_bias, spec.activation)
        return self.linear(h, weights.down, weights.down_bias), residual

    def route(
        self, logits: Tensor, chosen: int, score: str, normalize: bool = True, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._kernels_take(logits) or logits.shape[-1] > MOST_EXPERTS:
            return super().route(logits, chosen, score, normalize, bias)
        from quire_triton.kernels.route import route

        return route(logits, chosen, score, normalize, bias)

    def moe(self, x: Tensor, gates: Tensor, experts: Tensor, gate_up: Any, down: Any, activation: str) -> Tensor:
        if not self._kernels_take(x):
            return super().moe(x, gates, experts, gate_up, down, activation)
        from quire_triton.kernels.moe import moe

        return moe(x, gates, experts, gate_up, down, activation, self.options.batch_invariant)

    # -- sampling --------------------------------------------------------------------------------------------------
    def _samples(self, logits: Tensor) -> bool:
        return self.without_kernels is None and logits.dtype == torch.float32 and logits.shape[1] <= MOST_TOKENS

    def penalize(self, logits: Tensor, rows: Tensor, ids: Tensor, penalties: Tensor) -> None:
        if self.without_kernels is not None or logits.dtype != torch.float32 or logits.stride(1) != 1:
            return super().penalize(logits, rows, ids, penalties)
        from quire_triton.kernels.penalize import penalize

        return penalize(logits, rows, ids, penalties)

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
