"""Clients that vanish, keys, probes, draining, and the command's own start and end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from conftest import eventually
from fake import FakeLLM

from quire_server.keys import ApiKeys
from quire_server.serve import ServeError, bind
from quire_server.state import Settings

LONG = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True}


def raw(body: dict) -> bytes:
    """A completions request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["x", "y"]}])
@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_ends_its_request(make_live, fields, stream):
    live = make_live(FakeLLM(delay=0.01))
    count = 2 if "prompt" in fields else 1
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(raw({**LONG, **fields, "stream": stream}))
        assert eventually(lambda: len(live.engine.running) == count)
        if stream:
            assert connection.recv(100)
    gone = time.monotonic()
    assert eventually(lambda: not live.engine.running)
    assert time.monotonic() - gone < 0.5
    assert len(live.engine.aborted) == count
    assert eventually(lambda: live.server.lifecycle.in_flight == 0)
    assert (
        f'finished_reason="abort",model_name="demo"}} {float(count * fields.get("n", 1))}'
        in httpx.get(f"{live.base}/metrics").text
    )


def test_closing_the_openai_stream_aborts(make_live):
    live = make_live(FakeLLM(delay=0.005))
    stream = live.openai().completions.create(
        model="demo", prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert live.engine.running
    stream.close()
    assert eventually(lambda: not live.engine.running)
    assert live.engine.aborted


def test_slow_reader_holds_the_stream_back(make_live):
    """What a client does not read is not made into text: the server's memory does not grow with it."""
    live = make_live(FakeLLM(max_model_len=10**6))
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(raw({**LONG, "max_tokens": 900_000, "stream": True}))
        assert eventually(lambda: bool(live.engine.running))
        counter = live.server.models[0].metrics.itl
        assert eventually(lambda: _settled(counter))
        assert live.engine.running
    assert eventually(lambda: not live.engine.running)


def _settled(histogram) -> bool:
    before = histogram.sum
    time.sleep(0.3)
    return before == histogram.sum != 0


class TestKeys:
    @pytest.fixture
    def live(self, make_live):
        return make_live(settings=Settings(api_keys=("first", "sécond")))

    def test_every_route_but_the_probes_and_the_page(self, live):
        with live.http() as http:
            routes = [
                "/engine",
                "/engine/stream",
                "/pages/",
                "/v1/models",
                "/v1/models/demo",
                "/metrics",
                "/version",
                "/load",
                "/openapi.json",
                "/none",
                "//health",
            ]
            routes += ["/health/", "/health/x", "/none?/health", "/tokenize", "/v1/completions"]
            for path in routes:
                for method in ("GET", "POST", "OPTIONS", "PUT", "HEAD"):
                    response = http.request(method, live.base + path)  # whole: httpx would make "/" of "//health"
                    assert response.status_code == 401, (method, path)
                    assert response.headers["www-authenticate"] == "Bearer"
            assert http.get("/health").status_code == 200
            for path in ("/ping", "/live", "/ready"):
                assert http.get(path).status_code == 200, path
            assert http.get("/").status_code == 200

    @pytest.mark.parametrize(
        "value", ["", "Bearer", "Bearer wrong", "first", "Basic first", "Bearer first2", "Bearer firs"]
    )
    def test_wrong(self, live, value):
        with live.http() as http:
            error = http.get("/v1/models", headers={"Authorization": value})
            assert error.status_code == 401
            assert error.json()["error"]["code"] == "invalid_api_key"

    def test_right(self, live):
        assert live.openai(api_key="first").models.list().data
        header = "bearer sécond".encode()
        assert httpx.get(f"{live.base}/v1/models", headers={"Authorization": header}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            live.openai(api_key="other").models.list()

    def test_no_key_is_kept(self):
        keys = ApiKeys(("secret",))
        assert keys.find(b"secret")
        assert keys.find(b"secret ") is None
        assert "secret" not in repr(vars(keys))


def test_loading_then_serving(make_live):
    engine = FakeLLM()
    engine.up.clear()
    live = make_live(engine, wait=False)
    with live.http() as http:
        assert eventually(lambda: http.get("/ping").status_code == 200)
        health = http.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "loading")
        assert http.get("/live").status_code == 200
        unready = http.get("/ready")
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, "loading")
        assert int(unready.headers["retry-after"]) > 0
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        engine.up.set()
        assert live.ready.wait(5)
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 2}


def test_engine_that_does_not_start(make_live, caplog):
    engine = FakeLLM()
    engine.dead = "the model does not fit"
    live = make_live(engine, wait=False)
    live.thread.join(10)
    assert live.status == 1
    assert "the model does not fit" in caplog.text


def test_stop_while_loading(make_live):
    engine = FakeLLM()
    engine.up.clear()
    live = make_live(engine, wait=False)
    assert eventually(lambda: httpx.get(f"{live.base}/ping").status_code == 200)
    live.ask_to_stop()
    live.thread.join(5)
    assert live.status == 0
    assert engine.shut


def test_drain_finishes_what_runs_and_takes_nothing_new(make_live):
    live = make_live(FakeLLM(delay=0.01), drain_timeout=10)
    result = {}

    def ask():
        stream = live.openai().completions.create(model="demo", prompt="x", max_tokens=60, stream=True)
        result["text"] = "".join(c.choices[0].text for c in stream)

    asking = threading.Thread(target=ask)
    asking.start()
    assert eventually(lambda: bool(live.engine.running))
    live.ask_to_stop()
    assert eventually(lambda: live.server.lifecycle.state == "draining")
    with live.http() as http:
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) > 0
        assert http.get("/health").status_code == 503
        unready = http.get("/ready")
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, "shutting_down")
        assert int(unready.headers["retry-after"]) > 0
        assert http.get("/live").status_code == 200
    asking.join(10)
    assert len(result["text"].encode()) > 50
    live.thread.join(10)
    assert live.status == 0
    assert live.engine.shut
    assert not live.engine.aborted


def test_drain_has_an_end(make_live):
    live = make_live(FakeLLM(delay=0.02), drain_timeout=0.3)
    errors = []

    def ask(stream):
        try:
            answer = live.openai().completions.create(
                model="demo", prompt="x", max_tokens=4000, stream=stream, extra_body={"ignore_eos": True}
            )
            list(answer)
        except openai.APIError as error:
            errors.append(error)

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in asking:
        thread.start()
    assert eventually(lambda: len(live.engine.running) == 2)
    live.ask_to_stop()
    for thread in asking:
        thread.join(10)
    live.thread.join(10)
    assert [str(e).count("shutting down") for e in errors] == [1, 1]
    assert not live.engine.running


def test_a_stream_past_the_deadline_ends_with_an_error_event(make_live):
    live = make_live(FakeLLM(delay=0.02), drain_timeout=0.3)
    with live.http() as http, http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        live.ask_to_stop()
        events = [line for line in lines if line]  # httpx would raise if the connection just broke
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert "data: [DONE]" not in events
    live.thread.join(10)
    assert live.status == 0


@pytest.mark.parametrize(("trouble", "code"), [("hangs", "engine_unresponsive"), ("dead", "engine_dead")])
def test_ready_asks_the_engine_and_live_does_not(make_live, trouble, code):
    live = make_live(settings=Settings(health_timeout=0.05))
    setattr(live.engine, trouble, "it has died" if trouble == "dead" else True)
    with live.http() as http:
        unready = http.get("/ready")
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, code)
        assert int(unready.headers["retry-after"]) > 0
        assert http.get("/live").status_code == 200
        live.engine.errored = True
        assert http.get("/live").status_code == 503


def test_port_in_use_is_said_at_once():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}"):
            bind("127.0.0.1", port)


def test_metrics_have_vllms_names(make_live):
    live = make_live(FakeLLM(delay=0.001))
    live.openai().completions.create(model="demo", prompt="abcd", max_tokens=10)
    with live.http() as http:
        text = http.get("/metrics").text
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name.replace('model_name="demo"', "").replace("{}", "").replace("{,", "{").replace(",}", "}")] = (
                float(value)
            )
    expected = {
        "quire:num_requests_running": 0,
        "quire:num_requests_waiting": 2,
        "quire:kv_cache_usage_perc": 0.25,
        "quire:prefix_cache_queries_total": 10,
        "quire:prefix_cache_hits_total": 0,
        "quire:num_preemptions_total": 7,
        "quire:engine_up": 1,
        "quire:time_to_first_token_seconds_count": 1,
        "quire:inter_token_latency_seconds_count": 9,
        "quire:e2e_request_latency_seconds_count": 1,
        "quire:request_prompt_tokens_sum": 4,
        "quire:request_generation_tokens_sum": 10,
        "quire:request_queue_time_seconds_sum": 0.25,
        "quire:request_prefill_time_seconds_sum": 0.75,
        "quire:request_decode_time_seconds_sum": 1.0,
        "quire:request_inference_time_seconds_sum": 1.75,
        "quire:request_prefill_kv_computed_tokens_sum": 1,
        "quire:request_max_num_generation_tokens_sum": 10,
        "quire:request_params_n_sum": 1,
        "quire:request_params_max_tokens_sum": 10,
        "quire:iteration_tokens_total_count": 3,
        "quire:iteration_tokens_total_sum": 30,
        'quire:iteration_tokens_total_bucket{le="8.0"}': 1,
        'quire:iteration_tokens_total_bucket{le="32.0"}': 3,
        'quire:request_success_total{finished_reason="length"}': 1,
    }
    assert {name: values.get(name) for name in expected} == expected


def test_two_servers_share_nothing(make_live):
    one, two = make_live(), make_live()
    one.openai().completions.create(model="demo", prompt="abc")
    assert 'quire:e2e_request_latency_seconds_count{model_name="demo"} 1.0' in httpx.get(f"{one.base}/metrics").text
    assert 'quire:e2e_request_latency_seconds_count{model_name="demo"} 0.0' in httpx.get(f"{two.base}/metrics").text


def test_openapi_document(http):
    document = http.get("/openapi.json").json()
    request = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "top_k", "cache_salt"} <= set(request)
    assert "/v1/chat/completions" in document["paths"]


def test_version_and_load(http):
    assert http.get("/version").json()["version"]
    assert http.get("/load").json() == {"server_load": 0}


def test_long_text_does_not_stall_the_loop(make_live):
    live = make_live(FakeLLM(max_model_len=10**7))
    slow = live.engine.text.tokenizer.encode

    def encode(text, add_special_tokens=True):
        time.sleep(0.5 if len(text) > 10_000 else 0)
        return slow(text)

    live.engine.text.tokenizer.encode = encode

    async def race():
        async with httpx.AsyncClient(base_url=live.base) as http:
            long = asyncio.ensure_future(http.post("/tokenize", json={"prompt": "x" * 100_000}))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            await http.get("/ping")
            took = time.monotonic() - began
            assert (await long).json()["count"] == 100_000
            return took

    assert asyncio.run(race()) < 0.25
