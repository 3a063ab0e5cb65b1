"""Collectives through the library that torch was built with: NCCL, RCCL (under NCCL's name) or oneCCL (xccl).

A group is private, as the reference's is: no process-wide default group is made. Every method queues its work in the
order of the calling stream and does not wait for the device, so a captured step may hold it.

What ``all_reduce`` promises, the same bits on each rank, is the library's promise: NCCL's documentation of
ncclAllReduce says that it "leaves identical copies of the result in each recvbuff", and RCCL is held to NCCL's
interface. oneCCL's documentation gives the sum on each rank and does not speak of bits; the conformance kit compares
them. What no library promises is that an element's sum is added up in the same order in a buffer of another length (the algorithm
depends on the size), so where bits must not depend on the batch (``exact``) the parts are gathered and added here, in
rank order and in float32, as the reference does: ``size`` times the bytes, and bits that depend on nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed
from torch import Tensor

from quire.hardware import Communicator, DeviceUnavailable, UnsupportedOnDevice

METHODS = frozenset(
    {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "barrier"}
)

MakeGroup = Callable[[Any, int, int, timedelta], Any]
"""(store, rank, size, timeout) -> a process group of torch's."""


def nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """NCCL, or RCCL in a HIP build."""
    return _group(torch.distributed.ProcessGroupNCCL, store, rank, size, timeout)


def xccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """oneCCL."""
    return _group(torch.distributed.ProcessGroupXCCL, store, rank, size, timeout)


def _group(kind: Any, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = kind.Options()
    options._timeout = timeout
    return kind(store, rank, size, options)


LIBRARIES: dict[str, tuple[str, MakeGroup]] = {
    "NCCL": ("is_nccl_available", nccl_group),
    "RCCL": ("is_nccl_available", nccl_group),
    "oneCCL": ("is_xccl_available", xccl_group),
}


def missing(library: str) -> str | None:
    """Why this torch cannot use the library, in one line; None where it can."""
    if not torch.distributed.is_available():
        return f"this torch ({torch.__version__}) is built without torch.distributed"
    if not getattr(torch.distributed, LIBRARIES[library][0], lambda: False)():
        return f"this torch ({torch.__version__}) is built without {library}"
    return None


class GroupCommunicator(Communicator):
    """One rank's place in a group of torch's."""

    def __init__(
        self, rank: int, size: int, address: str, device: torch.device, library: str, make_group: MakeGroup,
        exact: bool = False, timeout: float = 300.0,
    ) -> None:  # fmt: skip
        """Join the ``size`` ranks that meet at ``address`` (tcp://host:port; rank 0 listens); blocks until all are there,
        for ``timeout`` seconds at most, which also bounds every collective.

        Raises ValueError for a bad rank or address, DeviceUnavailable when the ranks do not meet,
        UnsupportedOnDevice when two of them are on the same device.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not among the {size} ranks 0..{size - 1}")
        parts = urlsplit(address)
        if parts.scheme != "tcp" or not parts.hostname or not parts.port:
            raise ValueError(f"address '{address}' is not of the form tcp://host:port")
        self.rank, self.size, self.device, self.library, self.exact = rank, size, device, library, exact
        wait = timedelta(seconds=timeout)
        with self._named(f"meeting the other ranks at {address}", DeviceUnavailable):
            self._store: Any = torch.distributed.TCPStore(
                parts.hostname, parts.port, size, is_master=rank == 0, timeout=wait
            )
            self._apart()
            self._group: Any = make_group(self._store, rank, size, wait)

    def _apart(self) -> None:
        """Every rank must have a device of its own: the libraries hang or fail where two share one."""
        if self.device.type == "cpu":
            return
        mine = f"{_machine()}/{self.device}"
        self._store.set(f"device/{self.rank}", mine)
        devices = [self._store.get(f"device/{other}").decode() for other in range(self.size)]
        same = [other for other, device in enumerate(devices) if device == mine and other != self.rank]
        if same:
            raise UnsupportedOnDevice(
                self.device.type, "a communicator", f"rank {self.rank} and rank {same[0]} are both on {self.device}, and "
                f"{self.library} wants a device for each rank", [f"{self.size} devices", "fewer ranks"],
            )  # fmt: skip

    @contextlib.contextmanager
    def _named(self, what: str, kind: type[Exception] = RuntimeError) -> Iterator[None]:
        """A library's error said in one line, with who and what."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError, DistStoreError and DistNetworkError are
            first = str(error).strip().partition("\n")[0]
            raise kind(f"{self.library}, rank {self.rank} of {self.size}: {what} failed: {first}") from error

    def _do(self, what: str, work: Callable[[], Any]) -> None:
        """Queue a collective, and let the calling stream (not the host, on a GPU) wait for it."""
        with self._named(what):
            work().wait()

    # -- sums ------------------------------------------------------------------------------------------------------
    def all_reduce(self, x: Tensor) -> Tensor:
        if self.exact:
            return self._sum(self._gather(x, "all_reduce"), x)
        out = x.clone(memory_format=torch.contiguous_format)
        self._do("all_reduce", lambda: self._group.allreduce([out]))
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self._even(x)
        if self.exact:
            # Everybody's part of this rank's share is what an all-to-all brings.
            return self._sum(self.all_to_all(x).view(self.size, -1), x[: x.shape[0] // self.size])
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        self._do("reduce_scatter", lambda: self._group._reduce_scatter_base(out, x.contiguous()))
        return out

    def _sum(self, parts: Tensor, like: Tensor) -> Tensor:
        """parts [size, n] added in rank order in float32 (integers and float64 in their own), in the shape of ``like``."""
        wide = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
        total = parts[0].to(wide, copy=True)
        for part in parts[1:]:
            total += part
        return total.to(like.dtype).view(like.shape)

    # -- what only moves: as bytes, so that every dtype does -------------------------------------------------------
    def _gather(self, x: Tensor, what: str) -> Tensor:
        """Every rank's x, flat: [size, numel] in x's dtype."""
        out = x.new_empty((self.size, x.numel()))
        if not x.numel():
            return out
        self._do(what, lambda: self._group._allgather_base(_bytes(out), _bytes(x)))
        return out

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        parts = self._gather(x, "all_gather").view(self.size, *x.shape)
        return parts.flatten(0, 1) if dim in (0, -x.dim()) else torch.cat(parts.unbind(0), dim=dim)

    def all_to_all(self, x: Tensor) -> Tensor:
        self._even(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._do("all_to_all", lambda: self._group.alltoall_base(_bytes(out), _bytes(x), [], []))
        return out

    def _even(self, x: Tensor) -> None:
        if x.shape[0] % self.size:
            raise ValueError(f"dim 0 is {x.shape[0]}, which {self.size} ranks cannot share evenly")

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        options = torch.distributed.BroadcastOptions()
        options.rootRank = source
        self._do("broadcast", lambda: self._group.broadcast([_bytes(out)], options))
        return out

    def send(self, x: Tensor, to: int) -> None:
        self._do(f"send to rank {to}", lambda: self._group.send([_bytes(x)], to, 0))

    def recv(self, like: Tensor, source: int) -> Tensor:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._do(f"recv from rank {source}", lambda: self._group.recv([_bytes(out)], source, 0))
        return out

    def barrier(self) -> None:
        """Returns on the host when every rank has called it: a sum of one number, waited for."""
        one = torch.ones(1, device=self.device)
        self._do("barrier", lambda: self._group.allreduce([one]))
        one.item()

    def close(self) -> None:
        """Leave the group; idempotent. Do not call anything after it."""
        group, self._group, self._store = self._group, None, None
        if group is not None and hasattr(group, "shutdown"):
            with contextlib.suppress(RuntimeError):  # a peer that is gone already is no concern of one that leaves
                group.shutdown()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _machine() -> str:
    """What tells this machine from others in the group: ranks of other machines have devices of the same numbers."""
    import socket
    import uuid

    return f"{socket.gethostname()}/{uuid.getnode()}"
