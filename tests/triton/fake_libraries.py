"""Stand-ins for FlashInfer, torch's variable-length attention and IPEX, in host memory.

Each binds its arguments to the parameters of the release (``released.py``) and computes in float64 what the library's
documentation says of them, so that what a plugin hands over is checked by what comes out. They show nothing of the
libraries' kernels: layouts and dtypes that those refuse beyond their documentation, speed, or their bits.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.triton.released import FLASHINFER, IPEX, VARLEN, bound


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float | None) -> Tensor:
    """One sequence: q [t, Hq, D], the last t of the positions of k, v [length, Hkv, D]; causal, in float64."""
    t, heads, size = q.shape
    length, kv_heads = k.shape[:2]
    grouped = q.double().view(t, kv_heads, heads // kv_heads, size)
    scores = torch.einsum("tkgd,lkd->kgtl", grouped, k.double()) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    visible = torch.arange(length)[None] <= torch.arange(length - t, length)[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("kgtl,lkd->tkgd", weights, v.double()).reshape(t, heads, size).to(q.dtype)


def paged(
    q: Tensor, cache: tuple[Tensor, Tensor], starts: Any, pages: list[Tensor], lengths: Any, scale: float, cap: Any
) -> Tensor:
    """Ragged attention over the pages of each sequence: q [T, Hq, D]."""
    out = torch.full_like(q, torch.nan)
    for n, length in enumerate(lengths):
        begin, end = int(starts[n]), int(starts[n + 1])
        if begin == end:
            continue
        k, v = (side[pages[n].long()].flatten(0, 1)[: int(length)] for side in cache)
        out[begin:end] = attend(q[begin:end], k, v, scale, cap)
    return out


# -- FlashInfer --------------------------------------------------------------------------------------------------------
class Wrapper:
    """What the decode and the prefill wrapper share. ``world`` counts plans, and knows when a step is being recorded."""

    file: str
    planned: str
    world: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self._bound("__init__", *args, **kwargs)
        assert given["float_workspace_buffer"].dtype == torch.uint8
        assert not given["float_workspace_buffer"].any(), "it must be zero before its first use"
        assert given.get("kv_layout", "NHD") == "NHD"
        self.graph = bool(given.get("use_cuda_graph"))
        self.buffers = [given.get(f"paged_kv_{name}_buffer") for name in ("indptr", "indices", "last_page_len")]
        assert all((buffer is not None) == self.graph for buffer in self.buffers)
        self.world.wrappers.append(self)

    def _bound(self, function: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return bound(FLASHINFER.calls[self.file, type(self).__name__, function], self, *args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        assert not self.world.recording, "plan() copies and waits: it cannot be recorded"
        given = self._bound(self.planned, *args, **kwargs)
        self.world.plans += 1
        prefix = "" if self.planned == "_plan_impl" else "paged_kv_"
        lists = [given[f"{prefix}{name}"] for name in ("indptr", "indices", "last_page_len")]
        assert all(part.dtype in (torch.int32, torch.int64) for part in lists)
        indptr, indices, last = lists
        pages = np.diff(indptr.numpy())
        assert len(indices) == indptr[-1]
        assert ((last.numpy() >= 1) & (last.numpy() <= given["page_size"]) | (pages == 0)).all(), "1 <= last_page_len"
        if self.graph:
            assert (pages > 0).all()
            for buffer, part in zip(self.buffers, lists, strict=True):
                buffer[: len(part)].copy_(part)
        else:
            self.buffers = lists
        self.starts = given.get("qo_indptr", torch.arange(len(last) + 1))
        self.given = given

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        given = self._bound("run", *args, **kwargs)
        q, (k, v) = given["q"], given["paged_kv_cache"]
        indptr, indices, last = self.buffers
        assert q.dtype == self.given["q_data_type"] == k.dtype == self.given["kv_data_type"]
        assert k.shape[1:] == (self.given["page_size"], self.given["num_kv_heads"], q.shape[2])
        assert k.is_contiguous()
        assert v.is_contiguous()
        assert len(q) == self.starts[-1]
        pages = [indices[indptr[n] : indptr[n + 1]] for n in range(len(last))]
        size = self.given["page_size"]
        lengths = [(len(mine) - 1) * size + int(last[n]) if len(mine) else 0 for n, mine in enumerate(pages)]
        return paged(q, (k, v), self.starts, pages, lengths, self.given["sm_scale"], self.given["logits_soft_cap"])


def flashinfer(monkeypatch: pytest.MonkeyPatch, version: str = "0.7.2.post1") -> Any:
    """Install the stand-in; returns its world: ``wrappers`` made, ``plans`` counted, ``recording`` to be set."""
    world = types.SimpleNamespace(wrappers=[], plans=0, recording=False)

    class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
        file, planned = "decode.py", "_plan_impl"

    class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
        file, planned = "prefill.py", "plan"

        def plan(self, *args: Any, **kwargs: Any) -> None:
            super().plan(*args, **kwargs)
            assert self.given["causal"]

    classes = {c.__name__: c for c in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper)}
    for one in classes.values():
        one.world = world
    module("flashinfer", monkeypatch, **classes)
    module("flashinfer_jit_cache", monkeypatch)
    distribution("flashinfer-python", version, monkeypatch)
    return world


# -- torch -------------------------------------------------------------------------------------------------------------
def varlen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand-in for torch.nn.attention.varlen, with 2.13's parameters; returns the calls that it gets."""
    calls = []

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        given = bound(VARLEN[2, 13], *args, **kwargs)
        calls.append(given)
        k, table, used = given["key"], given["block_table"], given["seqused_k"]
        assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert table.dtype == used.dtype == given["cu_seq_q"].dtype == torch.int32
        assert given["cu_seq_k"].shape == given["cu_seq_q"].shape == (len(table) + 1,)
        assert given["window_size"] == (-1, 0), "causal"
        assert given["enable_gqa"] == (given["query"].shape[1] != k.shape[2])
        starts, lengths = given["cu_seq_q"].tolist(), used.tolist()
        assert given["max_q"] >= max(np.diff(starts), default=0)
        assert given["max_k"] >= max(lengths)
        pages = [table[n, : -(-length // k.shape[1])] for n, length in enumerate(lengths)]
        return paged(given["query"], (k, given["value"]), starts, pages, lengths, given["scale"], None)

    module("torch.nn.attention.varlen", monkeypatch, varlen_attn=varlen_attn)
    return calls


# -- IPEX --------------------------------------------------------------------------------------------------------------
def ipex(monkeypatch: pytest.MonkeyPatch, version: str = "2.8.10+xpu", without: str = "") -> list[str]:
    """Stand-in for intel_extension_for_pytorch; returns the names that are called."""
    calls: list[str] = []

    def given_to(owner: str, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append(name)
        file = "llm/modules/mha_fusion.py" if owner else "llm/functional/fusions.py"
        own = (None, *args) if owner else args
        return bound(IPEX.calls[file, owner, name], *own, **kwargs)

    class PagedAttention:
        @staticmethod
        def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> None:
            given = given_to("PagedAttention", "flash_attn_varlen_func", *args, **kwargs)
            starts, sums = given["cu_seqlens_q"].tolist(), given["cu_seqlens_kv"].tolist()
            lengths = np.diff(sums).tolist()
            assert given["is_cusal"]
            assert given["alibi_slopes"] is None
            k = given["key_cache"]
            pages = [given["block_tables"][n, : -(-length // k.shape[1])] for n, length in enumerate(lengths)]
            cap = given["softcap"] if given["softcap"] > 0 else None
            cache = (k, given["value_cache"])
            given["output"].copy_(paged(given["query"], cache, starts, pages, lengths, given["scale"], cap))

        @staticmethod
        def reshape_and_cache_flash(*args: Any, **kwargs: Any) -> None:
            given = given_to("PagedAttention", "reshape_and_cache_flash", *args, **kwargs)
            for side in ("key", "value"):
                given[f"{side}_cache"].flatten(0, 1)[given["slot_mapping"]] = given[side]

    def rms_norm(*args: Any, **kwargs: Any) -> Tensor:
        x, weight, eps = given_to("", "rms_norm", *args, **kwargs).values()
        wide = x.double()
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(x.dtype)

    def silu_mul(*args: Any, **kwargs: Any) -> Tensor:
        given = given_to("", "silu_mul", *args, **kwargs)
        return (torch.nn.functional.silu(given["x"].double()) * given["y"].double()).to(given["x"].dtype)

    def gelu_mul(*args: Any, **kwargs: Any) -> Tensor:
        given = given_to("", "gelu_mul", *args, **kwargs)
        wide = torch.nn.functional.gelu(given["x"].double(), approximate=given.get("approximate", "none"))
        return (wide * given["y"].double()).to(given["x"].dtype)

    functions = {f.__name__: f for f in (rms_norm, silu_mul, gelu_mul) if f.__name__ != without}
    modules, functional = types.SimpleNamespace(PagedAttention=PagedAttention), types.SimpleNamespace(**functions)
    module(
        "intel_extension_for_pytorch", monkeypatch, llm=types.SimpleNamespace(modules=modules, functional=functional)
    )
    distribution("intel-extension-for-pytorch", version, monkeypatch)
    return calls


def module(name: str, monkeypatch: pytest.MonkeyPatch, **contents: Any) -> None:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


def distribution(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def found(wanted: str) -> str:
        return version if wanted == name else real(wanted)

    monkeypatch.setattr(importlib.metadata, "version", found)
