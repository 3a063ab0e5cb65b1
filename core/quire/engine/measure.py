"""One measured step: what the largest step really takes, to put in the place of an estimate.

The arithmetic in ``memory.py`` decides what is loaded and sizes the pages; a device whose allocator can tell its peak
(``Backend.peak_memory``) then runs one step of the largest size over a pool of two pages, before the pages are
allocated, and the pages are sized again with the number that it found. It is that one step: a few tens of
milliseconds, and its kernels are compiled for later; no dummy requests of full length, no search.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quire.config import SchedulerConfig
from quire.engine.batch import StepArrays
from quire.engine.memory import size
from quire.errors import DoesNotFit
from quire.hardware import Backend, SamplingBatch
from quire.layers.decoder import Decoder
from quire.spec import KVSpec

PAGES = 2  # page 0 and one that every token is written to: the values are of no interest


def measure_step(backend: Backend, model: Decoder, kv: KVSpec, config: SchedulerConfig, length: int) -> int | None:
    """Bytes that a step of ``max_num_batched_tokens`` tokens and ``max_num_seqs`` sampled rows takes at its peak beyond
    the weights; ``length`` is the longest sequence. None: the device cannot tell, and nothing was run.

    Raises DoesNotFit when the step itself runs out of memory.
    """
    arrays = largest_step(kv, config.max_num_batched_tokens, length)

    def step() -> None:
        pool = backend.allocate_kv(kv, [PAGES] * len(kv.groups))
        batch = arrays.to_device(backend)
        plan = backend.plan_attention(batch, kv)
        hidden = model.forward(backend.to_device(arrays.token_ids), batch, pool, plan)
        rows = np.arange(config.max_num_seqs, dtype=np.int64) % len(arrays.token_ids)
        backend.sample(model.logits(hidden, backend.to_device(rows)), _sampling(backend, config.max_num_seqs))
        backend.synchronize()

    try:
        return backend.peak_memory(step)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"a step of {config.max_num_batched_tokens:,} tokens and {config.max_num_seqs:,} sampled rows does not fit on "
            f"{backend.name} beside the weights ({size(backend.memory(backend.device_index).free)} are free now: "
            f"{str(error).partition(chr(10))[0]}). What would make it fit: a smaller --max-num-batched-tokens or --max-num-seqs"
        ) from None


def largest_step(kv: KVSpec, tokens: int, length: int) -> StepArrays:
    """``tokens`` new tokens in sequences of at most ``length``, all of them in page 1 of every group."""
    counts = np.asarray([length] * (tokens // length) + [tokens % length] * (tokens % length > 0), dtype=np.int32)
    positions = np.concatenate([np.arange(count) for count in counts]).astype(np.int64)
    widths: Sequence[int] = [-(-int(counts.max()) // group.page_size) for group in kv.groups]
    return StepArrays(
        rows=np.arange(len(counts), dtype=np.int64),
        token_ids=np.zeros(tokens, dtype=np.int64),
        positions=positions,
        query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=counts,
        block_tables=tuple(np.ones((len(counts), width), dtype=np.int32) for width in widths),
        slots=tuple(group.page_size + positions % group.page_size for group in kv.groups),
    )


def _sampling(backend: Backend, rows: int) -> SamplingBatch:
    """Rows that ask for everything, so that no part of sampling is left out."""

    def full(value: float, dtype: type) -> torch.Tensor:
        return backend.to_device(np.full(rows, value, dtype=dtype))

    return SamplingBatch(
        temperature=full(1, np.float32), top_k=full(50, np.int32), top_p=full(0.9, np.float32),
        min_p=full(0.01, np.float32), uniform=full(0.5, np.float64),
    )  # fmt: skip
