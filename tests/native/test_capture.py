"""Recorded steps: what is replayed, what is refused, and whose memory results live in. The conformance kit has the rest."""

from __future__ import annotations

import subprocess
import sys

import torch

from quire_cpu import native
from quire_cpu.native_capture import capture


def test_replay_reads_its_inputs_anew():
    w1, w2 = (native.pack_linear(torch.randn(64, 64)) for _ in range(2))
    norm, x = torch.ones(64), torch.randn(3, 64)

    def step():
        h = native.linear(x, w1)
        for _ in range(5):
            y, h = (
                native.rms_norm(native.gated_linear(h, w2, activation="silu").repeat_interleave(1), norm[:32], 1e-6)[0],
                h,
            )
        return y

    assert capture(step, native.Arena()) is None  # repeat_interleave is torch's

    def recordable():
        h = native.linear(x, w1)
        for _ in range(5):
            h, _ = native.rms_norm(h, norm, 1e-6, residual=native.linear(h, w2).view(3, 64))
        return h

    recorded = capture(recordable, native.Arena())
    assert len(recorded.tape) == 11
    for _ in range(3):
        x.copy_(torch.randn(3, 64))
        assert torch.equal(recorded.replay(), recordable())


def test_memory_is_used_again_but_never_while_it_is_needed():
    w, x, arena = native.pack_linear(torch.randn(2048, 2048) / 45), torch.randn(2, 2048), native.Arena()

    def step():
        first = native.linear(x, w)
        h = first[:, :]  # keeps the memory of ``first`` when its name is gone
        del first
        for _ in range(20):
            h = native.linear(h, w, residual=h)
        return h

    recorded = [capture(step, arena) for _ in range(4)]
    assert sum(len(pieces) for pieces in arena.free.values()) <= 3
    for one in recorded:
        x.copy_(torch.randn(2, 2048))
        assert torch.equal(one.replay(), step())


def test_other_threads_are_not_recorded():
    import threading

    w, x = native.pack_linear(torch.randn(32, 32)), torch.randn(1, 32)

    def step():
        other = threading.Thread(target=lambda: native.linear(x, w))
        other.start()
        other.join()
        return native.linear(x, w)

    assert len(capture(step, native.Arena()).tape) == 1


def test_recording_does_not_import_torchs_compiler():
    """It takes a second, which the first request would wait for."""
    code = (
        "import sys, torch; from quire_cpu import native; from quire_cpu.native_capture import capture\n"
        "w, x = native.pack_linear(torch.randn(32, 32)), torch.randn(1, 32)\n"
        "assert capture(lambda: native.linear(x, w).view(32), native.Arena()) is not None\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
