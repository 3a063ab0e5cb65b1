"""Configuration: frozen dataclasses, resolved once. Names are vLLM's where the meaning is the same."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from quire.errors import ConfigError
from quire.logs import LogFormat
from quire.quantization import FORMATS


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int = 256  # sequences that run at once (samples of one request count each)
    max_num_batched_tokens: int = 2048  # new tokens in one step
    max_model_len: int = 0  # prompt and output of one sequence; 0: the model's own, or what fits
    max_waiting: int = 100_000  # requests queued; one more is refused
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # most prompt tokens one request takes in a step; 0: no limit but the budget
    policy: Literal["fcfs", "priority"] = "fcfs"
    preemption_mode: Literal["auto", "recompute", "swap"] = "auto"
    async_scheduling: bool = True  # plan step n+1 while step n runs
    priority_aging: float = 60.0  # seconds of waiting that outweigh one level of priority; 0: never (may starve)
    swap_page_cost: float = 2.0  # time to copy one page to or from the host, in times to compute one token


@dataclass(frozen=True)
class CacheConfig:
    block_size: int = 16
    num_pages: tuple[int, ...] = ()  # per KV group, page 0 (never owned) included; resolved from memory when empty
    num_host_pages: tuple[int, ...] = ()  # per KV group, page 0 (not used) included, for swapped sequences
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
    kv_cache_memory_bytes: int | None = None  # --kv-cache-memory-bytes; None: by gpu_memory_utilization
    gpu_memory_utilization: float | None = (
        None  # share of the device's memory to use; None: 0.9, or half of what is free
    )
    swap_space: float = 1.0  # GiB of host memory for swapped pages


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine process needs to start."""

    model: str  # a folder, a name that a plugin registers ("demo"), or a name on the hub
    tokenizer: str | None = None  # None: the model's own
    skip_tokenizer_init: bool = False  # serve token ids only
    revision: str | None = None
    device: str = "auto"
    device_index: int = 0
    dtype: str = "auto"
    quantization: str | None = None  # round weights while loading: a name of quire.quantization.FORMATS
    threads: int | None = None
    isa: str | None = None  # instruction set of a device that has several; None: the best
    batch_invariant: bool = False
    attention_backend: str | None = None  # one of those that the device offers; None: it chooses
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    seed: int = 0
    hf_overrides: tuple[tuple[str, Any], ...] = ()
    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    enforce_eager: bool = False  # never capture steps
    step_timeout: float = 120.0  # seconds; an engine whose step takes longer is replaced; 0: it may take for ever
    grammar_timeout: float = 5.0  # seconds that compiling one grammar may take
    spare_process: bool = True  # keep a process that could become the engine, should it die
    plugins: tuple[str, ...] | None = None  # names of plugins to load; None: all
    log_format: LogFormat = "text"  # of an engine process of its own
    cores: tuple[
        int, ...
    ] = ()  # of the host, that an engine process of its own is confined to; (): all that it may use

    def validate(self) -> None:
        """Raise ConfigError for a value no device could honour."""
        scheduler, cache = self.scheduler, self.cache
        positive: dict[str, int | None] = {
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_waiting": scheduler.max_waiting,
            "block_size": cache.block_size,
            "threads": self.threads,
            "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be at least 1")
        not_negative: dict[str, float] = {
            "max_model_len": scheduler.max_model_len,
            "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
            "swap_space": cache.swap_space,
            "step_timeout": self.step_timeout,
        }
        for name, number in not_negative.items():
            if number < 0:
                raise ConfigError(f"{name} = {number}: must not be negative")
        if not self.grammar_timeout > 0:
            raise ConfigError(f"grammar_timeout = {self.grammar_timeout}: must be above 0")
        if cache.block_size & (cache.block_size - 1):
            raise ConfigError(f"block_size = {cache.block_size}: must be a power of two")
        utilization = cache.gpu_memory_utilization
        if utilization is not None and not 0 < utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization = {utilization}: must be above 0 and at most 1")
        choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("scheduling_policy", scheduler.policy, ("fcfs", "priority")),
            ("preemption_mode", scheduler.preemption_mode, ("auto", "recompute", "swap")),
            ("load_format", self.load_format, ("auto", "safetensors", "dummy")),
            ("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32")),
        )
        for name, choice, allowed in choices:
            if choice not in allowed:
                raise ConfigError(f"{name} = {choice!r}: must be one of {', '.join(allowed)}")
        if self.quantization is not None and self.quantization not in FORMATS:
            raise ConfigError(
                f"quantization = {self.quantization!r}: a plain checkpoint can be rounded to {', '.join(FORMATS)}"
            )
        if not scheduler.enable_chunked_prefill and scheduler.max_model_len > scheduler.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_batched_tokens = {scheduler.max_num_batched_tokens}: without chunked prefill it must be at "
                f"least max_model_len = {scheduler.max_model_len}"
            )


ENGINE_FIELDS = {
    "tokenizer", "skip_tokenizer_init", "device", "dtype", "threads", "isa", "batch_invariant", "attention_backend",
    "load_format", "seed", "enforce_eager", "revision", "hf_overrides", "quantization", "step_timeout",
    "grammar_timeout", "spare_process",
}  # fmt: skip
SCHEDULER_FIELDS = {
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_waiting", "enable_chunked_prefill",
    "long_prefill_token_threshold", "scheduling_policy", "preemption_mode", "async_scheduling",
}  # fmt: skip
CACHE_FIELDS = {
    "block_size", "enable_prefix_caching", "kv_cache_dtype", "kv_cache_memory_bytes", "gpu_memory_utilization", "swap_space",
    "num_pages", "num_host_pages",
}  # fmt: skip


SHORT_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
}  # fmt: skip
"""Other spellings that ``kv_cache_dtype`` may have."""


def make_config(model: str, plugins: tuple[str, ...] | None = None, **options: Any) -> EngineConfig:
    """Keyword arguments with vLLM's names to an EngineConfig; a name that is not known is refused."""
    unknown = set(options) - ENGINE_FIELDS - SCHEDULER_FIELDS - CACHE_FIELDS
    if unknown:
        known = ", ".join(sorted(ENGINE_FIELDS | SCHEDULER_FIELDS | CACHE_FIELDS))
        raise ConfigError(f"unknown option {', '.join(sorted(unknown))}; Quire knows {known}")
    engine = {k: v for k, v in options.items() if k in ENGINE_FIELDS}
    scheduler = {k: v for k, v in options.items() if k in SCHEDULER_FIELDS and v is not None}
    cache = {k: v for k, v in options.items() if k in CACHE_FIELDS}
    if "scheduling_policy" in scheduler:
        scheduler["policy"] = scheduler.pop("scheduling_policy")
    device, _, index = str(engine.pop("device", "auto")).partition(":")
    if index and not index.isdigit():
        raise ConfigError(f"device = {device}:{index}: after the colon comes a device number")
    overrides = engine.pop("hf_overrides", None) or {}
    kv_dtype = str(cache.get("kv_cache_dtype", "auto"))
    cache["kv_cache_dtype"] = SHORT_DTYPES.get(kv_dtype, kv_dtype)
    config = EngineConfig(
        model=model,
        device=device,
        device_index=int(index or 0),
        plugins=plugins,
        hf_overrides=tuple(sorted(dict(overrides).items())),
        scheduler=SchedulerConfig(**scheduler),
        cache=CacheConfig(**cache),
        **engine,
    )
    with contextlib.suppress(TypeError):  # a value of the wrong type: named below
        config.validate()
    try:
        msgspec.convert(dataclasses.asdict(config), EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("$.", "")) from None
    return config
