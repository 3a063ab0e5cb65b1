"""Attention of other libraries on CUDA, and the table that says when they are asked before the kernels of quire-triton.

FlashInfer (Ye et al. 2025, https://arxiv.org/abs/2501.01005) is called as its release 0.7.2 is; torch's own
variable-length attention as torch 2.13's. ``signatures.py`` holds the names and parameters that are relied on.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.hardware import AttentionSpec
from quire_triton.choice import TRITON, ChoosingPlan, Implementation, Row, Shape, tokens

FLASHINFER, VARLEN = "FLASHINFER", "TORCH_VARLEN"

TABLE = (
    Row("*", True, (TRITON, FLASHINFER, VARLEN)),
    Row("*", False, (TRITON, FLASHINFER, VARLEN)),
)
"""Nothing here has been timed: the kernels of quire-triton come first, and the others where there is no Triton. A row for an
architecture that says otherwise names the file under bench/results that shows it."""


class TorchVarlen(Implementation):
    """``torch.nn.attention.varlen.varlen_attn``: FlashAttention 2 (Dao 2023, https://arxiv.org/abs/2307.08691) as torch's
    binaries hold it. Torch 2.13 gives it a block table, whose pages must be multiples of 256 tokens."""

    name = VARLEN
    page_sizes = frozenset({256})

    def missing(self) -> str | None:
        # Its source is read, not imported: the import takes torch's compiler with it, seconds that a start need not pay.
        found = importlib.util.find_spec("torch.nn.attention.varlen")
        if found is None or found.origin is None:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        lacking = {"block_table", "seqused_k", "enable_gqa"} - parameters(Path(found.origin).read_text(), "varlen_attn")
        if lacking:
            return (
                f"varlen_attn of torch {torch.__version__} does not take {', '.join(sorted(lacking))}, so it cannot read "
                "pages: torch 2.13 does"
            )
        return None

    def refuses(self, shape: Shape) -> str | None:
        if shape.spec.soft_cap is not None:
            return "it has no soft cap"
        if shape.spec.head_dim % 8 or shape.spec.head_dim > 256:
            return f"it takes head sizes that are multiples of 8 up to 256, not {shape.spec.head_dim}"
        return super().refuses(shape)

    def attention(self, q: Tensor, pool: Tensor, group: int, plan: ChoosingPlan, spec: AttentionSpec) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        batch, count = plan.batch, tokens(plan)
        # With a block table the keys' lengths come from seqused_k; the sums before them are checked for their shape,
        # and not read.
        out: Any = varlen_attn(
            q[:count], pool[0], pool[1], batch.query_start, batch.query_start, batch.max_query_len,
            max(batch.max_context_len, 1), scale=spec.scale, window_size=(-1, 0),
            enable_gqa=spec.heads != spec.kv_heads, seqused_k=batch.context_lens, block_table=batch.block_tables[group],
        )  # fmt: skip
        return _with_tail(out, q)


@dataclass
class FlashInferState:
    """A planned wrapper. ``buffers``: what a captured step's wrapper reads, at addresses that do not change."""

    wrapper: Any
    key: tuple[int, AttentionSpec, torch.dtype]
    decode: bool
    page_size: int
    captured: bool


class FlashInfer(Implementation):
    """FlashInfer's wrappers over pages: the decode one where every sequence has one query, else the prefill one. They are
    planned once a step for all layers of a kind, and for a captured step again before each replay."""

    name = FLASHINFER
    MINIMUM = (0, 6)
    head_sizes = (64, 256)
    HEAD_SIZES = frozenset({64, 128, 256})
    WORKSPACE = 128 << 20  # bytes, as its documentation recommends; shared by all wrappers, which run one after another
    TENSOR_CORES_FROM = 4  # query heads per KV head from which its documentation prefers them for decoding

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self._workspace: Tensor | None = None

    def missing(self) -> str | None:
        if importlib.util.find_spec("flashinfer") is None:
            return "it is not installed: pip install 'quire-plugin-cuda[flashinfer]'"
        try:
            version = importlib.metadata.version("flashinfer-python")
        except importlib.metadata.PackageNotFoundError:
            return "a module flashinfer is there, but no distribution flashinfer-python"
        if tuple(int(part) for part in version.split(".")[:2]) < self.MINIMUM:
            return f"FlashInfer {version} is installed; {'.'.join(map(str, self.MINIMUM))} or later is needed"
        compiler = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
        if importlib.util.find_spec("flashinfer_jit_cache") is None and not compiler:
            return (
                "FlashInfer would have to compile its kernels, and there is no nvcc: pip install flashinfer-jit-cache"
            )
        return None

    def refuses(self, shape: Shape) -> str | None:
        if shape.spec.head_dim not in self.HEAD_SIZES:
            return f"it is used for head sizes of {', '.join(map(str, sorted(self.HEAD_SIZES)))}, not {shape.spec.head_dim}"
        return super().refuses(shape)

    def attention(self, q: Tensor, pool: Tensor, group: int, plan: ChoosingPlan, spec: AttentionSpec) -> Tensor:
        key = (group, spec, q.dtype)
        if key not in plan.states:
            state = self._wrapper(plan, key, pool.shape[1], pool.shape[2])
            self._plan(state, plan)
            plan.states[key] = state
        state = plan.states[key]
        out = state.wrapper.run(q[: tokens(plan)], (pool[0], pool[1]))
        if state.captured:
            # Padding rows of a captured step read a page that may hold anything: theirs are zeros.
            out = out.masked_fill((plan.batch.context_lens == 0)[:, None, None], 0)
        return _with_tail(out, q)

    def update(self, plan: ChoosingPlan) -> None:
        for key, state in list(plan.states.items()):
            if state.captured:
                self._plan(state, plan)
            else:
                del plan.states[key]

    def _wrapper(self, plan: ChoosingPlan, key: Any, pages: int, page_size: int) -> FlashInferState:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

        group, spec, _ = key
        if self._workspace is None:  # zeros: the counters in it must be
            self._workspace = torch.zeros(self.WORKSPACE, dtype=torch.uint8, device=self.backend.device)
        if not plan.decode:
            wrapper = BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            return FlashInferState(wrapper, key, False, page_size, False)
        buffers: dict[str, Any] = {}
        if plan.kept:
            rows, width = plan.batch.block_tables[group].shape
            sizes = {"indptr": rows + 1, "indices": rows * width, "last_page_len": rows}
            buffers = {
                f"paged_kv_{name}_buffer": torch.zeros(size, dtype=torch.int32, device=self.backend.device)
                for name, size in sizes.items()
            }
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_cuda_graph=plan.kept,
            use_tensor_cores=spec.heads // spec.kv_heads >= self.TENSOR_CORES_FROM, **buffers,
        )  # fmt: skip
        return FlashInferState(wrapper, key, True, page_size, plan.kept)

    def _plan(self, state: FlashInferState, plan: ChoosingPlan) -> None:
        group, spec, dtype = state.key
        batch = plan.batch
        indptr, flat, last = page_lists(
            batch.context_lens_host, state.page_size, batch.block_tables[group].shape[1], state.captured
        )
        indices = batch.block_tables[group].reshape(-1)[self.backend.to_device(flat)]
        pages = (torch.from_numpy(indptr), indices, torch.from_numpy(last))
        shared: dict[str, Any] = dict(
            sm_scale=spec.scale, logits_soft_cap=spec.soft_cap, q_data_type=dtype, kv_data_type=dtype
        )
        sizes = (spec.heads, spec.kv_heads, spec.head_dim, state.page_size)
        if state.decode:
            state.wrapper.plan(*pages, *sizes, **shared)
        else:
            starts = torch.from_numpy(np.ascontiguousarray(batch.query_start_host, dtype=np.int32))
            state.wrapper.plan(starts, *pages, *sizes, causal=True, **shared)


def parameters(source: str, function: str) -> set[str]:
    """Names of the parameters of a function at a module's top level; empty where there is no such function."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return set()


def page_lists(
    lengths: np.ndarray, page_size: int, width: int, padded: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indptr int32 [N + 1], where each page of each sequence stands in the flattened block table int64, tokens in its
    last page int32 [N]). ``padded``: a sequence without tokens is given one, for wrappers that cannot have none."""
    if padded:
        lengths = np.maximum(lengths, 1)
    pages = -(-lengths.astype(np.int64) // page_size)
    indptr = np.concatenate(([0], np.cumsum(pages))).astype(np.int32)
    rows = np.repeat(np.arange(len(pages)), pages)
    flat = rows * width + np.arange(indptr[-1]) - indptr[rows]
    last = (lengths - np.maximum(pages - 1, 0) * page_size).astype(np.int32)
    return indptr, flat, last


def _with_tail(out: Tensor, q: Tensor) -> Tensor:
    """``out`` of the tokens that belong to sequences, and zeros for those of q that belong to none."""
    return out if len(out) == len(q) else torch.cat((out, out.new_zeros((len(q) - len(out), *out.shape[1:]))))
