"""How each operation is known to work on each device: `python docs/how_known.py` writes docs/how-known.md, `--check` says
whether it is current, `--evidence` first runs the conformance kit on the devices of this machine and on the kernels under
Triton's interpreter (a quarter of an hour) and keeps what they report.

Nothing is listed by hand. What an operation is computed by is read from the plugins' classes; what was run, from reports of the
conformance kit in bench/results (kit-*.json of this machine and the interpreter, gpu-*-kit*.json of bench/gpu.sh); what is
compiled, from the cases of tests/triton/aot.py, joined to operations by following their functions to the kernels.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/how-known.md"
RESULTS = ROOT / "bench/results"
PLUGINS = ("cpu", "cuda", "rocm", "xpu", "example")
sys.path[:0] = [str(ROOT), *(str(ROOT / "plugins" / name) for name in (*PLUGINS, "triton"))]

INTERPRETED = "interpreted"
VALUES = {
    "dtype": "dtypes", "kv_dtype": "kv_dtypes", "page_size": "page_sizes", "head_size": "head_sizes",
    "quantization": "quantization", "collective": "collectives",
}  # fmt: skip
"""Parameters of the kit's cases, and the capability that declares their values."""
FAMILIES = {"cuda": "cuda", "rocm": "hip"}
"""Devices, and the Triton backend that their kernels are compiled by."""


# -- evidence: reports of the kit ------------------------------------------------------------------------------------


@dataclass
class Function:
    """What came of one test function of the kit, over all its cases."""

    passed: int = 0
    failed: int = 0
    capability: str | None = None
    operations: dict[str, int] = field(default_factory=dict)  # operation -> cases passed that called it
    own: dict[str, int] = field(default_factory=dict)  # of them, those in which the reference did none of it
    broken: dict[str, int] = field(default_factory=dict)  # operation -> cases failed that called it
    values: dict[str, dict[str, int]] = field(default_factory=dict)  # parameter -> value -> cases passed
    failing: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class Evidence:
    """A report of the kit, by its test functions."""

    device: str
    hardware: str
    date: str
    commit: str
    torch: str
    functions: dict[str, Function]
    batch_invariant: bool = False
    attention_backend: str | None = None
    complete: bool = True

    def title(self) -> str:
        flags = ["--batch-invariant"] * self.batch_invariant
        flags += [f"--attention-backend {self.attention_backend}"] if self.attention_backend else []
        mode = f", opened with {' '.join(flags)}" if flags else ""
        whole = "" if self.complete else ", not all of the kit"
        return f"`{self.device}`{mode}: {self.hardware}, torch {self.torch}, {self.date}, commit {self.commit}{whole}"


def condensed(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of ``quire conformance --json`` by test functions: what this page needs, one line each."""
    functions: dict[str, dict[str, Any]] = {}
    for case in report["cases"]:
        name = f"{case['area']}.{case['name'].partition('[')[0]}"
        one = functions.setdefault(name, dataclasses.asdict(Function(capability=case["capability"])))
        if case["outcome"] not in ("passed", "failed"):
            continue
        one[case["outcome"]] += 1
        passed = case["outcome"] == "passed"
        for operation in case["operations"]:
            kinds = ["operations" if passed else "broken"]
            kinds += ["own"] if passed and operation not in case["by_reference"] else []
            for kind in kinds:
                one[kind][operation] = one[kind].get(operation, 0) + 1
        counts = one["values" if passed else "failing"]
        for parameter, value in case["parameters"].items():
            if parameter in VALUES:
                by_value = counts.setdefault(parameter, {})
                by_value[str(value)] = by_value.get(str(value), 0) + 1
    hardware = report.get("hardware") or {}
    details = hardware.get("details")
    return {
        "device": report["device"],
        "hardware": f"{hardware.get('name', 'unknown')}{f' ({details})' if details else ''}",
        "date": (report.get("date") or "")[:10], "commit": (report.get("commit") or "unknown")[:12],
        "torch": report["torch"], "batch_invariant": bool(report.get("batch_invariant")),
        "attention_backend": report.get("attention_backend"),
        "complete": report.get("complete", True), "functions": functions,
    }  # fmt: skip


def read(folder: Path = RESULTS) -> list[Evidence]:
    """Every report in ``folder``, of the interpreter last."""
    found = []
    for file in sorted([*folder.glob("kit-*.json"), *folder.glob("gpu-*-kit*.json")]):
        content = json.loads(file.read_text())
        content = condensed(content) if "cases" in content else content
        functions = {name: Function(**one) for name, one in content.pop("functions").items()}
        found.append(Evidence(**content, functions=functions))
    return sorted(found, key=lambda one: (one.device == INTERPRETED, one.batch_invariant))


def write(content: Mapping[str, Any], file: Path) -> None:
    """A condensed report, a line for each test function."""
    head = {name: value for name, value in content.items() if name != "functions"}
    lines = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in sorted(content["functions"].items())]
    start = json.dumps(head, indent=1).rstrip("\n}")
    file.write_text(f'{start},\n "functions": {{\n' + ",\n".join(lines) + "\n }\n}\n")


HERE = ("cpu", "cpu-torch", "example", INTERPRETED, f"{INTERPRETED}-invariant")
"""What any machine can run the kit on; the last is opened batch-invariant, and asked for that alone."""


def gather(chosen: Sequence[str] = HERE) -> None:
    """Run the kit on what this machine has, and on the kernels under the interpreter; write bench/results/kit-*.json.

    All reports are made before any is written, so that all name the commit without the files' own change.
    """
    made: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for device in (one for one in chosen if not one.startswith(INTERPRETED)):
            file = Path(folder) / f"{device}.json"
            command = ["-m", "quire.cli.main", "conformance", "--device", device, "--json", str(file)]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
            made[device] = json.loads(file.read_text())
        for name in (one for one in chosen if one.startswith(INTERPRETED)):
            made[name] = interpreted(Path(folder) / name, name != INTERPRETED)
    for device, report in made.items():
        write(condensed(report), RESULTS / f"kit-{device}.json")


def interpreted(folder: Path, invariant: bool) -> dict[str, Any]:
    """The report of the kit under the interpreter."""
    chosen = ["-m", "exhaustive", "-k", f"test_all_of_the_kit and {'' if invariant else 'not '}company"]
    tests = ["tests/triton/test_interpreted.py", *chosen, "-x", "--tb=short", f"--basetemp={folder}"]
    subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, check=True)
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*0/report.json"))]
    return {**reports[0], "cases": [case for report in reports for case in report["cases"]]}


# -- code: devices, operations, kernels ------------------------------------------------------------------------------


def backends() -> dict[str, Any]:
    """Device name to backend, of every plugin in the checkout, whether it finds its device here or not."""
    factories: dict[str, Any] = {}
    for plugin in PLUGINS:
        module = importlib.import_module(f"quire_{plugin}")
        module.quire_register_backends(lambda name, make, begin=None: factories.update({name: make}))
    return {name: make() for name, make in factories.items()}


def operations() -> tuple[str, ...]:
    from quire.plugins import OPERATIONS

    return (*OPERATIONS, "capture")


def is_own(backend: Any, operation: str) -> bool:
    """Whether the backend's class defines it, rather than inherits the reference."""
    from quire.hardware import Backend

    return getattr(type(backend), operation) is not getattr(Backend, operation)


def definitions(kind: type, operation: str) -> list[Any]:
    """The functions by which a backend's class computes an operation: the first in its order, and those that it may hand
    a case on to with ``super()``, without the reference."""
    from quire.hardware import Backend

    found = []
    for one in kind.__mro__:
        if one is Backend or (found and not {"super", operation} <= _names(found[-1].__code__)):
            break
        if operation in vars(one):
            found.append(inspect.unwrap(vars(one)[operation]))
    return found


def kernels_of(kind: type, operation: str) -> set[str]:
    """Names of the Triton kernels that an operation of a backend's class can launch, by what its code names."""
    seen: set[Any] = set()
    return {kernel for function in definitions(kind, operation) for kernel in _kernels(function, kind, seen)}


def _kernels(function: Any, kind: type | None, seen: set[Any]) -> set[str]:
    """Through functions and classes of the plugins, their modules, the function's own imports, and methods of ``kind``
    that are no operations themselves."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType) or function in seen:
        return set()
    seen.add(function)
    scope = {**function.__globals__, **_own_imports(function)}
    names = _names(function.__code__)
    values = [scope[name] for name in names if name in scope]
    values += [
        getattr(v, n) for v in values if isinstance(v, types.ModuleType) and _ours(v) for n in names if hasattr(v, n)
    ]
    values += [getattr(kind, name, None) for name in names - set(operations())]
    found: set[str] = set()
    for value in values:
        if type(value).__name__ in ("JITFunction", "InterpretedFunction") and hasattr(value, "fn"):
            found.add(value.fn.__name__)
        elif inspect.isfunction(value) and _ours(value):
            found |= _kernels(value, kind, seen)
        elif inspect.isclass(value) and _ours(value) and value is not kind:
            for method in vars(value).values():
                found |= _kernels(method, value, seen)
    return found


def _ours(value: Any) -> bool:
    where = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return bool(re.match(r"quire_(triton|cuda|rocm|xpu)\b", where or ""))


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _own_imports(function: types.FunctionType) -> dict[str, Any]:
    """What a function imports when it is called."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return {}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quire_"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if hasattr(module, alias.name):
                    found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def compiled() -> dict[str, dict[str, list[str]]]:
    """Kernel to target to the names of the configurations that tests/triton/test_compile.py compiles."""
    from tests.triton import aot

    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for target in aot.TARGETS:
        for name, kernel, *_ in aot.cases(target):
            found[kernel.__name__][target].append(name)
    return {kernel: dict(by_target) for kernel, by_target in sorted(found.items())}


def targets_of(device: str) -> list[str]:
    from tests.triton import aot

    return [name for name, target in aot.TARGETS.items() if target.backend == FAMILIES.get(device)]


def kit_functions() -> Iterator[str]:
    """area.function of every test in the kit that judges, in the files' order."""
    for file in sorted((ROOT / "core/quire/conformance").glob("test_*.py")):
        if file.stem == "test_speed":
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{file.stem.removeprefix('test_')}.{node.name.removeprefix('test_')}"


def named_tests(*patterns: str) -> Iterator[str]:
    """Tests that are not the kit's: file, and what they are called."""
    for file in sorted(file for pattern in patterns for file in (ROOT / "tests/triton").glob(pattern)):
        names = [
            node.name.removeprefix("test_").replace("_", " ")
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        if names:
            yield f"- `{file.relative_to(ROOT)}`: {'; '.join(names)}."


# -- the page --------------------------------------------------------------------------------------------------------


class Known:
    """All that is known, asked cell by cell."""

    def __init__(self, evidence: Sequence[Evidence]) -> None:
        from tests.triton.interpreted_device import Interpreted

        self.backends = backends()
        self.evidence = list(evidence)
        self.interpreter: Any = Interpreted()
        self.compiled = compiled()
        self.targets = list(dict.fromkeys(target for by_target in self.compiled.values() for target in by_target))
        self.operations = operations()

    def reports(self, device: str) -> list[tuple[int, Evidence]]:
        """(number, report) of a device's, or the interpreter's."""
        return [(n, one) for n, one in enumerate(self.evidence, 1) if one.device == device]

    def shares(self, device: str, operation: str) -> bool:
        """Whether what the interpreter ran is what the device computes by, or one of the ways that it chooses among."""
        theirs = getattr(type(self.interpreter), operation)
        return is_own(self.interpreter, operation) and theirs in definitions(type(self.backends[device]), operation)

    def operation(self, device: str, operation: str) -> str:
        backend = self.backends[device]
        own = is_own(backend, operation)

        def count(one: Evidence) -> tuple[int, int]:
            functions = one.functions.values()
            passed = sum((f.own if own else f.operations).get(operation, 0) for f in functions)
            return passed, sum(f.broken.get(operation, 0) for f in functions)

        said = self._run(device, count)
        if not said and self.shares(device, operation):
            said = self._run(INTERPRETED, count)
        if own:
            said += self._compiled(device, operation)
        by = "own" if own else "reference"
        return f"{by}: {', '.join(said)}" if said else f"{by}: **not yet**"

    def _compiled(self, device: str, operation: str) -> list[str]:
        kernels = kernels_of(type(self.backends[device]), operation) & set(self.compiled)
        targets = [t for t in targets_of(device) if kernels and all(t in self.compiled[kernel] for kernel in kernels)]
        return [f"compiled for {', '.join(targets)}"] if targets else []

    def _run(self, device: str, count: Any) -> list[str]:
        """What the reports of a device say of some cases: how many passed, and failed."""
        said = []
        for number, one in self.reports(device):
            passed, failed = count(one)
            verb = "interpreted" if device == INTERPRETED else "run"
            if failed:
                said.append(f"**fails {failed} of {failed + passed}** [{number}]")
            elif passed:
                said.append(f"{verb} {passed} [{number}]")
        return said

    def function(self, device: str, name: str) -> str:
        """A test function of the kit."""

        def count(one: Evidence) -> tuple[int, int]:
            found = one.functions.get(name, Function())
            return found.passed, found.failed

        said = self._run(device, count)
        known = [one.functions[name] for one in self.evidence if name in one.functions]
        ran = [one.functions[name].own for one in self.evidence if one.device == INTERPRETED and name in one.functions]
        if not said and any(self.shares(device, operation) for own in ran for operation in own):
            said = self._run(INTERPRETED, count)
        if said:
            return ", ".join(said)
        if any(name in one.functions for _, one in self.reports(device)):
            return "not declared"  # the kit was there, and skipped it
        capability = next((one.capability for one in known if one.capability), None)
        # Batch invariance may be a mode that is asked for at opening, which no class shows.
        if (
            capability
            and capability != "batch_invariant"
            and not getattr(self.backends[device].capabilities, capability)
        ):
            return "not declared"
        return "**not yet**"

    def value(self, device: str, parameter: str, value: str) -> str:
        """A value of a parameter of the kit's cases."""

        def count(one: Evidence) -> tuple[int, int]:
            # Of the interpreter's, only what ran a kernel: the rest is the reference on the host.
            functions = [f for f in one.functions.values() if f.own or one.device != INTERPRETED]
            passed = sum(f.values.get(parameter, {}).get(value, 0) for f in functions)
            return passed, sum(f.failing.get(parameter, {}).get(value, 0) for f in functions)

        if not self._declares(device, parameter, value):
            return "not declared"
        said = self._run(device, count)
        if not said and any(self.shares(device, operation) for operation in self.operations):
            said = self._run(INTERPRETED, count)
        return ", ".join(said) or "**not yet**"

    def _declares(self, device: str, parameter: str, value: str) -> bool:
        declared = getattr(self.backends[device].capabilities, VALUES[parameter])
        if parameter == "head_size":
            return bool(declared[0] <= int(value) <= declared[1])
        return value in map(str, declared)

    def values(self, parameter: str) -> list[str]:
        """Those that some report tried or some device declares."""
        found = {v for one in self.evidence for f in one.functions.values() for v in f.values.get(parameter, {})}
        if parameter != "head_size":
            declared = (getattr(b.capabilities, VALUES[parameter]) for b in self.backends.values())
            found |= {str(value) for values in declared for value in values}
        return sorted(found, key=lambda v: (int(v), "") if v.isdigit() else (0, v))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]


def page(evidence: Sequence[Evidence] | None = None) -> str:
    """The whole page as Markdown."""
    known = Known(read() if evidence is None else evidence)
    devices = list(known.backends)
    columns = [f"`{device}`" for device in devices]
    runs = [f"{n}. {one.title()}" for n, one in enumerate(known.evidence, 1)]
    unrun = [f"`{device}`" for device in devices if not known.reports(device)]
    missing = (
        f"No report is there of: {', '.join(unrun)}. `bench/gpu.sh kit` makes one ([how](../bench/README.md))."
        if unrun
        else ""
    )
    lines = [
        "# How it is known to work", "",
        "Generated by `python docs/how_known.py` from the plugins' code, the conformance kit's reports in `bench/results`",
        "and the lists of `tests/triton`; do not edit. `--evidence` makes the reports of this machine anew.", "",
        "- **run n [r]**: n cases of the kit passed on the hardware of report r; of an operation, those that called it and, if",
        "  it is the device's own, in which nothing of it was left to the reference.",
        "- **interpreted n [r]**: they passed under Triton's interpreter, which shows that the kernel computes what it should",
        "  and nothing of how a GPU runs it. Where a plugin chooses among several ways, one of them is Triton's.",
        "- **compiled for**: its kernels are compiled for that architecture, within its registers and shared memory.",
        "- **own**, **reference**: the plugin computes it itself, or by the definition in PyTorch.",
        "- **not yet**: none of these. **not declared**: the device promises nothing of the kind.", "",
        *runs, *(["", missing] if missing else []), "",
        "## Operations of the contract",
        *table(["operation", *columns], ([f"`{o}`", *(known.operation(d, o) for d in devices)] for o in known.operations)),
        "## Variants: the kit's test functions",
        *table(["area, case", *columns], (
            [name.replace(".", ": ").replace("_", " "), *(known.function(d, name) for d in devices)]
            for name in kit_functions()
        )),
        "## Dtypes, sizes, formats, collectives",
        *table(["value", *columns], (
            [f"{parameter.replace('_', ' ')} {value}", *(known.value(d, parameter, value) for d in devices)]
            for parameter in VALUES for value in known.values(parameter)
        )),
        "## Interpreted beside the kit", "",
        *named_tests("interpreted_*.py"), "",
        "## Host code against fakes", "",
        "What the plugins do on the host (devices, pinned copies, streams, recordings, memory, choices, collectives), against a",
        "fake of torch's device module and of other libraries, held to the names and signatures of theirs. It shows what is",
        "asked of a device, and nothing of what one would answer.", "",
        *named_tests("test_plugins.py", "test_fake_gpu.py", "test_choice.py", "test_communicator.py", "test_products.py"), "",
        "## Compiled ahead of time",
        "",
        "Configurations of each Triton kernel that `tests/triton/test_compile.py` compiles: some at every run, all with",
        "`-m exhaustive`.",
        *table(["kernel", *known.targets, "configurations"], (
            [f"`{kernel}`", *(str(len(by_target.get(target, ())) or "-") for target in known.targets), ", ".join(
                dict.fromkeys(name for names in by_target.values() for name in names)
            )]
            for kernel, by_target in known.compiled.items()
        )),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    parser.add_argument(
        "--evidence", nargs="*", choices=HERE, metavar="DEVICE",
        help=f"run the kit first, on {', '.join(HERE)} (a quarter of an hour) or those that are named",
    )  # fmt: skip
    args = parser.parse_args()
    if args.evidence is not None:
        gather(args.evidence or HERE)
    text = page()
    if args.check:
        current = PAGE.exists() and PAGE.read_text() == text
        print("current" if current else f"{PAGE.relative_to(ROOT)}: is not current: run `make docs`")
        return 0 if current else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
