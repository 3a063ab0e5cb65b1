"""What torch's GPU backends have in common: devices, memory and order through ``torch.cuda`` (which is HIP's name too)
or ``torch.xpu``. A plugin says which, what it is built with and what the device promises."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.hardware import (
    AttentionBatch,
    AttentionSpec,
    CapturedStep,
    Communicator,
    DeviceInfo,
    DeviceOptions,
    DeviceUnavailable,
    KVSpec,
    MemoryInfo,
    UnsupportedOnDevice,
)
from quire_triton import architectures, choice, communicator
from quire_triton.backend import TritonOps
from quire_triton.graphs import Recorder

log = logging.getLogger("quire.triton")

SWAP_PAGES = 64
"""Pages gathered at once on their way to or from the host: they take that much of the device's memory meanwhile."""

MAKERS = {"cuda": "nvidia", "hip": "amd", "xpu": "intel"}
"""Attributes of torch.version, and Triton's names for those whose GPUs it compiles for."""
BUILDS = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}
"""Attributes of torch.version, and what the builds that have them are called."""


class GpuBackend(TritonOps):
    """One GPU that torch knows. Without Triton the reference operations compute, and nothing is recorded: they read
    lengths on the host, and a recording would keep those of the step it was made in."""

    kind: str = "cuda"
    """The torch device type, and the name of its module in torch."""
    build: str = "cuda"
    """The attribute of torch.version that says what torch is built for."""
    minimum_torch: tuple[int, int] = (2, 11)
    look: str = ""
    """A command that shows the GPUs, for the error that says there are none."""
    products: str = "the library of matrix products"
    """Whose choice of kernel depends on the size of the batch, for the error that says so."""
    collectives: str = ""
    """The library of collectives, a key of ``communicator.LIBRARIES``."""
    implementations: tuple[type[choice.Implementation], ...] = ()
    """Attention of other libraries that this device may use."""
    attention_table: tuple[choice.Row, ...] = (
        choice.Row("*", True, (choice.TRITON,)),
        choice.Row("*", False, (choice.TRITON,)),
    )

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._recording = False
        self._others: dict[str, choice.Implementation] = {}
        self._chosen: dict[choice.Shape, choice.Implementation | None] = {}

    # -- what is there ---------------------------------------------------------------------------------------------
    def require(self) -> None:
        """Raise DeviceUnavailable, with the reason in one line, where there is no GPU to use."""
        name, version = BUILDS[self.build], getattr(torch.version, self.build, None)
        if version is None:
            others = [BUILDS[b] for b in BUILDS if getattr(torch.version, b, None) is not None]
            instead = f", for {' and '.join(others)}" if others else ""
            raise DeviceUnavailable(
                f"this torch ({torch.__version__}) is built without {name}{instead}: install one with it, see "
                "https://pytorch.org"
            )
        found = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if found < self.minimum_torch:
            least = ".".join(map(str, self.minimum_torch))
            raise DeviceUnavailable(
                f"torch {torch.__version__} is installed; the {self.name} device needs {least} or later"
            )
        if not self.module.is_available():
            raise DeviceUnavailable(
                f"torch is built for {name} {version}, but finds no usable GPU{self._why()}: check `{self.look}` and the driver"
            )

    def _why(self) -> str:
        """What torch says when it is made to start: no driver, one too old, no device. Its first sentence."""
        try:
            self.module.init()
        except Exception as error:  # RuntimeError, AssertionError, a loader's OSError: all of them mean no
            return f" ({str(error).strip().partition(chr(10))[0].partition('. ')[0].rstrip('.')})"
        return ""

    def details(self, properties: Any) -> str:
        """One line about a device beside its name."""
        return ""

    @property
    def maker(self) -> str:  # type: ignore[override]
        return MAKERS[self.build]

    @property
    def module(self) -> Any:
        return getattr(torch, self.kind)

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, self.device_index)

    def devices(self) -> list[DeviceInfo]:
        self.require()
        with self._torch("looking for devices"):
            found = [self.module.get_device_properties(index) for index in range(self.module.device_count())]
        return [DeviceInfo(index, own.name, self.details(own)) for index, own in enumerate(found)]

    def memory(self, index: int = 0) -> MemoryInfo:
        self.require()
        with self._torch("asking for memory"):
            free, total = self.module.mem_get_info(index)
        return MemoryInfo(free=free, total=total)

    @contextlib.contextmanager
    def _torch(self, what: str) -> Iterator[None]:
        """An error of torch or of the driver, in one line."""
        try:
            yield
        except (RuntimeError, AssertionError, OSError) as error:
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DeviceUnavailable(f"{what} on {self.name} failed: {first}") from error

    # -- opening ---------------------------------------------------------------------------------------------------
    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        """Raises DeviceUnavailable for an index that is not there, or a GPU that this torch has no code for,
        UnsupportedOnDevice for an option that cannot be honoured here."""
        self.require()
        with self._torch("counting devices"):
            count = self.module.device_count()
        if not 0 <= index < count:
            raise DeviceUnavailable(
                f"there is no {self.name} device {index}: this machine has {count} (0 to {count - 1})"
            )
        with self._torch(f"opening device {index}"):
            properties = self.module.get_device_properties(index)
            self._require_code(properties)
            self.module.set_device(index)
            self.module.mem_get_info(index)  # the first call that needs a context: a device that is lost says so here
        self.architecture = architectures.of(self.kind, properties, torch.version.hip is not None)
        self.capabilities = self._with_collectives(type(self).capabilities)
        super().open(index, options)
        self._recorder = Recorder(self.module)
        if options.batch_invariant:
            if self.without_kernels is not None:
                reason = f"{self.products} chooses its kernels by the size of the batch, and {self.without_kernels}"
                raise UnsupportedOnDevice(self.name, "batch_invariant", reason, ("install Triton", "--device cpu"))
            self.capabilities = dataclasses.replace(self.capabilities, batch_invariant=True)
        self._choose(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if self.kind == "cuda":
            # Products of float32 are float32: the reference says so, and conformance checks it.
            torch.backends.cuda.matmul.allow_tf32 = False
        if self.without_kernels is not None:
            self.capabilities = dataclasses.replace(self.capabilities, graphs=False)

    def _require_code(self, properties: Any) -> None:
        """Raise DeviceUnavailable where torch's binaries hold no code for this GPU."""

    def _with_collectives(self, declared: Any) -> Any:
        """What the class declares, with the collectives that this torch is built with."""
        offered = communicator.METHODS if self.collectives and communicator.missing(self.collectives) is None else ()
        return dataclasses.replace(declared, collectives=frozenset(offered))

    # -- order -----------------------------------------------------------------------------------------------------
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
        pinned = self._pinned(array.shape, torch.from_numpy(np.empty(0, array.dtype)).dtype)
        pinned.numpy()[...] = array
        return pinned.to(self.device, non_blocking=True)

    def _pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def allocate_kv(self, spec: KVSpec, pages: Sequence[int], host: bool = False) -> Any:
        """As the reference. A host pool is pinned and page by page in memory, under the same shape: a page crosses in one
        transfer that nobody waits for."""
        kv = super().allocate_kv(spec, pages, host)
        if host:
            for tensors in self._by_group(kv):
                for g, tensor in enumerate(tensors):
                    if tensor is not None:
                        tensors[g] = self._pinned(tensor.movedim(2, 0).shape, tensor.dtype).movedim(0, 2)
        return kv

    @staticmethod
    def _by_group(kv: Any) -> list[list[Any]]:
        """The tensors of a KV cache that have pages, in their third place: pools, and scales where there are any."""
        return [kv.pools, *([kv.scales] if getattr(kv, "scales", None) is not None else [])]

    def copy_pages(self, source: Any, target: Any, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        sides = ([one[group] for one in self._by_group(kv) if one[group] is not None] for kv in (source, target))
        both = list(zip(*sides, strict=True))
        crosses = all(a.is_pinned() != b.is_pinned() and a.dtype == b.dtype for a, b in both)
        if not crosses:
            return super().copy_pages(source, target, group, pairs)
        for first in range(0, len(pairs), SWAP_PAGES):
            some = pairs[first : first + SWAP_PAGES]
            for a, b in both:
                self._cross(_indexable(a), _indexable(b), some)
        return None

    def _cross(self, a: Tensor, b: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Pages between the device and pinned memory, gathered on the device so that each is one piece."""
        out = b.is_pinned()
        here = self.to_device(np.asarray([x if out else y for x, y in pairs], dtype=np.int64))
        if out:
            for page, (_, to) in zip(a.movedim(2, 0)[here], pairs, strict=True):
                b[:, :, to].copy_(page, non_blocking=True)
            return
        gathered = torch.empty((len(pairs), *b.movedim(2, 0).shape[1:]), dtype=b.dtype, device=b.device)
        for page, (of, _) in zip(gathered, pairs, strict=True):
            page.copy_(a[:, :, of], non_blocking=True)
        b[:, :, here] = gathered.movedim(0, 2)

    def peak_memory(self, fn: Callable[[], Any]) -> int:
        """What torch's allocator reserved at its peak, blocks that it could not give back included, and what grew outside
        of it: code of kernels that were loaded, workspaces of libraries."""
        module, index = self.module, self.device_index
        self.synchronize()
        module.empty_cache()
        module.reset_peak_memory_stats(index)
        reserved, free = module.memory_reserved(index), module.mem_get_info(index)[0]
        fn()
        self.synchronize()
        inside = module.max_memory_reserved(index) - reserved
        outside = free - module.mem_get_info(index)[0] - (module.memory_reserved(index) - reserved)
        module.empty_cache()
        return inside + max(outside, 0)

    def capture(self, fn: Callable[[], Any], static_inputs: Sequence[Tensor]) -> CapturedStep | None:
        if not self.capabilities.graphs or self._recorder is None:
            return None
        self._recording = True
        try:
            return self._recorder.record(fn)
        finally:
            self._recording = False

    def communicator(self, rank: int, size: int, address: str) -> Communicator:
        """Raises UnsupportedOnDevice where torch is built without the library."""
        reason = communicator.missing(self.collectives)
        if reason is not None:
            raise UnsupportedOnDevice(self.name, "a communicator", reason, ["a torch that has it", "one device"])
        make_group = communicator.LIBRARIES[self.collectives][1]
        exact = self.options.batch_invariant
        return communicator.GroupCommunicator(rank, size, address, self.device, self.collectives, make_group, exact)

    # -- which attention -------------------------------------------------------------------------------------------
    def _choose(self, options: DeviceOptions) -> None:
        """Find the implementations that this machine can use. Nothing is loaded where the kernels here always come
        first."""
        self._others, self._chosen = {}, {}
        self._missing = {one.name: one(self).missing() for one in self.implementations}
        self._missing[choice.TRITON] = self.without_kernels
        self._forced = None if options.attention_backend is None else options.attention_backend.upper()
        wanted = {self._forced} if self._forced else set().union(*(self._asked(decode) for decode in (True, False)))
        if self._forced is not None:
            reason = self._missing[self._forced]
            if reason is None and options.batch_invariant and self._forced != choice.TRITON:
                reason = "its bits depend on the batch, and --batch-invariant was asked for"
            if reason is not None:
                usable = sorted(name for name, why in self._missing.items() if why is None and name != self._forced)
                instead = [*(f"--attention-backend {name}" for name in usable), "leave the flag out"]
                raise UnsupportedOnDevice(self.name, f"--attention-backend {self._forced}", reason, instead)
        elif options.batch_invariant:
            wanted = set()
        self._others = {one.name: one(self) for one in self.implementations if one.name in wanted}
        forced = self._others.get(self._forced or "")
        if forced is not None:
            have = self.capabilities
            sizes = have.page_sizes if forced.page_sizes is None else have.page_sizes & forced.page_sizes
            (low, high), (least, most) = have.head_sizes, forced.head_sizes
            self.capabilities = dataclasses.replace(
                have, dtypes=have.dtypes & forced.dtypes, kv_dtypes=have.kv_dtypes & forced.dtypes, page_sizes=sizes,
                head_sizes=(max(low, least), min(high, most)), latent_sizes=frozenset(),
            )  # fmt: skip

    def _asked(self, decode: bool) -> list[str]:
        """Names of the table's row that are usable here, as far as the kernels of this package: they take whatever
        the references would."""
        names = choice.order(self.attention_table, self.architecture.name, decode).order
        usable = [name for name in names if self._missing[name] is None]
        return usable[: usable.index(choice.TRITON)] if choice.TRITON in usable else usable

    def _pick(self, shape: choice.Shape) -> choice.Implementation | None:
        """The implementation that computes a shape; None: the kernels here, or the references."""
        if shape not in self._chosen:
            names = [self._forced] if self._forced else self._asked(shape.decode)
            reasons = {name: self._others[name].refuses(shape) for name in names if name in self._others}
            if self._forced and reasons.get(self._forced):
                what = f"--attention-backend {self._forced}"
                raise UnsupportedOnDevice(self.name, what, str(reasons[self._forced]), ["leave the flag out"])
            taken = next((name for name, reason in reasons.items() if reason is None), None)
            self._chosen[shape] = None if taken is None else self._others[taken]
        return self._chosen[shape]

    def plan_attention(self, batch: AttentionBatch, spec: KVSpec, reuse: Any = None) -> Any:
        if not self._others:
            return super().plan_attention(batch, spec, reuse)
        if reuse is None:
            return choice.ChoosingPlan(batch, spec, super().plan_attention(batch, spec))
        reuse.batch, reuse.spec = batch, spec
        reuse.inner = super().plan_attention(batch, spec, reuse.inner)
        for other in self._others.values():
            other.update(reuse)
        return reuse

    def attention(self, q: Tensor, kv: Any, layer: int, plan: Any, spec: AttentionSpec, sinks: Any = None) -> Tensor:
        if not isinstance(plan, choice.ChoosingPlan):
            return super().attention(q, kv, layer, plan, spec, sinks)
        group, index = kv.place[layer]
        pool = kv.pools[group]
        dtype, kv_dtype = (str(one).removeprefix("torch.") for one in (q.dtype, pool.dtype))
        chosen = self._pick(choice.Shape(spec, plan.decode, pool.shape[3], dtype, kv_dtype, sinks is not None))
        if chosen is None or not len(q):
            return super().attention(q, kv, layer, plan.inner, spec, sinks)
        plan.kept = plan.kept or self._recording
        return chosen.attention(q.contiguous(), pool[index], group, plan, spec)

    def notes(self) -> list[str]:
        lines = [self.architecture.describe()]
        if self._forced is not None:
            lines.append(f"attention: {self._forced}, as --attention-backend says")
        else:
            for decode, what in ((True, "one query a sequence"), (False, "prompts and chunks")):
                row = choice.order(self.attention_table, self.architecture.name, decode)
                known = [name for name in (*self._asked(decode), choice.TRITON) if self._missing[name] is None]
                chosen = ", then ".join(known) or "the references"
                lines.append(f"attention of {what}: {chosen} (order: {row.measured or 'not yet timed'})")
        lines += [f"not usable: {name}: {why}" for name, why in self._missing.items() if why is not None]
        reason = communicator.missing(self.collectives)
        lines.append(f"collectives through {self.collectives}" if reason is None else f"no collectives: {reason}")
        return lines


def _indexable(x: Tensor) -> Tensor:
    """x, or its bytes where torch cannot index its dtype (8-bit floats)."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
