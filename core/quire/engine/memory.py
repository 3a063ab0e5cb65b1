"""Memory by arithmetic, before anything is loaded: weights, working memory, pages, and the requests that fit.

Nothing is profiled: a profile costs seconds and depends on the moment, arithmetic can be shown and checked. Where the
device can tell what one step of the largest size took (``measure.py``), that number replaces the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.config import CacheConfig, EngineConfig
from quire.errors import DoesNotFit
from quire.hardware import MemoryInfo
from quire.spec import KVSpec, ModelSpec

GIB = 1 << 30
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class MemoryPlan:
    """All sizes in bytes. ``pages`` and ``host_pages`` count page 0 of each group, which no sequence owns."""

    device: str
    memory: MemoryInfo
    budget: int
    budget_reason: str
    weights: int
    working: int
    kv: int
    page_bytes: tuple[int, ...]
    pages: tuple[int, ...]
    host_pages: tuple[int, ...]
    page_size: int
    max_model_len: int
    model_positions: int
    requests: float  # of full length that fit together
    measured: bool = False  # ``working`` was measured, not estimated

    def report(self) -> str:
        """The arithmetic as a few lines of text."""
        tokens = " + ".join(f"{(count - 1) * self.page_size:,}" for count in self.pages)
        shortened = (
            f" (the model allows {self.model_positions:,}; --max-model-len sets it)"
            if self.max_model_len < self.model_positions
            else ""
        )
        working = f"working memory {size(self.working)}{' (measured)' if self.measured else ''}"
        return "\n".join(
            [
                f"memory on {self.device}: {size(self.memory.free)} free of {size(self.memory.total)}; "
                f"budget {size(self.budget)} ({self.budget_reason})",
                f"  weights {size(self.weights)} + {working} + KV cache {size(self.kv)}",
                f"  KV cache: {tokens} tokens in pages of {self.page_size} ({size(sum(self.page_bytes))} each)",
                f"  requests of the full {self.max_model_len:,} tokens that fit together: {self.requests:.1f}{shortened}",
            ]
        )


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def working_bytes(spec: ModelSpec, dtype: str, tokens: int, sequences: int) -> int:
    """Upper estimate of a step's activations: the widest block for every token, and logits for every sequence.

    The block holds input, residual and norm (3 x hidden), q k v and the attention output, gate, up and their product;
    sampling holds float32 logits, their log-probabilities and one float64 cumulative sum.
    """
    width = max(
        3 * spec.hidden
        + 2 * (layer.attention.heads + layer.attention.kv_heads) * layer.attention.head_dim
        + 3 * layer.mlp.intermediate
        for layer in spec.layers
    )
    return tokens * width * DTYPE_BYTES[dtype] + sequences * spec.vocab_size * 16


def capture_bytes(spec: ModelSpec, dtype: str, sizes: Sequence[int]) -> int:
    """What captured decode steps of ``sizes`` sequences hold for as long as they live: each its logits, and all of them
    one pool of activations, that of the largest. A step that is measured does not show it: steps are captured later."""
    return working_bytes(spec, dtype, max(sizes), 0) + sum(sizes) * spec.vocab_size * 4


def request_pages(kv: KVSpec, length: int, chunk: int) -> tuple[int, ...]:
    """Pages per group that one request of ``length`` tokens holds at most; a window keeps only what it covers."""
    return tuple(
        -(-min(length, group.window + chunk if group.window else length) // group.page_size)
        + (1 if group.window and group.window + chunk < length else 0)
        for group in kv.groups
    )


def plan_memory(
    config: EngineConfig,
    spec: ModelSpec,
    kv: KVSpec,
    page_bytes: Sequence[int],
    weights: int,
    dtype: str,
    memory: MemoryInfo,
    measured: int | None = None,
    longest: int | None = None,
) -> MemoryPlan:
    """Divide the device's memory. ``measured``: working memory that a step was seen to take, instead of the estimate;
    ``longest``: a limit on the length when none was asked for. Raises DoesNotFit with the arithmetic and the flags that
    would make it fit."""
    cache, scheduler = config.cache, config.scheduler
    working = working_bytes(spec, dtype, scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
    working = working if measured is None else measured
    budget, reason = budget_of(cache, memory)
    length = scheduler.max_model_len or min(spec.max_positions, longest or spec.max_positions)
    page_size = kv.groups[0].page_size
    chunk = scheduler.max_num_batched_tokens
    available = cache.kv_cache_memory_bytes if cache.kv_cache_memory_bytes is not None else budget - weights - working

    def bytes_for(tokens: int) -> int:
        return sum(p * b for p, b in zip(request_pages(kv, tokens, chunk), page_bytes, strict=True))

    plan = MemoryPlan(
        device=config.device, memory=memory, budget=budget, budget_reason=reason, weights=weights, working=working,
        kv=max(available, 0), page_bytes=tuple(page_bytes), pages=(), host_pages=(), page_size=page_size,
        max_model_len=length, model_positions=spec.max_positions, requests=0.0,
        measured=measured is not None,
    )  # fmt: skip
    if weights + working > memory.free or available < bytes_for(min(length, page_size)):
        raise DoesNotFit(_refusal(plan, bytes_for(length), "the model"))
    if bytes_for(length) > available:
        if scheduler.max_model_len:
            raise DoesNotFit(_refusal(plan, bytes_for(length), f"one request of {length:,} tokens"))
        while bytes_for(length) > available:  # not asked for: serve what fits, and say so in the report
            length -= max(page_size, length // 64)
    if cache.num_pages:
        pages = cache.num_pages
        requests = min((p - 1) / r for p, r in zip(pages, request_pages(kv, length, chunk), strict=True))
    else:
        requests = min(available / bytes_for(length), float(scheduler.max_num_seqs))
        pages = tuple(int(requests * p) + 1 for p in request_pages(kv, length, chunk))
    share = cache.swap_space * GIB / sum(p * b for p, b in zip(pages, page_bytes, strict=True))
    host = cache.num_host_pages or tuple(int(min(share, 1.0) * p) for p in pages)
    used = sum(p * b for p, b in zip(pages, page_bytes, strict=True))
    return replace(plan, pages=pages, host_pages=host, max_model_len=length, requests=requests, kv=used)


def budget_of(cache: CacheConfig, memory: MemoryInfo) -> tuple[int, str]:
    """Bytes that may be used, and why."""
    utilization = cache.gpu_memory_utilization
    if utilization is not None:
        return int(min(memory.total * utilization, memory.free)), f"--gpu-memory-utilization {utilization}"
    if memory.shared:
        return memory.free // 2, "half of what is free, since other programs share it; --gpu-memory-utilization sets it"
    return int(min(memory.total * 0.9, memory.free)), "0.9 of all; --gpu-memory-utilization sets it"


def _refusal(plan: MemoryPlan, needed: int, what: str) -> str:
    left = plan.budget - plan.weights - plan.working
    return (
        f"{what} does not fit on {plan.device}: weights {size(plan.weights)} + working memory {size(plan.working)} + "
        f"KV cache for {plan.max_model_len:,} tokens {size(needed)} = {size(plan.weights + plan.working + needed)}, "
        f"but the budget is {size(plan.budget)} ({plan.budget_reason}; {size(plan.memory.free)} free of "
        f"{size(plan.memory.total)}), which leaves {size(max(left, 0))} for the KV cache. What would make it fit: a smaller "
        f"--max-model-len, --max-num-batched-tokens or --max-num-seqs, a larger --gpu-memory-utilization or "
        f"--kv-cache-memory-bytes, --dtype bfloat16, --quantization, or a smaller model"
    )
