"""Traces: what a span says, that it continues the caller's trace, and that it arrives at a collector."""

from __future__ import annotations

import gzip
import http.server
import subprocess
import sys
import threading

import httpx
import pytest
from conftest import eventually
from fake import FakeLLM
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from quire.errors import ConfigError
from quire_server import tracing
from quire_server.state import Settings

ENDPOINT = "http://127.0.0.1:1/v1/traces"
SECRET = "the eagle lands at midnight"


@pytest.fixture
def spans(make_live, monkeypatch):
    """(a traced server, a function that gives its spans when there are as many as expected)."""
    memory = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "exporter", lambda endpoint: memory)
    live = make_live(FakeLLM(delay=0.001), Settings(otlp_traces_endpoint=ENDPOINT))

    def finished(count: int = 1):
        def come() -> bool:
            live.server.tracing.provider.force_flush()
            return len(memory.get_finished_spans()) >= count

        assert eventually(come)
        found = memory.get_finished_spans()
        assert len(found) == count
        return found

    return live, finished


def chat(live, headers=None, **fields):
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, "stop": [SECRET], **fields}
    return httpx.post(f"{live.base}/v1/chat/completions", json=body, headers=headers, timeout=20)


@pytest.mark.parametrize("stream", [True, False])
def test_a_span_says_what_the_conventions_ask_and_nothing_of_the_prompt(spans, stream):
    live, finished = spans
    answer = chat(live, temperature=0.5, top_p=0.9, top_k=7, seed=3, n=2, stream=stream, user="ann")
    (span,) = finished()
    said = dict(span.attributes)
    assert (span.name, span.kind, span.status.status_code) == ("chat demo", SpanKind.SERVER, StatusCode.UNSET)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": len(f"<user>{SECRET}</user><assistant>"),
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "http.response.status_code": 200,
    }
    assert {name: said.get(name) for name in expected} == expected
    assert said["gen_ai.response.id"] in answer.text
    assert said["gen_ai.request.id"] == answer.headers["x-request-id"]
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
    assert said["gen_ai.latency.time_in_queue"] == 0.25  # the fake engine's clock
    assert said["gen_ai.latency.time_in_model_prefill"] == 0.75
    assert said["gen_ai.latency.time_in_model_decode"] == 1.0
    assert span.end_time - span.start_time >= said["gen_ai.latency.time_to_first_token"] * 1e9
    assert SECRET not in span.to_json()
    assert "ann" not in [*said.values()]
    ours = {"gen_ai.request.id"}  # as vLLM has it; the conventions have no name for the id of a request
    official = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    named = {name for name in said if name.startswith("gen_ai.") and not name.startswith("gen_ai.latency.")}
    assert named - ours <= official


def test_the_callers_trace_goes_on(spans):
    live, finished = spans
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    chat(live, {"traceparent": f"00-{trace}-{parent}-01", "tracestate": "vendor=1"})
    chat(live, {"traceparent": "00-nonsense"})
    continued, own = finished(2)
    assert f"{continued.context.trace_id:032x}" == trace
    assert f"{continued.parent.span_id:016x}" == parent
    assert continued.context.trace_state.get("vendor") == "1"
    assert own.parent is None


def test_a_caller_that_does_not_sample_is_heeded(spans):
    live, finished = spans
    chat(live, {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"})
    chat(live, {"X-Request-Id": "second"})
    (span,) = finished()
    assert span.attributes["gen_ai.request.id"] == "second"


def test_refusals_and_failures(spans):
    live, finished = spans
    assert chat(live, temperature=-1).status_code == 400
    live.engine.fails_after = 2
    assert chat(live).status_code == 500
    chat(live, stream=True)
    httpx.get(f"{live.base}/v1/models")
    httpx.post(f"{live.base}/tokenize", json={"prompt": SECRET})
    refused, failed, streamed = finished(3)
    assert (refused.name, refused.attributes["error.type"]) == ("chat", "400")
    assert refused.status.status_code is StatusCode.UNSET
    for span in (failed, streamed):
        assert (span.attributes["error.type"], span.status.status_code) == ("request_failed", StatusCode.ERROR)
        assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)


@pytest.fixture
def collector():
    """(its address, what it has received): a receiver of OTLP over HTTP."""
    received = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            received.append((self.path, self.headers, ExportTraceServiceRequest.FromString(data)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    server.server_close()


def test_spans_arrive_at_a_collector(make_live, collector, monkeypatch):
    endpoint, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    live = make_live(settings=Settings(otlp_traces_endpoint=endpoint))
    body = {"prompt": SECRET, "max_tokens": 4}
    assert httpx.post(f"{live.base}/v1/completions", json=body, timeout=20).status_code == 200
    live.close()  # what was not sent yet is sent before the end
    (path, headers, message) = received[0]
    assert (path, headers["Content-Type"], headers["x-tenant"]) == ("/v1/traces", "application/x-protobuf", "blue")
    (resource,) = message.resource_spans
    about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert (about["service.name"], about["deployment.environment.name"]) == ("quire", "test")
    (span,) = resource.scope_spans[0].spans
    assert span.name == "text_completion demo"
    said = {pair.key: pair.value for pair in span.attributes}
    assert said["gen_ai.usage.output_tokens"].int_value == 4
    assert SECRET.encode() not in message.SerializeToString()


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [("localhost:4318", "not an http"), ("http://localhost:4318", "http://localhost:4318/v1/traces"), ("", "not an")],
)
def test_what_is_no_endpoint_is_refused(endpoint, words):
    with pytest.raises(ConfigError, match=f"--otlp-traces-endpoint.*{words}"):
        tracing.Tracing(endpoint)


def test_other_protocols_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL=grpc"):
        tracing.Tracing(ENDPOINT)


def test_without_the_package_it_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"--otlp-traces-endpoint .* pip install 'quire-server\[otel\]'"):
        tracing.Tracing(ENDPOINT)


def test_a_server_that_does_not_trace_loads_none_of_it():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from fake import FakeLLM; from quire_server.state import Server;"
        "from quire_server.app import create_app; s = Server([FakeLLM()]); create_app(s); assert s.tracing is None;"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
