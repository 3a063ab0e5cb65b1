"""Packed integers to numbers of the product's type, in registers.

A conversion of each integer would cost more than the product of a decode step. Here an integer is put into the mantissa
of a number whose exponent makes it 128 + q (bfloat16) or 1024 + q (float16), two at a time, and the rest is taken off:
Kim et al. 2022 (https://arxiv.org/abs/2211.10017). PTX only; elsewhere the compiler's conversions do.
"""

from __future__ import annotations

import triton
import triton.language as tl


def halves(high: bool, take_off: bool, bfloat16: bool) -> str:
    """PTX: four bytes of $2 to four 16-bit numbers $0, $1 of their low or high half bytes, less 8 if ``take_off``."""
    magic = 0x4300 if bfloat16 else 0x6400  # 128 and 1024: a mantissa's last bit is worth 1
    off = magic + 8 * take_off
    shift = "shr.b32 a, a, 4; shr.b32 b, b, 4;" if high else ""
    spread = f"prmt.b32 a, $2, 0, 0x4140; prmt.b32 b, $2, 0, 0x4342; {shift}"
    enter = "".join(f"lop3.b32 {r}, {r}, 0x000f000f, {magic << 16 | magic:#x}, 0xea;" for r in "ab")
    if bfloat16:  # a sum of bfloat16 is sm_90's, a product and sum sm_80's
        off |= 0x8000
        leave = "mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, a, one, off; fma.rn.bf16x2 $1, b, one, off;"
    else:
        leave = "sub.f16x2 $0, a, off; sub.f16x2 $1, b, off;"
    return f"{{ .reg .b32 a, b, one, off; {spread} {enter} mov.b32 off, {off << 16 | off:#x}; {leave} }}"


LOW_BF16, HIGH_BF16 = tl.constexpr(halves(False, True, True)), tl.constexpr(halves(True, True, True))
LOW_FP16, HIGH_FP16 = tl.constexpr(halves(False, True, False)), tl.constexpr(halves(True, True, False))
RAW_LOW_BF16, RAW_HIGH_BF16 = tl.constexpr(halves(False, False, True)), tl.constexpr(halves(True, False, True))
RAW_LOW_FP16, RAW_HIGH_FP16 = tl.constexpr(halves(False, False, False)), tl.constexpr(halves(True, False, False))


@triton.jit
def integers(
    q, KIND: tl.constexpr, HIGH: tl.constexpr, RAW: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """int8: q as it is; int4: the low or high halves of bytes q, less 8 unless RAW. Exact, in the type DOT."""
    if KIND == "int8":
        w = q.to(DOT)
    elif PTX and tl.bfloat16 == DOT:
        low: tl.constexpr = RAW_LOW_BF16 if RAW else LOW_BF16
        high: tl.constexpr = RAW_HIGH_BF16 if RAW else HIGH_BF16
        w = tl.inline_asm_elementwise(high if HIGH else low, "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif PTX and tl.float16 == DOT:
        low_half: tl.constexpr = RAW_LOW_FP16 if RAW else LOW_FP16
        high_half: tl.constexpr = RAW_HIGH_FP16 if RAW else HIGH_FP16
        w = tl.inline_asm_elementwise(
            high_half if HIGH else low_half, "=r,=r,r", [q], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        half = (q >> 4 if HIGH else q & 15).to(tl.int32)
        wide = (half if RAW else half - 8).to(tl.float32)
        if tl.bfloat16 == DOT:  # the upper half of a small integer in float32 is all of it: no rounding needed
            w = (wide.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            w = wide.to(DOT)
    return w
