"""The pytest plugin that runs the kit's modules on one device, and the report that comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import platform
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quire.hardware import CONTRACT_VERSION, Backend, Capabilities, DeviceInfo, DeviceOptions
from quire.plugins import OPERATIONS
from quire.quantization import FORMATS

FOLDER = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
HEAD_SIZES = (32, 64, 80, 96, 128, 256)
LATENT_SIZES = ((576, 512),)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "barrier")
NOTED = (*OPERATIONS, "capture")
SCHEMA = 1
"""Version of the JSON report."""


@dataclass
class Target:
    """The device under test. ``factory`` makes a new backend; ``rank_arguments`` tell a process of its own how to."""

    name: str
    factory: Callable[[], Backend]
    index: int = 0
    options: DeviceOptions = field(default_factory=DeviceOptions)
    plugin: str | None = None  # entry point's name; None: not a plugin but an object
    distribution: str | None = None
    version: str | None = None
    rank_arguments: Sequence[str] = ()  # for quire.conformance.rank; empty: it cannot be made elsewhere


@dataclass
class Case:
    """One test's outcome. ``area`` is its module, ``capability`` what it needs declared (None: the contract itself)."""

    area: str
    name: str
    outcome: str  # passed, failed, skipped
    capability: str | None = None
    seconds: float = 0.0
    message: str = ""
    operations: list[str] = field(default_factory=list)  # of the contract, those the case called, in this process
    by_reference: list[str] = field(default_factory=list)  # those of them that the reference computed, always or once
    parameters: dict[str, Any] = field(default_factory=dict)  # what it was tried with: dtype, kv_dtype, head_size, ...


@dataclass
class Report:
    target: Target
    capabilities: Capabilities | None = None
    cases: list[Case] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""  # what pytest printed, when it was captured
    exit_code: int = 0
    hardware: DeviceInfo | None = None

    def names(self, outcome: str) -> list[str]:
        return [case.name for case in self.cases if case.outcome == outcome]

    def as_dict(self) -> dict[str, Any]:
        """The JSON report, from which the support matrix is made, and what is known of each operation."""
        import torch

        import quire
        from quire.bench.environment import commit, now

        declared = None if self.capabilities is None else _plain(dataclasses.asdict(self.capabilities))
        return {
            "schema": SCHEMA,
            "device": self.target.name,
            "distribution": self.target.distribution,
            "version": self.target.version,
            "quire": quire.__version__,
            "contract": ".".join(map(str, CONTRACT_VERSION)),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "hardware": None if self.hardware is None else dataclasses.asdict(self.hardware),
            "date": now(),
            "commit": commit(FOLDER),
            "batch_invariant": self.target.options.batch_invariant,
            "attention_backend": self.target.options.attention_backend,
            "capabilities": declared,
            "summary": {o: len(self.names(o)) for o in ("passed", "failed", "skipped")},
            "cases": [dataclasses.asdict(case) for case in self.cases],
            "speed": self.speed,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


class Kit:
    """Parameters for the kit's modules and the collection of their outcomes; conftest.py has the fixtures."""

    def __init__(self, target: Target, speed: bool) -> None:
        self.target, self.report, self.speed = target, Report(target), speed
        self._backend: Backend | None = None
        self._called: set[str] = set()
        self._by_reference: set[str] = set()
        self._defaults: dict[str, Callable[..., Any]] = {}

    def backend_once(self) -> Backend:
        """The opened backend, made on first use."""
        if self._backend is None:
            self._backend = self.target.factory()
            self.report.capabilities = self._backend.capabilities
            self.report.hardware = self._backend.devices()[self.target.index]
            self._backend.open(self.target.index, self.target.options)
            self.report.capabilities = self._backend.capabilities
            for name in NOTED:
                noted = self._noted(self._called, name, getattr(self._backend, name))
                setattr(self._backend, name, noted)
        return self._backend

    def _noted(
        self, where: set[str], name: str, operation: Callable[..., Any], bound: bool = True
    ) -> Callable[..., Any]:
        """``operation``, which adds its name to ``where`` when it is called on the backend under test."""

        @functools.wraps(operation)
        def call(*args: Any, **named: Any) -> Any:
            if bound or args[0] is self._backend:
                where.add(name)
            return operation(*args, **named)

        return call

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[KIT] = self
        config.addinivalue_line("markers", "capability(name): needs the device to declare it")
        config.addinivalue_line("markers", "speed: measures, and judges nothing")
        # The contract's defaults say when they compute, so that a report can tell a device's own work from theirs.
        for name in NOTED:
            self._defaults[name] = Backend.__dict__[name]
            setattr(Backend, name, self._noted(self._by_reference, name, self._defaults[name], bound=False))

    def pytest_unconfigure(self) -> None:
        for name, default in self._defaults.items():
            setattr(Backend, name, default)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        capabilities = self.backend_once().capabilities
        low, high = capabilities.head_sizes
        known: dict[str, tuple[Sequence[Any], Callable[[Any], bool]]] = {
            "dtype": (DTYPES, lambda d: d in capabilities.dtypes),
            "kv_dtype": (sorted({*KV_DTYPES, *capabilities.kv_dtypes}), lambda d: d in capabilities.kv_dtypes),
            "page_size": (sorted({*PAGE_SIZES, *capabilities.page_sizes}), lambda p: p in capabilities.page_sizes),
            "head_size": (sorted({*HEAD_SIZES, low, high}), lambda h: low <= h <= high),
            "latent_size": (
                sorted({*LATENT_SIZES, *capabilities.latent_sizes}),
                lambda s: s in capabilities.latent_sizes,
            ),
            "quantization": (sorted(FORMATS), lambda q: q in capabilities.quantization),
            "embed_format": (("dense", *sorted(FORMATS)), lambda f: f in capabilities.embed_formats),
            "collective": (COLLECTIVES, lambda c: c in capabilities.collectives),
        }
        for name, (values, declared) in known.items():
            if name in metafunc.fixturenames:
                skip = pytest.mark.skip(reason=f"{name} not declared")
                marks = [pytest.param(v, marks=() if declared(v) else skip) for v in values]
                metafunc.parametrize(name, marks, scope="session")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not self.speed:
            dropped = [item for item in items if item.get_closest_marker("speed")]
            items[:] = [item for item in items if item not in dropped]
            config.hook.pytest_deselected(items=dropped)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._called.clear()
        self._by_reference.clear()
        capability = _capability(item)
        if capability is not None and not getattr(self.backend_once().capabilities, capability):
            pytest.skip(f"{capability} not declared")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: Any
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            message = ""
            if report.failed:
                message = str(call.excinfo.value) if call.excinfo else ""
            elif report.skipped:
                message = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
            self.report.cases.append(
                Case(
                    area=item.path.stem.removeprefix("test_"),
                    name=item.name.removeprefix("test_"),
                    outcome=report.outcome,
                    capability=_capability(item),
                    seconds=round(report.duration, 4),
                    message=message[:2000],
                    # Ranks are processes of their own: what they call is not seen from here.
                    operations=sorted(
                        self._called | ({"communicator"} if "collective" in _parameters(item) else set())
                    ),
                    by_reference=sorted(self._called & self._by_reference),
                    parameters=_parameters(item),
                )
            )
        return report


KIT: pytest.StashKey[Kit] = pytest.StashKey()


def _parameters(item: pytest.Item) -> dict[str, Any]:
    """Those that are plain values."""
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return {name: value for name, value in given.items() if isinstance(value, str | int | float | None)}


def _capability(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("capability")
    return None if marker is None else marker.args[0]


def run(
    target: Target,
    keyword: str | None = None,
    speed: bool = False,
    quiet: bool = False,
    modules: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> Report:
    """Run the kit on ``target`` and report. ``keyword``: pytest's -k; ``modules``: areas, default all; ``quiet``: what
    pytest prints goes to ``report.output``."""
    kit = Kit(target, speed)
    paths = [str(FOLDER / f"test_{name}.py") for name in modules] or [str(FOLDER)]
    chosen = ["-k", keyword] if keyword else []
    fixed = ["-c", str(FOLDER / "conformance.ini"), "--rootdir", str(FOLDER), "--disable-plugin-autoload"]
    command = [*fixed, "-p", "no:cacheprovider", "--tb=short", "-q", *chosen, *arguments, *paths]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if quiet else contextlib.nullcontext():
        code = int(pytest.main(command, plugins=[kit]))
    report = kit.report
    report.exit_code, report.output = code, printed.getvalue()
    return report
