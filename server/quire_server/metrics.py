"""Prometheus metrics under vLLM's names with the prefix ``quire:``, in a registry of their own.

Gauges and counters of the engine are asked from it at each scrape; latencies and lengths are observed here, where the
client's view of them is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from quire.message import EngineReady, EngineStats
    from quire.outputs import RequestOutput

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class EngineCollector(Collector):
    """The engine's last answer. ``stats`` is None while it gives none: then only ``quire:engine_up`` 0 is shown."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.stats: EngineStats | None = None
        self.info: EngineReady | None = None

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, value: float) -> Metric:
            metric = GaugeMetricFamily(f"quire:{name}", text, labels=["model_name"])
            metric.add_metric([self.model], value)
            return metric

        def counter(name: str, text: str, value: float) -> Metric:
            metric = CounterMetricFamily(f"quire:{name}", text, labels=["model_name"])
            metric.add_metric([self.model], value)
            return metric

        stats = self.stats
        yield gauge("engine_up", "1 when the engine answered this scrape.", float(stats is not None))
        if self.info is not None:
            config = GaugeMetricFamily(
                "quire:cache_config_info",
                "Pages of the KV cache.",
                labels=["model_name", "block_size", "num_gpu_blocks"],
            )
            config.add_metric([self.model, str(self.info.page_size), str(self.info.pages)], 1.0)
            yield config
        if stats is None:
            return
        used = stats.pages_total - stats.pages_free
        yield gauge("num_requests_running", "Sequences in the running batch.", stats.running)
        yield gauge("num_requests_waiting", "Requests waiting to run.", stats.waiting)
        yield gauge("num_requests_swapped", "Sequences swapped to host memory.", stats.swapped)
        yield gauge("kv_cache_usage_perc", "KV cache usage; 1 is full.", used / max(stats.pages_total, 1))
        yield gauge("kv_waste_ratio", "Share of owned KV slots that hold no token.", stats.kv_waste)
        yield gauge("iteration_tokens", "Tokens in the last step.", stats.batch_tokens)
        yield counter("num_preemptions", "Sequences preempted.", stats.preemptions)
        yield counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries)
        yield counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits)
        yield counter("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield counter("engine_steps", "Steps the engine has run.", stats.steps)


class Metrics:
    """Everything that ``/metrics`` shows."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self.engine = EngineCollector(model)
        self.registry.register(self.engine)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"quire:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model)

        self.ttft = histogram("time_to_first_token_seconds", "Time to first token.", _LATENCY)
        self.itl = histogram("inter_token_latency_seconds", "Time between tokens of one sample.", _LATENCY)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per output token of a request.", _LATENCY
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Time of a whole request.", _LATENCY)
        self.decode = histogram("request_decode_time_seconds", "From first to last token.", _LATENCY)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens a request generated.", _TOKENS)
        self.params_n = histogram("request_params_n", "The parameter n.", _TOKENS)
        self.params_max_tokens = histogram("request_params_max_tokens", "The parameter max_tokens.", _TOKENS)
        self._success = Counter(
            "quire:request_success", "Requests finished.", ["model_name", "finished_reason"], registry=self.registry
        )

        self._by_key = Counter(
            "quire:requests_by_key",
            "Requests that carried this API key.",
            ["model_name", "key"],
            registry=self.registry,
        )
        self._limited = Counter(
            "quire:rate_limited_requests_by_key",
            "Requests refused for this API key's rate or concurrency.",
            ["model_name", "key"],
            registry=self.registry,
        )

    def by_key(self, name: str) -> None:
        """A request carried the key of this name. There are as many names as there are keys."""
        self._by_key.labels(self.model, name).inc()

    def limited(self, name: str) -> None:
        """A request was refused for its key's rate or concurrency."""
        self._limited.labels(self.model, name).inc()

    def success(self, reason: str) -> None:
        self._success.labels(self.model, reason).inc()

    def render(self, stats: EngineStats | None, info: EngineReady | None) -> bytes:
        """The text format, with the engine's answer (or its absence) of this moment."""
        self.engine.stats, self.engine.info = stats, info
        return generate_latest(self.registry)


class RequestTimer:
    """Observes one request's outputs as they pass."""

    def __init__(self, metrics: Metrics, n: int, max_tokens: int) -> None:
        self.metrics = metrics
        self.began = time.monotonic()
        self.tokens = 0
        self.prompt_tokens = 0
        self._last: dict[int, float] = {}
        self._done = 0
        self._n = n
        metrics.params_n.observe(n)
        metrics.params_max_tokens.observe(max_tokens)

    def saw(self, item: RequestOutput) -> None:
        now = time.monotonic()
        self.prompt_tokens = len(item.prompt_token_ids)
        for output in item.outputs:
            if output.token_ids:
                self.tokens += len(output.token_ids)
                before = self._last.get(output.index)
                if before is not None:
                    self.metrics.itl.observe(now - before)
                elif not self._last:
                    self.metrics.ttft.observe(now - self.began)
                self._last[output.index] = now
            if output.finish_reason is not None:
                self._done += 1
                self.metrics.success(output.finish_reason)
        if item.finished:
            self._finish(item, now)

    def _finish(self, item: RequestOutput, now: float) -> None:
        m, times = self.metrics, item.metrics
        m.e2e.observe(now - self.began)
        m.prompt_tokens.observe(self.prompt_tokens)
        m.generation_tokens.observe(self.tokens)
        first, last = times.first_token_time, times.last_token_time
        if first is not None and last is not None:
            m.decode.observe(max(last - first, 0.0))
            if self.tokens > self._n:
                m.tpot.observe(max(last - first, 0.0) / (self.tokens / self._n - 1))

    def abandoned(self) -> None:
        """The client went away, or the request failed: samples that had not finished count as aborted."""
        for _ in range(self._n - self._done):
            self.metrics.success("abort")
