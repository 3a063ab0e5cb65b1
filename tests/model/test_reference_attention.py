"""The reference attention against PyTorch's own, on shuffled pages among pages of NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.hardware import AttentionBatch
from quire.reference import paged
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec

PAGE = 8


def ragged(counts, contexts, page_size=PAGE, padding=0, seed=0):
    """A batch of sequences with ``counts`` new tokens of ``contexts`` in all, on shuffled pages, and padding rows."""
    rng = np.random.default_rng(seed)
    needed = [-(-c // page_size) for c in contexts]
    free = list(rng.permutation(np.arange(1, sum(needed) + 5)))
    table = np.zeros((len(contexts) + padding, max(needed) + 1), np.int32)
    slots, positions = [], []
    for n, (count, context) in enumerate(zip(counts, contexts, strict=True)):
        table[n, : needed[n]] = [free.pop() for _ in range(needed[n])]
        where = np.arange(context - count, context)
        positions.extend(where)
        slots.extend(table[n, where // page_size].astype(np.int64) * page_size + where % page_size)
    starts = np.concatenate(([0], np.cumsum(list(counts) + [0] * padding))).astype(np.int32)
    lengths = np.array(list(contexts) + [0] * padding, np.int32)
    batch = AttentionBatch(
        query_start=torch.from_numpy(starts),
        context_lens=torch.from_numpy(lengths),
        block_tables=(torch.from_numpy(table),),
        slots=(torch.tensor(slots, dtype=torch.int64),),
        positions=torch.tensor(positions, dtype=torch.int64),
        query_start_host=starts,
        context_lens_host=lengths,
        max_query_len=max(counts),
        max_context_len=max(contexts),
    )
    return batch, sum(needed) + 5


def expected(q, k, v, spec, sinks):
    """One sequence through PyTorch: k, v [context, Hkv, D], q the last of them."""
    t, context = len(q), len(k)
    i, j = torch.arange(context - t, context)[:, None], torch.arange(context)[None]
    mask = (j <= i) & (j > i - (spec.window or context + 1))
    k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, 1).transpose(0, 1) for x in (k, v))
    q = q.transpose(0, 1)
    if spec.soft_cap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=spec.scale).transpose(0, 1)
    scores = q @ k.transpose(1, 2) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    exps = scores.exp() * mask
    total = exps.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return (exps / total @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "soft_cap", "sinks"),
    [(4, 4, None, None, False), (6, 2, 5, None, False), (4, 1, 19, 3.0, False), (4, 2, None, None, True)],
)
def test_ragged_attention_equals_pytorch(dtype, heads, kv_heads, window, soft_cap, sinks):
    torch.manual_seed(1)
    spec = AttentionSpec(heads, kv_heads, 16, 0.3, "window" if window else "full", window, soft_cap, sinks)
    counts, contexts = [1, 9, 0, 7, 16, 1, 3, 300], [1, 9, 4, 15, 16, 17, 40, 310]
    batch, pages = ragged(counts, contexts, padding=2)
    group = KVGroupSpec((3, 5), kv_heads, 16, str(dtype).split(".")[1], PAGE, window)
    kv = paged.allocate_kv(KVSpec((group,)), [pages], "cpu")
    kv.pools[0].fill_(torch.nan)
    past, _ = ragged(contexts, contexts)  # the same pages, everything in them
    whole = [(torch.randn(c, kv_heads, 16, dtype=dtype), torch.randn(c, kv_heads, 16, dtype=dtype)) for c in contexts]
    paged.write_kv(kv, 5, torch.cat([k for k, _ in whole]), torch.cat([v for _, v in whole]), past)
    if window:  # pages that every window has passed point to page 0, which holds NaN
        for n, (count, context) in enumerate(zip(counts, contexts, strict=True)):
            batch.block_tables[0][n, : max(0, context - count - window + 1) // PAGE] = 0
    q = torch.randn(sum(counts), heads, 16, dtype=dtype)
    logits = torch.randn(heads, dtype=dtype) if sinks else None
    plan = paged.plan_attention(batch, kv.spec)
    out = paged.attention(q, kv, 5, plan, spec, logits)
    assert out.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for n, (k, v) in enumerate(whole):
        rows = slice(batch.query_start_host[n], batch.query_start_host[n + 1])
        torch.testing.assert_close(out[rows], expected(q[rows], k, v, spec, logits), rtol=0, atol=tolerance)


@pytest.mark.parametrize("value_dim", [16, 10])
def test_latent_attention_is_attention_over_leading_channels(value_dim):
    torch.manual_seed(2)
    spec = AttentionSpec(6, 1, 16, 0.3, value_dim=value_dim)
    counts, contexts = [1, 9, 7, 16, 1, 3], [1, 9, 15, 16, 17, 40]
    batch, pages = ragged(counts, contexts, padding=1)
    kv = paged.allocate_kv(KVSpec((KVGroupSpec((0,), 1, 16, "float64", PAGE, latent=True),)), [pages], "cpu")
    kv.pools[0].fill_(torch.nan)
    whole = [torch.randn(c, 1, 16, dtype=torch.float64) for c in contexts]
    paged.write_kv(kv, 0, torch.cat(whole), None, ragged(contexts, contexts)[0])
    q = torch.randn(sum(counts), 6, 16, dtype=torch.float64)
    out = paged.attention(q, kv, 0, paged.plan_attention(batch, kv.spec), spec)
    for n, k in enumerate(whole):
        rows = slice(batch.query_start_host[n], batch.query_start_host[n + 1])
        true = expected(q[rows], k, k[..., :value_dim], spec, None)
        torch.testing.assert_close(out[rows], true, rtol=0, atol=1e-12)


NUMBERS = st.floats(min_value=-(2.0**127), max_value=2.0**127, width=32)


@given(st.lists(st.lists(NUMBERS, min_size=8, max_size=8), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_eight_bits_against_the_best_of_all_codes(rows):
    """No code of the format is nearer to a number than the one it got, and storing again what was read changes nothing."""
    x = torch.tensor(rows, dtype=torch.float32)
    largest = x.abs().amax(1)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        codes, scales = paged.to_eight_bits(x, dtype)
        every = (
            torch.arange(-127, 128, dtype=torch.int8)
            if dtype == torch.int8
            else torch.arange(256).to(torch.uint8).view(dtype)
        )
        every = every.double()[every.double().isfinite()]
        normal = largest > 1e-29
        if dtype == torch.int8:
            assert (codes.double().abs().amax(1)[normal] == 127).all()
        else:
            assert not (codes.view(torch.uint8) == 0x80).any()
            mantissa, _ = torch.frexp(scales)
            assert (mantissa == 0.5).all(), "a scale is no power of two"
            assert (codes.double().abs().amax(1)[normal] >= 224).all()
        exact = x.double() / scales.double()[:, None]
        error = (codes.double() - exact).abs()
        best = (every[:, None, None] - exact).abs().amin(0)
        assert (error <= best + exact.abs() * 1e-6).all()
        read = paged.from_eight_bits(codes, scales, torch.float32)
        assert torch.equal(paged.from_eight_bits(*paged.to_eight_bits(read, dtype), torch.float32), read)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_of_what_is_not_finite(dtype):
    x = torch.randn(4, 3, 16)
    x[1, 2, 5], x[3, 0, 0] = torch.nan, torch.inf
    codes, scales = paged.to_eight_bits(x, dtype)
    lost = torch.zeros(4, 3, dtype=torch.bool)
    lost[1, 2] = lost[3, 0] = True
    assert torch.equal(scales.isnan(), lost)
    assert codes.float().isfinite().all()


def test_padding_rows_get_zeros_and_reuse_updates_the_very_plan():
    spec = AttentionSpec(2, 2, 8, 1.0)
    group = KVGroupSpec((0,), 2, 8, "float32", PAGE)
    kv = paged.allocate_kv(KVSpec((group,)), [4], "cpu")
    kv.pools[0].fill_(torch.nan)
    batch, _ = ragged([1], [1])
    plan = paged.plan_attention(batch, kv.spec)
    starts, lengths = np.array([0, 1, 2], np.int32), np.array([0, 0], np.int32)
    empty = AttentionBatch(
        torch.from_numpy(starts), torch.from_numpy(lengths), (torch.zeros(2, 1, dtype=torch.int32),),
        (torch.zeros(2, dtype=torch.int64),), torch.zeros(2, dtype=torch.int64), starts, lengths, 1, 0,
    )  # fmt: skip
    assert paged.plan_attention(empty, kv.spec, plan) is plan
    assert torch.equal(paged.attention(torch.randn(2, 2, 8), kv, 0, plan, spec), torch.zeros(2, 2, 8))


def test_copy_pages_reads_before_it_writes_and_page_bytes_is_what_a_page_takes():
    group = KVGroupSpec((0, 2), 3, 8, "bfloat16", PAGE)
    device, host = (paged.allocate_kv(KVSpec((group,)), [5], "cpu") for _ in range(2))
    device.pools[0].copy_(torch.randn(device.pools[0].shape))
    before = device.pools[0].clone()
    paged.copy_pages(device, device, 0, [(1, 2), (2, 1), (4, 3)])
    assert torch.equal(device.pools[0][:, :, [1, 2, 3]], before[:, :, [2, 1, 4]])
    paged.copy_pages(device, host, 0, [(3, 1)])
    assert torch.equal(host.pools[0][:, :, 1], before[:, :, 4])
    paged.copy_pages(device, host, 0, [])
    assert paged.page_bytes(group) * 5 == before.numel() * before.itemsize


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_pages_in_eight_bits_are_copied_with_their_scales(dtype, latent):
    group = KVGroupSpec((0, 2), 3, 8, dtype, PAGE, latent=latent)
    batch, count = ragged([20], [20], seed=1)
    device, host = (paged.allocate_kv(KVSpec((group,)), [pages], "cpu") for pages in (count, 5))
    x = torch.randn(20, 3, 8)
    for kv in (device, host):
        kv.scales[0].fill_(torch.nan)
    for layer in (0, 2):
        paged.write_kv(device, layer, x, None if latent else -x, batch)
    where = batch.block_tables[0][:, :3]
    pages = where[0].tolist()
    paged.copy_pages(device, host, 0, [(page, i + 1) for i, page in enumerate(pages)])
    spec = AttentionSpec(3, 3, 8, 1.0, value_dim=8 if latent else None)
    there, _ = paged._read(host, 2, torch.tensor([1, 2, 3]), spec, torch.float32)
    assert torch.equal(there[:20], paged.from_eight_bits(*paged.to_eight_bits(x, getattr(torch, dtype)), torch.float32))
    assert paged.page_bytes(group) * count == sum(t.numel() * t.itemsize for t in (device.pools[0], device.scales[0]))
