"""The XPU backend: torch.xpu for devices, memory and order, Triton kernels where Intel's Triton is there, else
intel-extension-for-pytorch's operations where that is usable, else the references; oneDNN for products, oneCCL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.hardware import AttentionBatch, Capabilities, DeviceOptions, NormSpec
from quire_triton.backend import KV_DTYPES, LATENT_SIZES
from quire_triton.choice import TRITON
from quire_triton.gpu import GpuBackend
from quire_xpu import ipex
from quire_xpu.attention import IPEX, TABLE, IpexAttention


class XpuBackend(GpuBackend):
    """One Intel GPU. It records nothing."""

    name = "xpu"
    kind = "xpu"
    build = "xpu"
    look = "xpu-smi discovery"
    products = "oneDNN"
    collectives = "oneCCL"
    implementations = (IpexAttention,)
    attention_table = TABLE
    minimum_torch = (2, 8)  # IPEX's last
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        kv_dtypes=KV_DTYPES,
        latent_sizes=LATENT_SIZES,
        page_sizes=frozenset({16, 32, 64, 128, 256}),
        attention_backends=frozenset({TRITON, IPEX}),
        quantization=frozenset({"int8", "int4", "int4-64", "int4-128"}),
        priority=10,
    )

    _fused: Any = None  # IPEX's PagedAttention and fused functions, where they are used

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        super().open(index, options)
        # Where there is Triton its kernels fuse what IPEX's operations do not (the residual, the halves of a gate).
        usable = self.without_kernels is not None and ipex.missing() is None
        self._fused = ipex.load() if usable else None

    def details(self, properties: Any) -> str:
        return f"{getattr(properties, 'max_compute_units', '?')} compute units"

    def notes(self) -> list[str]:
        used = ["norms, activations and KV writes: intel-extension-for-pytorch"] if self._fused else []
        return [*super().notes(), *used]

    def _ipex_takes(self, x: Tensor, *others: Tensor) -> bool:
        return x.dtype in (torch.bfloat16, torch.float16) and all(other.dtype == x.dtype for other in others)

    def write_kv(self, kv: Any, layer: int, k: Tensor, v: Any, batch: AttentionBatch) -> None:
        group, index = kv.place[layer]
        pool = kv.pools[group]
        if self._fused is None or v is None or not self._ipex_takes(k, v, pool):
            return super().write_kv(kv, layer, k, v, batch)
        keys, values = pool[index]
        self._fused[0].reshape_and_cache_flash(k, v, keys, values, batch.slots[group])
        return None

    def rms_norm(
        self, x: Tensor, weight: Tensor, spec: NormSpec, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self._fused is None or spec.offset or not self._ipex_takes(x, weight):
            return super().rms_norm(x, weight, spec, residual)
        total = x if residual is None else x + residual
        return self._fused[1].rms_norm(total, weight, spec.eps), total

    def gated_act(self, x: Tensor, activation: str) -> Tensor:
        if self._fused is None or not self._ipex_takes(x):
            return super().gated_act(x, activation)
        gate, up = (half.contiguous() for half in x.chunk(2, dim=-1))
        if activation == "silu":
            return self._fused[1].silu_mul(gate, up)
        return self._fused[1].gelu_mul(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")
