"""Caches in 8 bits and latent attention in Triton: the bytes that are stored, cuts along the keys, fuzzed shapes.

Run by test_interpreted_cases.py in a process where Triton interprets.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quire.conformance.world import Float64, Paper, Row, Shape, Stage, close, compare
from quire.reference import paged
from quire.spec import KVGroupSpec, KVSpec
from quire_triton import attention, configs
from quire_triton.kernels.write_kv import write_kv
from tests.triton.interpreted_cases import opened, short_parts  # noqa: F401

FUZZ = dict(deadline=None, derandomize=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "dim", "latent"), [(2, 64, False), (3, 80, False), (1, 576, True)])
def test_the_bytes_are_those_of_the_definition(dtype, heads, dim, latent):
    """Magnitudes over the whole range, halves between two codes, signed zeros, and what is not finite."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(40, heads, dim, generator=generator) * torch.logspace(-33, 33, 40)[:, None, None]
    x[3] = 0.0
    x[4, 0, :8] = torch.tensor([448.0, 1.0625, 1.1875, -1e-3, -0.0, 2.0**-10, 3 * 2.0**-10, -(2.0**-10)])
    x[4, 0, 8:] = 0.0
    x[5, 0, 1], x[6, -1, 2] = torch.nan, -torch.inf
    pages, size = 6, 16
    group = KVGroupSpec((0,), heads, dim, str(dtype).removeprefix("torch."), size, latent=latent)
    kv = paged.allocate_kv(KVSpec((group,)), [pages], "cpu")
    kv.pools[0].view(torch.int8).fill_(99)
    slots = torch.randperm(pages * size, generator=generator)[:40]
    v = None if latent else -x
    write_kv(kv.pools[0][0], kv.scales[0][0], x, v, slots)
    codes, scales = kv.pools[0][0].view(torch.int8), kv.scales[0][0]
    untouched = torch.ones(pages * size, dtype=torch.bool)
    untouched[slots] = False
    assert (codes.flatten(1, 2)[:, untouched] == 99).all(), "a slot of another was written"
    for side, numbers in enumerate((x,) if latent else (x, -x)):
        expected, expected_scales = paged.to_eight_bits(numbers, dtype)
        given_scales = scales[side].transpose(1, 2).flatten(0, 1)[slots]
        torch.testing.assert_close(given_scales, expected_scales, rtol=2e-7, atol=0, equal_nan=True)
        given_codes = codes[side].flatten(0, 1)[slots]
        # int8 divides by a scale, which two divisions may round apart; fp8 has nothing to round.
        apart = (given_codes.int() - expected.view(torch.int8).int()).abs()
        assert apart.max() <= (1 if dtype == torch.int8 else 0)
        assert (apart > 0).float().mean() < 1e-3


def test_every_code_of_fp8_is_read(monkeypatch):
    """One key each, so that the result is its value: through the cache and back, all codes at all scales."""
    backend = opened()
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()]
    numbers = torch.cat((numbers, torch.zeros(2))).view(4, 1, 64)
    numbers[:, :, -1] = 448.0
    paper = Paper([Row(4, 4)], Shape(kv_heads=1, heads=1, head_dim=64, window=1, kv_dtype="float8_e4m3fn"))
    for scale in (2.0**-60, 1.0, 2.0**40):
        paper.values = (numbers * scale)[None]
        assert torch.equal(Stage(backend, paper).attend(), numbers * scale)


KINDS = st.sampled_from(["float32", "int8", "float8_e4m3fn"])
ROWS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(0, 40)).map(lambda pair: Row(pair[0], min(pair))), min_size=1, max_size=5
)


@given(
    rows=ROWS, kv_dtype=KINDS, page_size=st.sampled_from([8, 16, 64, 256]), heads=st.sampled_from([(1, 1), (2, 3), (1, 8)]),
    head_dim=st.sampled_from([32, 64, 80, 128]), window=st.one_of(st.none(), st.integers(1, 50)), sinks=st.booleans(),
    cap=st.sampled_from([None, 3.0]), invariant=st.booleans(),
)  # fmt: skip
@hypothesis_settings(max_examples=10, **FUZZ)
def test_fuzzed_attention(rows, kv_dtype, page_size, heads, head_dim, window, sinks, cap, invariant):
    shape = Shape(
        kv_heads=heads[0], heads=heads[0] * heads[1], head_dim=head_dim, page_size=page_size, window=window,
        soft_cap=cap, sinks=sinks, kv_dtype=kv_dtype,
    )  # fmt: skip
    compare(opened(invariant), rows, shape)


@given(rows=ROWS, kv_dtype=KINDS, page_size=st.sampled_from([16, 64]), heads=st.sampled_from([1, 3, 16, 40]),
       window=st.sampled_from([None, 21]), sinks=st.booleans(), invariant=st.booleans())  # fmt: skip
@hypothesis_settings(max_examples=3, **FUZZ)
def test_fuzzed_latent_attention(rows, kv_dtype, page_size, heads, window, sinks, invariant):
    shape = Shape(
        kv_heads=1, heads=heads, head_dim=576, value_dim=512, page_size=page_size, window=window, sinks=sinks,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    compare(opened(invariant), rows, shape)


LATENT = Shape(kv_heads=1, heads=24, head_dim=576, value_dim=512)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_latent_decode_and_verification_cut_along_the_keys(short_parts, batch_invariant):  # noqa: F811
    rows = [Row(130, 1), Row(97, 3), Row(33, 1), Row(0, 1), Row(40, 0), Row(64, 2)]
    paper = Paper(rows, LATENT)
    out, truth = Stage(opened(batch_invariant), paper).attend(), Stage(Float64(), paper, "float64").attend()
    close(out, truth, "float32", what="latent attention")
    assert short_parts, "nothing was cut"


def test_latent_bits_alone_and_in_company(short_parts):  # noqa: F811
    backend, shape = opened(batch_invariant=True), Shape(**{**vars(LATENT), "kv_dtype": "float8_e4m3fn", "heads": 8})
    rows = [Row(33, 1, who=1), Row(70, 1, who=2), Row(50, 3, who=7), Row(20, 20, who=8)]
    together = Stage(backend, Paper(rows, shape)).attend()
    begin = 0
    for row in rows:
        alone = Stage(backend, Paper([row], shape)).attend()
        assert torch.equal(together[begin : begin + row.new], alone), f"{row} has other bits alone"
        begin += row.new


def test_latent_bits_of_a_prompt_in_chunks_that_are_cut(short_parts):  # noqa: F811
    shape = Shape(**{**vars(LATENT), "heads": 4, "sinks": True})
    backend = opened(batch_invariant=True)
    whole = Stage(backend, Paper([Row(70, 70, who=3)], shape)).attend()
    for new in (1, 30):
        assert torch.equal(whole[-new:], Stage(backend, Paper([Row(70, new, who=3)], shape)).attend())
    assert short_parts


def test_latent_attention_is_computed_by_the_kernel(monkeypatch):
    """And a latent size without one by the reference."""
    launched = []
    real = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a, **k: launched.append(1) or real(*a, **k))
    compare(opened(), [Row(5, 5)], LATENT)
    assert len(launched) == 1
    compare(opened(), [Row(5, 5)], Shape(kv_heads=1, heads=4, head_dim=40, value_dim=24))
    assert len(launched) == 1


def test_latent_configurations_hold_what_the_kernel_assumes():
    for arch in configs.SHARED_MEMORY:
        for itemsize in (2, 4):
            for group in (1, 16, 24, 128):
                decode, prefill = (configs.latent(arch, itemsize, kind, group) for kind in (True, False))
                assert configs.INVARIANT_SPLIT % decode.keys == 0
                assert decode.rows >= 16
                assert prefill.rows & (prefill.rows - 1) == 0
