"""Prometheus metrics under vLLM's names with the prefix ``quire:``, in a registry of their own.

Gauges and counters of the engine are asked from it at each scrape; latencies and lengths are observed here, where the
client's view of them is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from quire.message import STEP_TOKENS
from quire_server import loop_delay
from quire_server.record import current

if TYPE_CHECKING:
    from quire.message import EngineReady, EngineStats
    from quire.outputs import RequestOutput
    from quire.sampling.params import SamplingParams

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
        yield self._steps(stats)
        yield counter("num_preemptions", "Sequences preempted.", stats.preemptions)
        yield counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries)
        yield counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits)
        yield counter("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield counter("engine_steps", "Steps the engine has run.", stats.steps)

    def _steps(self, stats: EngineStats) -> Metric:
        bounds = [*(f"{size:.1f}" for size in STEP_TOKENS), "+Inf"]
        name, text = "quire:iteration_tokens_total", "Tokens of a step."
        steps = HistogramMetricFamily(name, text, labels=["model_name"])
        steps.add_metric([self.model], list(zip(bounds, accumulate(stats.step_sizes), strict=True)), stats.step_tokens)
        return steps


class Metrics:
    """Everything that ``/metrics`` shows."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self.engine = EngineCollector(model)
        self.registry.register(self.engine)
        ProcessCollector(registry=self.registry)  # memory, CPU time and open files of the HTTP process

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"quire:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model)

        self.ttft = histogram("time_to_first_token_seconds", "Time to first token.", _LATENCY)
        self.itl = histogram("inter_token_latency_seconds", "Time between tokens of one sample.", _LATENCY)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per output token of a request.", _LATENCY
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Time of a whole request.", _LATENCY)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _LATENCY)
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", _LATENCY)
        self.decode = histogram("request_decode_time_seconds", "From first to last token.", _LATENCY)
        self.inference = histogram("request_inference_time_seconds", "From the first step to the last token.", _LATENCY)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens a request generated.", _TOKENS)
        self.computed_tokens = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that no prefix hit spared.", _TOKENS
        )
        self.longest = histogram("request_max_num_generation_tokens", "Tokens of a request's longest sample.", _TOKENS)
        self.params_n = histogram("request_params_n", "The parameter n.", _TOKENS)
        self.params_max_tokens = histogram("request_params_max_tokens", "The parameter max_tokens.", _TOKENS)
        self.loop_delay = histogram(
            "event_loop_delay_seconds", "By how much a timer of the server's event loop came late.", loop_delay.BUCKETS
        )
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
        self.metrics, self.record = metrics, current()
        self.began = time.monotonic()
        self.tokens = 0
        self.prompt_tokens = 0
        self._last: dict[int, float] = {}
        self._lengths: dict[int, int] = {}  # tokens by sample
        self._done = 0
        self._cached = 0
        self._n = n
        metrics.params_n.observe(n)
        metrics.params_max_tokens.observe(max_tokens)

    def sent(self, model: str, engine_id: str, prompt_tokens: int, sampling: SamplingParams) -> None:
        """Note in the request's record what is asked of the engine."""
        self.record.prompt_tokens += prompt_tokens
        if self.record.sampling is None:
            self.record.model, self.record.sampling = model, sampling
            self.record.response_id = self.record.response_id or engine_id

    def saw(self, item: RequestOutput) -> None:
        now = time.monotonic()
        self.prompt_tokens = len(item.prompt_token_ids)
        if item.num_cached_tokens > self._cached:  # told with a sample's first token
            self.record.cached_tokens += item.num_cached_tokens - self._cached
            self._cached = item.num_cached_tokens
        for output in item.outputs:
            if output.token_ids:
                self.tokens += len(output.token_ids)
                self._lengths[output.index] = self._lengths.get(output.index, 0) + len(output.token_ids)
                self.record.completion_tokens += len(output.token_ids)
                if self.record.first_token is None:
                    self.record.first_token = now
                before = self._last.get(output.index)
                if before is not None:
                    self.metrics.itl.observe(now - before)
                elif not self._last:
                    self.metrics.ttft.observe(now - self.began)
                self._last[output.index] = now
            if output.finish_reason is not None:
                self._done += 1
                self.metrics.success(output.finish_reason)
                self.record.finish_reasons.append(output.finish_reason)
        if item.finished:
            self._finish(item, now)

    def _finish(self, item: RequestOutput, now: float) -> None:
        m, times = self.metrics, item.metrics
        self.record.times = self.record.times or times
        m.e2e.observe(now - self.began)
        m.prompt_tokens.observe(self.prompt_tokens)
        m.generation_tokens.observe(self.tokens)
        m.computed_tokens.observe(self.prompt_tokens - self._cached)
        m.longest.observe(max(self._lengths.values(), default=0))
        for metric, seconds in (
            (m.queue, times.queue_time),
            (m.prefill, times.prefill_time),
            (m.decode, times.decode_time),
            (m.inference, times.inference_time),
        ):
            if seconds is not None:
                metric.observe(seconds)
        if times.decode_time is not None and self.tokens > self._n:
            m.tpot.observe(times.decode_time / (self.tokens / self._n - 1))

    def abandoned(self) -> None:
        """The client went away, or the request failed: samples that had not finished count as aborted."""
        for _ in range(self._n - self._done):
            self.metrics.success("abort")
            self.record.finish_reasons.append("abort")
