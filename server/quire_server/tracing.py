"""OpenTelemetry traces: one span a request, by the semantic conventions for generative AI. Numbers and names, never text.

Only ``--otlp-traces-endpoint`` turns it on; sampling, headers, batching and the service's name are then read by the SDK
from the OTEL_* environment.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from quire import __version__
from quire.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from quire_server.record import RequestRecord

FLAG = "--otlp-traces-endpoint"
OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
"""Requests that have a span even when they are refused; others have one when the engine was asked."""


def exporter(endpoint: str) -> SpanExporter:
    """Sends spans as protobuf over HTTP. Raises ConfigError for what is no such endpoint."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{FLAG} {endpoint}: not an http or https address such as http://localhost:4318/v1/traces")
    if parts.path in ("", "/"):
        raise ConfigError(f"{FLAG} {endpoint}: the path is missing: {parts.scheme}://{parts.netloc}/v1/traces")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if os.environ.get(name, "http/protobuf") != "http/protobuf":
            raise ConfigError(
                f"{name}={os.environ[name]}: only http/protobuf is spoken here (port 4318 of a collector)"
            )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(f"{FLAG} needs a package: pip install 'quire-server[otel]' ({error})") from None
    return OTLPSpanExporter(endpoint=endpoint)


class Tracing:
    """Made once; ``finished`` is called with every request that has ended. Spans leave on a thread of the SDK's."""

    def __init__(self, endpoint: str) -> None:
        sender = exporter(endpoint)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "quire"})
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(sender))
        self._tracer = self.provider.get_tracer("quire_server", __version__)
        self._parent = TraceContextTextMapPropagator().extract
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)

    def finished(self, seen: RequestRecord, method: str, path: str, headers: Headers, status: int) -> None:
        """Tell of one request, if it was one to generate."""
        operation = OPERATIONS.get(path) if method == "POST" else None
        if operation is None and seen.sampling is None:
            return
        operation = operation or "chat"
        end = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {seen.model}" if seen.model else operation,
            context=self._parent({name: headers[name] for name in ("traceparent", "tracestate") if name in headers}),
            kind=self._kind,
            start_time=end - int((time.monotonic() - seen.began) * 1e9),
        )
        if span.is_recording():
            error = "request_failed" if "error" in seen.finish_reasons else str(status) if status >= 400 else None
            span.set_attributes(_attributes(seen, operation, method, path, status, error))
            if error is not None and (status >= 500 or status < 400):  # what the client did wrong is no failure of ours
                span.set_status(self._failed)
        span.end(end_time=end)

    def close(self) -> None:
        """Send what has not been sent; the SDK bounds how long that takes."""
        self.provider.shutdown()


def _attributes(
    seen: RequestRecord, operation: str, method: str, path: str, status: int, error: str | None
) -> dict[str, Any]:
    """Names of the semantic conventions where they have one, else vLLM's (gen_ai.latency.*, in seconds)."""
    sampling, times = seen.sampling, seen.times
    known: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": seen.model,
        "gen_ai.response.model": seen.model,
        "gen_ai.response.id": seen.response_id,
        "gen_ai.request.id": seen.request_id,
        "http.request.method": method,
        "http.response.status_code": status,
        "url.path": path,
        "error.type": error,
        **{f"quire.metadata.{name}": value for name, value in (seen.metadata or {}).items()},
    }
    if sampling is not None:
        known |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k if sampling.top_k > 0 else None,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
            "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
            "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
            "gen_ai.response.finish_reasons": seen.finish_reasons or None,
            "gen_ai.usage.input_tokens": seen.prompt_tokens,
            "gen_ai.usage.output_tokens": seen.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": seen.cached_tokens,
            "gen_ai.latency.e2e": time.monotonic() - seen.began,
            "gen_ai.latency.time_to_first_token": seen.ttft,
        }
    if times is not None:
        known |= {
            "gen_ai.latency.time_in_queue": times.queue_time,
            "gen_ai.latency.time_in_model_prefill": times.prefill_time,
            "gen_ai.latency.time_in_model_decode": times.decode_time,
            "gen_ai.latency.time_in_model_inference": times.inference_time,
        }
    return {name: value for name, value in known.items() if value is not None}
