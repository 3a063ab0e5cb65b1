"""docs/how-known.md: it is current, and says of a report, a kernel and a class what is so."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from tests.triton.conftest import ROOT, needs_triton

pytestmark = needs_triton
sys.path.insert(0, str(ROOT / "docs"))

import how_known  # noqa: E402

sys.path.remove(str(ROOT / "docs"))  # demo/ has a generate.py, too


@pytest.fixture(scope="module")
def known():
    return how_known.Known(how_known.read())


def test_the_page_is_current():
    done = subprocess.run([sys.executable, "docs/how_known.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("operation", "kernels"),
    [
        ("attention", {"attention_kernel", "attention_merge_kernel"}),
        ("write_kv", {"write_kv_kernel"}),
        ("copy_pages", {"copy_pages_kernel"}),
        ("rms_norm", {"rms_norm_kernel"}),
        ("rotary", {"rotary_kernel"}),
        ("linear", {"linear_kernel"}),
        ("devices", set()),
    ],
)
def test_the_kernels_of_an_operation_are_found_in_its_code(operation, kernels):
    from quire_cuda.backend import CudaBackend

    found = how_known.kernels_of(CudaBackend, operation)
    assert kernels <= found
    assert kernels or not found


def test_what_a_class_hands_on_is_a_way_of_its_too():
    from quire.hardware import Backend
    from quire_triton.backend import TritonOps

    class Chooses(TritonOps):
        def rotary(self, q, k, positions, cos_sin, interleaved=False):
            return super().rotary(q, k, positions, cos_sin, interleaved)

        def gated_act(self, x, activation):
            return x

        def embed(self, ids, table):
            return super().embed(ids, table)

        def layer_norm(self, x, weight, bias, spec, residual=None):
            return self.through(x, weight, bias, spec, residual)

        def through(self, *arguments):
            from quire_triton.kernels.rms_norm import rms_norm

            return rms_norm(*arguments)

    Chooses.through.__module__ = "quire_triton.test"
    assert how_known.definitions(Chooses, "rotary") == [Chooses.rotary, TritonOps.rotary]
    assert how_known.kernels_of(Chooses, "rotary") == {"rotary_kernel"}
    assert how_known.definitions(Chooses, "gated_act") == [Chooses.gated_act]
    assert not how_known.kernels_of(Chooses, "gated_act")
    assert how_known.definitions(Chooses, "embed") == [Chooses.embed]  # the reference is no way of its own
    assert how_known.definitions(Backend, "rotary") == []
    assert how_known.kernels_of(Chooses, "layer_norm") == {"rms_norm_kernel"}


def test_every_kernel_that_is_compiled_belongs_to_an_operation_of_a_plugin(known):
    """So that a new kernel's line does not fall between the tables."""
    found = {
        kernel
        for device in ("cuda", "rocm", "xpu")
        for operation in known.operations
        for kernel in how_known.kernels_of(type(known.backends[device]), operation)
    }
    assert set(known.compiled) <= found


def test_who_computes_an_operation(known):
    assert known.operation("example", "rms_norm").startswith("own: run ")
    assert known.operation("example", "linear").startswith("reference: run ")
    assert "compiled for sm_80, sm_90, sm_100" in known.operation("cuda", "attention")
    assert "gfx942" in known.operation("rocm", "attention")
    assert "sm_" not in known.operation("rocm", "attention")
    assert "compiled" not in known.operation("xpu", "attention")
    assert "interpreted" in known.operation("xpu", "attention")
    assert "compiled" not in known.operation("cpu", "attention")
    assert known.function("example", "graphs.replay_equals_eager") == "not declared"
    assert known.value("example", "page_size", "64") == "not declared"
    assert known.value("example", "head_size", "8") == "not declared"


def test_a_function_that_no_report_knows_is_not_yet_known(known):
    for device in known.backends:
        assert known.function(device, "attention.something_new") == "**not yet**"


def case(name: str, outcome: str, operations: list[str], reference: list[str] | None = None, **more) -> dict:
    area, _, name = name.partition(".")
    return {
        "area": area, "name": name, "outcome": outcome, "operations": operations, "by_reference": reference or [],
        "capability": more.pop("capability", None), "parameters": more,
    }  # fmt: skip


CASES = [
    case("attention.window[1]", "passed", ["attention"], kv_dtype="float16", other=3),
    case("attention.window[2]", "failed", ["attention"], kv_dtype="bfloat16"),
    case("operations.rotary[1]", "passed", ["rotary"]),
    case("operations.rotary[2]", "passed", ["rotary", "linear"], ["linear"]),  # handed on
    case("operations.embed", "passed", ["embed"], ["embed"]),
    case("graphs.replay[1]", "skipped", [], capability="graphs"),
]


def test_a_report_of_a_card_is_what_counts(tmp_path):
    report = {
        "device": "cuda", "hardware": {"index": 0, "name": "H100", "details": "9.0"}, "date": "2026-11-25T10:00:00+00:00",
        "commit": "0123456789abcdef", "torch": "2.11.0", "complete": False, "cases": CASES,
    }  # fmt: skip
    (tmp_path / "gpu-h100-kit.json").write_text(json.dumps(report))
    how_known.write(how_known.condensed({**report, "device": "cpu"}), tmp_path / "kit-cpu.json")
    cuda, cpu = how_known.read(tmp_path)
    assert dataclasses.replace(cuda, device="cpu") == cpu  # written condensed or whole, read the same
    assert cuda.title() == "`cuda`: H100 (9.0), torch 2.11.0, 2026-11-25, commit 0123456789ab, not all of the kit"
    known = how_known.Known([cuda])
    assert known.operation("cuda", "rotary").startswith("own: run 2 [1], compiled for")
    assert known.operation("cuda", "linear").startswith("own: compiled for")
    assert known.operation("cuda", "embed") == "reference: run 1 [1]"
    assert known.operation("cuda", "attention").startswith("own: **fails 1 of 2** [1]")
    assert known.function("cuda", "attention.window") == "**fails 1 of 2** [1]"
    assert known.value("cuda", "kv_dtype", "float16") == "run 1 [1]"
    assert known.value("cuda", "kv_dtype", "bfloat16") == "**fails 1 of 1** [1]"
    assert known.operation("rocm", "rotary").startswith("own: compiled for gfx942")
    assert "**not yet**" in known.operation("xpu", "rotary")
    assert "run 1 [1]" in how_known.page([cuda])
