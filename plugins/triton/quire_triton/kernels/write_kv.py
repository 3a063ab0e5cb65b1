"""Storing new keys and values in their pages. The reference is ``quire.reference.paged.write_kv``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens"])
def write_kv_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, tokens, stride_slot, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, blocks of channels): row t of k, v [tokens, WIDTH] goes to row slots[t] of keys, values.
    LATENT: there are keys alone."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (c < WIDTH)[None, :]
    source = t.to(tl.int64)[:, None] * WIDTH + c[None, :]
    slot = tl.load(slots_ptr + t, mask=t < tokens, other=0)
    target = slot[:, None] * stride_slot + c[None, :]
    k = tl.load(k_ptr + source, mask=mask)
    tl.store(keys_ptr + target, k.to(keys_ptr.dtype.element_ty), mask=mask)
    if not LATENT:
        v = tl.load(v_ptr + source, mask=mask)
        tl.store(values_ptr + target, v.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _eight_bits(x, FP8: tl.constexpr):
    """(codes int8, scales float32 [rows]) of x float32 [rows, channels]: ``quire.reference.paged.to_eight_bits``."""
    size = tl.abs(x)
    # A maximum ignores NaN, so that NaN is first made an infinity.
    largest = tl.max(tl.where(size == size, size, float("inf")), 1)
    finite = largest < float("inf")
    largest = tl.maximum(tl.where(finite, largest, 1.0), 1e-30)
    if FP8:
        # The power of two that brings the largest into (224, 448]: its exponent less 8, one more when its mantissa is
        # above that of 448, 0x600000.
        exponent = ((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        y = tl.where(finite[:, None], x * inverse[:, None], 0.0)
        size = tl.abs(y)
        # To nearest, ties to even. From 2**-6 on by dropping 20 bits of the mantissa and 120 of the exponent's bias;
        # below, in multiples of 2**-9, by an addition after which these are the last place.
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0.015625, small, normal)
        code = tl.where((y < 0) & (code > 0), code | 0x80, code)
    else:
        scale = largest / 127
        y = tl.where(finite[:, None], x * (127 / largest)[:, None], 0.0)
        code = ((y + 12582912.0) - 12582912.0).to(tl.int32)  # to nearest, ties to even
    return code.to(tl.int8), tl.where(finite, scale, float("nan"))


@triton.jit(do_not_specialize=["vectors"])
def write_kv_eight_bits_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, slots_ptr, vectors, stride_slot,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    FP8: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of vectors): vector r is head r % HKV of token r // HKV. keys, values int8 (FP8: bits of e4m3)
    [slots, HKV, D]; scales float32 [pages, HKV, PAGE]."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    inside = r < vectors
    mask = inside[:, None] & (d < D)[None, :]
    source = r.to(tl.int64)[:, None] * D + d[None, :]
    head = r % HKV
    slot = tl.load(slots_ptr + r // HKV, mask=inside, other=0)
    target = (slot * stride_slot + head * D)[:, None] + d[None, :]
    at = (slot // PAGE * HKV + head) * PAGE + slot % PAGE
    codes, scales = _eight_bits(tl.load(k_ptr + source, mask=mask, other=0.0).to(tl.float32), FP8)
    tl.store(keys_ptr + target, codes, mask=mask)
    tl.store(key_scales_ptr + at, scales, mask=inside)
    if not LATENT:
        codes, scales = _eight_bits(tl.load(v_ptr + source, mask=mask, other=0.0).to(tl.float32), FP8)
        tl.store(values_ptr + target, codes, mask=mask)
        tl.store(value_scales_ptr + at, scales, mask=inside)


def write_kv(pool: Tensor, scales: Tensor | None, k: Tensor, v: Tensor | None, slots: Tensor) -> None:
    """k, v [T, Hkv, D] into one layer's pool [sides, pages, page_size, Hkv, D] at slots int64 [T]; v None: keys alone.

    A pool in 8 bits has scales float32 [sides, pages, Hkv, page_size]; another casts to its dtype.
    """
    if not len(k):
        return
    heads, dim = k.shape[1:]
    k = k.contiguous()
    v = k if v is None else v.contiguous()
    latent = len(pool) == 1
    if scales is not None:
        codes = pool.view(torch.int8)  # so that no architecture need know the type
        block = triton.next_power_of_2(dim)
        rows = max(1, 1024 // block)
        write_kv_eight_bits_kernel[(triton.cdiv(len(k) * heads, rows),)](
            k, v, codes[0], codes[-1], scales[0], scales[-1], slots, len(k) * heads, pool.stride(2), HKV=heads, D=dim,
            PAGE=pool.shape[2], BLOCK_R=rows, BLOCK_D=block, FP8=pool.dtype != torch.int8, LATENT=latent, num_warps=4,
        )  # fmt: skip
        return
    width = heads * dim
    block = min(1024, triton.next_power_of_2(width))
    tokens = max(1, 1024 // block)
    grid = (triton.cdiv(len(k), tokens), triton.cdiv(width, block))
    write_kv_kernel[grid](
        k, v, pool[0], pool[-1], slots, len(k), pool.stride(2), WIDTH=width, BLOCK_T=tokens, BLOCK=block, LATENT=latent,
        num_warps=4,
    )  # fmt: skip
