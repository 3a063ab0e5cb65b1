"""Several engines on one machine: its memory and its cores divided by arithmetic, before anything is loaded.

Each model gets its weights and its working memory; what is left of the budget becomes KV caches that hold equally many
tokens, none more than its model can use. A device that computes on the host's cores would otherwise have the threads of
one engine wait for those of another: each engine is confined to cores of its own.

:func:`divided` asks a process of its own, since looking at a device takes what a server is to start without:
``python -m quire.engine.division`` reads an :class:`Ask` on standard input and answers on standard output.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from quire.config import EngineConfig
from quire.errors import ConfigError, DoesNotFit, UserError

if TYPE_CHECKING:
    from quire.engine.build import Survey
    from quire.engine.memory import MemoryPlan


class Ask(msgspec.Struct):
    configs: list[EngineConfig]
    names: list[str]  # of the models, for what is said of them
    utilization: float | None = None  # share of each device's memory for all models on it


class Division(msgspec.Struct):
    configs: list[EngineConfig] = []
    report: str = ""
    error: str | None = None
    kind: str = ""


def divided(configs: Sequence[EngineConfig], names: Sequence[str], utilization: float | None = None) -> Division:
    """The configurations with their shares, and the arithmetic as text. Raises UserError; DoesNotFit with the numbers."""
    ask = msgspec.msgpack.encode(Ask(list(configs), list(names), utilization))
    done = subprocess.run(
        [sys.executable, "-m", "quire.engine.division"], input=ask, stdout=subprocess.PIPE, check=False
    )
    try:
        division = msgspec.msgpack.decode(done.stdout, type=Division)
    except msgspec.DecodeError:
        raise UserError(f"the models could not be looked at: the process ended with status {done.returncode}") from None
    if division.error is not None:
        raise {"DoesNotFit": DoesNotFit, "ConfigError": ConfigError}.get(division.kind, UserError)(division.error)
    return division


# -- memory --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Need:
    """Of one model, in bytes. ``least``: of KV cache, without which it cannot serve; ``most``: what it could ever use."""

    fixed: int
    least: int
    most: int
    token: float


def need(found: Survey) -> Need:
    """What a model takes of its device. A model with memory of its own (--kv-cache-memory-bytes, --gpu-memory-utilization)
    takes just that."""
    from quire.engine.memory import request_pages, working_bytes

    cache, scheduler = found.config.cache, found.config.scheduler
    working = working_bytes(found.spec, found.dtype, scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
    fixed = found.weights + working

    def bytes_for(tokens: int) -> int:
        pages = request_pages(found.kv, tokens, scheduler.max_num_batched_tokens)
        return sum(p * b for p, b in zip(pages, found.page_bytes, strict=True))

    page = found.kv.groups[0].page_size
    least = bytes_for(scheduler.max_model_len or page)
    token = sum(found.page_bytes) / page
    if cache.kv_cache_memory_bytes is not None:
        return Need(fixed, cache.kv_cache_memory_bytes, cache.kv_cache_memory_bytes, token)
    if cache.gpu_memory_utilization is not None:
        own = max(least, int(found.memory.total * cache.gpu_memory_utilization) - fixed)
        return Need(fixed, own, own, token)
    most = scheduler.max_num_seqs * bytes_for(scheduler.max_model_len or found.spec.max_positions)
    return Need(fixed, least, max(least, most), token)


def caches(needs: Sequence[Need], budget: int) -> list[int] | None:
    """Bytes of KV cache for each: as many tokens in all of them, within what each needs and can use. None: too little."""
    room = budget - sum(one.fixed for one in needs)

    def at(tokens: float) -> list[int]:
        return [max(one.least, min(one.most, int(tokens * one.token))) for one in needs]

    if sum(at(0)) > room:
        return None
    low, high = 0.0, max(room, 0) / min(one.token for one in needs)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= room else (low, middle)
    return at(low)


def divide_memory(
    found: Sequence[Survey], names: Sequence[str], utilization: float | None
) -> tuple[list[EngineConfig], list[MemoryPlan], str]:
    """Of models on one device: (configurations, what each has, the budget in words). Raises DoesNotFit."""
    from quire.engine.memory import budget_of, size

    memory, whole = found[0].memory, replace(found[0].config.cache, gpu_memory_utilization=utilization)
    budget, reason = budget_of(whole, memory)
    needs = [need(one) for one in found]
    shares = caches(needs, budget)
    said = f"{size(memory.free)} free of {size(memory.total)}; budget {size(budget)} ({reason})"
    if shares is None:
        lines = [
            f"  {name}: weights and working memory {size(one.fixed)} + KV cache {size(one.least)} at least"
            for name, one in zip(names, needs, strict=True)
        ]
        together = sum(one.fixed + one.least for one in needs)
        raise DoesNotFit(
            f"{len(found)} models do not fit together on {found[0].device}: {said}, but they need {size(together)}:\n"
            + "\n".join(lines)
            + "\nWhat would make it fit: fewer models, a larger --gpu-memory-utilization (of all), or for a model a smaller "
            "--max-model-len, --max-num-batched-tokens, --max-num-seqs or --kv-cache-memory-bytes, or --quantization"
        )
    configs = [
        replace(one.config, cache=replace(one.config.cache, kv_cache_memory_bytes=share, gpu_memory_utilization=None))
        for one, share in zip(found, shares, strict=True)
    ]
    return configs, [one.plan(config) for one, config in zip(found, configs, strict=True)], said


# -- cores ---------------------------------------------------------------------------------------------------------
def divide_cores(cores: Sequence[int], usable: int, asked: Sequence[int | None]) -> list[tuple[int, tuple[int, ...]]]:
    """(threads, cores) for each engine: as many threads as it asked for (--threads), the others alike and at least one.

    ``usable`` is how many cores' worth of time there is, which a quota may make less than ``cores``: then each thread has
    several to run on. Where the threads are too many, slices are laid over one another, round and round.
    """
    usable = max(1, min(usable, len(cores)))
    open_ended = asked.count(None)
    each = max(1, (usable - sum(count or 0 for count in asked)) // open_ended) if open_ended else 0
    slices, at = [], 0
    for count in (each if count is None else count for count in asked):
        width = min(count * len(cores) // usable, len(cores))
        slices.append((count, tuple(sorted(cores[(at + i) % len(cores)] for i in range(width)))))
        at += width
    return slices


# -- both ----------------------------------------------------------------------------------------------------------
def divide(found: Sequence[Survey], names: Sequence[str], utilization: float | None) -> Division:
    """Raises DoesNotFit."""
    from quire.engine.memory import size

    configs = [one.config for one in found]
    lines = []
    groups: dict[tuple[str, int], list[int]] = {}
    for i, one in enumerate(found):  # all that is shared is the host's
        place = ("", 0) if one.memory.shared else (one.backend.name, one.config.device_index)
        groups.setdefault(place, []).append(i)
    for members in groups.values():
        here = [found[i] for i in members]
        made, plans, said = divide_memory(here, [names[i] for i in members], utilization)
        lines.append(f"memory on {here[0].device}: {said}, for {len(members)} model{'s' if len(members) > 1 else ''}")
        for i, config, plan in zip(members, made, plans, strict=True):
            configs[i] = config
            tokens = " + ".join(f"{(count - 1) * plan.page_size:,}" for count in plan.pages)
            lines.append(
                f"  {names[i]}: weights {size(plan.weights)} + working memory {size(plan.working)} + KV cache {size(plan.kv)} "
                f"({tokens} tokens; {plan.requests:.1f} requests of {plan.max_model_len:,})"
            )
    threads = [one.backend.devices()[one.config.device_index].threads for one in found]
    on_host = [i for i, count in enumerate(threads) if count]
    if len(on_host) > 1 and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        asked = [found[i].config.threads for i in on_host]
        for i, (count, slice_) in zip(on_host, divide_cores(cores, max(threads), asked), strict=True):
            configs[i] = replace(configs[i], threads=count, cores=slice_)
            lines.append(f"  {names[i]}: {count} thread{'s' if count > 1 else ''} on the cores {_ranges(slice_)}")
    return Division(configs, "\n".join(lines))


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 8`` for people."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] + 1 == number:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in parts)


def main() -> int:
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not the answer
    ask = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Ask)
    logging.basicConfig(level=logging.ERROR)  # the engines say the rest themselves
    name = ""  # of the model that is looked at
    try:
        from quire.engine.build import survey
        from quire.plugins import load

        registry = load(ask.configs[0].plugins)
        found = []
        for name, config in zip(ask.names, ask.configs, strict=True):  # noqa: B007  (it is told when this fails)
            found.append(survey(config, registry))
        name = ""
        division = divide(found, ask.names, ask.utilization)
    except UserError as error:
        division = Division(error=f"{name}: {error}" if name else str(error), kind=type(error).__name__)
    with contextlib.closing(answer):
        answer.write(msgspec.msgpack.encode(division))
    return 0


if __name__ == "__main__":
    sys.exit(main())
