"""The CPU backend on the native kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quire.hardware import (
    AttentionBatch,
    AttentionSpec,
    AttentionWeights,
    Backend,
    CapturedStep,
    DeviceInfo,
    DeviceOptions,
    KVGroupSpec,
    KVSpec,
    MlpSpec,
    MlpWeights,
    NormSpec,
    SamplingBatch,
    UnsupportedOnDevice,
    reference,
)
from quire_cpu import memory, native
from quire_cpu import native_attention as attention
from quire_cpu.backend import CpuBackend
from quire_cpu.native_capture import capture
from quire_cpu.placement import huge_pages, place

FORMATS = {name: format for name, format in reference.quantize.FORMATS.items() if not format.inputs}


class NativeCpuBackend(CpuBackend):
    """As :class:`CpuBackend`, by kernels of the plugin's own on threads of its own. Bits depend on the instruction
    set (``devices()`` names the one in use), but on nothing else that varies."""

    capabilities = dataclasses.replace(
        CpuBackend.capabilities, page_sizes=frozenset({16, 32, 64, 128, 256}), head_sizes=(8, 256), graphs=True,
        quantization=frozenset(FORMATS), kv_dtypes=frozenset(attention.KV_DTYPES),
        embed_formats=frozenset({"dense", *FORMATS}), isas=tuple(native.isas()),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._arena = native.Arena()

    def devices(self) -> list[DeviceInfo]:
        cores, pages, nodes = memory.cores(), huge_pages(), place(memory.cores()).nodes
        details = [f"{cores} core{'s' if cores != 1 else ''}", f"native kernels: {native.isa()}"]
        if pages:
            details.append(f"huge pages: {'no' if pages == 'never' else 'yes'}")
        if nodes:
            details.append(f"memory nodes: {', '.join(map(str, nodes))}")
        return [DeviceInfo(0, memory.processor()[0], "; ".join(details + memory.limits()), cores)]

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        Backend.open(self, index, options)
        if index != 0:
            raise UnsupportedOnDevice(self.name, "open", f"there is one device, 0, not {index}")
        threads = memory.cores() if options.threads is None else options.threads
        if threads < 1:
            raise UnsupportedOnDevice(self.name, "open", f"threads is {threads}, at least 1 is needed")
        if options.isa is not None:
            native.set_isa(options.isa)
        native.set_threads(threads)
        torch.set_num_threads(1)  # what torch still does is small: threads of its own would take cores from ours

    def capture(self, fn: Callable[[], Tensor], static_inputs: Sequence[Tensor]) -> CapturedStep | None:
        return capture(fn, self._arena)

    # -- paged KV --------------------------------------------------------------------------------------------------
    def page_bytes(self, spec: KVGroupSpec) -> int:
        return attention.page_bytes(spec)

    def allocate_kv(self, spec: KVSpec, pages: Sequence[int], host: bool = False) -> Any:
        return attention.allocate_kv(spec, pages)

    def write_kv(self, kv: Any, layer: int, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
        attention.write_kv(kv, layer, k, v, batch)

    def copy_pages(self, source: Any, target: Any, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        attention.copy_pages(source, target, group, pairs)

    def plan_attention(self, batch: AttentionBatch, spec: KVSpec, reuse: Any = None) -> Any:
        return attention.Plan(batch) if reuse is None else reuse.update(batch)

    def attention(self, q: Tensor, kv: Any, layer: int, plan: Any, spec: AttentionSpec, sinks: Any = None) -> Tensor:
        return attention.attention(q, kv, layer, plan, spec, sinks)

    # -- weights and pointwise operations --------------------------------------------------------------------------
    def pack_weight(self, raw: Mapping[str, Tensor], format: str = "dense") -> Any:
        """``dense``, or the same weight rounded to a format of the contract; the inputs of a product with it are rounded to
        8 bits, with a scale for each row and group of columns, and the products of a group are added up exactly.

        A decode step reads each weight once (1 byte and 1/32 of one in int8, 5/8 of a byte in int4) and does two
        operations for each weight and row.
        """
        if format != "dense" and format not in FORMATS:
            known = ("dense", *FORMATS)
            raise UnsupportedOnDevice(self.name, "pack_weight", f"the weight format '{format}' is unknown", known)

        def pack(weight: Tensor) -> native.PackedLinear | native.QuantizedLinear:
            if format == "dense":
                return native.pack_linear(weight)
            return native.pack_quantized(weight, FORMATS[format].bits, FORMATS[format].group)

        weight = raw["weight"]
        return [pack(one) for one in weight] if weight.dim() == 3 else pack(weight)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        self._same_dtype(x, weight)
        return native.linear(x, weight, bias)

    def _same_dtype(self, x: Tensor, weight: native.PackedLinear | native.QuantizedLinear) -> None:
        if isinstance(weight, native.PackedLinear) and x.dtype != weight.dtype:
            reason = f"input {x.dtype} with a weight of {weight.dtype}"
            raise UnsupportedOnDevice(self.name, "linear", reason, ("cast one",))

    def embed(self, ids: Tensor, table: Any) -> Tensor:
        return native.embed(ids, table)

    def rms_norm(
        self, x: Tensor, weight: Tensor, spec: NormSpec, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return native.rms_norm(x, weight, spec.eps, spec.offset, residual)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return native.layer_norm(x, weight, bias, spec.eps, spec.offset, residual)

    def gated_act(self, x: Tensor, activation: str) -> Tensor:
        return native.gated_act(x, activation)

    def moe(self, x: Tensor, gates: Tensor, experts: Tensor, gate_up: Any, down: Any, activation: str) -> Tensor:
        """As the reference, expert after expert, in float32."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in experts.unique().tolist():
            tokens, choice = (experts == expert).nonzero(as_tuple=True)
            hidden = native.gated_linear(x[tokens], gate_up[expert], activation=activation)
            y = native.linear(hidden, down[expert], out_dtype=torch.float32)
            out.index_add_(0, tokens, y * gates[tokens, choice].float()[:, None])
        return out.to(x.dtype)

    def sample(self, logits: Tensor, settings: SamplingBatch) -> Tensor:
        return native.argmax(logits) if settings.all_greedy else native.sample(logits, settings)

    def logprobs(self, logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return native.logprobs(logits, chosen, count)

    # -- compound operations ---------------------------------------------------------------------------------------
    def _norm(self, x: Tensor, weight: Any, spec: NormSpec, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if spec.kind == "layer":
            return self.layer_norm(x, weight[0], weight[1], spec, residual)
        return self.rms_norm(x, weight, spec, residual)

    def attention_block(
        self, x: Tensor, residual: Tensor | None, weights: AttentionWeights, spec: AttentionSpec, norm: NormSpec,
        kv: Any, layer: int, batch: AttentionBatch, plan: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h, residual = self._norm(x, weights.norm, norm, residual)
        qkv = self.linear(h, weights.qkv, weights.qkv_bias)
        q = attention.prepare_qkv(qkv, kv, layer, weights, spec, batch)
        out = attention.attention(q, kv, layer, plan, spec, weights.sinks)
        return native.linear(out.view(len(x), -1), weights.out, weights.out_bias), residual

    def gated_mlp(
        self, x: Tensor, residual: Tensor | None, weights: MlpWeights, spec: MlpSpec, norm: NormSpec
    ) -> tuple[Tensor, Tensor]:
        h, residual = self._norm(x, weights.norm, norm, residual)
        self._same_dtype(h, weights.gate_up)
        h = native.gated_linear(h, weights.gate_up, weights.gate_up_bias, activation=spec.activation)
        return native.linear(h, weights.down, weights.down_bias), residual

    def final_head(
        self, x: Tensor, residual: Tensor | None, rows: Tensor, norm_weight: Any, head: Any, norm: NormSpec
    ) -> Tensor:
        last = None if residual is None else native.embed(rows, residual)
        h, _ = self._norm(native.embed(rows, x), norm_weight, norm, last)
        self._same_dtype(h, head)
        return native.linear(h, head, out_dtype=torch.float32)
