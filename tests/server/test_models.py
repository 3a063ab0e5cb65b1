"""Several models in one server: each request reaches its own engine with its own tokenizer, limits and parsers, and
what is said of the server is said of each model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import threading
from collections import Counter

import httpx
import openai
import psutil
import pytest
from browser import CHROMIUM, Browser
from conftest import Live, eventually
from demo_server import DemoServer
from fake import FakeLLM
from test_errors import error_of
from test_page import PagedLLM

from quire.cli import top
from quire.cli.http import ServerAddress
from quire.cli.main import main
from quire.errors import EngineDead
from quire.message import EngineStats
from quire_server.batch_settings import BatchSettings
from quire_server.model import ModelSettings
from quire_server.parsers import Parsers
from quire_server.run_batch import run_batch
from quire_server.state import Settings

ASK = [{"role": "user", "content": "hello"}]
SETTINGS = Settings(
    models=(
        ModelSettings(names=("large", "gpt-4o"), parsers=Parsers(tool="hermes")),
        ModelSettings(
            names=("small",), parsers=Parsers(tool="glm45"), chat_template="{{ messages[-1].content }}{{ tools }}"
        ),
    ),
    health_timeout=0.3,
)
SCRIPTS = {"large": "I am the large one.", "small": "Small."}


def engines() -> list[FakeLLM]:
    made = [PagedLLM(max_model_len=4096), PagedLLM(max_model_len=64)]
    for engine, script in zip(made, SCRIPTS.values(), strict=True):
        engine.script = script
    return made


@pytest.fixture(scope="module")
def live():
    one = Live(engines(), SETTINGS)
    yield one
    one.close()


@pytest.fixture(scope="module")
def client(live):
    return live.openai()


@pytest.fixture(scope="module")
def http(live):
    with live.http() as one:
        yield one


# -- which engine ----------------------------------------------------------------------------------------------------
def asked(live) -> tuple[int, int]:
    return tuple(len(engine.opened) for engine in live.engines)


@pytest.mark.parametrize(("name", "index"), [("large", 0), ("gpt-4o", 0), ("small", 1)])
def test_every_route_reaches_the_model_that_is_named(live, client, http, name, index):
    script = list(SCRIPTS.values())[index]
    before = asked(live)
    assert client.chat.completions.create(model=name, messages=ASK).choices[0].message.content == script
    with client.chat.completions.stream(model=name, messages=ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == script
    done = client.completions.create(model=name, prompt="x", max_tokens=40)
    assert (done.model, done.choices[0].text) == (name, script)
    response = client.responses.create(model=name, input="hello")
    assert (response.model, response.output_text) == (name, script)
    message = {"model": name, "max_tokens": 40, "messages": ASK}
    answer = http.post("/v1/messages", json=message).json()
    assert (answer["model"], answer["content"][0]["text"]) == (name, script)
    after = asked(live)
    assert after[index] - before[index] == 5
    assert after[1 - index] == before[1 - index]
    # What needs no engine has the model's own tokenizer, template and context.
    counted = http.post("/tokenize", json={"model": name, "messages": ASK}).json()
    assert (counted["max_model_len"], counted["count"]) == ((4096, 29), (64, 9))[index]
    assert http.post("/v1/messages/count_tokens", json=message | {"max_tokens": 1}).status_code == 400
    tokens = http.post("/v1/messages/count_tokens", json={"model": name, "messages": ASK}).json()
    assert tokens["input_tokens"] == counted["count"]
    assert http.post("/detokenize", json={"model": name, "tokens": [104, 105]}).json() == {"prompt": "hi"}
    refused = error_of(http.post("/v1/embeddings", json={"model": name, "input": "x" * 50}), 400)
    assert name in refused["message"]


ROUTES = {
    "/v1/chat/completions": {"messages": ASK},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
    "/v1/embeddings": {"input": "x"},
}


@pytest.mark.parametrize("route", ROUTES)
def test_another_name_is_not_found_and_none_is_not_guessed(http, route):
    error = error_of(http.post(route, json={**ROUTES[route], "model": "medium"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "large, gpt-4o, small" in error["message"]
    error = error_of(http.post(route, json=ROUTES[route]), 400)
    assert (error["code"], error["param"]) == ("missing_required_parameter", "model")


def test_openais_client_says_not_found(client):
    with pytest.raises(openai.NotFoundError, match="large, gpt-4o, small"):
        client.chat.completions.create(model="medium", messages=ASK)


def test_models_are_listed_with_their_aliases(client):
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert {name: (card["root"], card["max_model_len"]) for name, card in cards.items()} == {
        "large": ("large", 4096), "gpt-4o": ("large", 4096), "small": ("small", 64),
    }  # fmt: skip
    assert client.models.retrieve("gpt-4o").model_dump() == cards["gpt-4o"]


def test_limits_and_parsers_are_the_models_own(live, client):
    long = "x" * 100
    assert client.completions.create(model="large", prompt=long, max_tokens=5).usage.prompt_tokens == 100
    with pytest.raises(openai.BadRequestError, match="holds 64"):
        client.completions.create(model="small", prompt=long, max_tokens=5)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
    calls = {
        "large": '<tool_call>{"name": "f", "arguments": {"a": "1"}}</tool_call>',
        "small": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    }
    live.engines[1].info.max_model_len = 4096
    try:
        for engine, (name, text) in zip(live.engines, calls.items(), strict=True):
            engine.script = text
            (choice,) = client.chat.completions.create(model=name, messages=ASK, tools=[tool]).choices
            assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": "1"}
            client.chat.completions.create(model=name, messages=ASK, tools=[tool], tool_choice="required")
            assert ("arg_key" in engine.opened[-1][1].structured_outputs.grammar) is (name == "small")
    finally:
        live.engines[1].info.max_model_len = 64
        for engine, script in zip(live.engines, SCRIPTS.values(), strict=True):
            engine.script = script


def test_a_response_goes_on_with_another_model(client):
    first = client.responses.create(model="large", input="hello")
    second = client.responses.create(model="small", input="and?", previous_response_id=first.id)
    assert (second.model, second.output_text) == ("small", SCRIPTS["small"])


# -- what is said of each --------------------------------------------------------------------------------------------
def test_health_is_of_all_or_of_one(make_live):
    both = engines()
    live = make_live(both, SETTINGS)
    with live.http() as http:
        assert http.get("/health").json() == {
            "status": "ok", "running": 0, "waiting": 4,
            "models": {"large": {"running": 0, "waiting": 2}, "small": {"running": 0, "waiting": 2}},
        }  # fmt: skip
        both[1].restarting = True
        for path in ("/health", "/ready"):
            error = error_of(http.get(path), 503)
            assert error["code"] == "engine_restarting"
            assert error["message"].startswith("small: engine restarting")
            assert http.get(f"{path}?model=gpt-4o").status_code == 200
            assert http.get(f"{path}?model=small").status_code == 503
            assert http.get(f"{path}?model=other").status_code == 404
        assert http.get("/live").status_code == 200
        assert http.post("/v1/completions", json={"model": "large", "prompt": "x"}).status_code == 200
        both[1].restarting, both[1].hangs = False, True
        assert "small: the engine did not answer within 0.3 s" in error_of(http.get("/health"), 503)["message"]
        both[1].errored, both[1].dead = True, "it crashed"
        assert error_of(http.get("/live"), 503)["message"] == "small: the engine is gone for good"
        assert http.get("/live?model=large").status_code == 200
        assert http.get("/health?model=large").status_code == 200
        assert http.post("/v1/completions", json={"model": "small", "prompt": "x"}).status_code == 503


def test_metrics_carry_the_models_name(make_live):
    both = engines()
    live = make_live(both, SETTINGS)
    with live.http() as http:
        for name, count in (("large", 2), ("gpt-4o", 1), ("small", 1)):
            for _ in range(count):
                http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 3})
        both[1].hangs = True
        text = http.get("/metrics").text

    def value(name: str, model: str) -> float | None:
        sample = re.search(rf'^quire:{name}\{{(?:.*,)?model_name="{model}"\}} (\S+)$', text, re.MULTILINE)
        return float(sample[1]) if sample else None

    assert (value("engine_up", "large"), value("engine_up", "small")) == (1, 0)
    assert (value("num_requests_waiting", "large"), value("num_requests_waiting", "small")) == (2, None)
    requests = "e2e_request_latency_seconds_count"
    assert (value(requests, "large"), value(requests, "small"), value(requests, "gpt-4o")) == (3, 1, None)
    assert 'quire:request_success_total{finished_reason="length",model_name="large"} 3.0' in text
    assert re.search(r"^quire:event_loop_delay_seconds_count \d", text, re.MULTILINE)


def test_engine_shows_the_one_that_is_asked_for(live, http):
    assert http.get("/engine").json()["model"] == "large"
    for name, own, length in (("gpt-4o", "large", 4096), ("small", "small", 64)):
        view = http.get(f"/engine?model={name}").json()
        assert (view["model"], view["max_model_len"], view["models"]) == (own, length, ["large", "small"])
        with http.stream("GET", f"/engine/stream?model={name}") as stream:
            first = next(line for line in stream.iter_lines() if line.startswith("data:"))
        assert json.loads(first[5:])["model"] == own
    assert error_of(http.get("/engine?model=other"), 404)["code"] == "model_not_found"
    assert http.get("/engine/stream?model=other").status_code == 404


def test_top_shows_all_or_one(live, capsys):
    histories = top.watched(ServerAddress(live.base), None)
    assert list(histories) == ["large", "small"]
    assert list(top.watched(ServerAddress(live.base), "small")) == ["small"]
    assert main(["top", live.base, "--once", "--interval", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in re.findall(r"quire top\s+(\w+) on", shown)] == ["large", "small"]


def test_top_goes_on_without_one(make_live, capsys):
    both = engines()
    live = make_live(both, SETTINGS)
    both[1].hangs = True
    assert main(["top", live.base, "--once", "--interval", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "large on fake" in shown
    assert "small at" in shown
    assert "did not answer" in shown


def test_chat_changes_the_model(live, capsys, monkeypatch):
    import io

    script = "hi\n/model\n/model small\nhi\n/model nothing\n/exit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    assert main(["chat", "--base-url", live.base]) == 0
    shown = capsys.readouterr()
    said = [line for line in shown.out.splitlines() if line in SCRIPTS.values()]
    assert said == [SCRIPTS["large"], SCRIPTS["small"]]
    assert "* large\n  gpt-4o\n  small" in shown.out
    assert "no such model: nothing" in shown.err


# -- start, drain, batches -------------------------------------------------------------------------------------------
def test_requests_are_taken_when_all_have_started(make_live):
    both = engines()
    both[1].up.clear()
    live = make_live(both, SETTINGS, wait=False)
    with live.http() as http:
        for path in ("/ready", "/ready?model=large", "/health"):
            assert eventually(lambda path=path: _status(http, path) == 503)
        assert error_of(http.post("/v1/completions", json={"model": "large", "prompt": "x"}), 503)["code"] == "loading"
        both[1].up.set()
        assert live.ready.wait(10)
        assert http.get("/ready").status_code == 200
    live.close()
    assert [engine.shut for engine in both] == [True, True]


def _status(http, path):
    with contextlib.suppress(httpx.TransportError):
        return http.get(path).status_code


def test_one_that_does_not_start_ends_the_server_with_its_name(make_live, caplog):
    both = engines()
    both[1].dead = "no such file"
    live = make_live(both, SETTINGS, wait=False)
    live.thread.join(10)
    assert live.status == 1
    assert "small: no such file" in caplog.text
    assert both[0].shut


def test_a_drain_waits_for_all(make_live):
    both = [FakeLLM(delay=0.01), FakeLLM(delay=0.01)]
    live = make_live(both, SETTINGS, drain_timeout=10)
    with live.http() as http:
        texts = []

        def run(name):
            texts.append(http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 40}).json())

        threads = [threading.Thread(target=run, args=(name,)) for name in ("large", "small")]
        for thread in threads:
            thread.start()
        assert eventually(lambda: all(engine.running for engine in both))
        live.ask_to_stop()
        for thread in threads:
            thread.join(10)
    assert {text["choices"][0]["finish_reason"] for text in texts} == {"length"}


def lines(*names: str) -> bytes:
    made = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": "x"}}
        for i, name in enumerate(names)
    ]
    return b"\n".join(json.dumps(line).encode() for line in made)


def test_a_batch_has_a_model_in_each_line(make_live, tmp_path):
    live = make_live(engines(), Settings(models=SETTINGS.models, batches=BatchSettings(data_dir=str(tmp_path))))
    client = live.openai()
    file = client.files.create(file=("in.jsonl", lines("large", "small", "gpt-4o", "other")), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert eventually(lambda: client.batches.retrieve(batch.id).status == "completed", 10)
    done = client.batches.retrieve(batch.id)
    assert (done.request_counts.completed, done.request_counts.failed) == (3, 1)
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    told = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    assert [told[i]["choices"][0]["text"] for i in "012"] == [
        SCRIPTS["large"][:16],
        SCRIPTS["small"],
        SCRIPTS["large"][:16],
    ]
    errors = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
    assert [error["response"]["status_code"] for error in errors] == [404]


def test_run_batch_over_two(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines("large", "small"))
    both = engines()
    assert asyncio.run(run_batch(both, SETTINGS, str(source), str(target), 4)) == 0
    told = {one["custom_id"]: one["response"]["body"] for one in map(json.loads, target.read_text().splitlines())}
    assert [told[i]["model"] for i in "01"] == ["large", "small"]
    assert [len(engine.opened) for engine in both] == [1, 1]
    assert all(engine.shut for engine in both)


def test_a_batch_waits_for_its_own_engine_alone(tmp_path):
    """An engine that is gone for good ends the run; one that merely restarts, or another's death, does not."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    both = engines()
    both[0].errored, both[0].dead = True, None  # gone, but nobody asks for it
    source.write_bytes(lines("small", "small"))
    assert asyncio.run(run_batch(both, SETTINGS, str(source), str(target), 4)) == 0
    both = engines()

    async def die(*_, **__):
        both[1].errored, both[1].dead = True, "it crashed"

    both[1].start = die
    with pytest.raises(Exception, match="gone for good"):
        asyncio.run(run_batch(both, SETTINGS, str(source), str(tmp_path / "again"), 4))


# -- two engines -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two():
    flags = (
        "--kv-cache-memory-bytes",
        "16M",
        "--model-flags",
        "small=--max-model-len 512 --served-model-name small tiny",
    )
    server = DemoServer(*flags, models=("large=demo", "small=demo"))
    yield server
    assert server.close() == 0, server.log


def processes(server: DemoServer) -> list[psutil.Process]:
    found = psutil.Process(server.process.pid).children()
    return sorted((p for p in found if "quire.engine.process" in " ".join(p.cmdline())), key=lambda p: p.create_time())


def texts(server: DemoServer, kill: int | None = None) -> list[str]:
    """What streams to both models say; engine ``kill`` is killed once all have begun."""
    client = server.client()
    options = {"prompt": "One day", "max_tokens": 200, "temperature": 1, "extra_body": {"ignore_eos": True}}
    jobs = [(name, seed) for seed in range(3) for name in ("large", "tiny")]
    made: dict[tuple[str, int], str] = {}
    begun = Counter()

    def run(name: str, seed: int) -> None:
        text = ""
        for chunk in client.completions.create(model=name, seed=seed, stream=True, **options):
            begun[name, seed] += 1
            text += chunk.choices[0].text
        made[name, seed] = text

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    if kill is not None:
        assert eventually(lambda: len(begun) == len(jobs), 30)
        os.kill(processes(server)[kill].pid, signal.SIGKILL)
    for thread in threads:
        thread.join(90)
    return [made[job] for job in jobs]


def test_one_engine_dies_and_both_go_on(two):
    undisturbed = texts(two)
    # Each model of the same checkpoint says the same, and one spare process waits for both.
    assert undisturbed[0::2] == undisturbed[1::2]
    assert eventually(lambda: len(processes(two)) == 3, 15)
    before = [p.pid for p in processes(two)]
    assert texts(two, kill=1) == undisturbed
    assert psutil.pid_exists(before[0])
    assert two.log.count("starting it again") == 1
    assert httpx.get(f"{two.base}/health", timeout=20).json()["models"].keys() == {"large", "small"}
    cards = httpx.get(f"{two.base}/v1/models", timeout=20).json()["data"]
    assert {card["id"]: card["max_model_len"] for card in cards} == {"large": 2048, "small": 512, "tiny": 512}


def test_what_was_divided_is_printed(two):
    assert "for 2 models" in two.printed
    assert re.search(r"  small: weights .*KV cache", two.printed)
    assert re.search(r"  large: 1 thread on the cores \d", two.printed)


class TwoFaces(PagedLLM):
    """An engine that says how many run, so that views of two can be told apart."""

    running_now = 0

    async def stats(self, pages: bool = False, timeout: float = 5.0) -> EngineStats:
        if self.dead:
            raise EngineDead(self.dead)
        stats = await super().stats(pages, timeout)
        stats.running = self.running_now
        return stats


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_chooses_a_model(make_live):
    both = [TwoFaces(), TwoFaces()]
    for i, (engine, script) in enumerate(zip(both, SCRIPTS.values(), strict=True)):
        engine.script, engine.running_now = script, 11 * (i + 1)
    live = make_live(both, SETTINGS)
    browser = Browser()
    running = "document.querySelector('#numbers dd')?.textContent"

    def ask() -> None:
        browser.run("document.getElementById('prompt').focus()")
        browser.type("hello")
        browser.key("Enter", "\r")

    try:
        browser.open(f"{live.base}/")
        browser.wait(f"{running} === '11'")
        assert browser.run("[...document.getElementById('models').options].map((o) => o.value)") == ["large", "small"]
        ask()
        browser.wait(f"document.getElementById('log').innerText.includes({json.dumps(SCRIPTS['large'])})")
        browser.run("(() => { const s = document.getElementById('models'); s.value = 'small';"
                    " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
        browser.wait(f"{running} === '22'")
        assert browser.run("document.title").startswith("small")
        browser.wait("!document.getElementById('send').disabled")
        ask()
        browser.wait(f"document.getElementById('log').innerText.includes({json.dumps(SCRIPTS['small'])})")
        assert browser.run("document.querySelectorAll('.message.user').length") == 2  # the conversation goes on
        assert browser.run("getComputedStyle(document.getElementById('model')).display") == "none"
        assert not browser.complaints()
    finally:
        browser.close()
    assert [len(engine.opened) for engine in both] == [1, 1]
