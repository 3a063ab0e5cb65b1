"""Paged attention of intel-extension-for-pytorch, and the table that says when it is asked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.hardware import AttentionSpec
from quire_triton.choice import TRITON, ChoosingPlan, Implementation, Row, Shape, tokens
from quire_xpu import ipex

IPEX = "IPEX"

TABLE = (Row("*", True, (TRITON, IPEX)), Row("*", False, (TRITON, IPEX)))
"""Nothing here has been timed: the kernels of quire-triton come first. They need a Triton that torch 2.8, the only one that
IPEX works with, does not bring, so that where IPEX is usable at all it is asked."""


class IpexAttention(Implementation):
    """``PagedAttention.flash_attn_varlen_func``: prompts, chunks and decode steps alike, over a block table. The build for
    GPUs takes pools of [pages, page_size, Hkv, D], as ours are (the one for CPUs, of the same name, does not)."""

    name = IPEX
    head_sizes = (64, 256)
    page_sizes = frozenset({64, 128, 256})  # vLLM runs it on pages of 64 and more

    def missing(self) -> str | None:
        return ipex.missing()

    def refuses(self, shape: Shape) -> str | None:
        if shape.spec.head_dim % 64 or shape.spec.head_dim > 256:
            return f"it copies the pool for head sizes that are not multiples of 64, such as {shape.spec.head_dim}"
        return super().refuses(shape)

    def attention(self, q: Tensor, pool: Tensor, group: int, plan: ChoosingPlan, spec: AttentionSpec) -> Tensor:
        paged, _ = ipex.load()
        batch, count = plan.batch, tokens(plan)
        if "starts" not in plan.states:
            sums = np.concatenate(([0], np.cumsum(batch.context_lens_host))).astype(np.int32)
            plan.states["starts"] = self.backend.to_device(sums)
        out = torch.zeros_like(q)
        paged.flash_attn_varlen_func(
            out[:count], q[:count], pool[0], pool[1], batch.query_start, plan.states["starts"], batch.max_query_len,
            batch.max_context_len, spec.scale, True, batch.block_tables[group], None,
            softcap=-1.0 if spec.soft_cap is None else spec.soft_cap,
        )  # fmt: skip
        return out

    def update(self, plan: ChoosingPlan) -> None:
        plan.states.clear()
