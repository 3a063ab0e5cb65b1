"""The GPU plugins on machines that lack something: each says what is wrong in one line, and nothing ends in a trace."""

from __future__ import annotations

import builtins
import logging
import subprocess
import sys
import types

import pytest
import torch

import quire_triton
from quire.hardware import DeviceOptions, DeviceUnavailable, UnsupportedOnDevice
from tests.triton.conftest import needs_triton
from tests.triton.fake_gpu import BUILD, GIB, MODULE, Gpu, install, made

PLUGINS = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU"}


@pytest.fixture(params=PLUGINS)
def name(request):
    return request.param


@pytest.fixture
def gpu(name, monkeypatch):
    return install(name, monkeypatch)


def line(call) -> str:
    with pytest.raises(DeviceUnavailable) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- no device to use --------------------------------------------------------------------------------------------------
def test_a_torch_built_for_nothing(name, monkeypatch):
    for build in BUILD.values():
        monkeypatch.setattr(torch.version, build, None, raising=False)
    backend = made(name)
    for call in (backend.devices, backend.memory, backend.open):
        assert f"built without {PLUGINS[name]}: install" in line(call)


def test_a_torch_built_for_something_else(name, monkeypatch):
    """It says for what: a ROCm build is not mistaken for a CUDA one, though both are torch.cuda."""
    other = "rocm" if name != "rocm" else "cuda"
    install(other, monkeypatch)
    assert f"built without {PLUGINS[name]}, for {PLUGINS[other]}: install" in line(made(name).devices)


def test_an_old_torch(name, monkeypatch):
    install(name, monkeypatch, version="2.7.1+cu126")
    least = "2.8" if name == "xpu" else "2.11"
    assert f"torch 2.7.1+cu126 is installed; the {name} device needs {least} or later" in line(made(name).open)


def test_the_driver_is_too_old(name, gpu):
    gpu.available = False
    gpu.failure = RuntimeError(
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver\nand so on"
    )
    said = line(made(name).devices)
    assert "finds no usable GPU (The NVIDIA driver on your system is too old (found version 11040)): check" in said
    assert {"cuda": "`nvidia-smi`", "rocm": "`rocminfo`", "xpu": "`xpu-smi discovery`"}[name] in said


def test_no_device(name, gpu):
    gpu.available = False
    assert "finds no usable GPU: check" in line(made(name).open)


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error: unspecified launch failure\nmore"), OSError("libze.so")])
def test_a_device_that_fails_when_it_is_touched(name, gpu, failure):
    gpu.failure = failure
    said = line(made(name).open)
    assert f"opening device 0 on {name} failed: {str(failure).partition(chr(10))[0]}" in said


def test_an_index_that_is_not_there(name, gpu):
    with pytest.raises(DeviceUnavailable, match=r"no \w+ device 2: this machine has 2 \(0 to 1\)"):
        made(name).open(2)


CODE = {
    "the same": ((9, 0), ["sm_90"], True),
    "an earlier minor of the same major": ((8, 9), ["sm_80"], True),
    "PTX of an earlier one": ((12, 0), ["sm_80", "compute_90"], True),
    "a later minor": ((8, 0), ["sm_86"], False),
    "another major": ((10, 0), ["sm_80", "sm_90"], False),
    "code for a variant that this is not": ((12, 1), ["sm_120a"], False),
    "code for this very variant": ((9, 0), ["sm_90a"], True),
    "nothing": ((9, 0), [], False),
}


@pytest.mark.parametrize("case", CODE)
def test_cuda_code_that_this_torch_has_not(case, monkeypatch):
    (major, minor), binaries, runs = CODE[case]
    gpu = install("cuda", monkeypatch, Gpu(major=major, minor=minor))
    gpu.arch_list = binaries
    if runs:
        made("cuda").open(0)
    else:
        said = line(made("cuda").open)
        assert (
            f"holds no code for GPU 0 (compute capability {major}.{minor}; it has {', '.join(binaries) or 'none'})"
            in said
        )


def test_a_gpu_that_the_kernels_are_too_new_for(monkeypatch):
    install("cuda", monkeypatch, Gpu(major=7, minor=5))
    assert "compute capability 7.5, the kernels need 8.0 or later" in line(made("cuda").open)


def test_rocm_code_that_this_torch_has_not(monkeypatch):
    install("rocm", monkeypatch, Gpu(gcnArchName="gfx1036:xnack-"))
    assert "holds no code for GPU 0 (gfx1036; it has sm_80" in line(made("rocm").open)


# -- what is there -----------------------------------------------------------------------------------------------------
def test_what_is_found(name, gpu):
    backend = made(name)
    assert [d.name for d in backend.devices()] == ["GPU 0", "GPU 1"]
    expected = {"cuda": "capability 9.0, 7 multi", "rocm": "gfx942, 7 compute", "xpu": "7 compute units"}[name]
    assert expected in backend.devices()[0].details
    gpu.take(2 * GIB, GIB)
    assert (backend.memory(1).free, backend.memory(1).total) == (77 * GIB, 80 * GIB)


def test_opening(name, gpu):
    backend = made(name)
    backend.open(1)
    assert "device 1" in gpu.log
    assert str(backend.device) == f"{MODULE[name]}:1"
    assert not backend.capabilities.batch_invariant


def test_batch_invariance_needs_the_kernels(name, gpu, monkeypatch):
    monkeypatch.setattr(quire_triton, "missing", lambda *_: "Triton cannot be imported")
    with pytest.raises(UnsupportedOnDevice, match="by the size of the batch, and Triton cannot be imported"):
        made(name).open(0, DeviceOptions(batch_invariant=True))
    monkeypatch.setattr(quire_triton, "missing", lambda *_: None)
    backend = made(name)
    backend.open(0, DeviceOptions(batch_invariant=True))
    assert backend.capabilities.batch_invariant


@pytest.mark.parametrize("problem", ["absent", "3.5.1", "4.0.0"])
def test_without_a_usable_triton(name, gpu, problem, monkeypatch, caplog):
    """The references compute, nothing is recorded, and the log says why, once."""
    real = builtins.__import__

    def imported(module, *rest, **more):
        if module != "triton":
            return real(module, *rest, **more)
        if problem == "absent":
            raise ImportError("No module named 'triton'")
        return types.SimpleNamespace(__version__=problem)

    backend = made(name)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(builtins, "__import__", imported)
        backend.open(0)
    assert len(caplog.records) == 1
    assert problem.replace("absent", "cannot be imported") in caplog.text
    assert "reference operations" in caplog.text
    assert not backend.capabilities.graphs
    assert backend.capture(lambda: None, []) is None
    assert any(note.startswith("not usable: TRITON_ATTN: Triton ") for note in backend.notes())
    # Operations still work, on tensors of the host here.
    x = torch.randn(3, 8)
    from quire.reference import ops

    assert torch.equal(backend.gated_act(x, "silu"), ops.gated_act(x, "silu"))


@needs_triton
def test_a_triton_that_compiles_for_others(name, gpu, monkeypatch, caplog):
    """The wheel that everybody has knows nothing of Intel's GPUs: that is said when the device is opened, and no kernel's
    first launch ends in a trace."""
    import triton.backends

    maker = {"cuda": "nvidia", "rocm": "amd", "xpu": "intel"}[name]
    others = {"nvidia": 1, "amd": 1, "intel": 1}
    monkeypatch.setattr(triton.backends, "backends", dict(others))
    assert quire_triton.missing(maker) is None
    del others[maker]
    monkeypatch.setattr(triton.backends, "backends", others)
    backend = made(name)
    with caplog.at_level(logging.WARNING):
        backend.open(0)
    [record] = caplog.records
    assert f"compiles for {' and '.join(sorted(others))}, not for {maker}: install the one" in record.getMessage()
    assert not backend.capabilities.graphs
    monkeypatch.setattr(triton.backends, "backends", {})
    assert "compiles for no GPU, not for" in quire_triton.missing(maker)


# -- what a user sees --------------------------------------------------------------------------------------------------
def registry(name):
    from quire.plugins import Plugin, Registry

    plugin = Plugin(name, f"quire-plugin-{name}", "1.0")
    plugin.registered["backends"].append(name)
    return Registry(plugins=[plugin], backends={name: lambda: made(name)})


def test_the_doctor_says_it_in_one_line(name, gpu, monkeypatch):
    from quire.cli.doctor import examine

    gpu.available = False
    report = examine(registry(name), name)
    assert not report["usable"]
    assert "finds no usable GPU" in report["problem"]
    gpu.available, gpu.arch_list = True, ["sm_75", "gfx803"]
    if name != "xpu":
        problem = examine(registry(name), name)["problem"]
        assert problem.startswith("torch 2.13.0 (")
        assert "\n" not in problem
    gpu.arch_list = ["sm_90", "gfx942"]
    gpu.failure = RuntimeError("the bus is gone\nTraceback")
    assert examine(registry(name), name)["problem"].endswith(f"on {name} failed: the bus is gone")


def test_the_engine_refuses_by_name(name, gpu, tmp_path):
    """From --device to the error, through the engine's own path."""
    from quire.config import make_config
    from quire.engine.build import _open

    gpu.available = False
    with pytest.raises(DeviceUnavailable, match="finds no usable GPU"):
        _open(made(name), make_config("x", device=name))
    gpu.available = True
    with pytest.raises(
        UnsupportedOnDevice, match=f"--attention-backend nonsense is not supported on device '{name}': it offers"
    ):
        _open(made(name), make_config("x", device=name, attention_backend="nonsense"))


def test_importing_the_library_loads_nothing():
    from tests.triton.conftest import ROOT, environment

    code = "import sys, quire_triton; assert not {'torch', 'triton'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment(interpret=False))
    assert quire_triton.MINIMUM == (3, 6)
