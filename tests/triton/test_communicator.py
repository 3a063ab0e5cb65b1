"""The GPU plugins' communicator over process groups of gloo, in host memory, and what it refuses by name."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire.conformance.kit import Target
from quire.conformance.kit import run as run_kit
from quire.hardware import DeviceUnavailable, UnsupportedOnDevice
from quire_triton import communicator
from quire_triton.communicator import GroupCommunicator
from tests.triton.fake_gpu import in_host_memory, install
from tests.triton.gloo_ranks import GlooRanks, gloo_group

HOST = torch.device("cpu")


def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def together(
    size: int, work: Callable[[GroupCommunicator], Any], exact: bool = False, device=HOST, timeout: float = 20
) -> list[Any]:
    """What ``work`` returned, or raised, on each of ``size`` ranks: threads, each with its own group and store."""
    where, found = address(), [None] * size

    def one(rank: int) -> None:
        try:
            made = GroupCommunicator(rank, size, where, device, "gloo", gloo_group, exact, timeout)
            found[rank] = work(made)
            made.barrier() if device == HOST else None
            made.close()
            made.close()
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def of_rank(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def test_every_method_between_processes():
    """The conformance kit's own cases, in processes, each with the device that is its own."""
    target = Target("gloo-ranks", GlooRanks, rank_arguments=["--factory", "tests.triton.gloo_ranks:GlooRanks"])
    report = run_kit(target, modules=["collectives"], quiet=True)
    assert report.exit_code == 0, report.output
    assert len(report.names("passed")) == 2 * len(communicator.METHODS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_an_exact_sum_depends_on_no_company(dtype):
    """In rank order, in float32 where that is wider: the bits of an element are the same in a buffer of any length."""
    size, width = 3, 64

    def work(c: GroupCommunicator):
        mine = (100 * of_rank(c.rank, 6, width)).to(dtype)
        whole = c.all_reduce(mine)
        parts = torch.cat([c.all_reduce(row) for row in mine.split(1)])
        return whole, parts, c.reduce_scatter(mine)

    found = together(size, work, exact=True)
    wide = dtype if dtype in (torch.float64, torch.int32) else torch.float32
    brought = [(100 * of_rank(r, 6, width)).to(dtype).to(wide) for r in range(size)]
    expected = (brought[0] + brought[1] + brought[2]).to(dtype)
    for rank, (whole, parts, share) in enumerate(found):
        assert torch.equal(whole, expected)
        assert torch.equal(parts, expected)
        assert torch.equal(share, expected[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.bfloat16, torch.int64])
def test_what_only_moves_moves_in_every_dtype_and_layout(dtype):
    size = 2

    def brought(rank: int) -> torch.Tensor:
        return of_rank(rank, 5, 4, 3).to(dtype).transpose(0, 1)  # not contiguous

    def work(c: GroupCommunicator):
        mine = brought(c.rank)
        kept = mine.clone()
        results = [c.all_gather(mine, dim) for dim in (0, 1, -1)]
        results += [c.all_to_all(mine), c.broadcast(mine, source=1), c.all_gather(mine[:0])]
        assert bits(mine) == bits(kept)
        return results

    a, b = brought(0), brought(1)
    for rank, (first, second, last, mixed, sent, empty) in enumerate(together(size, work)):
        for got, true in (
            (first, torch.cat((a, b), 0)),
            (second, torch.cat((a, b), 1)),
            (last, torch.cat((a, b), -1)),
            (mixed, torch.cat([x[2 * rank : 2 * rank + 2] for x in (a, b)])),
            (sent, b),
        ):
            assert got.shape == true.shape
            assert bits(got) == bits(true)
        assert empty.shape == (0, 5, 6)


def test_what_comes_is_nobodys_but_the_receivers():
    """all_reduce and broadcast leave their argument as it was."""

    def work(c: GroupCommunicator):
        mine = torch.full((4,), float(c.rank))
        c.all_reduce(mine)
        c.broadcast(mine, source=0)
        return mine

    assert [x.tolist() for x in together(2, work)] == [[0.0] * 4, [1.0] * 4]


# -- errors ------------------------------------------------------------------------------------------------------------
def test_ranks_that_do_not_meet_are_named():
    with pytest.raises(
        DeviceUnavailable, match=r"^gloo, rank 1 of 2: meeting the other ranks at tcp://127.0.0.1:\d+ failed: "
    ):
        GroupCommunicator(1, 2, address(), HOST, "gloo", gloo_group, timeout=1.0)


def test_two_ranks_on_one_device_are_refused():
    found = together(2, lambda c: None, device=torch.device("cuda", 0))
    for rank, error in enumerate(found):
        assert isinstance(error, UnsupportedOnDevice)
        assert f"rank {rank} and rank {1 - rank} are both on cuda:0, and gloo wants a device for each rank" in str(
            error
        )


def test_a_peer_that_is_gone_is_an_error_in_one_line():
    def work(c: GroupCommunicator):
        if c.rank == 1:
            raise SystemError("gone")
        return c.recv(torch.zeros(3), 1)

    gone, error = together(2, work, timeout=2)[::-1]
    assert isinstance(gone, SystemError)
    assert isinstance(error, RuntimeError)
    assert str(error).startswith("gloo, rank 0 of 2: recv from rank 1 failed: ")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("rank", "size", "where", "said"),
    [
        (2, 2, "tcp://127.0.0.1:1", "rank 2 is not among the 2 ranks"),
        (0, 1, "127.0.0.1:1", "is not of the form"),
        (0, 1, "tcp://127.0.0.1", "is not of the form"),
    ],
)
def test_a_bad_rank_or_address_is_named(rank, size, where, said):
    with pytest.raises(ValueError, match=said):
        GroupCommunicator(rank, size, where, HOST, "gloo", gloo_group)


def test_what_cannot_be_shared_evenly_is_refused():
    def work(c: GroupCommunicator):
        said = []
        for method in (c.reduce_scatter, c.all_to_all):
            with pytest.raises(ValueError, match="dim 0 is 3, which 2 ranks cannot share evenly") as caught:
                method(torch.zeros(3))
            said.append(caught)
        return len(said)

    assert together(2, work) == [2, 2]


# -- the plugins -------------------------------------------------------------------------------------------------------
LIBRARIES = {"cuda": "NCCL", "rocm": "RCCL", "xpu": "oneCCL"}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("built", [True, False])
def test_collectives_are_declared_where_torch_has_the_library(name, built, monkeypatch):
    install(name, monkeypatch)
    for library in ("nccl", "xccl"):
        right = built and (library == "xccl") == (name == "xpu")
        monkeypatch.setattr(torch.distributed, f"is_{library}_available", lambda right=right: right)
    backend = in_host_memory(name)
    backend.open(0)
    if built:
        assert backend.capabilities.collectives == communicator.METHODS
        assert f"collectives through {LIBRARIES[name]}" in backend.notes()
    else:
        assert backend.capabilities.collectives == frozenset()
        assert f"no collectives: this torch (2.13.0) is built without {LIBRARIES[name]}" in backend.notes()
        with pytest.raises(UnsupportedOnDevice, match=f"a communicator is not supported.*without {LIBRARIES[name]}"):
            backend.communicator(0, 1, "tcp://127.0.0.1:1")


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("invariant", [False, True])
def test_a_backend_makes_its_librarys_group_in_its_mode(name, invariant, monkeypatch):
    """The plugin's own path to the group, with gloo under the library's name; sums are exact where bits must be."""
    import quire_triton
    from quire.hardware import DeviceOptions

    monkeypatch.setattr(quire_triton, "missing", lambda *_: None)
    install(name, monkeypatch)
    kind = "XCCL" if name == "xpu" else "NCCL"
    made = []

    class Group(torch.distributed.ProcessGroupGloo):
        class Options:
            _timeout = None

        def __init__(self, store, rank, size, options):
            made.append((rank, size, options._timeout.total_seconds()))
            super().__init__(store, rank, size, options._timeout)

    monkeypatch.setattr(torch.distributed, f"is_{kind.lower()}_available", lambda: True)
    monkeypatch.setattr(torch.distributed, f"ProcessGroup{kind}", Group, raising=False)
    backend = in_host_memory(name)
    backend.open(0, DeviceOptions(batch_invariant=invariant))
    c = backend.communicator(0, 1, address())
    assert made == [(0, 1, 300.0)]
    assert (c.library, c.exact) == (LIBRARIES[name], invariant)
    x = torch.randn(4, 3)
    assert torch.equal(c.all_reduce(x), x)
    c.close()
