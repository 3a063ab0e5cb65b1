"""Native paged attention against float64, and its bits against itself: chunks, company and splits change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.conformance.world import stored
from quire.hardware import AttentionBatch
from quire.reference import paged as reference
from quire.spec import AttentionSpec, KVGroupSpec, KVSpec
from quire_cpu import native
from quire_cpu import native_attention as attention

FUZZ = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16), (torch.float32, torch.int8),
]  # q, KV  # fmt: skip
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}


class Sequences:
    """Sequences with random q, k, v for all positions, and a pool of poisoned pages in random order for them."""

    def __init__(self, lengths, spec: AttentionSpec, dtype, kv_dtype, page_size=16):
        self.spec, self.lengths, self.page_size, self.dtype = spec, lengths, page_size, dtype
        widths = [-(-length // page_size) for length in lengths]
        group = KVGroupSpec((3, 5), spec.kv_heads, spec.head_dim, NAMES[kv_dtype], page_size, spec.window)
        self.kv = attention.allocate_kv(KVSpec((group,)), [1 + sum(widths)])
        self.kv.pool(0).fill_(0xFF)  # NaN in either dtype, page 0 included
        order = torch.randperm(sum(widths)).add(1).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
        for n, pages in enumerate(order.split(widths)):
            self.tables[n, : widths[n]] = pages
        make = lambda heads: [torch.randn(n, heads, spec.head_dim).to(dtype) for n in lengths]  # noqa: E731
        self.q, self.k, self.v = make(spec.heads), make(spec.kv_heads), make(spec.kv_heads)
        self.written = [0] * len(lengths)

    def batch(self, parts):
        """parts: (sequence, begin, end) of the new tokens of each row; a sequence -1 is a padding row of that many."""
        counts = [end - begin for _, begin, end in parts]
        starts = np.cumsum([0, *counts]).astype(np.int32)
        lengths = np.array([end if n >= 0 else 0 for n, _, end in parts], dtype=np.int32)
        tables = torch.stack([self.tables[n] if n >= 0 else torch.zeros_like(self.tables[0]) for n, _, _ in parts])
        slots = []
        for n, begin, end in parts:
            position = torch.arange(begin, end)
            pages = self.tables[n, position // self.page_size] if n >= 0 else torch.zeros(end - begin)
            slots.append(pages.long() * self.page_size + (position % self.page_size if n >= 0 else 0))
        return AttentionBatch(
            torch.from_numpy(starts), torch.from_numpy(lengths), (tables,), (torch.cat(slots),),
            torch.zeros(int(starts[-1]), dtype=torch.int64), starts, lengths, max(counts), int(lengths.max()),
        )  # fmt: skip

    def run(self, parts, sinks=None, layer=5):
        """One step: writes the new keys and values of the parts, and returns attention's output for each."""
        batch = self.batch(parts)
        rows = lambda xs: torch.cat([xs[n][begin:end] if n >= 0 else xs[0][:0].new_zeros(end - begin, *xs[0].shape[1:])  # noqa: E731
                                     for n, begin, end in parts])  # fmt: skip
        attention.write_kv(self.kv, layer, rows(self.k), rows(self.v), batch)
        y = attention.attention(rows(self.q), self.kv, layer, attention.Plan(batch), self.spec, sinks)
        return list(y.split([end - begin for _, begin, end in parts]))

    def expected(self, n, begin, end, sinks=None):
        """float64, of keys and values as the pool stores them."""
        k, v = (stored(x[n][:end], self.kv.spec.groups[0].dtype).double() for x in (self.k, self.v))
        return reference._attend(self.q[n][begin:end].double(), k, v, self.spec, sinks)


NAMES_TO_DTYPE = {name: dtype for dtype, name in NAMES.items()}


def tolerance(dtype):
    """bfloat16 in, weights rounded to 8 bits and the result too; else float32 sums."""
    narrow = dtype == torch.bfloat16
    return {"rtol": 1e-2, "atol": 8e-3} if narrow else {"rtol": 1e-5, "atol": 5e-6}


def check(sequences, parts, sinks=None):
    for y, (n, begin, end) in zip(sequences.run(parts, sinks), parts, strict=True):
        if n < 0:
            assert not y.any()
        else:
            want = sequences.expected(n, begin, end, sinks)
            torch.testing.assert_close(y.double(), want, **tolerance(sequences.dtype))


@pytest.fixture(params=TYPES, ids=["f32", "bf16", "f32-bf16", "bf16-f16", "f32-s8"])
def types(request):
    return request.param


def spec_of(heads=6, kv_heads=2, head_dim=64, **more):
    return AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, **more)


@FUZZ
@given(data=st.data())
def test_float64(isa, types, data):
    kv_heads = data.draw(st.integers(1, 3), "kv_heads")
    spec = spec_of(
        kv_heads * data.draw(st.sampled_from([1, 2, 7, 15]), "group"),
        kv_heads,
        data.draw(st.sampled_from([32, 40, 64, 72, 80, 128, 256]), "head_dim"),
        window=data.draw(st.sampled_from([None, 1, 5, 16, 100, 300]), "window"),
        soft_cap=data.draw(st.sampled_from([None, 5.0]), "soft_cap"),
    )
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 15, 16, 17, 33, 255, 256, 257, 300]), min_size=1, max_size=3))
    s = Sequences(lengths, spec, *types, data.draw(st.sampled_from([16, 32, 128]), "page_size"))
    sinks = torch.randn(spec.heads).to(types[0]) if data.draw(st.booleans(), "sinks") else None
    cuts = [data.draw(st.integers(0, length - 1)) for length in lengths]
    first = [(n, 0, cut) for n, cut in enumerate(cuts)]
    if any(cuts):
        check(s, first, sinks)
    check(s, [(-1, 0, 2), *((n, cut, lengths[n]) for n, cut in enumerate(cuts))], sinks)


@pytest.mark.parametrize("window", [None, 300])
def test_bits_do_not_depend_on_chunks_company_or_threads(isa, types, window):
    spec = spec_of(14, 2, 64, window=window)
    s = Sequences([700, 31, 290], spec, *types)
    whole = s.run([(0, 0, 700)])[0]
    for threads in (1, 2):
        native.set_threads(threads, pin=False, spin_us=0)
        again = Sequences.__new__(Sequences)
        again.__dict__.update(s.__dict__)
        again.kv = attention.allocate_kv(s.kv.spec, s.kv.pages)
        again.kv.pool(0).fill_(0xFF)
        at, others = 0, [0, 0]
        rng = np.random.default_rng(threads)
        while at < 700:
            to = min(700, at + int(rng.choice([1, 13, 64, 200, 257])))
            parts = [(0, at, to)]
            for n in (1, 2):
                more = min(s.lengths[n], others[n - 1] + int(rng.integers(0, 40)))
                parts.insert(int(rng.integers(0, 2)), (n, others[n - 1], more))
                others[n - 1] = more
            y = again.run(parts)[[n for n, _, _ in parts].index(0)]
            assert torch.equal(y, whole[at:to]), (threads, at, to)
            at = to


def test_one_long_sequence_is_split_over_threads_and_has_the_same_bits(isa, dtype):
    spec = spec_of(7, 1, 32)
    s = Sequences([3000, 20], spec, dtype, torch.bfloat16)
    native.set_threads(1)
    s.run([(0, 0, 2999)])
    alone = s.run([(0, 2999, 3000)])[0]
    torch.testing.assert_close(alone.double(), s.expected(0, 2999, 3000), **tolerance(dtype))
    for threads in (2, 5):
        native.set_threads(threads, pin=False, spin_us=0)
        assert torch.equal(s.run([(0, 2999, 3000)])[0], alone)
        assert torch.equal(s.run([(1, 0, 20), (0, 2999, 3000)])[1], alone)


def test_passed_pages_are_not_read(isa, types):
    """With a window, table entries of passed pages point to page 0, which is poisoned."""
    spec = spec_of(4, 2, 64, window=20)
    s = Sequences([400], spec, *types)
    s.run([(0, 0, 390)])
    before = s.run([(0, 390, 400)])[0]
    s.tables[0, : (390 - 20 + 1) // 16] = 0
    assert torch.equal(s.run([(0, 390, 400)])[0], before)
    torch.testing.assert_close(before.double(), s.expected(0, 390, 400), **tolerance(types[0]))


def test_layers_have_pages_of_their_own_and_copies_are_equal():
    s = Sequences([40], spec_of(), torch.float32, torch.float32)
    a = s.run([(0, 0, 40)], layer=3)[0]
    keys = s.k[0]
    s.k[0] = keys + 1
    b = s.run([(0, 0, 40)], layer=5)[0]
    assert not torch.equal(a, b)
    s.k[0] = keys
    host = attention.allocate_kv(s.kv.spec, [8])
    pages = s.tables[0].tolist()
    attention.copy_pages(s.kv, host, 0, [(page, 5 - i) for i, page in enumerate(pages)])
    s.kv, s.tables = host, torch.tensor([[5, 4, 3]], dtype=torch.int32)
    assert torch.equal(s.run([(0, 39, 40)], layer=3)[0], a[39:])


def test_infinite_scores_do_not_reach_other_rows():
    s = Sequences([300], spec_of(), torch.float32, torch.float32)
    clean = s.run([(0, 0, 300)])[0]
    s.q[0][123] = float("nan")
    y = s.run([(0, 0, 300)])[0]
    assert y[123].isnan().all()
    keep = torch.arange(300) != 123
    assert torch.equal(y[keep], clean[keep])


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="page_size is 8"):
        attention.allocate_kv(KVSpec((KVGroupSpec((0,), 1, 64, "float32", 8),)), [2])
    with pytest.raises(ValueError, match="the KV dtype is float8"):
        attention.allocate_kv(KVSpec((KVGroupSpec((0,), 1, 64, "float8"),)), [2])
    s = Sequences([20], spec_of(), torch.float32, torch.float32)
    batch = s.batch([(0, 0, 5)])
    batch.context_lens_host[0] = 3
    with pytest.raises(ValueError, match="sequence 0 has 5 new tokens, but a context of 3"):
        attention.Plan(batch)


@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_what_is_not_finite_is_not_hidden(isa, kv_dtype):
    s = Sequences([300], spec_of(), torch.float32, getattr(torch, kv_dtype))
    s.k[0][250, 1, 3] = float("nan")
    s.v[0][299, 0, 3] = float("inf")
    y = s.run([(0, 0, 299)])[0]
    assert y[:250].isfinite().all()
    assert y[250:, 3:].isnan().all(), "of the key's head"
    assert y[:, :3].isfinite().all()
    assert not s.run([(0, 299, 300)])[0][0, :3].isfinite().all(dim=1).any(), "of the value's head"


def test_float16_pages_keep_every_float16(isa):
    """Through the cache and back: one key each, so that the result is its value. Denormals and the largest included."""
    bits = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.float16)
    values = bits[bits.isfinite()].view(-1, 64)
    s = Sequences([len(values)], spec_of(1, 1, window=1), torch.float32, torch.float16)
    s.v[0] = values.float().view(-1, 1, 64)
    assert torch.equal(s.run([(0, 0, len(values))])[0], s.v[0])
    s.v[0] = (s.v[0] * (1 + 2.0**-11 + 2.0**-20)).clamp(-65504, 65504)  # rounded to nearest
    assert torch.equal(s.run([(0, 0, len(values))])[0].half(), s.v[0].half())


def test_bfloat16_pages_keep_every_bfloat16(isa):
    """As above: also what a processor's own rounding to bfloat16 takes for zero."""
    bits = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    values = bits[bits.isfinite()].view(-1, 64)
    s = Sequences([len(values)], spec_of(1, 1, window=1), torch.float32, torch.bfloat16)
    for exact in (values.float(), values.float() * (1 + 2.0**-8 + 2.0**-20)):
        s.v[0] = exact.clamp(-3e38, 3e38).view(-1, 1, 64)
        assert torch.equal(s.run([(0, 0, len(values))])[0], s.v[0].bfloat16().float())


def test_page_bytes():
    group = lambda dtype: KVGroupSpec((0, 1), 3, 64, dtype, 32)  # noqa: E731
    numbers = 2 * 2 * 3 * 64 * 32
    sizes = {dtype: attention.page_bytes(group(dtype)) for dtype in attention.KV_DTYPES}
    assert sizes == {
        "float32": 4 * numbers, "bfloat16": 2 * numbers, "float16": 2 * numbers, "int8": numbers + numbers // 64 * 4,
    }  # fmt: skip
