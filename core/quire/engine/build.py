"""From a configuration to an engine that is ready: device, model, memory, pages, runner, scheduler."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.memory import MemoryPlan, capture_bytes, plan_memory
from quire.errors import ConfigError, UnsupportedOnDevice
from quire.hardware import Backend, DeviceOptions, MemoryInfo
from quire.models.config import read_config
from quire.models.family import find_family
from quire.plugins import Registry, load, native
from quire.quantization import FORMATS, head_format
from quire.scheduler.scheduler import Scheduler
from quire.spec import KVSpec, ModelSpec, kv_spec
from quire.weights.checkpoint import weight_bytes
from quire.weights.resolve import resolve_model

if TYPE_CHECKING:
    from quire.layers.decoder import Decoder
    from quire.sampling.grammar import GrammarCompiler
    from quire.text.tokenizer import Tokenizer

logger = logging.getLogger("quire.engine")


@dataclass
class Engine:
    """An EngineCore and what it was built from."""

    core: EngineCore
    config: EngineConfig
    spec: ModelSpec
    memory: MemoryPlan
    backend: Backend
    device: str  # "cpu" or "name:index", with the device's own name
    dtype: str
    compiler: GrammarCompiler | None = None

    def close(self) -> None:
        self.core.close()


@dataclass(frozen=True)
class Survey:
    """What is known of a model on its device before anything is loaded. Sizes in bytes; ``page_bytes`` per KV group."""

    config: EngineConfig
    folder: Path
    spec: ModelSpec
    maps: Any  # which tensors of the checkpoint make which weights
    backend: Backend
    device: str
    dtype: str
    kv: KVSpec
    weights: int
    page_bytes: tuple[int, ...]
    memory: MemoryInfo

    def plan(self, config: EngineConfig, measured: int | None = None, longest: int | None = None) -> MemoryPlan:
        """How ``config`` divides the memory; the others as in ``plan_memory``. Raises DoesNotFit."""
        plan = plan_memory(
            config, self.spec, self.kv, self.page_bytes, self.weights, self.dtype, self.memory, measured, longest
        )
        return replace(plan, device=self.device)


def survey(config: EngineConfig, registry: Registry, begin: bool = False) -> Survey:
    """Open the device and read the checkpoint's headers. ``begin``: the model is going to be loaded, and the device may
    start with what takes long. Raises UserError subclasses."""
    folder = resolve_model(config.model, registry.checkpoints, config.revision)
    hf_config = read_config(folder, dict(config.hf_overrides))
    family = find_family(registry.models, hf_config)
    spec = family.spec(hf_config)
    maps = family.weights(hf_config)
    if begin:
        likely = stored_dtype(hf_config) if config.dtype == "auto" else config.dtype
        if likely in ("bfloat16", "float16", "float32") and config.quantization in (None, *FORMATS):
            held = weight_bytes(maps, likely, config.quantization, spec.tied_embeddings, ("dense", *FORMATS))
            registry.begin(config.device, held, max(weight_bytes([weight], likely) for weight in maps))
    backend = registry.choose(config.device)
    device = _open(backend, config)
    dtype = choose_dtype(config.dtype, hf_config, backend)
    kv_dtype = dtype if config.cache.kv_cache_dtype == "auto" else config.cache.kv_cache_dtype
    _check_quantization(backend, config.quantization)
    _check_cache(backend, config.cache.block_size, kv_dtype, spec)
    if config.scheduler.max_model_len > spec.max_positions:
        raise ConfigError(
            f"max_model_len = {config.scheduler.max_model_len}: this model knows {spec.max_positions} positions"
        )
    kv = kv_spec(spec, kv_dtype, config.cache.block_size, config.scheduler.max_model_len or None)
    weights = weight_bytes(maps, dtype, config.quantization, spec.tied_embeddings, backend.capabilities.embed_formats)
    page_bytes = tuple(backend.page_bytes(group) for group in kv.groups)
    memory = backend.memory(config.device_index)
    return Survey(config, folder, spec, maps, backend, device, dtype, kv, weights, page_bytes, memory)


def build_engine(config: EngineConfig, registry: Registry | None = None) -> Engine:
    """Load the model on the device. Raises UserError subclasses, before loading whatever can be known before."""
    registry = registry or load(config.plugins)
    try:
        return _build(config, survey(config, registry, begin=True))
    finally:
        registry.begin(config.device, 0, 0)


def _build(config: EngineConfig, found: Survey) -> Engine:
    spec, backend, dtype, kv, maps = found.spec, found.backend, found.dtype, found.kv, found.maps
    memory = found.plan(config)
    from quire.engine.runner import Runner
    from quire.layers.decoder import Decoder
    from quire.weights.load import load_weights

    weights = load_weights(
        found.folder, maps, spec, backend, dtype, memory.max_model_len, config.load_format, config.seed,
        quantization=config.quantization,
    )  # fmt: skip
    model = Decoder(spec, weights, backend)
    memory = _measured(found, memory, model, config)
    scheduler_config = replace(config.scheduler, max_model_len=memory.max_model_len)
    cache_config = replace(config.cache, num_pages=memory.pages, num_host_pages=memory.host_pages)
    compiler = _grammar_compiler(config, spec)
    runner = Runner(
        backend, model, kv, memory.pages, memory.host_pages, scheduler_config.max_num_seqs,
        memory.max_model_len, capture=not config.enforce_eager, compiler=compiler,
    )  # fmt: skip
    scheduler = Scheduler(scheduler_config, cache_config, kv)
    core = EngineCore(scheduler, runner.run, overlap=scheduler_config.async_scheduling)
    runner.launched = core.launched
    resolved = replace(config, scheduler=scheduler_config, cache=cache_config)
    return Engine(core, resolved, spec, memory, backend, found.device, dtype, compiler)


def _measured(found: Survey, memory: MemoryPlan, model: Decoder, config: EngineConfig) -> MemoryPlan:
    """The plan made again with what one step was seen to take; the same one where the device cannot tell."""
    from quire.engine.graphs import LARGEST_BUCKET, bucket_sizes
    from quire.engine.measure import measure_step

    taken = measure_step(found.backend, model, found.kv, config.scheduler, memory.max_model_len)
    if taken is None:
        return memory
    if found.backend.capabilities.graphs and not config.enforce_eager:
        sizes = bucket_sizes(min(config.scheduler.max_num_seqs, LARGEST_BUCKET))
        taken += capture_bytes(found.spec, found.dtype, sizes)
    return found.plan(config, measured=taken, longest=memory.max_model_len)


def _grammar_compiler(config: EngineConfig, spec: ModelSpec) -> GrammarCompiler | None:
    """What compiles grammars over the model's tokenizer, which it reads when the first one comes."""
    if config.skip_tokenizer_init:
        return None
    from quire.sampling.grammar import GrammarCompiler

    def open_tokenizer() -> Tokenizer:
        from quire.text.checkpoint import open_text

        return open_text(config).tokenizer

    return GrammarCompiler(open_tokenizer, spec.vocab_size, spec.eos_token_ids)


def _open(backend: Backend, config: EngineConfig) -> str:
    devices = backend.devices()
    if config.device_index >= len(devices):
        raise ConfigError(
            f"device = {backend.name}:{config.device_index}: there are {len(devices)} such devices, numbered from 0"
        )
    missing = [name for name, own in native(backend).items() if not own]
    if missing:
        logger.info("%s computes these by the reference: %s", backend.name, ", ".join(missing))
    options = DeviceOptions(
        threads=config.threads,
        isa=config.isa,
        batch_invariant=config.batch_invariant,
        attention_backend=config.attention_backend,
    )
    backend.open(config.device_index, options)
    if config.batch_invariant and not backend.capabilities.batch_invariant:
        raise UnsupportedOnDevice(
            backend.name,
            "--batch-invariant",
            "its kernels' bits depend on the batch",
            ["another device", "leave the flag out"],
        )
    for note in backend.notes():
        logger.info("%s: %s", backend.name, note)
    found = devices[config.device_index]
    label = backend.name if len(devices) == 1 else f"{backend.name}:{config.device_index}"
    return f"{label} ({found.name}{', ' + found.details if found.details else ''})"


def choose_dtype(wanted: str, hf_config: dict, backend: Backend) -> str:
    """``auto``: the checkpoint's own dtype where the device has it, else bfloat16, else float32."""
    available = backend.capabilities.dtypes
    if wanted != "auto":
        if wanted not in available:
            raise UnsupportedOnDevice(
                backend.name,
                f"--dtype {wanted}",
                "the device does not compute in it",
                [f"--dtype {d}" for d in sorted(available)],
            )
        return wanted
    return next(d for d in (stored_dtype(hf_config), "bfloat16", "float32", *sorted(available)) if d in available)


def stored_dtype(hf_config: dict) -> str:
    """What the checkpoint says that it is stored in."""
    return str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def _check_quantization(backend: Backend, wanted: str | None) -> None:
    offered = backend.capabilities.quantization
    if wanted is None or (wanted in FORMATS and {wanted, head_format(wanted)} <= offered):
        return
    raise UnsupportedOnDevice(
        backend.name,
        f"--quantization {wanted}",
        f"it offers {', '.join(sorted(offered)) or 'none'}",
        [*(f"--quantization {name}" for name in sorted(offered & set(FORMATS))), "no --quantization"],
    )


def _check_cache(backend: Backend, block_size: int, kv_dtype: str, spec: ModelSpec) -> None:
    able = backend.capabilities
    if block_size not in able.page_sizes:
        sizes = [f"--block-size {s}" for s in sorted(able.page_sizes)]
        raise UnsupportedOnDevice(backend.name, f"--block-size {block_size}", "no such page size", sizes)
    if kv_dtype not in able.kv_dtypes:
        kinds = [f"--kv-cache-dtype {d}" for d in sorted(able.kv_dtypes)]
        raise UnsupportedOnDevice(backend.name, f"--kv-cache-dtype {kv_dtype}", "not a KV cache dtype here", kinds)
    low, high = able.head_sizes
    for layer in spec.layers:
        key, value = layer.attention.head_dim, layer.attention.value_dim
        if value is not None:
            if (key, value) not in able.latent_sizes:
                known = ", ".join(f"{k} and {v}" for k, v in sorted(able.latent_sizes)) or "none"
                operation = f"latent attention of {key} and {value} channels"
                raise UnsupportedOnDevice(backend.name, operation, f"its kernels take {known}", ["another device"])
        elif not low <= key <= high:
            raise UnsupportedOnDevice(backend.name, f"head size {key}", f"its kernels take {low} to {high}")
