"""The contract, held to every device that is installed and usable here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quire import plugins
from quire.hardware import DeviceOptions, UnsupportedOnDevice

REGISTRY = plugins.load()
USABLE = [name for name in sorted(REGISTRY.backends) if REGISTRY.find(name)[1]]
RUNS = {name: ["--device", name] for name in USABLE}
# With the best instruction set by default; the others are asked for. What passes between ranks is the same for all.
RUNS |= {
    f"{name} {isa}": ["--device", name, "--isa", isa, "-k", "not collective"]
    for name in USABLE
    for isa in REGISTRY.backend(name).capabilities.isas[:-1]
}


@pytest.fixture(scope="module", params=RUNS)
def report(request, tmp_path_factory):
    """What `quire conformance --device NAME --json FILE` reports."""
    file = tmp_path_factory.mktemp("report") / "report.json"
    command = ["conformance", *RUNS[request.param], "--threads", "1", "--json", str(file)]
    result = subprocess.run(
        [sys.executable, "-m", "quire.cli.main", *command], capture_output=True, text=True, timeout=280
    )
    assert file.exists(), result.stdout + result.stderr
    return {**json.loads(file.read_text()), "exit": result.returncode, "output": result.stdout, "command": command}


def test_at_least_the_cpu_is_usable():
    assert {"cpu", "example"} <= set(USABLE)


def test_conformance(report):
    failed = [
        f"{case['area']} {case['name']}: {case['message']}" for case in report["cases"] if case["outcome"] == "failed"
    ]
    assert not failed
    assert report["exit"] == 0, report["output"]
    areas = {case["area"] for case in report["cases"] if case["outcome"] == "passed"}
    assert {"loading", "memory", "attention", "pages", "operations", "sampling", "model"} <= areas


def test_every_declared_capability_was_tested(report):
    passed = dict.fromkeys(("company", "graphs", "collectives"), 0)
    for case in report["cases"]:
        passed[case["area"]] = passed.get(case["area"], 0) + (case["outcome"] == "passed")
    declared = report["capabilities"]
    assert bool(passed["company"]) == declared["batch_invariant"]
    assert bool(passed["graphs"]) == declared["graphs"]
    assert bool(passed["collectives"]) == bool(declared["collectives"]) or "not collective" in report["command"]


def test_the_cpu_promises_invariance():
    assert REGISTRY.backend("cpu").capabilities.batch_invariant


def test_the_cpus_instruction_sets_are_asked_for_by_name():
    backend = REGISTRY.backend("cpu")
    assert "portable" in backend.capabilities.isas
    for device, isa in (("cpu", "quantum"), ("example", "avx2"), ("cpu-torch", "avx2")):
        with pytest.raises(UnsupportedOnDevice, match=f"--isa {isa}.*instead"):
            REGISTRY.backend(device).open(0, DeviceOptions(isa=isa))


def test_the_doctor_shows_the_instruction_set_in_use():
    command = [sys.executable, "-m", "quire.cli.main", "doctor", "--device", "cpu", "--isa", "portable", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (device,) = json.loads(result.stdout)["devices"]
    assert "native kernels: portable" in device["found"][0]["details"]
