"""What must not drift: core names no device, light things load no torch, nothing unpickles or evaluates."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "core" / "quire").rglob("*.py"))
SOURCES = (
    CORE + sorted((ROOT / "server" / "quire_server").rglob("*.py")) + sorted((ROOT / "plugins").rglob("quire_*/*.py"))
)
DEVICE_WORDS = re.compile(r"cuda|\brocm|\bhip\b|\bxpu|triton", re.IGNORECASE)


def test_sources_are_found():
    assert len(CORE) > 40
    assert len(SOURCES) > len(CORE)


def test_core_names_no_device():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in CORE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if DEVICE_WORDS.search(line)
    ]
    assert found == []


def test_the_contract_stays_small():
    assert len((ROOT / "core/quire/hardware.py").read_text().splitlines()) <= 367


@pytest.mark.parametrize(
    "module",
    ["quire", "quire.hardware", "quire.spec", "quire.config", "quire.message", "quire.plugins", "quire.cli.main",
     "quire.cli.engine_args", "quire.scheduler.scheduler", "quire.engine.async_llm", "quire_server.app", "quire_server.cli",
     "quire_cpu"],
)  # fmt: skip
def test_importing_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text())
    assert not _imports(tree) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", ["scheduler", "kv"])
def test_scheduling_knows_no_tensor(folder):
    for path in (ROOT / "core/quire" / folder).rglob("*.py"):
        assert "torch" not in _imports(ast.parse(path.read_text())), path


def test_plugins_import_only_the_contract():
    for path in (ROOT / "plugins").rglob("quire_*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quire."):
                assert node.module == "quire.hardware", f"{path}:{node.lineno} imports {node.module}"
