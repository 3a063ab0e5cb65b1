"""A fake of torch's device modules (torch.cuda, torch.xpu), for the host code of the GPU plugins.

It has what that code calls and keeps a log of it: which stream is current when, what waits for what, which recording
runs in which pool, what the allocator was asked. Tensors live in host memory and are computed at once.

What it does not show: that a kernel or a library runs, or what it computes; that a copy is asynchronous, or that two
streams would race where nothing orders them; that a replay repeats the work (``replay`` only says that it was called);
that torch's real functions take these arguments, beyond the names that ``test_fake_gpu.py`` looks up in torch; and
nothing of time. A GPU shows those: ``bench/gpu.sh`` and ``quire conformance``.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from typing import Any

import pytest
import torch

BUILD = {"cuda": "cuda", "rocm": "hip", "xpu": "xpu"}
MODULE = {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu"}
GIB = 1 << 30


class Stream:
    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: Stream) -> None:
        self.gpu.log.append(f"{self.name} waits for {other.name}")


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.where = gpu, "nowhere"

    def record(self) -> None:
        self.where = self.gpu.current.name
        self.gpu.log.append(f"event on {self.where}")

    def synchronize(self) -> None:
        self.gpu.log.append(f"host waits for an event on {self.where}")


class Graph:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.pool: Any = None

    def replay(self) -> None:
        self.gpu.log.append("replay")


class Gpu:
    """The module. ``log``: what was called, in order. ``reserved``, ``peak``, ``outside`` are bytes that ``take`` moves."""

    def __init__(self, count: int = 2, **properties: Any) -> None:
        self.count, self.available = count, True
        self.arch_list = ["sm_80", "sm_90", "compute_90", "gfx90a", "gfx942", "gfx1100"]
        self.properties = dict(
            major=9, minor=0, multi_processor_count=7, max_compute_units=7, gcnArchName="gfx942:sramecc+:xnack-",
            warp_size=64, sub_group_sizes=[16, 32],
        )  # fmt: skip
        self.properties |= properties
        self.log: list[str] = []
        self.failure: Exception | None = None  # what the driver says to whatever is asked first
        self.default = self.current = Stream(self, "default")
        self.streams = self.pools = 0
        self.capturing: Any = None
        self.captures: list[Graph] = []
        self.refusal: str | None = None  # why the next recording fails
        self.total, self.reserved, self.peak, self.outside = 80 * GIB, 0, 0, 0

    def take(self, inside: int, outside: int = 0) -> None:
        """A step takes ``inside`` bytes from torch's allocator, which keeps them, and a library ``outside`` from the driver."""
        self.reserved += inside
        self.peak = max(self.peak, self.reserved)
        self.outside += outside

    # -- what torch's modules have ---------------------------------------------------------------------------------
    def is_available(self) -> bool:
        return self.available

    def init(self) -> None:
        if self.failure is not None:
            raise self.failure

    def device_count(self) -> int:
        return self.count

    def get_device_properties(self, index: Any) -> Any:
        return types.SimpleNamespace(name=f"GPU {index}", **self.properties)

    def get_arch_list(self) -> list[str]:
        return self.arch_list

    def mem_get_info(self, index: int = 0) -> tuple[int, int]:
        self.init()
        return self.total - self.reserved - self.outside, self.total

    def set_device(self, index: int) -> None:
        self.init()
        self.log.append(f"device {index}")

    def synchronize(self, index: int = 0) -> None:
        self.log.append("synchronize")

    def empty_cache(self) -> None:
        self.log.append("empty cache")

    def reset_peak_memory_stats(self, index: int = 0) -> None:
        self.peak = self.reserved

    def memory_reserved(self, index: int = 0) -> int:
        return self.reserved

    def max_memory_reserved(self, index: int = 0) -> int:
        return self.peak

    def Stream(self, device: Any = None) -> Stream:
        self.streams += 1
        return Stream(self, f"stream {self.streams}")

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Any:
        before, self.current = self.current, stream
        self.log.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self) -> str:
        self.pools += 1
        return f"pool {self.pools}"

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:
        if self.refusal is not None:
            raise RuntimeError(self.refusal)
        graph.pool = pool
        self.log.append(f"recording on {stream.name} in {pool} ({capture_error_mode})")
        self.capturing = graph
        with self.stream(stream):
            yield
        self.capturing = None
        self.captures.append(graph)


def install(name: str, monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None = None, version: str = "2.13.0") -> Gpu:
    """Torch as if built for the plugin's device, with a fake in the place of its module."""
    gpu = gpu or Gpu()
    for build in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, build, None, raising=False)
    monkeypatch.setattr(torch.version, BUILD[name], "99.9")
    monkeypatch.setattr(torch, MODULE[name], gpu)
    monkeypatch.setattr(torch, "__version__", version)
    return gpu


def made(name: str) -> Any:
    """The backend that the plugin registers, made by its own hook."""
    found: dict[str, Any] = {}
    importlib.import_module(f"quire_{name}").quire_register_backends(found.__setitem__)
    assert list(found) == [name]
    return found[name]()


class Pinned(torch.Tensor):
    """A tensor that says that it is pinned, and hands that on to its views and to nothing else."""

    def is_pinned(self, device: Any = None) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        views = func in (torch.Tensor.movedim, torch.Tensor.permute, torch.Tensor.view)
        return out if views or not isinstance(out, Pinned) else out.as_subclass(torch.Tensor)


def in_host_memory(name: str) -> Any:
    """The plugin's backend with its tensors in host memory; ``pinned`` lists what it asked to be pinned, which then says
    so of itself and of its views, as torch's tensors do."""
    base = type(made(name))

    class Here(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.pinned: list[tuple[int, ...]] = []

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def _pinned(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
            self.pinned.append(tuple(shape))
            return torch.empty(tuple(shape), dtype=dtype).as_subclass(Pinned)

    return Here()
