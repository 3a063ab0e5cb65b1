"""Captured decode steps, one per batch bucket.

A decode step of N sequences is always the same work on other numbers, so a device that can record it replays it in
one call. Buckets are powers of two and their halves-between; a smaller batch is padded with rows of context length 0,
which write to page 0 and get zeros. A bucket is captured when it is first met: nobody waits for graphs at start-up.

All numbers of a step lie in one piece of memory, on the host and on the device: they are written in place and sent in
one copy, and block tables only when a page has come or gone. Host time here is the device's waiting time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from quire.engine.batch import RowTables
from quire.hardware import AttentionBatch, Backend, CapturedStep
from quire.layers.decoder import Decoder
from quire.spec import KVSpec

ALIGNMENT = 64  # bytes
LARGEST_BUCKET = 512  # sequences; a larger step computes long enough to hide its launches


class Block:
    """Arrays in one piece of host memory, and tensors of the same shapes in one piece of the device's."""

    def __init__(self, backend: Backend, shapes: Sequence[tuple[type, tuple[int, ...]]]) -> None:
        self.backend = backend
        sizes = [prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes]
        ends = np.cumsum([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]).tolist()
        starts = [0, *ends[:-1]]
        self._host = np.zeros(ends[-1], dtype=np.uint8)
        self._device = backend.to_device(self._host)
        self.arrays: list[np.ndarray] = []
        self.tensors: list[torch.Tensor] = []
        for (dtype, shape), start, size in zip(shapes, starts, sizes, strict=True):
            self.arrays.append(self._host[start : start + size].view(dtype).reshape(shape))
            kind = torch.int64 if dtype is np.int64 else torch.int32
            self.tensors.append(self._device[start : start + size].view(kind).view(shape))

    def send(self) -> None:
        """The arrays' present contents to the tensors."""
        self._device.copy_(self.backend.to_device(self._host))


class Inputs:
    """What a captured step of ``size`` sequences reads. Padding rows have context length 0 and slot 0."""

    def __init__(self, backend: Backend, spec: KVSpec, size: int, max_model_len: int) -> None:
        self.size, groups = size, len(spec.groups)
        wide, narrow = (np.int64, (size,)), (np.int32, (size,))
        self._numbers = Block(backend, [wide] * (2 + groups) + [narrow, (np.int32, (size + 1,))])
        widths = [-(-(max_model_len + 1) // group.page_size) for group in spec.groups]
        self._tables = Block(backend, [(np.int32, (size, width)) for width in widths])
        self.token_ids, self.positions, *self.slots, self.context_lens, query_start = self._numbers.arrays
        query_start[:] = np.arange(size + 1)
        token_ids, positions, *slots, context_lens, starts = self._numbers.tensors
        self._numbers.send()
        self.tensors = [token_ids, positions, *slots, context_lens, starts, *self._tables.tensors]
        self.batch = AttentionBatch(
            query_start=starts, context_lens=context_lens, block_tables=tuple(self._tables.tensors), slots=tuple(slots),
            positions=positions, query_start_host=query_start, context_lens_host=self.context_lens, max_query_len=1,
            max_context_len=max_model_len,
        )  # fmt: skip
        self._rows = np.empty(0, dtype=np.int64)
        self._version = -1

    def fill(self, tables: RowTables, rows: np.ndarray, starts: np.ndarray) -> None:
        """The step in which each of ``rows`` int64 [N] computes its token at position ``starts`` int64 [N]."""
        count = len(rows)
        same = self._version == tables.version and np.array_equal(rows, self._rows)
        for group, table, slots, full in zip(
            tables.spec.groups, tables.block_tables, self.slots, self._tables.arrays, strict=True
        ):
            page, offset = np.divmod(starts, group.page_size)
            np.multiply(table[rows, page], group.page_size, out=slots[:count])
            slots[:count] += offset
            if not same:
                np.take(table, rows, axis=0, out=full[:count], mode="clip")
        if count < len(self._rows):
            for array in (self.token_ids, self.positions, self.context_lens, *self.slots, *self._tables.arrays):
                array[count:] = 0
        self.token_ids[:count] = tables.tokens[rows, starts]
        self.positions[:count] = starts
        np.add(starts, 1, out=self.context_lens[:count], casting="unsafe")
        self._numbers.send()
        if not same:
            self._tables.send()
            self._rows, self._version = rows, tables.version
        self.batch.max_context_len = int(self.context_lens.max())


@dataclass
class Bucket:
    step: CapturedStep
    inputs: Inputs
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

    def run(self, tables: RowTables, rows: np.ndarray, starts: np.ndarray, launched: Callable[[], None]) -> Any:
        """Row ``rows[i]`` of the tables computes its token at position ``starts[i]``. ``launched`` is called when all
        that is left to do is the device's."""
        bucket = self._bucket(self._size(len(rows)))
        assert bucket is not None
        bucket.inputs.fill(tables, rows, starts)
        self.backend.plan_attention(bucket.inputs.batch, self.spec, reuse=bucket.plan)
        launched()
        return bucket.step.replay()

    def _bucket(self, size: int) -> Bucket | None:
        if size in self.buckets:
            return self.buckets[size]
        # The captured step must be right for every later batch of the bucket, so it is planned for the longest.
        inputs = Inputs(self.backend, self.spec, size, self.max_model_len)
        every_row = self.backend.to_device(np.arange(size, dtype=np.int64))
        plan = self.backend.plan_attention(inputs.batch, self.spec)

        def step() -> Any:
            hidden = self.model.forward(inputs.tensors[0], inputs.batch, self.kv, plan)
            return self.model.logits(hidden, every_row)

        captured = self.backend.capture(step, [*inputs.tensors, every_row])
        if captured is None:
            self.refused = True
            return None
        self.buckets[size] = Bucket(captured, inputs, plan)
        return self.buckets[size]
