"""Prometheus metrics under vLLM's names with the prefix ``quire:``, in a registry of their own.

Gauges and counters of the engine are asked from it at each scrape; latencies and lengths are observed here, where the
client's view of them is.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from quire.message import STEP_TOKENS, EngineReady, EngineStats
from quire_server import loop_delay
from quire_server.record import current

if TYPE_CHECKING:
    from quire.outputs import RequestOutput
    from quire.sampling.params import SamplingParams

Answer = tuple[EngineStats | None, EngineReady | None]
"""Of one engine, to a scrape."""

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Buckets:
    """A histogram without locks, as the event loop alone observes: a token must not cost more than it takes to tell of it.

    ``bounds`` are the buckets' upper edges; ``counts`` has one more entry, for what is above them all.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """How many were at most each bound, and how many there were."""
        return list(accumulate(self.counts))


class BucketsFamily(Collector):
    """One metric of all models."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], models: Sequence[str]) -> None:
        self.name, self.text = name, text
        self.of = {model: Buckets(bounds) for model in models}

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self.name, self.text, labels=["model_name"])
        for model, buckets in self.of.items():
            edges = [*(str(float(bound)) for bound in buckets.bounds), "+Inf"]
            family.add_metric([model], list(zip(edges, buckets.cumulative(), strict=True)), buckets.sum)
        yield family


class EngineCollector(Collector):
    """The engines' last answers, by model. One that gave none has only ``quire:engine_up`` 0."""

    def __init__(self, models: Sequence[str]) -> None:
        self.answers: dict[str, Answer] = dict.fromkeys(models, (None, None))

    def collect(self) -> Iterator[Metric]:
        up = {model: float(stats is not None) for model, (stats, _) in self.answers.items()}
        yield _family(GaugeMetricFamily, "engine_up", "1 when the engine answered this scrape.", up)
        config = GaugeMetricFamily(
            "quire:cache_config_info", "Pages of the KV cache.", labels=["model_name", "block_size", "num_gpu_blocks"]
        )
        for model, (_, info) in self.answers.items():
            if info is not None:
                config.add_metric([model, str(info.page_size), str(info.pages)], 1.0)
        yield config
        known = {model: stats for model, (stats, _) in self.answers.items() if stats is not None}
        for kind, name, text, value in ENGINE_METRICS:
            yield _family(kind, name, text, {model: value(stats) for model, stats in known.items()})
        yield _steps(known)


def _family(kind: Family, name: str, text: str, values: dict[str, float]) -> Metric:
    family = kind(f"quire:{name}", text, labels=["model_name"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family


def _steps(known: dict[str, EngineStats]) -> Metric:
    bounds = [*(f"{size:.1f}" for size in STEP_TOKENS), "+Inf"]
    steps = HistogramMetricFamily("quire:iteration_tokens_total", "Tokens of a step.", labels=["model_name"])
    for model, stats in known.items():
        steps.add_metric([model], list(zip(bounds, accumulate(stats.step_sizes), strict=True)), stats.step_tokens)
    return steps


Family = type[GaugeMetricFamily] | type[CounterMetricFamily]
ENGINE_METRICS: tuple[tuple[Family, str, str, Callable[[EngineStats], float]], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Sequences in the running batch.", lambda s: s.running),
    (GaugeMetricFamily, "num_requests_waiting", "Requests waiting to run.", lambda s: s.waiting),
    (GaugeMetricFamily, "num_requests_swapped", "Sequences swapped to host memory.", lambda s: s.swapped),
    (
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "KV cache usage; 1 is full.",
        lambda s: (s.pages_total - s.pages_free) / max(s.pages_total, 1),
    ),
    (GaugeMetricFamily, "kv_waste_ratio", "Share of owned KV slots that hold no token.", lambda s: s.kv_waste),
    (CounterMetricFamily, "num_preemptions", "Sequences preempted.", lambda s: s.preemptions),
    (CounterMetricFamily, "prefix_cache_queries", "Tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    (CounterMetricFamily, "prefix_cache_hits", "Tokens found in the prefix cache.", lambda s: s.prefix_hits),
    (CounterMetricFamily, "prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens),
    (CounterMetricFamily, "generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    (CounterMetricFamily, "engine_steps", "Steps the engine has run.", lambda s: s.steps),
)


class Metrics:
    """Everything that ``/metrics`` shows: what is of one model, with its name as a label, and what is of the server."""

    def __init__(self, models: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self._engines = EngineCollector(models)
        self.registry.register(self._engines)
        ProcessCollector(registry=self.registry)  # memory, CPU time and open files of the HTTP process
        families = {
            name: BucketsFamily(f"quire:{full}", text, bounds, models) for name, full, text, bounds in REQUEST_METRICS
        }
        for family in families.values():
            self.registry.register(family)
        success = Counter(
            "quire:request_success", "Requests finished.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._of = {model: ModelMetrics(model, families, success) for model in models}
        self.loop_delay = Histogram(
            "quire:event_loop_delay_seconds",
            "By how much a timer of the server's event loop came late.",
            buckets=loop_delay.BUCKETS,
            registry=self.registry,
        )
        self._by_key = Counter(
            "quire:requests_by_key", "Requests that carried this API key.", ["key"], registry=self.registry
        )
        self._limited = Counter(
            "quire:rate_limited_requests_by_key",
            "Requests refused for this API key's rate or concurrency.",
            ["key"],
            registry=self.registry,
        )

    def of(self, model: str) -> ModelMetrics:
        return self._of[model]

    def by_key(self, name: str) -> None:
        """A request carried the key of this name. There are as many names as there are keys."""
        self._by_key.labels(name).inc()

    def limited(self, name: str) -> None:
        """A request was refused for its key's rate or concurrency."""
        self._limited.labels(name).inc()

    def render(self, answers: dict[str, Answer]) -> bytes:
        """The text format, with the engines' answers (or their absence) of this moment, by model."""
        self._engines.answers = answers
        return generate_latest(self.registry)


class ModelMetrics:
    """What is observed of one model's requests."""

    def __init__(self, model: str, families: dict[str, BucketsFamily], success: Counter) -> None:
        of = {name: family.of[model] for name, family in families.items()}
        self.ttft, self.itl, self.tpot, self.e2e = of["ttft"], of["itl"], of["tpot"], of["e2e"]
        self.queue, self.prefill, self.decode, self.inference = (
            of["queue"],
            of["prefill"],
            of["decode"],
            of["inference"],
        )
        self.prompt_tokens, self.generation_tokens = of["prompt_tokens"], of["generation_tokens"]
        self.computed_tokens, self.longest = of["computed_tokens"], of["longest"]
        self.params_n, self.params_max_tokens = of["params_n"], of["params_max_tokens"]
        self._model, self._success = model, success

    def success(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()


REQUEST_METRICS: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("ttft", "time_to_first_token_seconds", "Time to first token.", _LATENCY),
    ("itl", "inter_token_latency_seconds", "Time between tokens of one sample.", _LATENCY),
    ("tpot", "request_time_per_output_token_seconds", "Mean time per output token of a request.", _LATENCY),
    ("e2e", "e2e_request_latency_seconds", "Time of a whole request.", _LATENCY),
    ("queue", "request_queue_time_seconds", "From arrival to the first step.", _LATENCY),
    ("prefill", "request_prefill_time_seconds", "From the first step to the first token.", _LATENCY),
    ("decode", "request_decode_time_seconds", "From first to last token.", _LATENCY),
    ("inference", "request_inference_time_seconds", "From the first step to the last token.", _LATENCY),
    ("prompt_tokens", "request_prompt_tokens", "Prompt tokens of a request.", _TOKENS),
    ("generation_tokens", "request_generation_tokens", "Tokens a request generated.", _TOKENS),
    (
        "computed_tokens",
        "request_prefill_kv_computed_tokens",
        "Prompt tokens of a request that no prefix hit spared.",
        _TOKENS,
    ),
    ("longest", "request_max_num_generation_tokens", "Tokens of a request's longest sample.", _TOKENS),
    ("params_n", "request_params_n", "The parameter n.", _TOKENS),
    ("params_max_tokens", "request_params_max_tokens", "The parameter max_tokens.", _TOKENS),
)


class RequestTimer:
    """Observes one request's outputs as they pass."""

    def __init__(self, metrics: ModelMetrics, n: int, max_tokens: int) -> None:
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
