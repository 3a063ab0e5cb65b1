"""The conformance kit itself: it passes what is right, and catches what is wrong, by name."""

from __future__ import annotations

import json

import pytest

from quire.conformance.kit import Report, Target, run
from quire.conformance.matrix import matrix
from tests.device.broken import CAUGHT_BY, Host, RankDependent


def target(factory, name: str = "under test") -> Target:
    return Target(
        name,
        factory,
        distribution="none",
        version="0",
        rank_arguments=["--factory", f"{factory.__module__}:{factory.__name__}"],
    )


@pytest.fixture(scope="module")
def sound() -> Report:
    """The kit on the backend from which the broken ones are made (what takes long is run on real devices)."""
    return run(target(Host), quiet=True, keyword="not test_collective and not test_model and not 50257")


def test_a_sound_backend_passes(sound):
    failed = [f"{case.area} {case.name}: {case.message}" for case in sound.cases if case.outcome == "failed"]
    assert not failed
    assert sound.exit_code == 0, sound.output
    areas = {case.area for case in sound.cases if case.outcome == "passed"}
    assert areas == {"loading", "memory", "attention", "pages", "operations", "sampling", "graphs"}


def test_what_is_not_declared_is_skipped_with_the_reason(sound):
    company = [case for case in sound.cases if case.area == "company"]
    assert company
    assert {case.outcome for case in company} == {"skipped"}
    skipped = [case for case in sound.cases if case.name == "dtypes[float16]"]
    assert [case.message for case in skipped] == ["Skipped: dtype not declared"]


@pytest.mark.parametrize("broken", CAUGHT_BY, ids=lambda cls: cls.__name__)
def test_a_broken_backend_is_caught(broken):
    area, name = CAUGHT_BY[broken]
    report = run(target(broken), keyword=f"test_{name}", quiet=True, modules=[area])
    failed = [case for case in report.cases if case.outcome == "failed"]
    assert any(case.area == area and case.name.partition("[")[0] == name for case in failed), report.output
    assert report.exit_code == 1
    assert all(case.message for case in failed)


def test_a_broken_collective_is_caught():
    report = run(target(RankDependent), keyword="all_reduce and 2", quiet=True, modules=["collectives"])
    assert report.names("failed") == ["collective[2 ranks-all_reduce]"], report.output


def test_the_report_says_what_was_tested(sound):
    data = json.loads(json.dumps(sound.as_dict()))
    assert data["device"] == "under test"
    assert data["capabilities"]["dtypes"] == ["bfloat16", "float32"]
    assert data["summary"]["passed"] == sum(case["outcome"] == "passed" for case in data["cases"])
    assert {"quire", "contract", "torch", "python", "machine"} <= set(data)


def test_the_report_says_where_it_ran_and_which_operations_a_case_called(sound):
    data = json.loads(json.dumps(sound.as_dict()))
    assert data["hardware"]["index"] == 0
    assert data["date"].startswith("20")
    assert not data["batch_invariant"]
    cases = {case["name"]: case for case in data["cases"] if case["outcome"] == "passed"}
    called = next(case for name, case in cases.items() if name.startswith("gated_act[") and "bfloat16" in name)
    assert called["operations"] == ["gated_act"]
    assert called["parameters"]["dtype"] == "bfloat16"
    window = next(case for name, case in cases.items() if name.startswith("window["))
    assert {"allocate_kv", "write_kv", "plan_attention", "attention"} <= set(window["operations"])
    own = next(case for name, case in cases.items() if name.startswith("rms_norm["))
    assert own["operations"] == ["rms_norm"]
    assert own["by_reference"] == ([] if "rms_norm" in vars(Host) else ["rms_norm"])
    sizes = {case["parameters"]["head_size"] for case in cases.values() if "head_size" in case["parameters"]}
    assert sizes == {32, 64}


def test_the_matrix_tells_failures_from_what_is_not_declared(sound):
    data = sound.as_dict()
    data["cases"][0] = {**data["cases"][0], "area": "loading", "outcome": "failed"}
    table = matrix([data])
    assert "| loading | **fails 1 of" in table
    assert "| company | not declared |" in table
    assert "| page sizes | 16, 32 |" in table
