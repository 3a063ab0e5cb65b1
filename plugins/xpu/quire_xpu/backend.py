"""The XPU backend: torch.xpu for devices, memory and order, Triton kernels where Intel's Triton is there, oneDNN for
products."""

from __future__ import annotations

from typing import Any

import torch

from quire.hardware import Capabilities, DeviceUnavailable
from quire_triton.gpu import GpuBackend


class XpuBackend(GpuBackend):
    """One Intel GPU. It records nothing."""

    name = "xpu"
    kind = "xpu"
    products = "oneDNN"
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        kv_dtypes=frozenset({"float32", "bfloat16", "float16"}),
        page_sizes=frozenset({16, 32, 64, 128, 256}),
        quantization=frozenset({"int8", "int4", "int4-64", "int4-128"}),
        priority=10,
    )

    def require(self) -> None:
        if getattr(torch.version, "xpu", None) is None:
            raise DeviceUnavailable(
                f"this torch ({torch.__version__}) is built without XPU: install one with it, see https://pytorch.org"
            )
        if not torch.xpu.is_available():
            raise DeviceUnavailable(
                f"torch is built for XPU {torch.version.xpu}, but finds no usable GPU: check `xpu-smi discovery` and "
                "the driver"
            )

    def details(self, properties: Any) -> str:
        return f"{getattr(properties, 'max_compute_units', '?')} compute units"
