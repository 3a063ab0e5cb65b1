// 4 floats, in the vector extension of GCC and Clang: SSE2 on any x86-64, NEON on any AArch64, scalars elsewhere.
#pragma once

namespace quire::QUIRE_ISA {

constexpr int W = 4;
constexpr int REGISTERS = 16;

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef uint32_t uint4 __attribute__((vector_size(16)));

struct VF { float4 v; };
struct VRaw { uint4 v; };  // W 32-bit units, for example pairs of bf16

QUIRE_INLINE VF zero() { return {float4{0, 0, 0, 0}}; }
QUIRE_INLINE VF set1(float x) { return {float4{x, x, x, x}}; }
QUIRE_INLINE VF load(const float* p) {
    VF r;
    memcpy(&r, p, 16);
    return r;
}
QUIRE_INLINE void store(float* p, VF a) { memcpy(p, &a, 16); }
QUIRE_INLINE VRaw load_raw(const void* p) {
    VRaw r;
    memcpy(&r, p, 16);
    return r;
}
QUIRE_INLINE void store_raw(void* p, VRaw a) { memcpy(p, &a, 16); }

QUIRE_INLINE VF select(int4 mask, VF x, VF y) {
    return {(float4)(((int4)x.v & mask) | ((int4)y.v & ~mask))};
}

QUIRE_INLINE VF operator+(VF a, VF b) { return {a.v + b.v}; }
QUIRE_INLINE VF operator-(VF a, VF b) { return {a.v - b.v}; }
QUIRE_INLINE VF operator*(VF a, VF b) { return {a.v * b.v}; }
QUIRE_INLINE VF operator/(VF a, VF b) { return {a.v / b.v}; }
QUIRE_INLINE VF fma(VF a, VF b, VF c) { return {a.v * b.v + c.v}; }  // rounded twice: there may be no such instruction
QUIRE_INLINE VF add_product(VF acc, VF a, VF b) { return fma(a, b, acc); }
QUIRE_INLINE VF broadcast(const char* x) {
    float value;
    memcpy(&value, x, 4);
    return set1(value);
}
QUIRE_INLINE VF max(VF a, VF b) { return select(a.v > b.v, a, b); }
QUIRE_INLINE VF min(VF a, VF b) { return select(a.v < b.v, a, b); }
QUIRE_INLINE VF abs(VF a) { return {(float4)((int4)a.v & 0x7fffffff)}; }
QUIRE_INLINE VF sqrt(VF a) {
    for (int i = 0; i < W; i++) a.v[i] = __builtin_sqrtf(a.v[i]);
    return a;
}
// To nearest, ties to even, by the unit in the last place of 1.5 * 2^23; right for |a| < 2^22, which is all we ask.
QUIRE_INLINE VF round(VF a) {
    const VF magic = set1(12582912.0f);
    return (a + magic) - magic;
}
QUIRE_INLINE VF select_lt(VF a, VF b, VF x, VF y) { return select(a.v < b.v, x, y); }
QUIRE_INLINE VF copysign(VF magnitude, VF sign) {
    return {(float4)(((uint4)sign.v & 0x80000000u) | ((uint4)magnitude.v & 0x7fffffffu))};
}
QUIRE_INLINE VF keep(VF x, int first, int last, VF y) {
    const int4 lane = {0, 1, 2, 3};
    return select((lane >= first) & (lane < last), x, y);
}
QUIRE_INLINE VF scale_by_power(VF a, VF n) {
    int4 e;
    for (int i = 0; i < W; i++) e[i] = n.v[i] == n.v[i] ? int32_t(n.v[i]) : 0;  // a NaN shows in a
    return {a.v * (float4)((e + 127) << 23)};
}

QUIRE_INLINE float reduce_add(VF a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
QUIRE_INLINE float reduce_max(VF a) {
    const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
    return x > y ? x : y;
}

QUIRE_INLINE VF pair_low(VRaw a) { return {(float4)(a.v << 16)}; }
QUIRE_INLINE VF pair_high(VRaw a) { return {(float4)(a.v & 0xffff0000u)}; }

QUIRE_INLINE VF half_low(VRaw a) {
    const uint4 sign = (a.v & 0x8000u) << 16, magnitude = (a.v & 0x7fffu) << 13;
    // The exponent is 112 too small, also for denormals; infinities and NaN keep the largest.
    const uint4 finite = (uint4)((float4)magnitude * set1(5.192296858534828e33f).v);
    const uint4 odd = (uint4)((a.v & 0x7c00u) == 0x7c00u);
    return {(float4)(sign | (finite & ~odd) | ((magnitude | 0x7f800000u) & odd))};
}
QUIRE_INLINE VF half_high(VRaw a) { return half_low({a.v >> 16}); }
template <int I>
QUIRE_INLINE VF signed_byte(VRaw a) {
    return {__builtin_convertvector((int4)(a.v << (24 - 8 * I)) >> 24, float4)};
}
QUIRE_INLINE uint16_t half_bits(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    const uint16_t sign = uint16_t(x >> 16 & 0x8000u);
    x &= 0x7fffffffu;
    if (x > 0x7f800000u) return sign | 0x7e00;   // NaN
    if (x >= 0x47800000u) return sign | 0x7c00;  // 65536 and more
    if (x < 0x38800000u) {                       // denormal: rounded by the unit in the last place of 0.5
        float v;
        memcpy(&v, &x, 4);
        v += 0.5f;
        memcpy(&x, &v, 4);
        return uint16_t(sign | (x - 0x3f000000u));
    }
    x += 0xc8000fffu + (x >> 13 & 1);
    return uint16_t(sign | x >> 13);
}
QUIRE_INLINE void store(half* p, VF a) {
    for (int i = 0; i < W; i++) p[i].bits = half_bits(a.v[i]);
}

QUIRE_INLINE VF load(const uint16_t* p) {
    uint4 r;
    for (int i = 0; i < W; i++) r[i] = uint32_t(p[i]) << 16;
    return {(float4)r};
}
QUIRE_INLINE void store(uint16_t* p, VF a) {
    const uint4 bits = (uint4)a.v;
    const uint4 up = bits + 0x7fffu + ((bits >> 16) & 1), quiet = bits | 0x400000u;
    const uint4 nan = (uint4)(a.v != a.v);
    const uint4 r = ((quiet & nan) | (up & ~nan)) >> 16;
    for (int i = 0; i < W; i++) p[i] = uint16_t(r[i]);
}

QUIRE_INLINE VRaw set1_raw(int32_t x) { return {uint4{uint32_t(x), uint32_t(x), uint32_t(x), uint32_t(x)}}; }
QUIRE_INLINE VRaw low_nibbles(VRaw a) { return {a.v & 0x0f0f0f0fu}; }
QUIRE_INLINE VRaw high_nibbles(VRaw a) { return {(a.v >> 4) & 0x0f0f0f0fu}; }
QUIRE_INLINE VRaw multiply_raw(VRaw a, VRaw b) { return {a.v * b.v}; }
QUIRE_INLINE void own_register(VRaw&) {}
QUIRE_INLINE VF to_float(VRaw a) { return {__builtin_convertvector((int4)a.v, float4)}; }
QUIRE_INLINE void store_s8(int8_t* p, VF a) {
    a = round(a);
    for (int i = 0; i < W; i++) p[i] = a.v[i] == a.v[i] ? int8_t(a.v[i]) : int8_t(0);
}
constexpr int x_integer_bytes = 1;
QUIRE_INLINE VRaw dot_bytes(VRaw acc, VRaw w, const char* x) {
    for (int j = 0; j < 4; j++) acc.v += ((w.v >> (8 * j)) & 255u) * uint32_t(int32_t(int8_t(x[j])));
    return acc;
}

}  // namespace quire::QUIRE_ISA
