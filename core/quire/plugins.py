"""Finds plugins and keeps what they register. Discovery imports plugin modules, never a device.

A plugin is an entry point in the group ``quire``. What is wrong with one (its import fails, a hook is misspelled, a
name is taken, it was built for another contract) is recorded under its name, and the rest go on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from quire.hardware import CONTRACT_VERSION, Backend, DeviceInfo, DeviceUnavailable, Hooks

log = logging.getLogger("quire.plugins")

GROUP = "quire"
KINDS = ("backends", "models", "checkpoints", "tool_parsers", "reasoning_parsers")


@dataclass
class Plugin:
    """One entry point and what came of it. ``error`` says why it, or a part of it, was refused."""

    name: str
    distribution: str
    version: str
    error: str | None = None
    registered: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def refuse(self, reason: str) -> None:
        """Record why this plugin, or one more part of it, was refused."""
        if self.error is None:
            self.error = reason
        elif reason not in self.error:
            self.error += f"; {reason}"


@dataclass
class Registry:
    """Everything registered. Factories are called only when something is used."""

    plugins: list[Plugin] = field(default_factory=list)
    backends: dict[str, Callable[[], Backend]] = field(default_factory=dict)
    models: dict[str, Callable[[], Any]] = field(default_factory=dict)
    checkpoints: dict[str, Callable[[], str]] = field(default_factory=dict)
    tool_parsers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    reasoning_parsers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    begins: dict[str, Callable[[int, int], None]] = field(default_factory=dict)  # of backends that have one

    def owner(self, kind: str, name: str) -> Plugin:
        return next(p for p in self.plugins if name in p.registered[kind])

    def backend(self, name: str) -> Backend:
        """A new, unopened backend. Raises DeviceUnavailable for an unknown name or another contract version."""
        if name not in self.backends:
            known = ", ".join(sorted(self.backends)) or "none; install one, for example quire-plugin-cpu"
            broken = "".join(f"; plugin '{p.name}' was refused: {p.error}" for p in self.plugins if p.error)
            raise DeviceUnavailable(f"no plugin registers the device '{name}' (registered: {known}){broken}")
        plugin = self.owner("backends", name)
        try:
            backend = self.backends[name]()
        except DeviceUnavailable:
            raise
        except Exception as error:
            raise DeviceUnavailable(f"plugin '{plugin.name}' cannot make device '{name}': {describe(error)}") from error
        wrong = contract_error(backend)
        if wrong is not None:
            reason = f"device '{name}' {wrong}: install matching versions of quire-core and {plugin.distribution}"
            plugin.refuse(reason)
            raise DeviceUnavailable(reason)
        backend.name = name
        return backend

    def begin(self, name: str, weights: int, largest: int) -> None:
        """Tell ``--device NAME`` that a model of ``weights`` bytes is coming, or (0) that it is there. With ``auto``, only
        where all devices are one plugin's: memory is not to be taken on one device for what will be on another."""
        if name == "auto" and len({self.owner("backends", each).name for each in self.backends}) > 1:
            return
        for each in self.backends if name == "auto" else (name,):
            if each in self.begins:
                try:
                    self.begins[each](weights, largest)
                except Exception as error:  # it only saves time: what the device cannot do, it says when it is opened
                    log.warning("begin() of '%s' failed: %s", each, describe(error))

    def find(self, name: str) -> tuple[Backend | None, list[DeviceInfo], str]:
        """(backend, its devices, why there are none): never raises, whatever a plugin does."""
        try:
            backend = self.backend(name)
            found = list(backend.devices())
        except DeviceUnavailable as error:
            return None, [], str(error)
        except Exception as error:  # whatever a stranger's code raises is its own
            return None, [], f"devices() of '{name}' failed: {describe(error)}"
        return backend, found, "" if found else "it finds no device"

    def choose(self, name: str) -> Backend:
        """The backend for ``--device NAME``. ``auto``: of those that find a device, the highest priority."""
        if name != "auto":
            return self.backend(name)
        looked = {candidate: self.find(candidate) for candidate in sorted(self.backends)}
        usable = [b for b, found, _ in looked.values() if b is not None and found and b.capabilities.priority >= 0]
        if usable:
            return max(usable, key=lambda backend: backend.capabilities.priority)
        reasons = "; ".join(f"{name}: {why or 'not taken unless named'}" for name, (_, _, why) in looked.items())
        raise DeviceUnavailable(
            f"no registered device is usable ({reasons or 'none is registered'}); "
            "`pip install quire-plugin-cpu` runs anywhere"
        )


def contract_error(backend: Backend) -> str | None:
    """What is wrong with the contract version that a backend states, if anything."""
    stated = backend.capabilities.contract_version
    ours = ".".join(map(str, CONTRACT_VERSION))
    if stated is None:
        return f"does not state the contract it is built for (contract_version; this core speaks {ours})"
    if stated[0] != CONTRACT_VERSION[0] or stated[1] > CONTRACT_VERSION[1]:
        return f"is built for contract {stated[0]}.{stated[1]}, this core speaks {ours}"
    return None


OPERATIONS = (
    "page_bytes", "allocate_kv", "write_kv", "copy_pages", "plan_attention", "attention", "pack_weight", "linear", "embed",
    "rms_norm", "layer_norm", "rotary", "gated_act", "moe", "route", "penalize", "sample", "logprobs", "attention_block",
    "gated_mlp", "final_head", "communicator",
)  # fmt: skip
"""Everything that has a default under quire.reference."""


def native(backend: Backend) -> dict[str, bool]:
    """Which operations the backend's class defines itself; the others are the reference's."""
    return {name: getattr(type(backend), name) is not getattr(Backend, name) for name in OPERATIONS}


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def selection(names: Iterable[str] | None = None) -> tuple[str, ...] | None:
    """Which plugins to load: ``names`` (--plugins), else the variable QUIRE_PLUGINS (comma-separated), else all."""
    if names is not None:
        return tuple(names)
    variable = os.environ.get("QUIRE_PLUGINS")
    return None if variable is None else tuple(n.strip() for n in variable.split(",") if n.strip())


def load(only: Iterable[str] | None = None, found: Iterable[EntryPoint] | None = None) -> Registry:
    """Load core's own models and the plugins installed here (``found`` replaces them in tests)."""
    import quire.models

    registry = Registry()
    core = Plugin("core", "quire-core", quire.__version__)
    registry.plugins.append(core)
    _register(registry, core, quire.models)
    names = selection(only)
    points = sorted(entry_points(group=GROUP) if found is None else found, key=lambda e: (e.name, e.value))
    taken: dict[str, str] = {"core": "quire-core"}
    for point in points:
        if names is not None and point.name not in names:
            continue
        distribution = point.dist
        plugin = Plugin(
            point.name,
            distribution.name if distribution else "unknown",
            distribution.version if distribution else "unknown",
        )
        registry.plugins.append(plugin)
        if point.name in taken:
            plugin.refuse(f"the name '{point.name}' is already taken by {taken[point.name]}: uninstall one of the two")
            continue
        taken[point.name] = plugin.distribution
        try:
            module = point.load()
        except Exception as error:  # whatever a stranger's module raises on import is its own
            plugin.refuse(f"import of {point.value} failed: {describe(error)}")
            continue
        _register(registry, plugin, module)
    for name in names or ():
        if name not in taken:
            registry.plugins.append(
                Plugin(name, "not installed", "-", error="asked for, but no such plugin is installed")
            )
    return registry


def _register(registry: Registry, plugin: Plugin, module: Any) -> None:
    """Run one plugin's hooks, alone in its own manager, so that its mistakes are its own."""
    manager = pluggy.PluginManager("quire")
    manager.add_hookspecs(Hooks)
    try:
        manager.register(module, name=plugin.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        plugin.refuse(f"a hook is not one of Quire's or has wrong arguments: {error}")
        return

    def collector(kind: str) -> Callable[[str, Callable[[], Any]], None]:
        def register(name: str, factory: Callable[[], Any]) -> None:
            table = getattr(registry, kind)
            if name in table:
                owner = registry.owner(kind, name)
                plugin.refuse(f"'{name}' ({kind}) is already registered by '{owner.name}' ({owner.distribution})")
                return
            table[name] = factory
            plugin.registered[kind].append(name)

        return register

    def register_backend(
        name: str, factory: Callable[[], Any], begin: Callable[[int, int], None] | None = None
    ) -> None:
        collector("backends")(name, factory)
        if begin is not None and name in plugin.registered["backends"]:
            registry.begins[name] = begin

    collectors = {kind: collector(kind) for kind in KINDS} | {"backends": register_backend}
    for kind in KINDS:
        try:
            getattr(manager.hook, f"quire_register_{kind}")(register=collectors[kind])
        except Exception as error:
            plugin.refuse(f"quire_register_{kind} failed: {describe(error)}")
