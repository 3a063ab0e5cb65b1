"""Products with integer weights, against float64 of the very integers, and their bits against themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.reference.quantize import dequantize, quantize
from quire_cpu import native

FUZZ = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def integers(n, k, bits, group, zeros, scale_dtype=torch.float32):
    groups = -(-k // group)
    q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, groups) / (1 << bits)).to(scale_dtype)
    zero = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8) if zeros else None
    middle = (1 << (bits - 1)) if zero is None else zero.double().repeat_interleave(group, 1)[:, :k]
    return q, scales, zero, (q.double() - middle) * scales.double().repeat_interleave(group, 1)[:, :k]


def rounded(x, group):
    """x as the kernels round it: 8 bits, a scale for each row and group."""
    rows, k = x.shape
    wide = F.pad(x.float(), (0, -k % group)).view(rows, -1, group)
    top = wide.abs().amax(2, keepdim=True)
    q = (wide * torch.where(top > 0, torch.full_like(top, 127.0).div(top), 0.0)).round()
    return (q.double() * top.div(127.0).double()).view(rows, -1)[:, :k]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@FUZZ
@given(rows=st.integers(1, 20), n=st.integers(1, 100), k=st.integers(1, 300), group=st.sampled_from([32, 64, 128]))
def test_float64(isa, dtype, bits, zeros, scale_dtype, rows, n, k, group):
    q, scales, zero, w = integers(n, k, bits, group, zeros, scale_dtype)
    x, b = torch.randn(rows, k).to(dtype), torch.randn(n)
    y = native.linear(x, native.pack_integers(q, scales, zero, bits, group), b, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), F.linear(rounded(x, group), w, b.double()), rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_largest_integers_do_not_overflow(isa, bits, group):
    """Some instruction sets add neighbours in 16 bits first."""
    largest = torch.tensor([0, (1 << bits) - 1, 1 << (bits - 1), 1], dtype=torch.uint8)
    q = largest[:, None].expand(4, 2 * group).repeat(8, 1)
    scales, x = torch.ones(32, 2), torch.tensor([[127.0], [-127.0]]).expand(2, 2 * group)
    for zeros, middle in ((None, 1 << (bits - 1)), (torch.zeros(32, 2, dtype=torch.uint8), 0)):
        y = native.linear(x, native.pack_integers(q, scales, zeros, bits, group))
        assert torch.equal(y, F.linear(x, q.float() - middle))


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_do_not_depend_on_rows_threads_place_or_instruction_set(dtype, bits):
    q, scales, zero, _ = integers(192, 1500, bits, 32, True)
    packed, x = native.pack_integers(q, scales, zero, bits, 32), torch.randn(600, 1500).to(dtype)
    whole = native.linear(x, packed, out_dtype=torch.float32)
    gated = native.gated_linear(x, packed, activation="silu")
    for rows in (1, 2, 3, 5, 6, 7, 13, 64, 505):
        start = (7 * rows) % (601 - rows)
        part = x[start : start + rows]
        assert torch.equal(native.linear(part, packed, out_dtype=torch.float32), whole[start : start + rows])
        assert torch.equal(native.gated_linear(part, packed, activation="silu"), gated[start : start + rows])
    for threads in (1, 3):
        native.set_threads(threads, pin=False, spin_us=0)
        assert torch.equal(native.linear(x, packed, out_dtype=torch.float32), whole)
    for name in native.isas()[1:]:  # the portable one rounds each product
        native.set_isa(name)
        assert torch.equal(native.linear(x[:40], packed, out_dtype=torch.float32), whole[:40]), name


@pytest.mark.parametrize(("bits", "group", "worst"), [(8, 128, 0.008), (8, 32, 0.007), (4, 32, 0.12), (4, 128, 0.15)])
def test_quantized_weights_are_close(bits, group, worst):
    w, x = torch.randn(200, 640) * torch.rand(200, 1), torch.randn(30, 640)
    w[3] = 0
    w[5, 64:192] = 0
    q, scales = quantize(w, bits, group)
    back = dequantize(q, scales.double(), bits, group)
    error = (back - w).norm() / w.norm()
    assert error < worst
    assert not back[3].any()
    step = scales.repeat_interleave(group, 1).abs()
    assert ((back - w).abs() <= step * (0.51 if bits == 8 else 1.8)).all()
    y = native.linear(x, native.pack_quantized(w, bits, group))
    exact = x.double() @ w.double().T
    assert (y - exact).norm() / exact.norm() < worst + 0.01


@pytest.mark.parametrize("bits", [4, 8])
@FUZZ
@given(n=st.integers(1, 70), k=st.integers(1, 300), group=st.sampled_from([32, 64, 128]))
def test_weights_are_rounded_as_the_definition_says(dtype, bits, n, k, group):
    """By the bytes: what rounds and packs at once, against the definition's integers packed as they are."""
    w = (torch.randn(n + 1, k + 3) * torch.rand(n + 1, 1)).to(dtype)[1:, 1 : k + 1]
    w[n // 2, : k // 2] = 0
    once, twice = (
        native.pack_quantized(w, bits, group),
        native.pack_integers(*quantize(w, bits, group), None, bits, group),
    )
    assert torch.equal(*(native.as_tensor(p.buffer, torch.uint8)[: p.shape.bytes] for p in (once, twice)))


def test_a_weight_that_is_not_finite_is_not_hidden():
    w = torch.randn(3, 256)
    w[1, 130], w[2, 5] = torch.nan, -torch.inf
    y = native.linear(torch.randn(4, 256), native.pack_quantized(w, 4, 32))
    assert y[:, 1:].isnan().all()
    assert y[:, 0].isfinite().all()


def test_not_finite_inputs_spoil_their_row_alone(isa, dtype):
    q, scales, zero, _ = integers(40, 128, 4, 32, False)
    packed, x = native.pack_integers(q, scales, zero, 4, 32), torch.randn(9, 128).to(dtype)
    clean = native.linear(x, packed)
    x[2, 5], x[4, 127] = torch.nan, torch.inf
    y = native.linear(x, packed)
    assert y[[2, 4]].isnan().all()
    keep = [0, 1, 3, 5, 6, 7, 8]
    assert torch.equal(y[keep], clean[keep])


def test_errors_name_the_field():
    q, scales, _, _ = integers(4, 64, 4, 32, False)
    with pytest.raises(ValueError, match="bits and group are 3 and 32"):
        native.pack_integers(q, scales, None, 3, 32)
    with pytest.raises(ValueError, match=r"scales is torch.float32 \(4, 2\), expected torch.float32 \(4, 1\)"):
        native.pack_integers(q, scales, None, 4, 64)


@pytest.mark.parametrize(("format", "worst"), [("int8", 0.015), ("int4", 0.15)])
def test_the_backend_rounds_weights_while_packing(format, worst):
    from quire.hardware import UnsupportedOnDevice
    from quire_cpu.native_backend import NativeCpuBackend

    backend, w, x = NativeCpuBackend(), torch.randn(64, 256), torch.randn(9, 256).bfloat16()
    y = backend.linear(x, backend.pack_weight({"weight": w.bfloat16()}, format))
    exact = x.double() @ w.double().T
    assert (y - exact).norm() / exact.norm() < worst
    with pytest.raises(UnsupportedOnDevice, match="'int3' is unknown.*dense, int8, int4"):
        backend.pack_weight({"weight": w}, "int3")
