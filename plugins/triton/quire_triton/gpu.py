"""What torch's GPU backends have in common: devices, memory and order through ``torch.cuda`` (which is HIP's name too)
or ``torch.xpu``. A plugin says which, why a machine has none, and what the device promises."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.hardware import (
    CapturedStep,
    DeviceInfo,
    DeviceOptions,
    DeviceUnavailable,
    MemoryInfo,
    UnsupportedOnDevice,
)
from quire_triton.backend import TritonOps
from quire_triton.graphs import Recorder

log = logging.getLogger("quire.triton")


class GpuBackend(TritonOps):
    """One GPU that torch knows. Without Triton the reference operations compute, and nothing is recorded: they read
    lengths on the host, and a recording would keep those of the step it was made in."""

    kind: str = "cuda"
    """The torch device type, and the name of its module in torch."""
    products: str = "the library of matrix products"
    """Whose choice of kernel depends on the size of the batch, for the error that says so."""

    def __init__(self) -> None:
        self._recorder = Recorder()

    def require(self) -> None:
        """Raise DeviceUnavailable, with the reason in one line, where there is no GPU to use."""
        raise NotImplementedError

    def details(self, properties: Any) -> str:
        """One line about a device beside its name."""
        return ""

    @property
    def module(self) -> Any:
        return getattr(torch, self.kind)

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, self.device_index)

    def devices(self) -> list[DeviceInfo]:
        self.require()
        found = []
        for index in range(self.module.device_count()):
            properties = self.module.get_device_properties(index)
            found.append(DeviceInfo(index, properties.name, self.details(properties)))
        return found

    def memory(self, index: int = 0) -> MemoryInfo:
        self.require()
        free, total = self.module.mem_get_info(index)
        return MemoryInfo(free=free, total=total)

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        """Raises DeviceUnavailable for an index that is not there, UnsupportedOnDevice for ``batch_invariant`` without
        Triton."""
        self.require()
        count = self.module.device_count()
        if not 0 <= index < count:
            raise DeviceUnavailable(
                f"there is no {self.name} device {index}: this machine has {count} (0 to {count - 1})"
            )
        super().open(index, options)
        if options.batch_invariant:
            if self.without_kernels is not None:
                reason = f"{self.products} chooses its kernels by the size of the batch, and {self.without_kernels}"
                raise UnsupportedOnDevice(self.name, "batch_invariant", reason, ("install Triton", "--device cpu"))
            self.capabilities = dataclasses.replace(self.capabilities, batch_invariant=True)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if self.kind == "cuda":
            # Products of float32 are float32: the reference says so, and conformance checks it.
            torch.backends.cuda.matmul.allow_tf32 = False
        self.module.set_device(index)
        if self.without_kernels is not None:
            self.capabilities = dataclasses.replace(self.capabilities, graphs=False)

    def stream(self) -> Any:
        return self.module.stream(self.module.Stream(self.device_index))

    def event(self) -> Any:
        event = self.module.Event()
        event.record()
        return event

    def synchronize(self) -> None:
        self.module.synchronize(self.device_index)

    def to_device(self, array: np.ndarray) -> Tensor:
        # A pinned copy, so that the transfer need not wait and the caller may write to its array again. Torch's
        # allocator keeps the pinned memory until the transfer has been made.
        return torch.tensor(array).pin_memory().to(self.device, non_blocking=True)

    def capture(self, fn: Callable[[], Any], static_inputs: Sequence[Tensor]) -> CapturedStep | None:
        return self._recorder.record(fn) if self.capabilities.graphs else None
