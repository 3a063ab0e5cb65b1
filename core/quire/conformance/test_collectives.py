"""Collectives between processes: each declared method, on two and three ranks, in every declared dtype."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from quire.conformance.kit import Target
from quire.conformance.rank import SAME


@pytest.fixture(scope="session")
def groups():
    """What the ranks of a group of each size found: all methods are run in one group of processes."""
    return {}


@pytest.fixture(params=[2, 3], ids=lambda size: f"{size} ranks")
def ranks(request, target, groups):
    if not target.rank_arguments:
        pytest.skip("this backend is an object that another process cannot make")
    if request.param not in groups:
        groups[request.param] = gather(target, request.param)
    if isinstance(groups[request.param], str):
        pytest.skip(groups[request.param])
    return groups[request.param]


def gather(target: Target, size: int) -> list[dict] | str:
    """Run ``size`` ranks to their end and read what each printed. Why they could not meet, as text, where there are fewer
    devices than ranks and the device will not be shared."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    # Each rank has a device of its own where there are enough of them.
    devices = len(target.factory().devices())
    indices = [(target.index + rank) % devices if devices >= size else target.index for rank in range(size)]
    command = [sys.executable, "-m", "quire.conformance.rank", *target.rank_arguments, "--address", address]
    command += ["--size", str(size)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    own = [["--index", str(index), "--rank", str(rank)] for rank, index in enumerate(indices)]
    processes = [
        subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for more in own
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-1500:]
    found = [json.loads(out) for out, _ in outputs]
    refused = [rank["refused"] for rank in found if "refused" in rank]
    assert not refused or devices < size, "; ".join(refused)
    return refused[0] if refused else found


def test_collective(ranks, collective):
    errors = [rank[collective]["error"] for rank in ranks if rank[collective]["error"]]
    assert not errors, "; ".join(errors)
    if collective in SAME:
        assert len({rank[collective]["bits"] for rank in ranks}) == 1, f"{collective} gave ranks different bits"
