"""One rank of the collectives' cases: a process of its own that prints what it found as one line of JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quire.conformance.world import close
from quire.hardware import Backend, Communicator, UnsupportedOnDevice
from quire.reference import torch_dtype

SHAPE = (12, 5)


def of_rank(rank: int, dtype: str) -> Tensor:
    """What a rank brings."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + rank)).to(torch_dtype(dtype))


def cases(c: Communicator, mine: Tensor, all_of: list[Tensor], dtype: str) -> dict[str, Callable[[], Tensor]]:
    """Each method's check; it returns a tensor, of which those named in SAME must be the same bits on every rank."""
    device, rank, size = mine.device, c.rank, c.size
    total = torch.stack([x.double() for x in all_of]).sum(0)
    share = SHAPE[0] // size

    def expect(given: Tensor, true: Tensor, what: str) -> Tensor:
        assert given.device.type == device.type, f"{what} gave a tensor on {given.device}"
        assert given.dtype == mine.dtype, f"{what} gave {given.dtype}"
        close(given, true, dtype, factor=2, what=what)
        return given

    def moves(given: Tensor, true: Tensor, what: str) -> Tensor:
        assert torch.equal(given.cpu(), true), f"{what} changed what it moved, or moved something else"
        return given

    def send() -> Tensor:
        """Around the ring, the even ranks sending first."""
        to, source = (rank + 1) % size, (rank - 1) % size
        if rank % 2 == 0:
            c.send(mine, to)
            got = c.recv(torch.empty_like(mine), source)
        else:
            got = c.recv(torch.empty_like(mine), source)
            c.send(mine, to)
        return moves(got, all_of[source], "send and recv")

    def barrier() -> Tensor:
        for _ in range(3):
            c.barrier()
        return mine

    return {
        "all_reduce": lambda: expect(c.all_reduce(mine), total, "all_reduce"),
        "all_gather": lambda: torch.cat(
            [
                moves(c.all_gather(mine), torch.cat(all_of, -1), "all_gather over the last dim").reshape(-1),
                moves(c.all_gather(mine, dim=0), torch.cat(all_of, 0), "all_gather over dim 0").reshape(-1),
            ]
        ),
        "reduce_scatter": lambda: expect(c.reduce_scatter(mine), total[rank * share :][:share], "reduce_scatter"),
        "all_to_all": lambda: moves(
            c.all_to_all(mine), torch.cat([x[rank * share :][:share] for x in all_of]), "all_to_all"
        ),
        "broadcast": lambda: moves(c.broadcast(mine, source=size - 1), all_of[-1], "broadcast"),
        "send": send,
        "recv": send,
        "barrier": barrier,
    }


SAME = ("all_reduce", "all_gather", "broadcast")


def run(backend: Backend, rank: int, size: int, address: str) -> dict[str, Any]:
    """{method: {"error": why it failed or "", "bits": digest of the result}}, for each declared method in turn;
    {"refused": why} where the device would not make a communicator."""
    try:
        communicator = backend.communicator(rank, size, address)
    except UnsupportedOnDevice as reason:  # two ranks on one device, say: test_collectives.py judges
        return {"refused": str(reason)}
    found: dict[str, Any] = {}
    for name in sorted(backend.capabilities.collectives):
        error, digest = "", hashlib.sha256()
        for dtype in sorted(backend.capabilities.dtypes):
            everyone = [of_rank(r, dtype) for r in range(size)]
            try:
                out = cases(communicator, everyone[rank].clone().to(backend.device), everyone, dtype)[name]()
                digest.update(out.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            except Exception as failure:  # reported to the parent, which makes it the case's failure
                error = f"rank {rank} of {size}, {dtype}: {type(failure).__name__}: {failure}"
        found[name] = {"error": error, "bits": digest.hexdigest()}
    communicator.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", help="a registered device")
    parser.add_argument("--plugins", help="load only these")
    parser.add_argument("--factory", help="module:name of a callable that makes the backend, instead of --device")
    parser.add_argument("--index", type=int, default=0)
    for name in ("rank", "size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", required=True)
    args = parser.parse_args()
    if args.factory:
        module, _, name = args.factory.partition(":")
        backend = getattr(import_module(module), name)()
    else:
        from quire import plugins

        backend = plugins.load(args.plugins.split(",") if args.plugins else None).backend(args.device)
    backend.open(args.index)
    json.dump(run(backend, args.rank, args.size, args.address), sys.stdout)


if __name__ == "__main__":
    main()
