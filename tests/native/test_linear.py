"""The native linear against float64, and its bits against itself: other rows, threads and places change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire_cpu import native

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
FUZZ = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def operands(rows: int, n: int, k: int, dtype: torch.dtype):
    return torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)


def tolerance(k: int) -> float:
    """Of one chain of k float32 additions of terms of the order of 1 / sqrt(k)."""
    return 4e-7 * (k**0.5 + 4)


@FUZZ
@given(rows=st.integers(1, 70), n=st.integers(1, 100), k=st.integers(1, 200))
def test_float64(isa, dtype, rows, n, k):
    x, w, b = operands(rows, n, k, dtype)
    y = native.linear(x, native.pack_linear(w), b, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), F.linear(x.double(), w.double(), b.double()), rtol=1e-6, atol=tolerance(k))


def test_long_rows_and_several_blocks(isa, dtype):
    """More rows than are packed at once, and a reduction longer than a panel."""
    x, w, b = operands(600, 70, 1500, dtype)
    y = native.linear(x, native.pack_linear(w), b, out_dtype=torch.float32)
    torch.testing.assert_close(
        y.double(), F.linear(x.double(), w.double(), b.double()), rtol=1e-6, atol=tolerance(1500)
    )


@pytest.mark.parametrize("k", [96, 100, 1200])
def test_bits_do_not_depend_on_rows_threads_or_place(isa, dtype, k):
    x, w, b = operands(70, 130, k, dtype)
    packed = native.pack_linear(w)
    alone = torch.cat([native.linear(row[None], packed, b) for row in x])
    for rows in range(1, 71):
        start = (7 * rows) % (71 - rows)
        assert torch.equal(native.linear(x[start : start + rows], packed, b), alone[start : start + rows]), rows
    for threads in (1, 3):
        native.set_threads(threads, pin=False, spin_us=0)
        assert torch.equal(native.linear(x, packed, b), alone)


def test_output_is_the_float32_sum_rounded_once(isa):
    x, w, b = operands(20, 50, 64, torch.bfloat16)
    packed = native.pack_linear(w)
    exact = native.linear(x, packed, b, out_dtype=torch.float32)
    assert torch.equal(native.linear(x, packed, b), exact.bfloat16())


def test_residual(isa, dtype):
    x, w, b = operands(20, 50, 64, dtype)
    residual = torch.randn(20, 50).to(dtype)
    y = native.linear(x, native.pack_linear(w), b, residual=residual, out_dtype=torch.float32)
    expected = F.linear(x.double(), w.double(), b.double()) + residual.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=tolerance(64))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", [19, 32, 96])
def test_gated(isa, dtype, activation, half):
    x, w, b = operands(33, 2 * half, 1100, dtype)
    packed = native.pack_linear(w)
    gate, up = F.linear(x.double(), w.double(), b.double()).chunk(2, dim=-1)
    y = native.gated_linear(x, packed, b, activation=activation, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), ACTIVATIONS[activation](gate) * up, rtol=1e-5, atol=4 * tolerance(1100))
    alone = [native.gated_linear(row[None], packed, b, activation=activation, out_dtype=torch.float32) for row in x]
    assert torch.equal(torch.cat(alone), y)


def test_activations_over_their_whole_range(isa):
    """One weight of 1 and one of 0 with bias 1: the output is act(x) alone."""
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.logspace(-6, 0, 500), -torch.logspace(-6, 0, 500)])[:, None]
    packed = native.pack_linear(torch.tensor([[1.0], [0.0]]))
    for name, reference in ACTIVATIONS.items():
        y = native.gated_linear(x, packed, torch.tensor([0.0, 1.0]), activation=name)
        torch.testing.assert_close(y.double(), reference(x.double()), rtol=2e-6, atol=4e-7)


def test_rows_with_gaps_and_float32_rows_against_a_bfloat16_weight(isa):
    x, w, _ = operands(20, 40, 64, torch.bfloat16)
    packed = native.pack_linear(w)
    wide = torch.full((20, 200), float("nan"), dtype=torch.bfloat16)
    wide[:, 50:114] = x
    assert torch.equal(native.linear(wide[:, 50:114], packed), native.linear(x, packed))
    assert torch.equal(native.linear(x.float(), packed, out_dtype=torch.bfloat16), native.linear(x, packed))


def test_infinities_and_nan_stay_in_their_row(isa, dtype):
    x, w, _ = operands(18, 40, 64, dtype)
    clean = native.linear(x, native.pack_linear(w))
    x[5, 3], x[9, 1] = float("nan"), float("inf")
    y = native.linear(x, native.pack_linear(w))
    assert y[5].isnan().all()
    assert not y[9].isfinite().any()
    keep = [row for row in range(18) if row not in (5, 9)]
    assert torch.equal(y[keep], clean[keep])


def test_no_rows():
    assert native.linear(torch.empty(0, 8), native.pack_linear(torch.randn(4, 8))).shape == (0, 4)


def test_errors_name_the_field():
    packed = native.pack_linear(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"x has shape \(2, 9\), expected \(2, 8\)"):
        native.linear(torch.randn(2, 9), packed)
    with pytest.raises(ValueError, match="bias has shape"):
        native.linear(torch.randn(2, 8), packed, torch.randn(3))
    with pytest.raises(ValueError, match="activation 'relu' is unknown"):
        native.gated_linear(torch.randn(2, 8), packed, activation="relu")
    with pytest.raises(ValueError, match="weight has 5 rows, but gate and up"):
        native.gated_linear(torch.randn(2, 8), native.pack_linear(torch.randn(5, 8)), activation="silu")
    with pytest.raises(ValueError, match=r"dtype torch\.float16"):
        native.pack_linear(torch.randn(4, 8).half())
    with pytest.raises(ValueError, match="cannot be used here"):
        native.set_isa("mmx")
    with pytest.raises(ValueError, match="threads must be between 1 and 256, got 0"):
        native.set_threads(0)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_both_ways_of_fetching_weights_are_tried_and_change_no_bit(bits):
    """Which way is kept is the machine's business; here: that one is, for each number of rows, and that nobody sees it."""

    def pack(n: int, k: int):
        raw = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).bfloat16()
        return native.pack_linear(raw) if bits == 16 else native.pack_quantized(raw, bits, 128 if bits == 8 else 32)

    weight, small = pack(4096, 2048), pack(64, 64)
    try:
        native.set_isa(native.isa())  # forgets
        for rows in (1, 3, 9):
            x = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(rows)).bfloat16()
            first = native.linear(x, weight)
            for _ in range(60):
                native.linear(x[:, :64], small)
            assert native._native.near_fetches(rows, bits) == -1, "a weight that caches hold says nothing of memory"
            assert all(torch.equal(native.linear(x, weight), first) for _ in range(100))
            assert native._native.near_fetches(rows, bits) in ((0, 1) if rows < 9 else (-1,))
            assert torch.equal(native.linear(x, weight), first)
        assert all(native._native.near_fetches(1, other) == -1 for other in {4, 8, 16} - {bits})
    finally:
        native.set_isa(native.isa())
