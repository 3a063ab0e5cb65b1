"""The runner's tables: per row its tokens and its pages, and from them the arrays of a step.

A row is one running sequence. Tables are allocated once, untouched memory costs nothing; a step is assembled with a
few vectorised numpy operations whatever the batch, because host time is the device's waiting time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.hardware import AttentionBatch, Backend
from quire.message import NewRow, StepPlan
from quire.spec import KVSpec


@dataclass
class StepArrays:
    """One step on the host. T tokens, N sequences."""

    rows: np.ndarray  # int64 [N]
    token_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    query_start: np.ndarray  # int32 [N + 1]
    context_lens: np.ndarray  # int32 [N]
    block_tables: tuple[np.ndarray, ...]  # int32 [N, M] per group
    slots: tuple[np.ndarray, ...]  # int64 [T] per group

    def to_device(self, backend: Backend) -> AttentionBatch:
        return AttentionBatch(
            query_start=backend.to_device(self.query_start),
            context_lens=backend.to_device(self.context_lens),
            block_tables=tuple(backend.to_device(table) for table in self.block_tables),
            slots=tuple(backend.to_device(slots) for slots in self.slots),
            positions=backend.to_device(self.positions),
            query_start_host=self.query_start,
            context_lens_host=self.context_lens,
            max_query_len=int((self.query_start[1:] - self.query_start[:-1]).max(initial=0)),
            max_context_len=int(self.context_lens.max(initial=0)),
        )


class RowTables:
    """Tokens and block tables of all rows.

    ``tokens`` int32 [rows, max_model_len + 1]; ``block_tables[g]`` int32 [rows, ceil(max_model_len / page_size)];
    ``version`` counts changes of block tables.
    """

    def __init__(self, rows: int, max_model_len: int, spec: KVSpec) -> None:
        self.spec = spec
        self.version = 0
        self.tokens = np.zeros((rows, max_model_len + 1), dtype=np.int32)
        self.known = np.zeros(rows, dtype=np.int64)
        self.prompt_len = np.zeros(rows, dtype=np.int64)
        self.block_tables = [
            np.zeros((rows, -(-(max_model_len + 1) // group.page_size)), dtype=np.int32) for group in spec.groups
        ]

    def admit(self, new: NewRow) -> None:
        count = len(new.token_ids)
        self.tokens[new.row, :count] = new.token_ids
        self.known[new.row] = count
        self.prompt_len[new.row] = new.prompt_len

    def fork(self, source: int, row: int, prompt_len: int) -> None:
        """Give ``row`` the prompt of ``source``; its pages come with the plan."""
        self.tokens[row, :prompt_len] = self.tokens[source, :prompt_len]
        self.known[row] = self.prompt_len[row] = prompt_len

    def write_pages(self, plan: StepPlan) -> None:
        self.version += bool(plan.pages)
        for row, group, first, pages in plan.pages:
            self.block_tables[group][row, first : first + len(pages)] = pages

    def append(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        self.tokens[rows, self.known[rows]] = token_ids
        self.known[rows] += 1

    def arrays(self, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> StepArrays:
        """The step in which row ``rows[i]`` computes ``counts[i]`` tokens from position ``starts[i]``."""
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        offsets = np.repeat(starts - query_start[:-1], counts)
        positions = np.arange(query_start[-1], dtype=np.int64) + offsets
        token_rows = np.repeat(rows, counts)
        context_lens = (starts + counts).astype(np.int32)
        tables, slots = [], []
        for group, table in zip(self.spec.groups, self.block_tables, strict=True):
            width = max(1, -(-int(context_lens.max(initial=1)) // group.page_size))
            tables.append(np.ascontiguousarray(table[rows, :width]))
            pages = table[token_rows, positions // group.page_size].astype(np.int64)
            slots.append(pages * group.page_size + positions % group.page_size)
        return StepArrays(
            rows=rows,
            token_ids=self.tokens[token_rows, positions].astype(np.int64),
            positions=positions,
            query_start=query_start,
            context_lens=context_lens,
            block_tables=tuple(tables),
            slots=tuple(slots),
        )
