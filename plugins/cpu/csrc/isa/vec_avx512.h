// 16 floats in an AVX-512 register (F, BW, DQ, VL; BF16 where compiled for it).
#pragma once

#include <immintrin.h>

namespace quire::QUIRE_ISA {

constexpr int W = 16;
constexpr int REGISTERS = 32;

struct VF { __m512 v; };
struct VRaw { __m512i v; };  // W 32-bit units, for example pairs of bf16

QUIRE_INLINE VF zero() { return {_mm512_setzero_ps()}; }
QUIRE_INLINE VF set1(float x) { return {_mm512_set1_ps(x)}; }
QUIRE_INLINE VF load(const float* p) { return {_mm512_loadu_ps(p)}; }
QUIRE_INLINE void store(float* p, VF a) { _mm512_storeu_ps(p, a.v); }
QUIRE_INLINE VRaw load_raw(const void* p) { return {_mm512_loadu_si512(p)}; }
QUIRE_INLINE void store_raw(void* p, VRaw a) { _mm512_storeu_si512(p, a.v); }

QUIRE_INLINE VF operator+(VF a, VF b) { return {_mm512_add_ps(a.v, b.v)}; }
QUIRE_INLINE VF operator-(VF a, VF b) { return {_mm512_sub_ps(a.v, b.v)}; }
QUIRE_INLINE VF operator*(VF a, VF b) { return {_mm512_mul_ps(a.v, b.v)}; }
QUIRE_INLINE VF operator/(VF a, VF b) { return {_mm512_div_ps(a.v, b.v)}; }
QUIRE_INLINE VF fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QUIRE_INLINE VF add_product(VF acc, VF a, VF b) { return fma(a, b, acc); }
QUIRE_INLINE VF broadcast(const char* x) {
    float value;
    memcpy(&value, x, 4);
    return set1(value);
}
// As the x86 instructions: when an operand is NaN the result is b.
QUIRE_INLINE VF max(VF a, VF b) { return {_mm512_max_ps(a.v, b.v)}; }
QUIRE_INLINE VF min(VF a, VF b) { return {_mm512_min_ps(a.v, b.v)}; }
QUIRE_INLINE VF abs(VF a) { return {_mm512_abs_ps(a.v)}; }
QUIRE_INLINE VF sqrt(VF a) { return {_mm512_sqrt_ps(a.v)}; }
QUIRE_INLINE VF round(VF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a < b ? x : y (y when either is NaN).
QUIRE_INLINE VF select_lt(VF a, VF b, VF x, VF y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
QUIRE_INLINE VF copysign(VF magnitude, VF sign) {
    const __m512i bit = _mm512_set1_epi32(int(0x80000000u));
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v),
                                                          _mm512_castps_si512(magnitude.v), 0xca))};
}
// Lanes first <= i < last of x, the others of y.
QUIRE_INLINE VF keep(VF x, int first, int last, VF y) {
    const uint32_t up = last >= W ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1;
    const uint32_t low = first >= W ? 0xffffu : first <= 0 ? 0u : (1u << first) - 1;
    return {_mm512_mask_blend_ps(__mmask16(up & ~low), y.v, x.v)};
}
// a * 2^n for integral n in [-126, 127].
QUIRE_INLINE VF scale_by_power(VF a, VF n) { return {_mm512_scalef_ps(a.v, n.v)}; }

QUIRE_INLINE float reduce_add(VF a) { return _mm512_reduce_add_ps(a.v); }
QUIRE_INLINE float reduce_max(VF a) { return _mm512_reduce_max_ps(a.v); }

// Of 32-bit units that hold two bf16: the one at the lower address, the one at the higher.
QUIRE_INLINE VF pair_low(VRaw a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
QUIRE_INLINE VF pair_high(VRaw a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(int(0xffff0000u))))};
}

// The same of two float16, and byte I of the unit, signed.
QUIRE_INLINE VF half_low(VRaw a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }
QUIRE_INLINE VF half_high(VRaw a) { return half_low({_mm512_srli_epi32(a.v, 16)}); }
template <int I>
QUIRE_INLINE VF signed_byte(VRaw a) {
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a.v, 24 - 8 * I), 24))};
}
QUIRE_INLINE void store(half* p, VF a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

QUIRE_INLINE VF load(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
QUIRE_INLINE __m256i round_to_bf16(VF a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i r = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, up, quiet), 16);
    return _mm512_cvtepi32_epi16(r);
}
QUIRE_INLINE void store(uint16_t* p, VF a) {
#if defined(__AVX512BF16__)
    // The instruction does the same, but takes denormals for zero: what is stored is to be the same everywhere.
    __m256i r = (__m256i)_mm512_cvtneps_pbh(a.v);
    if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, 0x20) != 0, 0)) r = round_to_bf16(a);
#else
    const __m256i r = round_to_bf16(a);
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r);
}

#if defined(__AVX512BF16__)
#define QUIRE_HAS_BF16_DOT 1
// acc + low(w) * low(x) + high(w) * high(x) in each lane; denormals count as zero, each sum is rounded.
QUIRE_INLINE VF dot_bf16(VF acc, VRaw w, const void* x) {
    int pair;
    memcpy(&pair, x, 4);
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(pair))};
}
// For an operand of dot_bf16: as store, but denormals become zero here.
QUIRE_INLINE void store_operand(uint16_t* p, VF a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
// 2^x for x <= 0 within 1.1e-4 of it, for what is rounded to 8 bits next, and exact for integers. The polynomial is a
// least-maximum fit on [0, 1) with both ends fixed.
QUIRE_INLINE VF coarse_power_of_two(VF x) {
    const VF r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
    VF p = fma(r, set1(0.07826797f), set1(0.22630768f));
    p = fma(p, r, set1(0.69542432f));
    return {_mm512_scalef_ps(fma(p, r, set1(1.0f)).v, x.v)};
}
#endif

// Integers: W of 32 bits.
QUIRE_INLINE VRaw set1_raw(int32_t x) { return {_mm512_set1_epi32(x)}; }
QUIRE_INLINE VRaw low_nibbles(VRaw a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
QUIRE_INLINE VRaw high_nibbles(VRaw a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
QUIRE_INLINE VRaw multiply_raw(VRaw a, VRaw b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
// Hides from the compiler that two registers start with the same value: it would share them, then copy in every round.
QUIRE_INLINE void own_register(VRaw& a) { asm("" : "+v"(a.v)); }
QUIRE_INLINE VF to_float(VRaw a) { return {_mm512_cvtepi32_ps(a.v)}; }
// W floats of magnitude at most 127 to the nearest integers; NaN to anything.
QUIRE_INLINE void store_s8(int8_t* p, VF a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
// acc + the sum of 4 products of unsigned bytes of w with the signed ones at x.
#if defined(__AVX512VNNI__)
constexpr int x_integer_bytes = 1;
QUIRE_INLINE VRaw dot_bytes(VRaw acc, VRaw w, const char* x) {
    int32_t four;
    memcpy(&four, x, 4);
    // Not by the intrinsic: GCC 12 copies its accumulator around, and then has too few registers for a tile's sums.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(four)));
    return acc;
}
#else
// x widened to 16 bits, in the order 0, 2, 1, 3: the even bytes of w meet the first pair, the odd ones the second.
constexpr int x_integer_bytes = 2;
QUIRE_INLINE VRaw dot_bytes(VRaw acc, VRaw w, const char* x) {
    int32_t even, odd;
    memcpy(&even, x, 4);
    memcpy(&odd, x + 4, 4);
    const __m512i mask = _mm512_set1_epi32(0x00ff00ff);
    const __m512i a = _mm512_madd_epi16(_mm512_and_si512(w.v, mask), _mm512_set1_epi32(even));
    const __m512i b = _mm512_madd_epi16(_mm512_and_si512(_mm512_srli_epi32(w.v, 8), mask), _mm512_set1_epi32(odd));
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(a, b))};
}
#endif

}  // namespace quire::QUIRE_ISA
