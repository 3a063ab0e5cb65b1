"""The ROCm backend: torch's HIP build (whose names are torch.cuda's), Triton kernels, hipBLASLt for products."""

from __future__ import annotations

from typing import Any

import torch

from quire.hardware import Capabilities, DeviceUnavailable
from quire_triton.gpu import GpuBackend


class RocmBackend(GpuBackend):
    """One AMD GPU."""

    name = "rocm"
    kind = "cuda"
    products = "hipBLASLt"
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        kv_dtypes=frozenset({"float32", "bfloat16", "float16"}),
        page_sizes=frozenset({16, 32, 64, 128, 256}),
        quantization=frozenset({"int8", "int4", "int4-64", "int4-128", "w8a8", "fp8"}),  # those the architecture has
        graphs=True,
        priority=10,
    )

    def require(self) -> None:
        if torch.version.hip is None:
            raise DeviceUnavailable(
                f"this torch ({torch.__version__}) is built without ROCm: install one with it, see https://pytorch.org"
            )
        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                f"torch is built for ROCm {torch.version.hip}, but finds no usable GPU: check `rocminfo` and the driver"
            )

    def details(self, properties: Any) -> str:
        return f"{properties.gcnArchName.partition(':')[0]}, {properties.multi_processor_count} compute units"
