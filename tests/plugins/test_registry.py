"""Whatever is wrong with one plugin is said under its name, and the rest go on."""

from __future__ import annotations

import dataclasses
import sys
import types
from importlib.metadata import EntryPoint

import pytest

from quire import plugins
from quire.hardware import Backend, Capabilities, DeviceInfo, DeviceUnavailable, UnsupportedOnDevice, hookimpl


class Distribution:
    """As much of importlib.metadata's as a plugin is described by."""

    def __init__(self, name: str, version: str = "1.0") -> None:
        self.name, self.version = name, version


class Sound(Backend):
    capabilities = Capabilities(contract_version=(1, 0))

    def devices(self):
        return [DeviceInfo(0, "a device")]


@pytest.fixture
def plugin(monkeypatch):
    """Makes an entry point of a module with the given members."""

    def make(name: str, distribution: str | None = None, **members) -> EntryPoint:
        module = types.ModuleType(f"quire_test_{distribution or name}".replace("-", "_"))
        for key, value in members.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        point = EntryPoint(name=name, value=module.__name__, group="quire")
        vars(point)["dist"] = Distribution(distribution or f"dist-{name}")
        return point

    return make


def backends(**factories):
    @hookimpl
    def quire_register_backends(register):
        for name, factory in factories.items():
            register(name, factory)

    return {"quire_register_backends": quire_register_backends}


def errors(registry: plugins.Registry) -> dict[str, str]:
    return {p.distribution: p.error for p in registry.plugins if p.error}


def test_a_sound_plugin_is_registered_with_its_distribution(plugin):
    registry = plugins.load(found=[plugin("one", **backends(alpha=Sound))])
    assert errors(registry) == {}
    owner = registry.owner("backends", "alpha")
    assert (owner.name, owner.distribution, owner.version) == ("one", "dist-one", "1.0")
    assert registry.backend("alpha").name == "alpha"
    assert registry.backend("alpha") is not registry.backend("alpha")


def test_core_registers_its_models():
    registry = plugins.load(found=[])
    assert "LlamaForCausalLM" in registry.models
    assert registry.owner("models", "LlamaForCausalLM").distribution == "quire-core"


def test_two_plugins_with_one_name(plugin):
    first = plugin("same", "dist-a", **backends(alpha=Sound))
    second = plugin("same", "dist-b", **backends(beta=Sound))
    registry = plugins.load(found=[first, second, plugin("other", **backends(gamma=Sound))])
    assert errors(registry) == {
        "dist-b": "the name 'same' is already taken by dist-a: uninstall one of the two",
    }
    assert sorted(registry.backends) == ["alpha", "gamma"]


def test_nobody_takes_cores_name(plugin):
    registry = plugins.load(found=[plugin("core", "impostor", **backends(alpha=Sound))])
    assert "already taken by quire-core" in errors(registry)["impostor"]
    assert registry.backends == {}


def test_two_plugins_with_one_device(plugin):
    found = [plugin("a", **backends(alpha=Sound, mine=Sound)), plugin("b", **backends(alpha=Sound, yours=Sound))]
    registry = plugins.load(found=found)
    assert errors(registry) == {"dist-b": "'alpha' (backends) is already registered by 'a' (dist-a)"}
    assert registry.owner("backends", "alpha").name == "a"
    assert sorted(registry.backends) == ["alpha", "mine", "yours"]


def test_several_mistakes_are_all_named(plugin):
    found = [plugin("a", **backends(alpha=Sound, beta=Sound)), plugin("b", **backends(alpha=Sound, beta=Sound))]
    error = errors(plugins.load(found=found))["dist-b"]
    assert "'alpha' (backends)" in error
    assert "'beta' (backends)" in error


@pytest.mark.parametrize("stated", [(2, 0), (1, 99), (0, 9)])
def test_another_contract_version(plugin, stated):
    class Other(Sound):
        capabilities = Capabilities(contract_version=stated)

    registry = plugins.load(found=[plugin("new", **backends(alpha=Other)), plugin("ok", **backends(beta=Sound))])
    with pytest.raises(DeviceUnavailable, match=f"'alpha' is built for contract {stated[0]}.{stated[1]}") as caught:
        registry.backend("alpha")
    assert "dist-new" in str(caught.value)
    assert "alpha" in errors(registry)["dist-new"]
    assert registry.choose("auto").name == "beta"


def test_a_contract_version_that_is_not_stated(plugin):
    class Silent(Sound):
        capabilities = Capabilities()

    registry = plugins.load(found=[plugin("silent", **backends(alpha=Silent))])
    with pytest.raises(DeviceUnavailable, match="does not state the contract"):
        registry.backend("alpha")


def test_an_import_that_fails(plugin):
    broken = EntryPoint(name="broken", value="quire_no_such_module", group="quire")
    vars(broken)["dist"] = Distribution("dist-broken")
    registry = plugins.load(found=[broken, plugin("ok", **backends(alpha=Sound))])
    assert errors(registry)["dist-broken"].startswith("import of quire_no_such_module failed: ModuleNotFoundError")
    assert list(registry.backends) == ["alpha"]


def test_an_import_that_raises_anything(tmp_path, monkeypatch):
    (tmp_path / "quire_raises.py").write_text("raise OSError('libdevice.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint(name="raises", value="quire_raises", group="quire")
    error = plugins.load(found=[point]).plugins[-1].error
    assert error == "import of quire_raises failed: OSError: libdevice.so: cannot open shared object file"


def test_a_misspelled_hook(plugin):
    @hookimpl
    def quire_register_backend(register):
        register("alpha", Sound)

    found = [plugin("typo", quire_register_backend=quire_register_backend), plugin("ok", **backends(beta=Sound))]
    registry = plugins.load(found=found)
    assert "unknown hook 'quire_register_backend'" in errors(registry)["dist-typo"]
    assert list(registry.backends) == ["beta"]


def test_a_hook_with_wrong_arguments(plugin):
    @hookimpl
    def quire_register_backends(registry):
        registry("alpha", Sound)

    registry = plugins.load(found=[plugin("args", quire_register_backends=quire_register_backends)])
    assert "registry" in errors(registry)["dist-args"]
    assert registry.backends == {}


def test_a_hook_that_fails_halfway(plugin):
    @hookimpl
    def quire_register_backends(register):
        register("alpha", Sound)
        raise RuntimeError("no licence")

    registry = plugins.load(found=[plugin("half", quire_register_backends=quire_register_backends)])
    assert errors(registry) == {"dist-half": "quire_register_backends failed: RuntimeError: no licence"}
    assert list(registry.backends) == ["alpha"]


def test_factories_and_devices_that_fail_do_not_stop_auto(plugin):
    def factory():
        raise OSError("driver too old")

    class Raises(Sound):
        def devices(self):
            raise RuntimeError("initialisation failed")

    class Empty(Sound):
        def devices(self):
            return []

    found = [plugin("a", **backends(one=factory, two=Raises, three=Empty))]
    registry = plugins.load(found=found)
    with pytest.raises(DeviceUnavailable) as caught:
        registry.choose("auto")
    message = str(caught.value)
    assert "cannot make device 'one': OSError: driver too old" in message
    assert "devices() of 'two' failed: RuntimeError: initialisation failed" in message
    assert "three: it finds no device" in message
    registry = plugins.load(found=[*found, plugin("ok", **backends(four=Sound))])
    assert registry.choose("auto").name == "four"


def test_auto_takes_the_highest_priority_and_never_a_negative_one(plugin):
    def of(priority):
        capabilities = dataclasses.replace(Sound.capabilities, priority=priority)
        return type("Ranked", (Sound,), {"capabilities": capabilities})

    registry = plugins.load(found=[plugin("a", **backends(low=of(0), high=of(5), teaching=of(-1)))])
    assert registry.choose("auto").name == "high"
    assert registry.choose("teaching").name == "teaching"
    only = plugins.load(found=[plugin("a", **backends(teaching=of(-1)))])
    with pytest.raises(DeviceUnavailable, match="teaching: not taken unless named"):
        only.choose("auto")


def test_a_device_is_told_of_a_model_before_it_is_made(plugin, caplog):
    told = []

    def fails(weights, largest):
        raise OSError("no memory")

    @hookimpl
    def quire_register_backends(register):
        register("alpha", Sound, lambda *sizes: told.append(("alpha", *sizes)))
        register("beta", Sound)
        register("gamma", Sound, begin=fails)

    one = [plugin("one", quire_register_backends=quire_register_backends)]
    registry = plugins.load(found=one)
    for name in ("alpha", "beta", "auto", "unknown"):
        registry.begin(name, 300, 100)
    assert told == [("alpha", 300, 100)] * 2
    assert "begin() of 'gamma' failed: OSError: no memory" in caplog.text
    several = plugins.load(found=[*one, plugin("two", **backends(delta=Sound))])
    several.begin("auto", 300, 100)
    assert len(told) == 2, "the model may be on another plugin's device"
    several.begin("alpha", 0, 0)
    assert told[-1] == ("alpha", 0, 0)


def test_an_unknown_device_lists_what_there_is_and_what_was_refused(plugin):
    broken = EntryPoint(name="broken", value="quire_no_such_module", group="quire")
    registry = plugins.load(found=[broken, plugin("ok", **backends(alpha=Sound))])
    with pytest.raises(DeviceUnavailable) as caught:
        registry.backend("beta")
    assert "registered: alpha" in str(caught.value)
    assert "plugin 'broken' was refused: import of quire_no_such_module failed" in str(caught.value)


def test_restricting_by_argument_and_by_variable(plugin, monkeypatch):
    found = [plugin("a", **backends(alpha=Sound)), plugin("b", **backends(beta=Sound))]
    assert list(plugins.load(["a"], found=found).backends) == ["alpha"]
    monkeypatch.setenv("QUIRE_PLUGINS", "b, ")
    assert list(plugins.load(found=found).backends) == ["beta"]
    assert list(plugins.load(["a"], found=found).backends) == ["alpha"], "the argument wins over the variable"
    monkeypatch.setenv("QUIRE_PLUGINS", "")
    assert plugins.load(found=found).backends == {}
    monkeypatch.delenv("QUIRE_PLUGINS")
    assert sorted(plugins.load(found=found).backends) == ["alpha", "beta"]


def test_asking_for_a_plugin_that_is_not_installed(plugin):
    registry = plugins.load(["a", "missing"], found=[plugin("a", **backends(alpha=Sound))])
    assert errors(registry) == {"not installed": "asked for, but no such plugin is installed"}
    assert registry.plugins[-1].name == "missing"


def test_a_plugin_that_is_not_selected_is_not_imported():
    broken = EntryPoint(name="broken", value="quire_no_such_module", group="quire")
    assert errors(plugins.load([], found=[broken])) == {}


def test_an_attention_implementation_that_a_device_has_not_is_refused_by_name():
    """By the contract itself: a backend that declares none accepts none, whatever its plugin knows of the option."""
    from quire.hardware import DeviceOptions

    class Two(Backend):
        name = "two"
        capabilities = Capabilities(contract_version=(1, 0), attention_backends=frozenset({"SLOW", "FAST"}))

    Two().open(0, DeviceOptions(attention_backend="fast"))
    with pytest.raises(UnsupportedOnDevice, match="--attention-backend OTHER .* 'two': it offers FAST, SLOW; instead"):
        Two().open(0, DeviceOptions(attention_backend="OTHER"))
    with pytest.raises(UnsupportedOnDevice, match="one implementation of its own"):
        Backend().open(0, DeviceOptions(attention_backend="FAST"))
