"""Who is answered: hosts, origins, certificates, keys; what pages may do; what logs hold."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from conftest import Live, eventually
from demo_server import checkpoint
from test_broken_clients import Client
from test_command import parse

from quire.errors import ConfigError, ModelError
from quire.models.config import read_config
from quire.text.checkpoint import TextFiles
from quire_server import cli
from quire_server.network import LOOPBACK_NAMES, Network, host_allowed
from quire_server.serve import bind
from quire_server.state import Settings

PAGE = "https://page.example"
ROOT = Path(__file__).resolve().parents[2]


# -- hosts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("localhost:8000", True), ("LocalHost.:8000", True), ("a.localhost:1", True),
        ("127.0.0.1", True), ("127.0.0.1:8000", True), ("[::1]", True), ("[::1]:8000", True),
        ("evil.example", False), ("evil.example:8000", False), ("localhost.evil.example", False), ("evillocalhost", False),
        ("127.0.0.1.evil.example", False), ("evil.example@localhost", False), ("[::1].evil.example", False), ("[::1", False),
        ("", False), ("localhost/health?", False),
    ],
)  # fmt: skip
def test_names_of_this_machine(host, allowed):
    assert host_allowed(host, LOOPBACK_NAMES) == allowed
    assert host_allowed(host, ("*",))


def test_a_page_whose_name_was_pointed_here_gets_nothing(make_live):
    live = make_live(settings=Settings(network=Network(host="127.0.0.1")))
    with live.http() as http:
        assert http.get("/v1/models").status_code == 200
        for path in ("/", "/health", "/v1/models", "/engine", "/metrics", "/none"):
            refused = http.get(path, headers={"Host": "evil.example"})
            assert refused.status_code == 421
            error = refused.json()["error"]
            assert (error["code"], "--allowed-hosts" in error["message"]) == ("host_not_allowed", True)
        assert http.post("/v1/completions", json={"prompt": "x"}, headers={"Host": "evil.example"}).status_code == 421
    with Client(live.port) as one:
        two = b"GET /ping HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        assert one.send(two).response()[0] in (400, 421)
    with Client(live.port) as probe:  # no browser leaves the header out, but probes of HTTP/1.0 do
        assert probe.send(b"GET /ping HTTP/1.0\r\n\r\n").response()[0] == 200
    assert not live.engine.opened


def test_hosts_follow_the_address(make_live):
    def hosts(*flags: str) -> tuple[str, ...]:
        network = cli._settings(parse("demo", *flags)).network
        return network.hosts(network.host)

    assert hosts() == hosts("--host", "::1") == hosts("--host", "localhost") == LOOPBACK_NAMES
    assert hosts("--host", "0.0.0.0") == hosts("--host", "example.org") == ("*",)
    assert hosts("--allowed-hosts", "a.example", "*.b.example") == ("a.example", "*.b.example")
    assert hosts("--allowed-hosts", '["a.example"]') == ("a.example",)
    with make_live(settings=Settings(network=Network(allowed_hosts=("*.b.example",)))).http() as http:
        assert http.get("/ping", headers={"Host": "x.b.example:80"}).status_code == 200
        assert http.get("/ping", headers={"Host": "b.example"}).status_code == 421


@pytest.mark.parametrize("host", ["x/health?", "x/ping#", "x\\/health", "health", "x@/health"])
def test_no_header_changes_which_route_needs_a_key(make_live, host):
    live = make_live(settings=Settings(api_keys=("secret-key",)))
    with Client(live.port) as one:
        head = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-Host: /health\r\nX-Original-URL: /health\r\n"
        assert one.send(f"{head}Connection: close\r\n\r\n".encode()).response()[0] == 401


# -- what a request cannot bring ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_embeds", "gASVBAAAAAAAAABLAS4="), ("logits_processors", ["os.system"]), ("mm_processor_kwargs", {}),
        ("media_io_kwargs", {}), ("kv_transfer_params", {}), ("guided_decoding_backend", "outlines"),
        ("lora_path", "/x"), ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", {"tokenize": True}), ("chat_template_kwargs", {"messages": []}),
    ],
)  # fmt: skip
def test_neither_code_nor_tensors_nor_templates(live, http, field, value):
    before = len(live.engine.opened)
    message = {"messages": [{"role": "user", "content": "x"}], field: value}
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = http.post(path, json=message)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert http.post("/v1/completions", json={"prompt": "x", field: value}).json()["error"]["param"] == field
    assert len(live.engine.opened) == before


@pytest.mark.parametrize("kind", ["image_url", "audio_url", "video_url", "input_audio", "file"])
def test_no_url_is_fetched(live, http, kind):
    with bind("127.0.0.1", 0) as trap:
        trap.listen()
        trap.settimeout(0.3)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/"
        part = {"type": kind, kind: {"url": url}}
        body = {"messages": [{"role": "user", "content": [part]}]}
        assert http.post("/v1/chat/completions", json=body).status_code == 400
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path, has_tokenizer):
    """Hugging Face's auto_map names Python files of the checkpoint; nothing here looks at it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["auto_map"] = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
        settings["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        settings["tokenizer_class"] = "Evil"
        (folder / name).write_text(json.dumps(settings))
    if not has_tokenizer:
        (folder / "tokenizer.json").unlink()
    read_config(folder)
    with contextlib.nullcontext() if has_tokenizer else pytest.raises(ModelError):
        assert TextFiles(folder).tokenizer.encode("x")
    assert not ran.exists()
    for path in [*(ROOT / "core").rglob("*.py"), *(ROOT / "server").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        assert not re.search("trust_remote_code=True|spec_from_file_location", path.read_text()), path


# -- other origins ---------------------------------------------------------------------------------------------------
def test_other_origins_may_nothing_by_default(live, http):
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert http.options("/v1/completions", headers=asked).status_code == 405
    for answer in (http.get("/v1/models", headers={"Origin": PAGE}), http.options("/v1/completions", headers=asked)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x/y"]
)
def test_what_a_browser_sends_without_asking_is_no_request(live, http, kind):
    """A page can post these to any server (and read nothing), so they must not make it work."""
    before = len(live.engine.opened)
    content = json.dumps({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}).encode()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        refused = http.post(path, content=content, headers={} if kind is None else {"Content-Type": kind})
        assert refused.status_code == 415, refused.text
    assert len(live.engine.opened) == before


def test_origins_that_are_named_may_ask(make_live):
    settings = Settings(api_keys=("secret-key",), network=Network(allowed_origins=(PAGE,)))
    with make_live(settings=settings).http() as http:
        asked = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        before = http.options("/v1/completions", headers=asked)  # a browser asks it without the key
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == PAGE
        assert "access-control-allow-credentials" not in before.headers
        key = {"Authorization": "Bearer secret-key", "Origin": PAGE}
        answer = http.post("/v1/completions", json={"prompt": "x"}, headers=key)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        # A refusal can be read by the page too, or its author would not know what is wrong.
        refused = http.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        other = {**asked, "Origin": "https://other.example"}
        assert http.options("/v1/completions", headers=other).status_code == 400
        assert (
            "access-control-allow-origin"
            not in http.get("/v1/models", headers={**key, "Origin": "https://o.example"}).headers
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--allowed-origins", "*", "--allow-credentials"], "--allow-credentials"),
        (["--allowed-hosts", "a*.example"], "--allowed-hosts"),
        (["--ssl-keyfile", "x"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-ca-certs", "x"], "--ssl-ca-certs needs --ssl-certfile"),
        (["--ssl-certfile", "/no/such/file"], "--ssl-certfile"),
        (["--max-connections", "0"], "--max-connections must be above 0"),
        (["--write-timeout", "-1"], "--write-timeout must be above 0"),
    ],
)
def test_senseless_flags(flags, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        cli._settings(parse("demo", *flags))


def test_flags_become_the_network():
    network = cli._settings(
        parse(
            "demo", "--host", "0.0.0.0", "--allowed-origins", PAGE, "--allowed-methods", '["GET"]', "--allowed-headers", "*",
            "--allow-credentials", "--metrics-port", "9", "--metrics-host", "::1", "--timeout-keep-alive", "7",
            "--max-connections", "8", "--max-header-bytes", "9000", "--header-timeout", "1.5", "--write-timeout", "2.5",
        )
    ).network  # fmt: skip
    assert network == Network(
        host="0.0.0.0", allowed_origins=(PAGE,), allowed_methods=("GET",), allowed_headers=("*",), allow_credentials=True,
        metrics_port=9, metrics_host="::1", timeout_keep_alive=7, max_connections=8, max_header_bytes=9000,
        header_timeout=1.5, write_timeout=2.5,
    )  # fmt: skip
    assert cli._settings(parse("demo")).network == Network(host="127.0.0.1")


def test_every_answer_says_what_it_is_and_no_page_frames_the_page(http):
    for path in ("/", "/v1/models", "/metrics", "/none", "/pages/app.js"):
        assert http.get(path).headers.get_list("x-content-type-options") == ["nosniff"]
    assert "frame-ancestors 'none'" in http.get("/").headers["content-security-policy"]
    assert "'unsafe" not in http.get("/").headers["content-security-policy"]


# -- certificates ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate for localhost, one for a client, and the authority that signed both."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2")
    openssl("req", "-x509", *curve, "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority")
    for name, password in (("server", ("-passout", "pass:sesame")), ("client", ("-nodes",))):
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1")
        openssl(
            "req",
            "-x509",
            *curve,
            *password,
            *sign,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            "-subj",
            f"/CN={name}",
        )
    return folder


def network_of(*flags: str) -> Network:
    return cli._settings(parse("demo", *flags)).network


def test_https(make_live, certificates):
    server = ("--ssl-certfile", f"{certificates}/server.pem", "--ssl-keyfile", f"{certificates}/server.key")
    for password in ((), ("--ssl-keyfile-password", "wrong")):
        with pytest.raises(ConfigError, match="--ssl-certfile"):
            network_of(*server, *password)
    network = network_of(*server, "--ssl-keyfile-password", "sesame")
    live = make_live(settings=Settings(network=network))
    trusted = ssl.create_default_context(cafile=f"{certificates}/ca.pem")
    base = f"https://127.0.0.1:{live.port}"
    with httpx.Client(base_url=base, verify=trusted) as client:
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        with client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
    with pytest.raises(httpx.TransportError):
        live.http().get("/ping")
    old = ssl.create_default_context(cafile=f"{certificates}/ca.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert httpx.get(f"{base}/ping", verify=old).status_code == 200
    assert cli.address(_Listener(), "127.0.0.1", network.scheme) == "https://127.0.0.1:1"


class _Listener:
    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1


def test_clients_show_a_certificate(make_live, certificates):
    flags = ("--ssl-certfile", f"{certificates}/server.pem", "--ssl-keyfile", f"{certificates}/server.key")
    password = ("--ssl-keyfile-password", "sesame")
    live = make_live(
        settings=Settings(network=network_of(*flags, *password, "--ssl-ca-certs", f"{certificates}/ca.pem"))
    )
    context = ssl.create_default_context(cafile=f"{certificates}/ca.pem")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"https://127.0.0.1:{live.port}/ping", verify=context)
    context.load_cert_chain(f"{certificates}/client.pem", f"{certificates}/client.key")
    assert httpx.get(f"https://127.0.0.1:{live.port}/ping", verify=context).status_code == 200


# -- a port for the metrics ------------------------------------------------------------------------------------------
def test_metrics_elsewhere(make_live):
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    settings = Settings(api_keys=("secret-key",), network=Network(metrics_port=port))
    live: Live = make_live(settings=settings, metrics_listener=listener)
    key = {"Authorization": "Bearer secret-key"}
    metrics = f"http://127.0.0.1:{port}"
    with live.http(headers=key) as http:
        assert http.get("/metrics").status_code == 404
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    text = httpx.get(f"{metrics}/metrics", headers=key).text
    assert 'quire:request_success_total{finished_reason="length",model_name="demo"} 1.0' in text
    assert httpx.get(f"{metrics}/metrics").status_code == 401
    assert httpx.get(f"{metrics}/metrics", headers={**key, "Host": "evil.example"}).status_code == 421
    for path in ("/", "/v1/models", "/v1/completions", "/openapi.json", "/engine"):
        assert httpx.get(f"{metrics}{path}", headers=key).status_code == 404
    live.close()
    with socket.socket() as closed, pytest.raises(OSError):
        closed.connect(("127.0.0.1", port))


# -- logs ------------------------------------------------------------------------------------------------------------
MARKER = "xyzzy-marker"


def provoke(live: Live) -> None:
    """Send a marker in every place that it could be logged from, on good and bad roads alike."""
    bodies = [
        {"prompt": MARKER}, {"prompt": MARKER, "stream": True}, {"prompt": MARKER, "temperature": MARKER},
        {"prompt": MARKER, MARKER: 1}, {"prompt": MARKER, "stop": [MARKER] * 99}, {"prompt": MARKER, "max_tokens": 10**7},
        {"prompt": MARKER, "logit_bias": {MARKER: 1}}, {"prompt": MARKER, "structured_outputs": {"regex": MARKER + "("}},
        {"messages": [{"role": "user", "content": MARKER}]}, {"messages": [{"role": MARKER, "content": MARKER}]},
        {"messages": [{"role": "user", "content": MARKER}], "tools": [{"function": {"name": MARKER + "!"}}]},
        {"messages": [{"role": "user", "content": MARKER}], "chat_template": MARKER},
    ]  # fmt: skip
    with live.http() as http:
        for body in bodies:
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                http.post(path, json=body)
        http.post(
            "/v1/completions", content=f'{{"prompt": "{MARKER}'.encode(), headers={"Content-Type": "application/json"}
        )
        http.post(
            f"/v1/completions?{MARKER}", json=bodies[0], headers={"X-Request-Id": f"<{MARKER}>", "X-Other": MARKER}
        )
        http.get("/v1/models", headers={"Authorization": f"Bearer {MARKER}"})
    with Client(live.port) as garbage:
        garbage.send(f"{MARKER}\r\n\r\n".encode()).rest()
    with Client(live.port) as half:
        half.send(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{MARKER}".encode())


def test_no_log_holds_what_clients_sent(make_live, caplog):
    caplog.set_level(logging.DEBUG)
    for logger in ("httpcore", "httpx"):  # the client's own
        logging.getLogger(logger).setLevel(logging.WARNING)
    live = make_live()
    provoke(live)
    live.engine.breaks_after = 2
    provoke(live)
    assert eventually(lambda: caplog.text.count("/v1/completions 500") >= 2)
    assert MARKER not in caplog.text
