"""A device for tests: host memory, with the GPU plugins' communicator over gloo in the place of NCCL, RCCL or oneCCL.

It shows what the communicator makes of a process group; what those libraries do is shown on their devices.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo

from quire.hardware import Backend, Capabilities, Communicator, DeviceInfo, MemoryInfo
from quire_triton.communicator import METHODS, GroupCommunicator


def gloo_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return ProcessGroupGloo(store, rank, size, timeout)


class GlooRanks(Backend):
    name = "gloo-ranks"
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        collectives=METHODS,
    )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo(index, "host memory") for index in range(3)]

    def open(self, index: int = 0, options: Any = None) -> None:
        assert index in range(3)

    def memory(self, index: int = 0) -> MemoryInfo:
        return MemoryInfo(1 << 30, 1 << 30)

    def communicator(self, rank: int, size: int, address: str) -> Communicator:
        return GroupCommunicator(rank, size, address, self.device, "gloo", gloo_group)
