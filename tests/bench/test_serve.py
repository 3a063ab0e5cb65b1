"""``quire bench serve`` against a server whose answers are known, through the command line."""

import json

import pytest

from quire.bench.openai import EventLines, StreamReader
from quire.bench.records import RequestRecord
from quire.cli.main import main


@pytest.fixture
def bench(fake, tmp_path):
    """Runs the command; (exit status, results, whole JSON)."""
    server, base_url = fake

    def run(*flags, model="pieces-1", detailed=True):
        path = tmp_path / "result.json"
        command = ["bench", "serve", "--base-url", base_url, "--json", str(path), "--num-prompts", "12"]
        command += ["--model", model] if model else []
        command += ["--save-detailed"] if detailed else []
        status = main([*command, *flags])
        content = json.loads(path.read_text())
        return status, content["results"], content

    return server, run


def test_counts_are_the_servers(bench):
    server, run = bench
    status, figures, content = run("--input-len", "7", "--output-len", "5")
    assert status == 0
    assert (figures["completed"], figures["failed"], figures["errors"]) == (12, 0, {})
    assert (figures["input_tokens"], figures["output_tokens"], figures["output_arrivals"]) == (84, 60, 60)
    assert figures["requested_output_tokens"] == 60
    assert len(content["requests"]) == 12
    assert {len(request["arrivals"]) for request in content["requests"]} == {5}
    assert {request["finish_reason"] for request in content["requests"]} == {"length"}
    body = server.bodies[-1]
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"], body["stream"]) == (5, True, 0.0, True)
    assert body["stream_options"] == {"include_usage": True}
    assert len(server.bodies) == 13  # the first request, alone, is not measured
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 13
    assert all(len(prompt) == 7 and max(prompt) < 1000 for prompt in prompts)


def test_the_document_says_what_was_measured(bench):
    _, run = bench
    _, _, content = run(
        "--input-len", "4", "--output-len", "2", "--api-key", "secret", "--request-rate", "1000", detailed=False
    )
    assert content["kind"] == "serve"
    assert content["settings"]["input_len"] == "4:4"
    assert content["settings"]["request_rate"] == 1000
    assert content["results"]["server"]["version"] == {"version": "9.9"}
    machine, versions = content["environment"]["machine"], content["environment"]["versions"]
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert {"python", "torch", "quire-core"} <= set(versions)
    assert "requests" not in content
    assert "secret" not in json.dumps(content)


def test_tokens_that_come_together_are_counted_right(bench):
    _, run = bench
    _, figures, content = run("--input-len", "4", "--output-len", "10", "--continuous-usage-stats", model="pieces-4")
    assert figures["output_tokens"] == 120
    assert figures["output_arrivals"] == 36
    assert {tuple(request["counts"]) for request in content["requests"]} == {(4, 4, 2)}


def test_without_usage_in_each_chunk_the_total_is_still_the_servers(bench, capsys):
    _, run = bench
    _, figures, content = run("--input-len", "4", "--output-len", "10", model="pieces-4")
    assert figures["output_tokens"] == 120
    assert {tuple(request["counts"]) for request in content["requests"]} == {(0, 0, 0)}
    assert "120 tokens came in 36 pieces" in capsys.readouterr().out


def test_tokens_that_do_not_show_end_with_the_last_event(bench):
    _, run = bench
    _, figures, content = run("--input-len", "4", "--output-len", "9", model="hides")
    assert figures["output_tokens"] == 108
    assert {tuple(request["counts"]) for request in content["requests"]} == {(0, 0, 0)}
    assert all(request["arrivals"][-1] == request["finished"] for request in content["requests"])
    _, _, content = run("--input-len", "4", "--output-len", "9", "--continuous-usage-stats", model="hides")
    assert {tuple(request["counts"]) for request in content["requests"]} == {(1, 1, 7)}


def test_a_finish_reason_apart_is_no_token(bench, capsys):
    _, run = bench
    _, _, content = run("--input-len", "4", "--output-len", "9", model="apart")
    assert {len(request["arrivals"]) for request in content["requests"]} == {9}
    assert all(request["finished"] >= request["arrivals"][-1] for request in content["requests"])
    assert "pieces" not in capsys.readouterr().out


def test_chat(bench):
    server, run = bench
    _, figures, _ = run("--input-len", "6", "--output-len", "3", "--endpoint", "/v1/chat/completions")
    assert figures["input_tokens"] == 12 * (6 + 3)
    assert figures["output_arrivals"] == 36  # the chunk with the role alone is no token
    assert len(server.bodies[-1]["messages"][0]["content"].split()) == 6
    assert "prompt" not in server.bodies[-1]


def test_errors_in_streams_are_counted_and_left_out(bench, capsys):
    _, run = bench
    status, figures, _ = run("--input-len", "4", "--output-len", "3", model="breaks")
    assert status == 1
    assert (figures["completed"], figures["failed"]) == (8, 4)
    assert figures["errors"] == {"error in the stream: the step failed": 4}
    assert figures["output_tokens"] == 24
    assert "4 failed: error in the stream: the step failed" in capsys.readouterr().out


def test_a_server_that_refuses_ends_the_run_with_its_words(bench, capsys):
    _, run = bench
    with pytest.raises(FileNotFoundError):
        run(model="refuses")
    assert "the first request failed: HTTP 400: no such thing" in capsys.readouterr().err


def test_a_stream_that_stops_early_is_a_failure(bench, capsys):
    _, run = bench
    with pytest.raises(FileNotFoundError):
        run("--output-len", "3", model="cuts")
    assert "the stream ended without a finish reason" in capsys.readouterr().err


def test_a_server_that_sends_no_usage(bench):
    _, run = bench
    _, figures, _ = run("--input-len", "4", "--output-len", "3", model="silent")
    assert (figures["input_tokens"], figures["output_tokens"]) == (48, 36)


def test_concurrency_is_bounded(bench):
    server, run = bench
    _, figures, _ = run("--input-len", "4", "--output-len", "20", "--max-concurrency", "3", "--num-prompts", "30")
    assert figures["peak_concurrency"] <= 3
    assert server.peak == 3


def test_the_model_is_asked_for_and_the_rest_is_sent(bench):
    server, run = bench
    _, figures, _ = run(
        "--input-len", "4", "--output-len", "2", "--api-key", "k", "--header", "X-Tenant=t", "--no-ignore-eos",
        "--extra-body", '{"top_p": 0.5}', "--num-warmups", "3", model=None,
    )  # fmt: skip
    assert figures["server"]["model"] == server.bodies[-1]["model"] == "pieces-1"
    assert server.headers[-1]["authorization"] == "Bearer k"
    assert server.headers[-1]["x-tenant"] == "t"
    assert "ignore_eos" not in server.bodies[-1]
    assert server.bodies[-1]["top_p"] == 0.5
    assert len(server.bodies) == 12 + 1 + 3


def test_the_same_seed_sends_the_same_requests(bench):
    server, run = bench
    sent = []
    for seed in ("1", "1", "2"):
        run("--input-len", "3:9", "--output-len", "1:4", "--seed", seed, "--max-concurrency", "1")
        sent.append([(body["prompt"], body["max_tokens"]) for body in server.bodies])
        server.bodies.clear()
    assert sent[0] == sent[1] != sent[2]


def test_requests_from_a_file(bench, tmp_path):
    server, run = bench
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [5, 6, 7], "output_len": 2}\n{"prompt": [8], "output_len": 4}\n')
    _, figures, _ = run("--dataset-path", str(path))
    assert (figures["completed"], figures["input_tokens"], figures["output_tokens"]) == (2, 4, 6)
    assert {tuple(body["prompt"]) for body in server.bodies} == {(5, 6, 7), (8,)}


def test_kv_waste_is_sampled_from_the_metrics(bench, capsys):
    _, run = bench
    _, figures, _ = run("--input-len", "4", "--output-len", "4", "--metrics-interval", "0.001", "--request-rate", "60")
    assert figures["kv"]["samples"] >= 1
    assert figures["kv"]["waste_mean"] == pytest.approx(0.025)
    assert figures["kv"]["usage_max"] == pytest.approx(0.5)
    assert "2.5%" in capsys.readouterr().out
    assert run("--input-len", "4", "--output-len", "4", "--metrics-interval", "0")[1]["kv"] is None


def test_plot(bench, tmp_path):
    _, run = bench
    path = tmp_path / "picture.png"
    assert run("--input-len", "4", "--output-len", "4", "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_so_before_working(bench, monkeypatch, capsys):
    server, run = bench
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(FileNotFoundError):
        run("--plot", "x.png")
    assert "pip install 'quire-core[plot]'" in capsys.readouterr().err
    assert not server.bodies


def test_nobody_at_the_address(capsys):
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:1"]) == 2
    assert "no connection to 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_events_are_found_wherever_the_body_was_cut(size):
    body = b': comment\r\ndata: {"choices":[{"text":"a"}]}\r\n\r\ndata:[DONE]\n\n'
    found = []
    lines = EventLines(lambda data, now: found.append(data))
    for i in range(0, len(body), size):
        lines.feed(body[i : i + size], 0.0)
    assert found == [b'{"choices":[{"text":"a"}]}', b"[DONE]"]


def test_an_event_that_is_no_chunk_is_the_requests_error():
    reader = StreamReader(RequestRecord(started=0.0))
    reader.event(b"{not json", 1.0)
    reader.end()
    assert "not a completion chunk" in reader.record.error
