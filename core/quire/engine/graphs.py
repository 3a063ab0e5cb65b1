"""Captured decode steps, one per batch bucket.

A decode step of N sequences is always the same work on other numbers, so a device that can record it replays it in
one call. Buckets are powers of two and their halves-between; a smaller batch is padded with rows of context length 0,
which write to page 0 and get zeros. A bucket is captured when it is first met: nobody waits for graphs at start-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.engine.batch import StepArrays
from quire.hardware import AttentionBatch, Backend, CapturedStep
from quire.layers.decoder import Decoder
from quire.spec import KVSpec

LARGEST_BUCKET = 512  # sequences; a larger step computes long enough to hide its launches


@dataclass
class Bucket:
    step: CapturedStep
    batch: AttentionBatch
    token_ids: Any
    plan: Any


def bucket_sizes(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to and including ``largest``."""
    sizes, power = {largest}, 1
    while power < largest:
        sizes |= {power, min(power + power // 2, largest)}
        power *= 2
    return sorted(sizes)


class DecodeGraphs:
    """Captures lazily; ``run`` returns logits float32 [bucket, V], of which the first N rows count."""

    def __init__(
        self, backend: Backend, model: Decoder, kv: Any, spec: KVSpec, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.backend, self.model, self.kv, self.spec = backend, model, kv, spec
        self.max_model_len = max_model_len
        self.sizes = bucket_sizes(min(max_num_seqs, LARGEST_BUCKET))
        self.buckets: dict[int, Bucket] = {}
        self.refused = False  # the device answered None: never ask again

    def fits(self, sequences: int) -> bool:
        return not self.refused and sequences <= self.sizes[-1] and self._bucket(self._size(sequences)) is not None

    def _size(self, sequences: int) -> int:
        return next(size for size in self.sizes if size >= sequences)

    def run(self, arrays: StepArrays) -> Any:
        bucket = self._bucket(self._size(len(arrays.rows)))
        assert bucket is not None
        padded = self._pad(arrays, len(bucket.token_ids))
        fresh = padded.to_device(self.backend)
        static = bucket.batch
        for old, new in zip(_tensors(static), _tensors(fresh), strict=True):
            old.copy_(new)
        bucket.token_ids.copy_(self.backend.to_device(padded.token_ids))
        static.query_start_host, static.context_lens_host = fresh.query_start_host, fresh.context_lens_host
        static.max_query_len, static.max_context_len = fresh.max_query_len, fresh.max_context_len
        self.backend.plan_attention(static, self.spec, reuse=bucket.plan)
        return bucket.step.replay()

    def _pad(self, arrays: StepArrays, size: int) -> StepArrays:
        """Widen to ``size`` rows and to block tables of full width, so that every replay has the captured shapes."""
        count = len(arrays.rows)
        extra = size - count

        def grow(array: np.ndarray, width: int) -> np.ndarray:
            return np.pad(array, (0, width))

        tables = []
        for group, table in zip(self.spec.groups, arrays.block_tables, strict=True):
            full = np.zeros((size, -(-(self.max_model_len + 1) // group.page_size)), dtype=np.int32)
            full[:count, : table.shape[1]] = table
            tables.append(full)
        return StepArrays(
            rows=grow(arrays.rows, extra),
            token_ids=grow(arrays.token_ids, extra),
            positions=grow(arrays.positions, extra),
            query_start=np.arange(size + 1, dtype=np.int32),
            context_lens=grow(arrays.context_lens, extra),
            block_tables=tuple(tables),
            slots=tuple(grow(slots, extra) for slots in arrays.slots),
        )

    def _bucket(self, size: int) -> Bucket | None:
        if size in self.buckets:
            return self.buckets[size]
        empty = np.zeros(size, dtype=np.int64)
        zeros = StepArrays(
            rows=empty,
            token_ids=empty,
            positions=empty,
            query_start=np.arange(size + 1, dtype=np.int32),
            context_lens=empty.astype(np.int32),
            block_tables=tuple(np.zeros((size, 1), dtype=np.int32) for _ in self.spec.groups),
            slots=tuple(empty for _ in self.spec.groups),
        )
        padded = self._pad(zeros, size)
        batch = padded.to_device(self.backend)
        # The captured step must be right for every later batch of the bucket, so it is planned for the longest.
        batch.max_context_len = self.max_model_len
        token_ids = self.backend.to_device(padded.token_ids.copy())
        every_row = self.backend.to_device(np.arange(size, dtype=np.int64))
        plan = self.backend.plan_attention(batch, self.spec)

        def step() -> Any:
            return self.model.logits(self.model.forward(token_ids, batch, self.kv, plan), every_row)

        captured = self.backend.capture(step, [token_ids, *_tensors(batch), every_row])
        if captured is None:
            self.refused = True
            return None
        self.buckets[size] = Bucket(captured, batch, token_ids, plan)
        return self.buckets[size]


def _tensors(batch: AttentionBatch) -> list[Any]:
    return [batch.query_start, batch.context_lens, *batch.block_tables, *batch.slots, batch.positions]
