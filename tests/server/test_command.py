"""The command: what it prints works when pasted, and signals end it as promised."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import eventually
from fake import FakeLLM

from quire.errors import ConfigError
from quire_server import cli
from quire_server.limits import Limits
from quire_server.model import ModelSettings
from quire_server.network import Network
from quire_server.serve import ServeError
from quire_server.state import Settings

HERE = Path(__file__).parent
SERVE = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from fake import FakeLLM
from quire_server.serve import bind, serve
from quire_server.state import Settings
listener = bind("127.0.0.1", 0)
ready = lambda server: print(listener.getsockname()[1], flush=True)
server = serve([FakeLLM(delay=0.02)], Settings(), listener, drain_timeout=float(sys.argv[2]), on_ready=ready)
sys.exit(asyncio.run(server))
"""


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.plugins = None
    return args


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("keys", [(), ("sesame",)])
def test_banner_works_when_pasted(make_live, template, keys):
    engine = FakeLLM()
    if not template:
        engine.text.tokenizer.chat_templates = {}
    live = make_live(engine, Settings(api_keys=keys))
    lines = cli.banner(live.server, live.base).splitlines()
    environment = {**os.environ, "QUIRE_API_KEY": "sesame"}
    curl = next(line for line in lines if line.startswith("curl "))
    done = subprocess.run(curl, shell=True, capture_output=True, text=True, env=environment, timeout=20)
    assert '"finish_reason":"' in done.stdout, done.stderr
    start = next(i for i, line in enumerate(lines) if line.startswith("from openai"))
    python = "\n".join(lines[start : start + 3])
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, env=environment, timeout=30)
    assert len(done.stdout) > 10, done.stderr
    assert not keys or "sesame" not in "\n".join(lines)


def test_flags_become_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    local = Network(host="127.0.0.1")
    assert cli._settings(parse()) == Settings(models=(ModelSettings(names=("demo",)),), network=local)
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    args = parse(
        str(tmp_path), "--api-key", "a", "--api-key", "b", "--max-n", "4", "--chat-template", str(template),
        "--response-role", "bot", "--trust-request-chat-template", "--disable-access-log", "--health-timeout", "1.5",
    )  # fmt: skip
    assert cli._settings(args) == Settings(
        models=(ModelSettings(names=(tmp_path.name,), response_role="bot", chat_template="{{ messages }}"),),
        api_keys=("a", "b"),
        limits=Limits(max_n=4),
        network=local,
        trust_request_chat_template=True,
        health_timeout=1.5,
        access_log=False,
    )
    assert cli._settings(parse("x", "--served-model-name", "one", "two")).models[0].names == ("one", "two")
    monkeypatch.setenv("QUIRE_API_KEY", "from-environment")
    assert cli._settings(parse()).api_keys == ("from-environment",)
    assert cli._settings(parse("x", "--api-key", "flag")).api_keys == ("flag",)


@pytest.mark.parametrize("arguments", [["--max-n", "0"], ["--chat-template", "/no/such/file"], ["--api-key", ""]])
def test_senseless_flags_are_refused(arguments):
    with pytest.raises(ConfigError, match=re.escape(arguments[0])):
        cli._settings(parse("demo", *arguments))


def test_taken_port_is_said_before_the_model_is_looked_at(make_live):
    live = make_live()
    with pytest.raises(ServeError, match=str(live.port)):
        cli.run(parse("/no/such/model", "--port", str(live.port)))


@pytest.fixture
def process():
    """process(drain_timeout) -> (running server process, its address)."""
    started = []

    def start(drain: float) -> tuple[subprocess.Popen, str]:
        one = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(HERE), str(drain)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(one)
        return one, f"http://127.0.0.1:{int(one.stdout.readline())}"

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_sigterm_drains(process):
    one, base = process(20)
    body = {"prompt": "x", "max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        one.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{base}/health").status_code == 503)
        assert list(lines)[-2] == "data: [DONE]"
    assert one.wait(10) == 0


def test_a_second_signal_stops(process):
    one, base = process(60)
    body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        one.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{base}/health").status_code == 503)
        assert one.poll() is None
        began = time.monotonic()
        one.send_signal(signal.SIGINT)
        rest = list(lines)
    assert one.wait(10) == 0
    assert time.monotonic() - began < 3
    assert "shutting down" in rest[-2] or "shutting down" in rest[-1]
