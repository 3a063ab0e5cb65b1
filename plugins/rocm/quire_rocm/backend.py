"""The ROCm backend: torch's HIP build (whose names are torch.cuda's), Triton kernels, hipBLASLt for products, RCCL.

What differs between AMD's architectures (64 lanes or 32, which fp8, which matrix instructions) is
``quire_triton.architectures``; the open backend has its row as ``architecture``.
"""

from __future__ import annotations

from typing import Any

import torch

from quire.hardware import Capabilities, DeviceUnavailable
from quire_triton.backend import KV_DTYPES, LATENT_SIZES
from quire_triton.choice import TRITON
from quire_triton.gpu import GpuBackend


class RocmBackend(GpuBackend):
    """One AMD GPU."""

    name = "rocm"
    kind = "cuda"
    build = "hip"
    look = "rocminfo"
    products = "hipBLASLt"
    collectives = "RCCL"
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        kv_dtypes=KV_DTYPES,
        latent_sizes=LATENT_SIZES,
        page_sizes=frozenset({16, 32, 64, 128, 256}),
        attention_backends=frozenset({TRITON}),
        quantization=frozenset({"int8", "int4", "int4-64", "int4-128", "w8a8", "fp8"}),  # those the architecture has
        graphs=True,
        priority=10,
    )

    def _require_code(self, properties: Any) -> None:
        """AMD's code runs on the architecture it was made for and on no other."""
        name, binaries = properties.gcnArchName.partition(":")[0], torch.cuda.get_arch_list()
        if name not in {binary.partition(":")[0] for binary in binaries}:
            raise DeviceUnavailable(
                f"torch {torch.__version__} (ROCm {torch.version.hip}) holds no code for {properties.name} ({name}; it has "
                f"{', '.join(binaries) or 'none'}): install a torch that does, see https://pytorch.org"
            )

    def details(self, properties: Any) -> str:
        return f"{properties.gcnArchName.partition(':')[0]}, {properties.multi_processor_count} compute units"
