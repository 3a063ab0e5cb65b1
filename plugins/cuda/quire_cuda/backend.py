"""The CUDA backend: torch.cuda for devices, memory and order, Triton kernels, cuBLAS for products, NCCL, recorded decode."""

from __future__ import annotations

from typing import Any

import torch

from quire.hardware import Capabilities, DeviceUnavailable
from quire_cuda.attention import FLASHINFER, TABLE, VARLEN, FlashInfer, TorchVarlen
from quire_triton.backend import KV_DTYPES, LATENT_SIZES
from quire_triton.choice import TRITON
from quire_triton.gpu import GpuBackend

KERNELS_FROM = (8, 0)
"""The least compute capability that the kernels of quire-triton are compiled for."""


class CudaBackend(GpuBackend):
    """One NVIDIA GPU."""

    name = "cuda"
    kind = "cuda"
    build = "cuda"
    look = "nvidia-smi"
    products = "cuBLAS"
    collectives = "NCCL"
    implementations = (FlashInfer, TorchVarlen)
    attention_table = TABLE
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        kv_dtypes=KV_DTYPES,
        latent_sizes=LATENT_SIZES,
        page_sizes=frozenset({16, 32, 64, 128, 256}),
        attention_backends=frozenset({TRITON, FLASHINFER, VARLEN}),
        quantization=frozenset({"int8", "int4", "int4-64", "int4-128", "w8a8", "fp8"}),  # those the architecture has
        graphs=True,
        priority=10,
    )

    def _require_code(self, properties: Any) -> None:
        """Code for the same major capability and no later minor one runs, and PTX of any earlier one is compiled by the
        driver (CUDA C++ programming guide, binary and PTX compatibility)."""
        mine = (properties.major, properties.minor)
        binaries = torch.cuda.get_arch_list()
        if mine < KERNELS_FROM:
            least = ".".join(map(str, KERNELS_FROM))
            raise DeviceUnavailable(
                f"{properties.name} has compute capability {mine[0]}.{mine[1]}, the kernels need {least} or later"
            )
        for kind, _, digits in (name.partition("_") for name in binaries):
            number = "".join(c for c in digits if c.isdigit())
            if len(number) < 2:
                continue
            theirs = (int(number[:-1]), int(number[-1]))
            plain = number == digits  # sm_90a and the like run on that very architecture alone
            if (kind == "sm" and theirs[0] == mine[0] and theirs <= mine and (plain or theirs == mine)) or (
                kind == "compute" and theirs <= mine and plain
            ):
                return
        raise DeviceUnavailable(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) holds no code for {properties.name} (compute capability "
            f"{mine[0]}.{mine[1]}; it has {', '.join(binaries) or 'none'}): install a torch that does, see https://pytorch.org"
        )

    def details(self, properties: Any) -> str:
        capability = f"compute capability {properties.major}.{properties.minor}"
        return f"{capability}, {properties.multi_processor_count} multiprocessors"
