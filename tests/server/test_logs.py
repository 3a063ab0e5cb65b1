"""The log as JSON: every line of both processes is an object, requests are found by their id, and no prompt is in it."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from datetime import datetime

import httpx
import pytest
from conftest import eventually
from fake import FakeLLM

from quire.logs import FIELDS, JsonFormatter

SECRET = "the eagle lands at midnight"


@pytest.fixture
def lines():
    """The JSON objects that a server in this process logs."""
    written: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            written.append(self.format(record))

    handler = Keep()
    handler.setFormatter(JsonFormatter("server"))
    root = logging.getLogger()
    root.addHandler(handler)
    level, root.level = root.level, logging.INFO
    yield lambda: [json.loads(line) for line in written]
    root.removeHandler(handler)
    root.level = level


def access(lines, path):
    """The access line of the one request to ``path``, which is written after its answer."""
    found = []
    assert eventually(lambda: bool(found.extend(o for o in lines() if o.get("path") == path) or found))
    return found[0]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_one_object_with_its_numbers(make_live, lines, stream):
    live = make_live(FakeLLM(delay=0.001))
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 7, "stream": stream, "user": "ann"}
    body["metadata"] = {"team": "birds"}
    answer = httpx.post(f"{live.base}/v1/chat/completions", json=body, headers={"X-Request-Id": "mine-1"}, timeout=20)
    line = access(lines, "/v1/chat/completions")
    assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    assert (line["level"], line["logger"], line["process"]) == ("INFO", "quire.access", "server")
    assert (line["request_id"], line["model"], line["method"], line["status"]) == ("mine-1", "demo", "POST", 200)
    assert (line["completion_tokens"], line["finish_reasons"], line["user"]) == (7, ["length"], "ann")
    assert line["cached_tokens"] == 3
    assert line["metadata"] == {"team": "birds"}
    assert line["prompt_tokens"] == len(f"<user>{SECRET}</user><assistant>")
    assert 0 < line["ttft_ms"] <= line["duration_ms"]
    assert SECRET not in json.dumps(lines())
    assert "mine-1" in answer.text  # the answer's id, and the engine's, are found by it
    assert "mine-1" in live.engine.opened[0][0]


def test_jobs_of_a_request_add_up_and_a_refused_one_has_no_tokens(make_live, lines):
    live = make_live()
    body = {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 4}
    assert httpx.post(f"{live.base}/v1/completions", json=body, timeout=20).status_code == 200
    line = access(lines, "/v1/completions")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (5, 16)
    assert line["finish_reasons"] == ["length"] * 4
    assert httpx.post(f"{live.base}/tokenize", json={"nothing": 1}).status_code == 400
    refused = access(lines, "/tokenize")
    assert not {"prompt_tokens", "ttft_ms", "model", "finish_reasons"} & set(refused)


def test_the_same_id_given_twice_is_two_requests(make_live):
    live = make_live()
    for _ in range(2):
        answer = httpx.post(
            f"{live.base}/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "again"}, timeout=20
        )
        assert answer.headers["x-request-id"] == "again"
    assert len({request_id for request_id, *_ in live.engine.opened}) == 2


def test_a_failure_is_one_line_with_its_traceback():
    try:
        raise ValueError("no\nsuch\nthing")
    except ValueError:
        record = logging.getLogger("x").makeRecord(
            "x", logging.ERROR, "f", 1, "it \n%s", ("failed",), sys.exc_info(), extra={"request_id": "r", "other": 1}
        )
    text = JsonFormatter("engine").format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "it \nfailed"
    assert "ValueError" in line["exception"]
    assert line["request_id"] == "r"
    assert "other" not in line
    assert "request_id" in FIELDS


def test_every_line_of_both_processes_is_an_object():
    """The real command: what it and its engine write, from start to end."""
    command = [sys.executable, "-c", "import sys; from quire.cli.main import main; sys.exit(main())", "serve", "demo"]
    flags = [
        "--device",
        "cpu",
        "--threads",
        "1",
        "--port",
        "0",
        "--log-format",
        "json",
        "--kv-cache-memory-bytes",
        "8M",
    ]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        written = []
        for text in process.stderr:
            written.append(json.loads(text))
            if "Quire serves demo on" in written[-1]["message"]:
                break
        base = written[-1]["message"].rpartition(" ")[2]
        body = {"prompt": SECRET, "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"{base}/v1/completions", json=body, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        rest, printed = process.stderr.read(), process.stdout.read()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    written += [json.loads(text) for text in rest.splitlines()]
    assert printed == ""
    assert SECRET not in json.dumps(written)
    (line,) = [one for one in written if one.get("path") == "/v1/completions"]
    assert (line["completion_tokens"], line["status"]) == (3, 200)
