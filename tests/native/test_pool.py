"""The thread pool: callers side by side, processes that fork, threads that come and go."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from quire_cpu import native


def test_callers_on_several_threads():
    w = native.pack_linear(torch.randn(300, 64))
    xs = [torch.randn(9, 64) for _ in range(4)]
    expected = [native.linear(x, w) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(native.linear(xs[i], w), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def _child(x, w, expected, queue):
    queue.put(torch.equal(native.linear(x, native.pack_linear(w)), expected))


def test_a_forked_process_has_its_own_threads():
    x, w = torch.randn(9, 64), torch.randn(300, 64)
    expected = native.linear(x, native.pack_linear(w))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(x, w, expected, queue))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert queue.get() is True


def _states(threads: set[str]) -> set[str]:
    return {Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] for thread in threads}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads' states are read from /proc")
def test_idle_threads_sleep():
    native.set_threads(1)
    before = set(os.listdir("/proc/self/task"))
    native.set_threads(4, pin=False, spin_us=50)
    x, w = torch.randn(40, 64), native.pack_linear(torch.randn(300, 64))
    native.linear(x, w)
    ours = set(os.listdir("/proc/self/task")) - before
    assert len(ours) >= 3
    deadline = time.monotonic() + 30
    while _states(ours) != {"S"}:
        assert time.monotonic() < deadline, "threads without work are still running"
        time.sleep(0.01)
    native.linear(x, w)  # and they wake


def test_torch_has_no_threads_beside_ours():
    from quire.hardware import DeviceOptions
    from quire_cpu.native_backend import NativeCpuBackend

    before = torch.get_num_threads()
    try:
        NativeCpuBackend().open(0, DeviceOptions(threads=3))
        assert (native.threads(), torch.get_num_threads()) == (3, 1)
    finally:
        torch.set_num_threads(before)


def test_threads_can_be_changed_between_calls():
    x, w = torch.randn(40, 64), native.pack_linear(torch.randn(300, 64))
    expected = native.linear(x, w)
    for count in (1, 4, 2, 7, 1):
        native.set_threads(count, pin=False, spin_us=0)
        assert native.threads() == count
        for _ in range(20):
            assert torch.equal(native.linear(x, w), expected)
