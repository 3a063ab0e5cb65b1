"""Built wheels, installed from nothing into an empty environment, serve: the three distributions are complete."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = ("core", "plugins/cpu", "server")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    # All instruction sets were built when the tests were installed: here one, beside the portable kernels.
    environment = {**os.environ, "SKBUILD_CMAKE_DEFINE": "QUIRE_ISAS=avx2"}
    subprocess.run([*command, *(str(ROOT / project) for project in PROJECTS)], check=True, timeout=600, env=environment)
    return sorted(folder.glob("*.whl"))


def test_wheels_hold_what_they_should_and_nothing_else(wheels):
    names = {wheel.name.split("-")[0]: zipfile.ZipFile(wheel).namelist() for wheel in wheels}
    assert set(names) == {"quire_core", "quire_plugin_cpu", "quire_server"}
    assert "quire/hardware.py" in names["quire_core"]
    assert "quire_server/demo/model.safetensors" in names["quire_server"]
    for files in names.values():
        assert any(name.endswith("LICENSE") for name in files)
        assert not [name for name in files if name.startswith("tests/") or "__pycache__" in name]
    assert max(wheel.stat().st_size for wheel in wheels) < 24 << 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheels_serve_from_an_empty_environment(wheels, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    torch = subprocess.run(
        [sys.executable, "-c", "from importlib.metadata import version; print(version('torch').split('+')[0])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"torch=={torch}"], check=True, timeout=600)
    subprocess.run([*install, *wheels], check=True, timeout=600)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    server = subprocess.Popen(
        [tmp_path / "venv/bin/quire", "serve", "--port", str(port), "--kv-cache-memory-bytes", "64M"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        body = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
        answer = ask(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
        assert "42" in answer["choices"][0]["message"]["content"]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def ask(url: str, body: dict, server: subprocess.Popen) -> dict:
    """POST, once the server has come up."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except OSError:
            assert server.poll() is None, server.stdout.read()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
