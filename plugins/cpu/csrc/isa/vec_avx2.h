// 8 floats in an AVX2 register, with FMA.
#pragma once

#include <immintrin.h>

namespace quire::QUIRE_ISA {

constexpr int W = 8;
constexpr int REGISTERS = 16;

struct VF { __m256 v; };
struct VRaw { __m256i v; };  // W 32-bit units, for example pairs of bf16

QUIRE_INLINE VF zero() { return {_mm256_setzero_ps()}; }
QUIRE_INLINE VF set1(float x) { return {_mm256_set1_ps(x)}; }
QUIRE_INLINE VF load(const float* p) { return {_mm256_loadu_ps(p)}; }
QUIRE_INLINE void store(float* p, VF a) { _mm256_storeu_ps(p, a.v); }
QUIRE_INLINE VRaw load_raw(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
QUIRE_INLINE void store_raw(void* p, VRaw a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }

QUIRE_INLINE VF operator+(VF a, VF b) { return {_mm256_add_ps(a.v, b.v)}; }
QUIRE_INLINE VF operator-(VF a, VF b) { return {_mm256_sub_ps(a.v, b.v)}; }
QUIRE_INLINE VF operator*(VF a, VF b) { return {_mm256_mul_ps(a.v, b.v)}; }
QUIRE_INLINE VF operator/(VF a, VF b) { return {_mm256_div_ps(a.v, b.v)}; }
QUIRE_INLINE VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// acc + a * b, and x for all lanes, where they are written: GCC 12 moves the broadcasts of a whole tile to its front, and
// then has too few registers for the sums.
QUIRE_INLINE VF add_product(VF acc, VF a, VF b) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(acc.v) : "x"(a.v), "x"(b.v));
    return acc;
}
QUIRE_INLINE VF broadcast(const char* x) {
    VF all;
    asm volatile("vbroadcastss %1, %0" : "=x"(all.v) : "m"(*reinterpret_cast<const float(*)>(x)));
    return all;
}
QUIRE_INLINE VF max(VF a, VF b) { return {_mm256_max_ps(a.v, b.v)}; }
QUIRE_INLINE VF min(VF a, VF b) { return {_mm256_min_ps(a.v, b.v)}; }
QUIRE_INLINE VF abs(VF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
QUIRE_INLINE VF sqrt(VF a) { return {_mm256_sqrt_ps(a.v)}; }
QUIRE_INLINE VF round(VF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
QUIRE_INLINE VF select_lt(VF a, VF b, VF x, VF y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
QUIRE_INLINE VF copysign(VF magnitude, VF sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_and_ps(bit, sign.v), _mm256_andnot_ps(bit, magnitude.v))};
}
QUIRE_INLINE VF keep(VF x, int first, int last, VF y) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
    return {_mm256_blendv_ps(y.v, x.v, _mm256_castsi256_ps(_mm256_andnot_si256(before, below)))};
}
QUIRE_INLINE VF scale_by_power(VF a, VF n) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}

QUIRE_INLINE float reduce_add(VF a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
QUIRE_INLINE float reduce_max(VF a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

QUIRE_INLINE VF pair_low(VRaw a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))}; }
alignas(32) static const uint32_t high_halves[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                    0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
QUIRE_INLINE VF pair_high(VRaw a) {
    VF high;  // by an operand in memory: the sums of a tile need every register
    asm("vandps %1, %2, %0" : "=x"(high.v) : "m"(high_halves), "x"(a.v));
    return high;
}

QUIRE_INLINE VF half_low(VRaw a) {
    const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(packed))};
}
QUIRE_INLINE VF half_high(VRaw a) { return half_low({_mm256_srli_epi32(a.v, 16)}); }
template <int I>
QUIRE_INLINE VF signed_byte(VRaw a) {
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a.v, 24 - 8 * I), 24))};
}
QUIRE_INLINE void store(half* p, VF a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

QUIRE_INLINE VF load(const uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
QUIRE_INLINE void store(uint16_t* p, VF a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

QUIRE_INLINE VRaw set1_raw(int32_t x) { return {_mm256_set1_epi32(x)}; }
QUIRE_INLINE VRaw low_nibbles(VRaw a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
QUIRE_INLINE VRaw high_nibbles(VRaw a) { return low_nibbles({_mm256_srli_epi16(a.v, 4)}); }
QUIRE_INLINE VRaw multiply_raw(VRaw a, VRaw b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
// Hides from the compiler that two registers start with the same value: it would share them, then copy in every round.
QUIRE_INLINE void own_register(VRaw& a) { asm("" : "+x"(a.v)); }
QUIRE_INLINE VF to_float(VRaw a) { return {_mm256_cvtepi32_ps(a.v)}; }
QUIRE_INLINE void store_s8(int8_t* p, VF a) {
    const __m256i i = _mm256_cvtps_epi32(a.v);
    const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(h, h));
}
constexpr int x_integer_bytes = 1;
#define QUIRE_BYTES_IN_16_BITS 1  // integer products are quant_bytes.h's

}  // namespace quire::QUIRE_ISA
