"""The GPU plugins on a machine without their GPU, and without Triton: one line that says what is wrong."""

from __future__ import annotations

import builtins
import importlib
import logging
import types

import pytest
import torch

import quire_triton
from quire.hardware import DeviceOptions, DeviceUnavailable, UnsupportedOnDevice

PLUGINS = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU"}


def made(name: str):
    """The backend that the plugin registers, made by its own hook."""
    found = {}
    importlib.import_module(f"quire_{name}").quire_register_backends(found.__setitem__)
    assert list(found) == [name]
    return found[name]()


def line(call) -> str:
    with pytest.raises(DeviceUnavailable) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_torch_built_for_something_else(name, monkeypatch):
    for kind in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, kind, None, raising=False)
    backend = made(name)
    for call in (backend.devices, backend.memory, backend.open):
        assert f"built without {PLUGINS[name]}" in line(call)


@pytest.mark.parametrize("name", PLUGINS)
def test_no_device(name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip" if name == "rocm" else name, "99.9", raising=False)
    monkeypatch.setattr(getattr(torch, "xpu" if name == "xpu" else "cuda"), "is_available", lambda: False)
    assert "finds no usable GPU" in line(made(name).open)


class Gpu:
    """As much of torch.cuda and torch.xpu as the host code calls; it computes nothing."""

    def __init__(self) -> None:
        self.chosen = None

    def is_available(self):
        return True

    def device_count(self):
        return 2

    def get_device_properties(self, index):
        return types.SimpleNamespace(
            name=f"GPU {index}", major=9, minor=0, multi_processor_count=7, max_compute_units=7,
            gcnArchName="gfx942:sramecc+",
        )  # fmt: skip

    def mem_get_info(self, index):
        return 3 << 30, 4 << 30

    def set_device(self, index):
        self.chosen = index


@pytest.fixture(params=PLUGINS)
def backend(request, monkeypatch):
    name = request.param
    monkeypatch.setattr(torch.version, "hip" if name == "rocm" else name, "99.9", raising=False)
    monkeypatch.setattr(torch, "xpu" if name == "xpu" else "cuda", Gpu())
    return made(name)


def test_what_is_found(backend):
    assert [d.name for d in backend.devices()] == ["GPU 0", "GPU 1"]
    assert {"cuda": "capability 9.0", "rocm": "gfx942, 7", "xpu": "7 compute"}[backend.name] in backend.devices()[
        0
    ].details
    assert (backend.memory(1).free, backend.memory(1).total) == (3 << 30, 4 << 30)


def test_opening(backend):
    backend.open(1)
    assert backend.module.chosen == 1
    assert str(backend.device) == ("xpu:1" if backend.name == "xpu" else "cuda:1")
    with pytest.raises(DeviceUnavailable, match=r"no \w+ device 2: this machine has 2 \(0 to 1\)"):
        backend.open(2)
    assert not backend.capabilities.batch_invariant


def test_batch_invariance_needs_the_kernels(backend, monkeypatch):
    monkeypatch.setattr(quire_triton, "missing", lambda: "Triton cannot be imported")
    with pytest.raises(UnsupportedOnDevice, match="by the size of the batch, and Triton cannot be imported"):
        backend.open(0, DeviceOptions(batch_invariant=True))
    monkeypatch.setattr(quire_triton, "missing", lambda: None)
    backend.open(0, DeviceOptions(batch_invariant=True))
    assert backend.capabilities.batch_invariant


@pytest.mark.parametrize("problem", ["absent", "3.5.1", "4.0.0"])
def test_without_a_usable_triton(backend, problem, monkeypatch, caplog):
    """The references compute, nothing is recorded, and the log says why, once."""
    real = builtins.__import__

    def imported(name, *rest, **more):
        if name != "triton":
            return real(name, *rest, **more)
        if problem == "absent":
            raise ImportError("No module named 'triton'")
        return types.SimpleNamespace(__version__=problem)

    monkeypatch.setattr(builtins, "__import__", imported)
    with caplog.at_level(logging.WARNING):
        backend.open(0)
    assert len(caplog.records) == 1
    assert problem.replace("absent", "cannot be imported") in caplog.text
    assert "reference operations" in caplog.text
    assert not backend.capabilities.graphs
    assert backend.capture(lambda: None, []) is None
    # Operations still work, on tensors of the host here.
    x = torch.randn(3, 8)
    from quire.reference import ops

    assert torch.equal(backend.gated_act(x, "silu"), ops.gated_act(x, "silu"))


def test_importing_the_library_loads_nothing():
    import subprocess
    import sys

    from tests.triton.conftest import ROOT, environment

    code = "import sys, quire_triton; assert not {'torch', 'triton'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment(interpret=False))
    assert quire_triton.MINIMUM == (3, 6)
