"""bench/gpu.sh on a machine without a GPU: the whole script on tiny shapes, with no more packages than a bare machine
has, so that no mistake in Python waits for the card; and the arithmetic of goals, shares and limits."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from gpu import attention, busy, kit, nano, rows, run, shapes, timing  # noqa: E402
from model_cost import read_cost  # noqa: E402
from quire.hardware import DeviceOptions  # noqa: E402

HIDE = """
import sys
hidden = set({names!r})
def without(find):
    def look(name, *rest):
        found = find(name, *rest)
        where = found and str(found.origin or found.submodule_search_locations)
        return None if found and name.partition(".")[0] in hidden and "site-packages" in where else found
    return look
class Without:
    def __init__(self, finder):
        self.finder, self.find_spec = finder, without(finder.find_spec)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def needed_by(names: list[str]) -> set[str]:
    """Distributions that these need, themselves included, without extras."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = str(canonicalize_name(waiting.pop()))
        if name in found:
            continue
        found.add(name)
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, wanted):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment in which only torch, Triton, pytest, what they need, and the CPU plugin can be imported."""
    from packaging.utils import canonicalize_name

    kept = needed_by(["torch", "triton", "pytest", "numpy"])
    hidden = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(canonicalize_name(owner) in kept or owner.startswith("quire") for owner in owners)
    ]
    assert {"msgspec", "zmq", "tokenizers", "rich", "transformers"} <= set(hidden)
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def test_the_whole_script_on_a_bare_machine(bare, tmp_path):
    out = tmp_path / "results"
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--device", "cpu", "--smoke", "--in-process", "--commit", "c0ffee"]
    done = subprocess.run([*command, "--out", str(out)], env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr  # the profiler sees no device here
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    result = json.loads(next(out.glob("gpu-*-speed.json")).read_text())
    assert {part["part"] for part in result["parts"]} == {part.name for part in (*run.SPEED, *run.KIT)}
    assert {part["outcome"] for part in result["parts"]} == {"ran"}
    assert (result["commit"], result["device"], result["smoke"]) == ("c0ffee", "cpu", True)
    assert set(result["ceilings"]) == {rows.COPY, rows.MATRIX}
    absent = {row["name"]: row["why"] for row in result["rows"] if row["value"] is None}
    assert "fp8" in absent.pop("8b fp8: prefill of 8k", "fp8")  # a CPU may lack it, and then says so
    assert absent.pop("0.6b: device busy").endswith("activity on cpu")
    assert absent.pop("start: quire serve to the first token").startswith("not installed here: zmq")
    for peer in nano.PEERS:
        assert absent.pop(f"{nano.ROW}, {peer}") == f"{peer} is not installed here"
    assert not absent
    measured = {row["name"] for row in result["rows"]}
    assert all(goal.row in measured and (not goal.of or goal.of in measured) for goal in rows.goals())
    unmeasured = {goal["title"] for goal in result["goals"] if goal["reached"] is None}
    assert unmeasured - {"fp8, 8B prefill of 8k, against bf16"} == {"nano-vllm's benchmark: device busy"}
    for name, cases in (("kit", "operations"), ("kit-invariant", "company")):
        report = json.loads(next(out.glob(f"gpu-*-{name}.json")).read_text())
        assert report["complete"]
        assert report["commit"] == "c0ffee"
        assert any(case["area"] == cases and case["outcome"] == "passed" for case in report["cases"])
        assert not report["summary"]["failed"]


def test_parts_run_apart_and_one_that_fails_stops_none(tmp_path, capfd):
    """With processes and limits of their own, on a device that is registered nowhere."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), "fp8", "kernels", "--device", "nowhere", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    result = json.loads((tmp_path / "gpu-nowhere-ceilings-fp8-kernels.json").read_text())
    assert [(part["part"], part["outcome"]) for part in result["parts"]] == [
        ("ceilings", "failed with status 2"), ("fp8", "ran"), ("kernels", "failed with status 2"),
    ]  # fmt: skip
    assert "no plugin registers the device 'nowhere'" in result["problem"]
    assert all(row["value"] is None and row["why"] for row in result["rows"])


def test_a_part_whose_time_is_over_is_ended_with_all_that_it_started(tmp_path):
    note = tmp_path / "child"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    begin = time.monotonic()
    assert run.status([sys.executable, "-c", code], 3.0) is None
    assert time.monotonic() - begin < 60
    child = Path("/proc") / note.read_text()
    deadline = time.monotonic() + 10
    while child.exists() and (child / "stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or (child / "stat").read_text().split()[2] == "Z"
    assert run.status([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == 3


def test_time_that_is_over_begins_nothing(tmp_path):
    args = ["kernels", "--device", "cpu", "--smoke", "--in-process", "--seconds", "0", "--out", str(tmp_path)]
    assert run.main(args) == 1
    [file] = tmp_path.glob("*.json")
    assert {part["outcome"] for part in json.loads(file.read_text())["parts"]} == {"not begun: 0 s were left"}


def test_the_parts_of_a_run():
    assert [part.name for part in run.chosen(["kit"])] == ["kit", "kit-invariant"]
    assert run.chosen(["speed"]) == list(run.SPEED)
    assert [part.name for part in run.chosen(["nothing", "int4"][1:])] == ["ceilings", "int4"]
    assert {part.name for part in run.chosen([])} == {part.name for part in (*run.SPEED, *run.KIT)}
    # Every row of the table has its time, even if each part before it takes all of its own.
    assert sum(part.seconds for part in run.chosen([])[: len(run.GOALS)]) <= 585
    assert {part.name for part in run.chosen([])[: len(run.GOALS)]} == set(run.GOALS)
    with pytest.raises(SystemExit, match="no part is called nothing: there are all, kit, speed, ceilings"):
        run.chosen(["nothing"])


def test_attention_of_other_libraries_is_measured_where_it_can_be(tmp_path, monkeypatch):
    """Each in turn, at a page size that it takes; one that is refused or breaks says why, and ends none."""
    from quire.hardware import UnsupportedOnDevice

    class Whole:
        """A device's backend, as far as its attention is forced."""

        def __init__(self, name: str, own) -> None:
            self.name, self.own = name, own
            wide = {"page_sizes": frozenset({32}), "attention_backends": frozenset({"TRITON_ATTN", "A", "B", "C"})}
            self.capabilities = dataclasses.replace(own.capabilities, **wide)

        def __getattr__(self, name):
            return getattr(self.own, name)

        def allocate_kv(self, spec, pages):
            assert spec.groups[0].page_size == 32
            return self.own.allocate_kv(spec, pages)

        def attention(self, q, kv, layer, plan, spec):
            if self.name == "C":
                raise RuntimeError("no such kernel")
            return self.own.attention(q, kv, layer, plan, spec)

    def opened(device, batch_invariant=False, attention_backend=None):
        if attention_backend == "B":
            raise UnsupportedOnDevice(device, "--attention-backend B", "it is not installed")
        return Whole(attention_backend, timing.open_backend(device))

    monkeypatch.setattr(attention, "open_backend", opened)
    file = tmp_path / "rows"
    assert attention.main(["--device", "cpu-torch", "--smoke", "--others", "--rows", str(file)]) == 0
    found = {row.name: row for row in rows.read(file)}
    assert "it is not installed" in found["attention, B"].why
    assert found["attention, C"].why == "RuntimeError: no such kernel"
    assert {name for name, row in found.items() if row.value} == {
        f"attention, A: {step}"
        for step in (
            "decode 64 x 8k", "decode 1 x 128k", "decode 256 x 1k", "prefill 1 x 8k", "chunk of 2k after 30k",
            "8 prompts of 1k beside 64 decodes of 4k",
        )
    }  # fmt: skip


def test_the_kit_of_one_attention(tmp_path, capsys):
    """The flag reaches the kit, whose report says so in a file of its own; a device that has no such one refuses."""
    args = ["--device", "cpu-torch", "--attention-backend", "FLASHINFER", "--json", str(tmp_path / "report.json")]
    assert kit.main(args) == 2
    assert "--attention-backend FLASHINFER is not supported on device 'cpu-torch'" in capsys.readouterr().out
    namespace = argparse.Namespace(batch_invariant=True, attention_backend="A")
    assert kit.options(namespace) == DeviceOptions(batch_invariant=True, attention_backend="A")
    args = argparse.Namespace(device="cuda", commit=None, smoke=False, out="out", attention_backend="A")
    one = object.__new__(run.Run)
    one.args, one.card = args, "card"
    [part, _] = run.KIT
    assert one.command(part)[-4:] == ["--attention-backend", "A", "--json", "out/gpu-card-kit-a.json"]
    with pytest.raises(SystemExit):
        run.main(["8b", "--attention-backend", "A"])
    assert "is for the parts of the kit" in capsys.readouterr().err


def row(name: str, value: float | None, **more) -> rows.Row:
    return rows.Row(name, value, **more)


@pytest.mark.parametrize(
    ("kind", "bound", "value", "of", "reached", "short"),
    [
        ("share", 0.85, 2.0, None, 0.5, True),
        ("share", 0.5, 2.0, None, 0.5, False),
        ("times", 3.0, 2.0, 7.0, 3.5, False),
        ("times", 3.0, 2.0, 5.0, 2.5, True),
        ("cost", 0.15, 1.2, 1.0, 0.2, True),
        ("cost", 0.15, 0.9, 1.0, -0.1, False),
        ("at most", 15.0, 16.0, None, 16.0, True),
        ("at least", 0.9, 0.95, None, 0.95, False),
    ],
)
def test_a_goal_is_judged(kind, bound, value, of, reached, short):
    goal = rows.Goal("t", kind, "a", bound, "b" if of else "")
    table = {"a": row("a", value, limit=1.0)} | ({"b": row("b", of)} if of else {})
    found = goal.judge(table)
    assert found["reached"] == pytest.approx(reached)
    assert found["short"] is short
    assert goal.text(table).startswith("FELL SHORT" if short else "held")


def test_what_was_not_measured_fell_short_and_says_why():
    goal = rows.Goal("t", "times", "a", 3.0, "b")
    for table, why in (
        ({}, "it did not run"),
        ({"a": row("a", None, why="no such format"), "b": row("b", 1.0)}, "no such format"),
        ({"a": row("a", 1.0)}, "it did not run"),
    ):
        found = goal.judge(table)
        assert (found["reached"], found["short"], found["why"]) == (None, True, why)
        assert goal.text(table).startswith("not measured")
    assert rows.Goal("t", "share", "a", 0.5).judge({"a": row("a", 1.0)})["short"]  # no ceiling: no share


def test_a_row_that_was_being_written_is_left_out(tmp_path):
    file = tmp_path / "rows"
    out = rows.Recorder(file)
    out.add(rows.COPY, 10.0, "B/s")
    out.add(rows.MATRIX, 100.0, "FLOP/s")
    out.add("a", 4.0, limit=out.least(20.0, 100.0), note=1)
    with file.open("a") as stream:
        stream.write('{"name": "b", "val')
    found = rows.read(file)
    assert [one.name for one in found] == [rows.COPY, rows.MATRIX, "a"]
    assert (found[2].limit, found[2].share) == (2.0, 0.5)  # bytes take 2 s, operations 1
    assert rows.Row("r", 50.0, "tokens/s", 100.0).share == 0.5
    assert rows.Recorder(tmp_path / "none").least(1.0) is None


def test_the_share_of_time_that_a_device_is_busy():
    assert busy.union([(5, 7), (0, 3), (2, 4), (2, 3)]) == 6
    assert busy.share([(10, 20), (15, 30), (35, 50)]) == 35 / 40
    assert busy.share([]) is None


def test_the_benchmark_is_that_of_nano_vllm():
    """Its README reports 133,966 output tokens for bench.py with seed 0."""
    work = nano.workload()
    assert len(work) == 256
    assert sum(tokens for _, tokens in work) == 133_966
    assert all(100 <= len(prompt) <= 1024 for prompt, _ in work)


def test_shapes_are_those_of_the_models_they_are_named_after(tmp_path):
    """Parameters as the models' cards state them: all, embeddings included."""
    for name, billions in (("8b", 8.03), ("32b", 32.8), ("0.6b", 0.596)):
        folder = shapes.write_config(name, tmp_path, smoke=False)
        total = sum(
            part.shape[0] * (part.shape[1] if len(part.shape) > 1 else 1)
            for weight in shapes.weights_of(folder)
            for part in weight.parts
        )
        assert total / 1e9 == pytest.approx(billions, rel=0.005)
        cost = shapes.cost(folder)
        assert shapes.matrix_bytes(folder, None) == 2 * (cost.body + cost.head)
        assert 0.5 < shapes.matrix_bytes(folder, "int8") / (cost.body + cost.head) < 1.05


def test_a_written_checkpoint_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "BLOCK", 1000)  # many blocks, and a rest
    folder, size = shapes.write_checkpoint("8b", tmp_path, smoke=True)
    assert read_cost(folder) == shapes.cost(folder)
    held = 0
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        names = set(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            held += tensor.nbytes
            assert 0 < tensor.float().abs().max() < 0.2
    assert held == size
    assert names == {part.name for weight in shapes.weights_of(folder) for part in weight.parts}


def test_reports_of_one_device_are_joined():
    parts = [{"device": "d", "cases": [{"outcome": o, "area": o}], "complete": True} for o in ("passed", "failed")]
    assert kit.merged(parts)["summary"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert kit.merged(parts)["complete"]
    assert not kit.merged([parts[0], {**parts[1], "complete": False}])["complete"]
    assert not kit.merged(parts, complete=False)["complete"]
    assert not kit.merged([])["complete"]
    assert "speed" not in kit.modules()
    assert kit.modules()[0] == "attention"


RECORDS = """
from __future__ import annotations
import msgspec
class A(msgspec.Struct, omit_defaults=True):
    x: int
    y: list[int] = []
    z: dict[int, float] | None = None
    def __post_init__(self):
        if self.x < 0:
            raise ValueError("x is negative")
class B(A, kw_only=True, tag="b"):
    w: str = "w"
    v: list[int] = msgspec.field(default_factory=lambda: [7])
class D(msgspec.Struct):
    inner: A | None = None
class C(msgspec.Struct, array_like=True):
    a: int
    b: str | None = None
"""


@pytest.mark.parametrize(
    "expression",
    [
        "A(1)", "A(1, [2])", "A(y=[3], x=1)", "A()", "A(1, [2], None, 4)", "A(1, u=2)", "A(-1)", "B(x=1)", "B(1, v=[1])",
        "C(1)", "C(1, 'b') == C(1, 'b')", "C(1) == C(2)", "A(1) == C(1)", "A(1).y is A(1).y", "B(x=1).v is B(x=1).v",
        "convert(to_builtins(A(2, [1], {3: 0.5})), A)", "convert(to_builtins(A(-2)), A)", "hash(C(1))",
        "to_builtins(B(x=5, w='q'))['w']", "convert(to_builtins(D(A(3))), D)", "convert({'inner': None}, D)",
    ],
)  # fmt: skip
def test_the_stand_in_for_msgspec_does_as_msgspec(expression):
    """As far as an engine in one process asks it."""
    import msgspec

    spec = importlib.util.spec_from_file_location("msgspec", ROOT / "bench/gpu/bare/msgspec.py")
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)

    def tried(module) -> str:
        scope: dict = {"convert": lambda v, t: module.convert(v, t, strict=False), "to_builtins": module.to_builtins}
        kept = sys.modules["msgspec"]
        sys.modules["msgspec"] = module
        try:
            exec(RECORDS, scope)
            return repr(eval(expression, scope))
        except Exception as error:
            return next((kind.__name__ for kind in (TypeError, ValueError) if isinstance(error, kind)), repr(error))
        finally:
            sys.modules["msgspec"] = kept

    assert tried(stand_in) == tried(msgspec)
