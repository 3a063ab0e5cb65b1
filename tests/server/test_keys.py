"""API keys from a file: who is let in, under which name, and that nobody's cache is another's."""

from __future__ import annotations

import hashlib
import logging
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import eventually
from demo_server import DemoServer
from fake import FakeLLM
from test_command import parse

from quire.cli.main import main
from quire.errors import ConfigError
from quire_server import cli
from quire_server.keys import ApiKeys, read_keys
from quire_server.state import Server, Settings

ALICE, BOB = "alice-secret-key", "bob-secret-key"
HERE = Path(__file__).parent


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(
        f"# who may ask\n\nalice:{ALICE}   # in plain\nbob:{sha256(BOB)} rpm=60 concurrent=4\n", encoding="utf-8"
    )
    path.chmod(0o600)
    return path


def header(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_file(file, caplog):
    keys = ApiKeys(("from-the-flag",), file)
    alice, bob, flag = (keys.find(key.encode()) for key in (ALICE, BOB, "from-the-flag"))
    assert [alice.name, bob.name, flag.name] == ["alice", "bob", "api-key-1"]
    assert (alice.requests_per_minute, bob.requests_per_minute, bob.concurrent_requests) == (None, 60, 4)
    for wrong in (sha256(BOB), sha256(ALICE), "alice", f"alice:{ALICE}", ALICE + " ", "", "é"):
        assert keys.find(wrong.encode()) is None
    assert ALICE not in repr(vars(keys))
    assert not caplog.text
    file.chmod(0o644)
    read_keys(file)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alice", "line 1: must be NAME:KEY"),
        ("al ice:secret-key", "line 1: must be NAME:KEY"),
        ("#\nal/ice:secret-key", "line 2: must be NAME:KEY"),
        ("alice:short", "line 1: the key of alice has less than 8"),
        ("alice:secret-key rps=3", "line 1: after the key of alice may stand rpm=NUMBER"),
        ("alice:secret-key rpm=0", "line 1: after the key"),
        ("alice:secret-key\nalice:other-key", "two keys are named alice"),
        (f"alice:secret-key\nbob:{sha256('secret-key')}", "bob and alice are the same key"),
        ("\n".join(f"n{i}:secret-{i}" for i in range(1025)), "1025 keys are more than 1024"),
        ("api-key-1:secret-key", "two keys are named api-key-1"),
        ("# nothing", "it holds no key"),
        (b"\xff", "--api-key-file"),
        (None, "--api-key-file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_its_secrets(tmp_path, text, said):
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    plain = ["--api-key", "other"] if "api-key-1" in said else []
    with pytest.raises(ConfigError) as refused:
        cli._settings(parse("demo", "--api-key-file", str(path), *plain))
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_names_reach_the_log_and_the_metrics(make_live, file, caplog):
    caplog.set_level(logging.INFO)
    live = make_live(settings=Settings(api_key_file=file))
    with live.http() as http:
        for key in (ALICE, BOB, ALICE):
            assert http.post("/v1/completions", json={"prompt": "x"}, headers=header(key)).status_code == 200
        assert http.get("/v1/models", headers=header("alice")).status_code == 401
        text = http.get("/metrics", headers=header(BOB)).text
    assert 'quire:requests_by_key_total{key="alice"} 2.0' in text
    assert 'quire:requests_by_key_total{key="bob"} 2.0' in text  # the metrics too
    assert eventually(lambda: len(re.findall(r"/v1/completions 200 .* key=alice", caplog.text)) == 2)
    assert not re.search(f"{ALICE}|{BOB}|{sha256(ALICE)}", caplog.text + text)


def test_key_as_anthropics_clients_send_it(make_live, file):
    with make_live(settings=Settings(api_key_file=file)).http() as http:
        assert http.get("/v1/models", headers={"X-Api-Key": ALICE}).status_code == 200
        assert http.get("/v1/models", headers={"X-Api-Key": "other"}).status_code == 401
        # One way of asking at a time: a wrong bearer is not made good by another header.
        both = {**header("other"), "X-Api-Key": ALICE}
        assert http.get("/v1/models", headers=both).status_code == 401


def test_reload(file, caplog):
    keys = ApiKeys((), file)
    file.write_text(f"carol:carol-secret-key\nbob:{BOB}\n")
    keys.reload()
    assert [keys.find(key.encode()) is not None for key in (ALICE, BOB, "carol-secret-key")] == [False, True, True]
    file.write_text("not a line of keys\n")
    keys.reload()
    assert keys.find(BOB.encode())
    assert "the keys stay as they were" in caplog.text
    file.write_text("# everybody is shut out\n")
    keys.reload()
    assert keys.find(BOB.encode()) is None
    assert keys, "without a key left the server is closed, not open"


SERVE = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fake import FakeLLM
from quire_server.serve import bind, serve
from quire_server.state import Settings
listener = bind("127.0.0.1", 0)
ready = lambda server: print(listener.getsockname()[1], flush=True)
sys.exit(asyncio.run(serve([FakeLLM()], Settings(api_key_file=Path(sys.argv[2])), listener, on_ready=ready)))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal here")
def test_sighup_reads_the_file_again(file):
    command = [sys.executable, "-c", SERVE, str(HERE), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            base = f"http://127.0.0.1:{int(process.stdout.readline())}"
            assert httpx.get(f"{base}/v1/models", headers=header(ALICE)).status_code == 200
            file.write_text("carol:carol-secret-key\n")
            process.send_signal(signal.SIGHUP)
            assert eventually(lambda: httpx.get(f"{base}/v1/models", headers=header(ALICE)).status_code == 401)
            assert httpx.get(f"{base}/v1/models", headers=header("carol-secret-key")).status_code == 200
        finally:
            process.terminate()
        assert process.wait(20) == 0


def test_command_makes_a_key_that_the_file_takes(tmp_path, capsys):
    assert main(["api-key", "dave"]) == 0
    key, line = re.findall(r"^(?:sk-|dave:).*$", capsys.readouterr().out, re.MULTILINE)
    assert key not in line
    path = tmp_path / "keys"
    path.write_text(line)
    assert ApiKeys((), path).find(key.encode()).name == "dave"
    assert main(["api-key", "dave"]) == 0
    assert key not in capsys.readouterr().out
    assert main(["api-key", "da ve"]) == 2
    assert "NAME" in capsys.readouterr().err


def test_flags(file, monkeypatch):
    monkeypatch.setenv("QUIRE_API_KEY", "a-clients-own")
    settings = cli._settings(parse("demo", "--api-key-file", str(file), "--isolate-cache"))
    assert (settings.api_keys, settings.api_key_file, settings.isolate_cache) == ((), file, True)
    assert "QUIRE_API_KEY" in cli.banner(_loaded(settings), "http://x")
    monkeypatch.delenv("QUIRE_API_KEY")
    for flag in ("--isolate-cache", "--max-requests-per-minute-per-key=5", "--max-concurrent-requests-per-key=5"):
        with pytest.raises(ConfigError, match=f"{flag.partition('=')[0]}: without API keys"):
            cli._settings(parse("demo", flag))
    with pytest.raises(ConfigError, match="--max-requests-per-minute-per-key must be above 0"):
        cli._settings(parse("demo", "--api-key", "k", "--max-requests-per-minute-per-key", "-1"))


def _loaded(settings):
    return Server([FakeLLM()], settings)


@pytest.mark.parametrize("isolate", [True, False])
def test_salts_are_of_the_key_and_of_the_request(make_live, file, isolate):
    live = make_live(settings=Settings(api_key_file=file, isolate_cache=isolate))
    with live.http() as http:
        for key in (ALICE, BOB, ALICE):
            for salt in (None, "a", "b"):
                for route, prompt in (
                    ("completions", {"prompt": ["x", "y"]}),
                    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
                ):
                    body = {**prompt, "cache_salt": salt, "max_tokens": 1}
                    assert http.post(f"/v1/{route}", json=body, headers=header(key)).status_code == 200
    salts = [options["cache_salt"] for _, _, options in live.engine.opened]
    alice, bob, again = salts[:9], salts[9:18], salts[18:]
    assert alice == again
    if isolate:
        assert not set(alice) & set(bob)
        assert len(set(alice)) == 3
        assert not [s for s in salts if sha256(ALICE) in s or ALICE in s]
    else:
        assert alice == bob == [None] * 3 + ["a"] * 3 + ["b"] * 3


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The whole server, with keys and a cache for each."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"alice:{ALICE}\nbob:{sha256(BOB)}\n")
    path.chmod(0o600)
    server = DemoServer("--api-key-file", str(path), "--isolate-cache")
    yield server
    assert server.close() == 0, server.log


@pytest.mark.slow
def test_second_key_gets_none_of_what_the_first_has_cached(guarded):
    prompt = " ".join(f"word{i}" for i in range(60))

    def cached(key: str, salt: str | None = None) -> int:
        client = guarded.client().with_options(api_key=key)
        done = client.completions.create(model="demo", prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt})
        return done.usage.prompt_tokens_details.cached_tokens

    assert cached(ALICE) == 0
    assert cached(ALICE) > 50
    assert cached(BOB) == 0
    assert cached(BOB) > 50
    assert cached(ALICE, "mine") == 0
    assert cached(ALICE, "mine") > 50
    assert cached(BOB, "mine") == 0


@pytest.mark.slow
def test_only_the_http_port_listens_and_only_here(guarded):
    """What the processes say to each other goes over sockets in a folder that is this user's alone."""
    own = psutil.Process(guarded.process.pid)
    processes = [own, *own.children(recursive=True)]
    listening = [c for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [(c.laddr.ip, c.laddr.port) for c in listening] == [("127.0.0.1", int(guarded.base.rpartition(":")[2]))]
    paths = {Path(c.laddr) for p in processes for c in p.net_connections("unix") if str(c.laddr).startswith("/")}
    folders = {path.parent for path in paths if "quire-" in str(path)}
    assert folders
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


@pytest.mark.slow
def test_neither_process_logs_a_prompt_or_a_key(guarded):
    marker = "xyzzy-marker"
    extra = [{}, {"stream": True}, {"max_tokens": 10**6}, {"seed": marker}, {marker: 1}, {"logit_bias": {"1000000": 1}},
             {"structured_outputs": {"regex": f"{marker}("}}, {"bad_words": [marker]}, {"stop": [marker]}]  # fmt: skip
    with httpx.Client(base_url=guarded.base, headers=header(ALICE), timeout=60) as http:
        statuses = {http.post("/v1/completions", json={"prompt": marker, **fields}).status_code for fields in extra}
        assert statuses == {200, 400}
        http.get("/v1/models", headers=header(marker))
        with http.stream(
            "POST", "/v1/completions", json={"prompt": marker, "stream": True, "max_tokens": 500}
        ) as stream:
            next(stream.iter_lines())
    assert eventually(lambda: "key=alice" in guarded.log)
    assert not re.search(f"{marker}|{ALICE}|{BOB}|{sha256(BOB)}", guarded.log + guarded.printed)
