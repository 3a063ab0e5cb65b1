"""A device for tests: the Triton kernels under Triton's interpreter, on host memory.

It shows that the kernels compute what they should, and nothing of how a GPU runs them. Triton reads TRITON_INTERPRET
when it is imported, so this is used in a process of its own.
"""

from __future__ import annotations

import dataclasses

import torch

from quire.hardware import Capabilities, DeviceInfo, DeviceOptions, MemoryInfo
from quire.quantization import FORMATS
from quire_triton.backend import KV_DTYPES, LATENT_SIZES, TritonOps


class Interpreted(TritonOps):
    name = "interpreted"
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        kv_dtypes=KV_DTYPES,
        latent_sizes=LATENT_SIZES,
        page_sizes=frozenset({8, 16, 32, 64, 128, 256}),
        head_sizes=(32, 256),
        quantization=frozenset(FORMATS),
    )

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        super().open(index, options)
        # The formats of every architecture, whatever host memory counts as.
        self.capabilities = dataclasses.replace(type(self).capabilities, batch_invariant=options.batch_invariant)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo(0, "Triton's interpreter")]

    def memory(self, index: int = 0) -> MemoryInfo:
        return MemoryInfo(1 << 30, 1 << 30)
