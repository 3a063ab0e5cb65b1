"""The CUDA backend: torch.cuda for devices, memory and order, Triton kernels, cuBLAS for products, recorded decode."""

from __future__ import annotations

from typing import Any

import torch

from quire.hardware import Capabilities, DeviceUnavailable
from quire_triton.gpu import GpuBackend


class CudaBackend(GpuBackend):
    """One NVIDIA GPU."""

    name = "cuda"
    kind = "cuda"
    products = "cuBLAS"
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
        if torch.version.cuda is None:
            raise DeviceUnavailable(
                f"this torch ({torch.__version__}) is built without CUDA: install one with it, see https://pytorch.org"
            )
        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                f"torch is built for CUDA {torch.version.cuda}, but finds no usable GPU: check `nvidia-smi` and the "
                "driver"
            )

    def details(self, properties: Any) -> str:
        capability = f"compute capability {properties.major}.{properties.minor}"
        return f"{capability}, {properties.multi_processor_count} multiprocessors"
